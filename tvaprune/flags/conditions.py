"""Flags that act only beside another one's value, as data: given where they would do nothing, they are refused."""

from collections.abc import Callable
from dataclasses import dataclass, fields

from tvaprune import ranks
from tvaprune.errors import InputError
from tvaprune.flags.arguments import Arguments
from tvaprune.flags.recipes import is_on
from tvaprune.flags.settings import DistillSettings
from tvaprune.flags.verbs import TARGETS, VERBS

_GATES = (
    "vib_learning_rate", "reg_learning_rate", "kl_factor", "att_mul", "inter_mul", "emb_mult",
    "lagrangian_warmup_epochs", "beta", "beta_start", "settle_share", "gate_noise", "gate_ce_weight",
    "initial_log_variance", "norm_width", *(entry.name for entry in fields(DistillSettings)),
)  # fmt: skip
# What fits the machine or the screen may stand in a command line or a recipe for all methods alike.
_ANYWHERE = ("per_device_train_batch_size", "disable_tqdm", "log_level", "report_to", "run_name")
_TRAINED = tuple(name for name in VERBS["prune"].training if name not in _ANYWHERE)
_DISTILLED = (
    "distill_temp", "gate_ce_weight", "distill_ce_loss_alpha", "distill_hidden_alpha", "teacher_cache", "teacher_top_k",
)  # fmt: skip


@dataclass(frozen=True)
class Condition:
    """What some flags need in order to do anything.

    Attributes:
        flags: Their names.
        words: What would leave them idle.
        holds: Whether they act.
        verbs: Where that is asked.
    """

    flags: tuple[str, ...]
    words: str
    holds: Callable[[Arguments], bool]
    verbs: tuple[str, ...] = ("prune", "apply", "finetune")


CONDITIONS = (
    Condition((*_GATES, *_TRAINED, "shard"), "without --prune_method vib, as the others score units in one shot",
              lambda args: args.prune.prune_method == "vib", ("prune",)),
    Condition(("shard",), "in one process: start several by torchrun or accelerate launch",
              lambda args: ranks.launched() > 1),
    Condition(("shard",), "beside --full_ft True, which trains the layers that it would freeze",
              lambda args: not args.finetune.full_ft, ("finetune",)),
    Condition(("device_map", "stream"), "in several processes: start one, without torchrun or accelerate launch",
              lambda args: ranks.launched() == 1),
    Condition(("speed_batches",), "beside --shard True or --device_map auto, which time the way between the GPUs",
              lambda args: not args.is_spread),
    Condition(("memory",), "beside --shard True or --device_map auto, as what each GPU holds is not counted",
              lambda args: not args.is_spread),
    Condition(("prompt_tokens",), "beside --shard True or --stream True, where no whole model is in memory: tvaprune "
              "report --prompts asks those that are saved",
              lambda args: not (args.source.shard or args.prune.stream)),
    Condition(("prompt_tokens",), "without --do_eval True", lambda args: args.training.do_eval, ("apply",)),
    Condition(("teacher_cache",), "beside --shard True, which keeps the teacher's layers apart already",
              lambda args: not args.source.shard),
    Condition(("do_zero_eval",), "beside --shard True: score the merged model that it leaves, by lm_eval",
              lambda args: not args.source.shard, ("finetune",)),
    Condition(_DISTILLED, "without --distill True", lambda args: args.distill.distill),
    Condition(("teacher_top_k",), "without --teacher_cache", lambda args: args.finetune.teacher_cache is not None),
    Condition(("lora_r", "lora_alpha_ratio", "lora_dropout", "train_lm_head"), "beside --full_ft True",
              lambda args: not args.finetune.full_ft),
    Condition(("early_stopping_patience",), "beside --eval_strategy no: it counts evaluations",
              lambda args: args.training.eval_strategy != "no"),
    Condition(("refit_samples", "refit_offload"), "without --weight_update refit or reconstruct",
              lambda args: args.prune.refits),
    Condition(("refit_offload", "speed_batches", "device_map", "memory"), "beside --stream True, where no model is in "
              "memory", lambda args: not args.prune.stream),
    Condition(("stream",), "without --mask_loc or --plan, as there is nothing to cut",
              lambda args: args.prune.mask_loc is not None or args.prune.plan is not None),
    Condition(("save_pruned",), "without --mask_loc or --plan, as there is nothing to cut",
              lambda args: args.prune.mask_loc is not None or args.prune.plan is not None, ("apply",)),
    Condition(("stream",), "without --save_pruned FOLDER or --do_eval True",
              lambda args: args.prune.save_pruned is not None or args.training.do_eval),
    Condition(("do_zero_eval",), "beside --stream True, as zero-shot scores need the model in memory: score the folder "
              "of --save_pruned", lambda args: not args.prune.stream),
    Condition(("zero_eval_tasks", "num_fewshot", "zero_eval_limit", "compare_dense", "write_out"),
              "without --do_zero_eval True", lambda args: args.evaluation.do_zero_eval),
    Condition(("fp16",), "without a GPU, where --bf16 may serve",
              lambda args: args.training.device.type != "cpu"),
    Condition(("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"),
              "without --activation_checkpointing True",
              lambda args: bool(args.training.activation_checkpointing)),
    Condition(("num_train_epochs", "epoch_f"), "beside --max_steps, which says how long the training is",
              lambda args: args.training.max_steps <= 0),
    Condition(("num_train_epochs",), "beside --epoch_f, the released tool's name for it",
              lambda args: args.finetune.epoch_f is None, ("finetune",)),
    Condition(("eval_steps",), "beside --eval_strategy no", lambda args: args.training.eval_strategy != "no"),
    Condition(("save_steps", "save_total_limit"), "beside --save_strategy no",
              lambda args: args.training.save_strategy != "no"),
    Condition(("dataloader_prefetch_factor", "dataloader_persistent_workers"), "without --dataloader_num_workers",
              lambda args: args.training.dataloader_num_workers > 0),
)  # fmt: skip


def parse(verb: str, arguments: list[str]) -> Arguments:
    """Returns the flags of a verb's command line, each in its range and with something to do.

    Raises:
        InputError: If a value cannot be used, or a flag that was given would do nothing.
    """
    args = Arguments.parse(arguments, verb)
    targets = [f"--{name}" for name in TARGETS if name in args.recipe]
    if len(targets) > 1:
        raise InputError(f"{' and '.join(targets)}: each says how much goes; give one of them")
    for condition in CONDITIONS:
        given = [name for name in condition.flags if is_on(args.recipe, name)]
        if verb in condition.verbs and given and not condition.holds(args):
            names = " and ".join(f"--{name}" for name in given)
            raise InputError(f"{names} would do nothing {condition.words}; leave it out")
    return args
