"""Every numeric flag has a range, checked before any work; a flag that would do nothing is refused."""

import math
import re
from dataclasses import fields

import pytest
from support import tiny

from tvaprune.errors import InputError
from tvaprune.flags.arguments import (
    STAGES,
    Arguments,
    FinetuneRunArguments,
    RunArguments,
    parse_comparison,
    parse_sampling,
)
from tvaprune.flags.conditions import CONDITIONS, parse
from tvaprune.flags.ranges import CHOICES, RANGES, SHARE
from tvaprune.flags.settings import CompareSettings, SampleSettings
from tvaprune.flags.verbs import ALWAYS, VERBS, check_flags

OWN = {"compare": (CompareSettings, parse_comparison), "sample": (SampleSettings, parse_sampling)}  # and their parsers
CLASSES = (*STAGES, CompareSettings, SampleSettings, RunArguments, FinetuneRunArguments)
ACTING = {name for row in VERBS.values() for name in row.flags} | {
    entry.name for cls, _ in OWN.values() for entry in fields(cls)
}
NUMERIC = sorted(
    {entry.name for cls in CLASSES for entry in fields(cls)
     if entry.name in ACTING and re.search(r"\b(int|float)\b", str(entry.type))}
)  # fmt: skip


def verb_of(name):
    """A verb in which a flag acts, by its class of flags."""
    own = (verb for verb, (cls, _) in OWN.items() if name in {entry.name for entry in fields(cls)})
    return next(own, None) or next(verb for verb, row in VERBS.items() if name in row.flags)


def read(name, value):
    flags = [f"--{name}={value}"]
    verb = verb_of(name)
    return OWN[verb][1](flags) if verb in OWN else Arguments.parse(flags, verb)


def test_every_numeric_flag_has_a_range_and_every_range_a_flag():
    assert set(NUMERIC) - {"dtype"} == set(RANGES)
    known = {entry.name for cls in CLASSES for entry in fields(cls)}
    assert set(CHOICES) <= known and {name for row in CONDITIONS for name in row.flags} <= known


def test_every_training_argument_that_is_offered_is_one():
    known = {entry.name for entry in fields(RunArguments)}
    offered = {name for row in VERBS.values() for name in row.training} | set(ALWAYS) - {"config"}
    assert offered <= known


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("name", sorted(RANGES))
def test_no_flag_takes_a_number_that_is_none(name, value):
    with pytest.raises(InputError, match=rf"{name}( is {value}: give|.*invalid (int|float|\w+) value)"):
        read(name, value)


BAD = [
    ("lagrangian_warmup_epochs", -1), ("num_train_epochs", 0), ("num_train_epochs", -1), ("epoch_f", 0),
    ("warmup_steps", -1), ("eval_steps", 0), ("save_steps", -5), ("logging_steps", 0), ("max_steps", 0),
    ("max_steps", -2), ("per_device_train_batch_size", 0), ("per_device_eval_batch_size", -1),
    ("gradient_accumulation_steps", -1), ("seed", -1), ("seed", 2**32), ("data_seed", -1),
    ("dataloader_num_workers", -1), ("dataloader_num_workers", 100_000), ("lora_r", 0), ("kl_factor", -1e-6),
    ("att_mul", -1), ("inter_mul", -1), ("emb_mult", -30), ("block_size", 1), ("ctx_length", 0),
    ("max_train_samples", 0), ("max_eval_samples", -1), ("adam_beta1", 1), ("save_total_limit", 0),
    ("target_sparsity", 0), ("target_sparsity", 1), ("settle_share", 1), ("dim_multiple", -8), ("num_fewshot", -1),
    ("speed_batches", -1), ("sparsities", 1), ("seeds", -1), ("threads", 0), ("teacher_top_k", 0),
    ("tokens", 0), ("page", 0), ("batch_size", -1), ("temperature", 0), ("memory", 2), ("memory", 0.5),
    ("lr_scheduler_type", "reduce_lr_on_plateau"), ("lr_scheduler_type", "cosine_with_min_lr"),
    ("lr_scheduler_type", "warmup_stable_decay"), ("save_strategy", "best"), ("report_to", "tensorboard_of_nobody"),
]  # fmt: skip
GOOD = [
    ("lagrangian_warmup_epochs", 0), ("num_train_epochs", 0.01), ("warmup_steps", 0), ("eval_steps", 0.1),
    ("max_steps", 1), ("seed", 0), ("seed", 2**32 - 1), ("dataloader_num_workers", 0), ("kl_factor", 0),
    ("att_mul", 0), ("emb_mult", 0), ("block_size", 2), ("settle_share", 0), ("dim_multiple", 0), ("num_fewshot", 0),
    ("speed_batches", 0), ("lr_scheduler_type", "cosine"), ("save_strategy", "no"), ("target_sparsity", 0.999),
    ("seeds", 0), ("initial_log_variance", -1e-5), ("report_to", "none"), ("memory", 2.5),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), BAD)
def test_a_value_out_of_its_range_is_refused_in_one_line(name, value):
    with tiny.refused(f"--{name}") as error:
        read(name, value)
    assert str(value) in str(error.value)


@pytest.mark.parametrize(("name", "value"), GOOD)
def test_a_value_at_the_edge_of_its_range_is_taken(name, value):
    read(name, value)


def test_the_default_of_every_flag_is_in_its_range():
    for verb in ("prune", "apply", "finetune"):
        Arguments.parse([], verb)
    parse_comparison([])
    parse_sampling([])
    assert SHARE.holds(0) and not SHARE.holds(1) and not SHARE.holds(math.nan)


@pytest.mark.parametrize(
    "name",
    ["push_to_hub", "neftune_noise_alpha", "label_smoothing_factor", "dataloader_drop_last", "lr_scheduler_kwargs",
     "metric_for_best_model", "greater_is_better", "save_only_model", "deepspeed", "hub_token", "torch_compile"],
)  # fmt: skip
@pytest.mark.parametrize("verb", ["prune", "apply", "finetune"])
def test_a_training_argument_that_does_not_act_is_offered_nowhere(name, verb):
    with pytest.raises(InputError, match=f"--{name} is no flag of {verb}"):
        check_flags(verb, [f"--{name}", "1"])


@pytest.mark.parametrize(
    "name", ["learning_rate", "weight_decay", "optim", "adam_beta1", "load_best_model_at_end", "lora_r", "mask_loc"]
)
def test_gate_training_refuses_what_it_does_not_use(name):
    with pytest.raises(InputError, match=f"--{name} acts in "):
        check_flags("prune", [f"--{name}=1"])
    check_flags("finetune", [f"--{name}=1"])  # control


IDLE = [
    ("prune", "--prune_method magnitude", "--vib_learning_rate 0.1", "without --prune_method vib"),
    ("prune", "--prune_method flap", "--resume_from_checkpoint True", "without --prune_method vib"),
    ("prune", "--prune_method flap", "--num_train_epochs 2", "without --prune_method vib"),
    ("prune", "--prune_method random", "--distill False", None),
    ("prune", "--max_steps 4", "--num_train_epochs 2", "beside --max_steps"),
    ("finetune", "--max_steps 4", "--epoch_f 2", "beside --max_steps"),
    ("finetune", "--epoch_f 2", "--num_train_epochs 2", "beside --epoch_f"),
    ("prune", "--eval_strategy no", "--eval_steps 2", "beside --eval_strategy no"),
    ("finetune", "--save_strategy no --load_best_model_at_end False", "--save_steps 2", "beside --save_strategy no"),
    ("prune", "--distill False", "--distill_temp 2", "without --distill True"),
    ("prune", "--distill False", "--gate_ce_weight 0.5", "without --distill True"),
    ("finetune", "--distill False", "--teacher_cache c", "without --distill True"),
    ("finetune", "--distill False", "--distill_ce_loss_alpha 1", "without --distill True"),
    ("finetune", "", "--teacher_top_k 4", "without --teacher_cache"),
    ("finetune", "--full_ft True", "--lora_r 4", "beside --full_ft True"),
    ("finetune", "--eval_strategy no --load_best_model_at_end False", "--early_stopping_patience 2", "it counts"),
    ("apply", "--weight_update fold", "--refit_offload True", "without --weight_update refit"),
    ("finetune", "--weight_update none", "--refit_samples 8", "without --weight_update refit"),
    ("prune", "--weight_update reconstruct", "--refit_samples 8", None),
    ("apply", "--weight_update fold", "--refit_offload no", None),
    ("apply", "", "--zero_eval_limit 3", "without --do_zero_eval True"),
    ("apply", "", "--write_out True", "without --do_zero_eval True"),
    ("prune", "--use_cpu", "--fp16 True", "without a GPU"),
    ("apply", "--device_map auto", "--memory 24", "beside --shard True or --device_map auto"),
    ("apply", f"--do_eval True --stream True --mask_loc {__file__}", "--memory 24", "beside --stream True"),
    ("prune", "", "--dataloader_persistent_workers True", "without --dataloader_num_workers"),
]  # fmt: skip


@pytest.mark.parametrize(("verb", "beside", "idle", "words"), IDLE)
def test_a_flag_that_would_do_nothing_is_refused(verb, beside, idle, words):
    parse(verb, beside.split())  # control: it is the flag
    if words is None:
        parse(verb, [*beside.split(), *idle.split()])
        return
    with tiny.refused(f"{idle.split()[0]} would do nothing .*{words}.*; leave it out"):
        parse(verb, [*beside.split(), *idle.split()])


@pytest.mark.parametrize("flags", ["--vib_learning_rate 0.1", "--distill_temp 2", "--per_device_train_batch_size 4"])
def test_a_flag_that_acts_is_taken(flags):
    parse("prune", flags.split())


def test_targets_that_differ_in_the_last_digit_have_folders_of_their_own():
    args = Arguments.parse(["--target_sparsity", "0.3000001", "0.3000002", "0.2", "--output_dir", "o"], "prune")
    folders = {one.save_loc.name for one in args.each_target().values()}
    assert folders == {"sparsity_0.3000001", "sparsity_0.3000002", "sparsity_0.2"}


@pytest.mark.parametrize("other", ["--dim_multiple 8", "--uniform True", "--mask_loc m.pkl", "--tensor_parallel 2"])
def test_a_plan_stands_alone(other, tmp_path):
    (tmp_path / "plan.json").touch()  # parsing looks no further than its name
    (tmp_path / "m.pkl").touch()
    plan = ["--plan", str(tmp_path / "plan.json")]
    with pytest.raises(InputError, match=f"--plan .*says already what is kept; leave out {other.split()[0]}"):
        parse("apply", [*plan, *other.replace("m.pkl", str(tmp_path / "m.pkl")).split()])
    assert parse("apply", plan).prune.plan == plan[1]  # control
    with pytest.raises(InputError, match="--plan nowhere.json: there is no such file"):
        parse("finetune", ["--plan", "nowhere.json"])
