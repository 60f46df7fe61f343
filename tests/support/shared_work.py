"""Work that processes share, small enough for two of them on a CPU: ``torchrun shared_work.py OUT``, or in one process.

Each function returns tensors that must not depend on how many processes there were.
"""

import copy
import sys
from contextlib import contextmanager
from pathlib import Path

import torch
from conftest import TINY, perturb
from datasets import Dataset
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM

from support.updates import reconstruct, refit
from tvaprune import ranks
from tvaprune.choose.gated_model import GatedModel
from tvaprune.choose.scores import score_masks
from tvaprune.choose.settings import gate_settings
from tvaprune.choose.trainer import GateTrainer
from tvaprune.cli import run_command
from tvaprune.cut.fold import fold
from tvaprune.cut.slice import apply_plan
from tvaprune.errors import InputError
from tvaprune.flags.arguments import FinetuneRunArguments, RunArguments
from tvaprune.flags.settings import DistillSettings, PruneSettings
from tvaprune.measure.perplexity import text_loss
from tvaprune.models.shape import shape_of
from tvaprune.models.sharding import shard
from tvaprune.plan.exact_cut import calibrate
from tvaprune.plan.keep_plan import plan_from_masks
from tvaprune.plan.widths import WidthRules
from tvaprune.recover.lora import LoraSettings, add_lora
from tvaprune.recover.teacher import LiveTeacher
from tvaprune.recover.trainer import FinetuneTrainer, LossWeights

BATCH, STEPS = 4, 10  # blocks of a step, over all processes
METHODS = ("wanda_sp", "flap", "taylor")
CPU = torch.device("cpu")
WAITED_FOR = "process 1 alone cannot go on"


def model(seed=0, kind="llama"):
    return perturb(AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **TINY)), seed).eval()


def frozen(sharded, seed=0):
    return shard(model(seed), CPU) if sharded else model(seed)


def blocks(count, seed=3, length=12):
    ids = torch.randint(0, 47, (count, length), generator=torch.Generator().manual_seed(seed))
    return Dataset.from_dict({"input_ids": ids.tolist()}).with_format("torch")


@contextmanager
def noise(drawn=None):
    """Makes the gates' noise the same for all rows of a batch; or notes, in a list, what is drawn of it."""
    real = torch.randn

    def fixed(*shape, **options):
        size = shape if isinstance(shape[0], int) else shape[0]
        return real(size[1:], generator=torch.Generator().manual_seed(size[-1])).expand(size).clone()

    def noting(*shape, **options):
        drawn.append(real(*shape, **options))
        return drawn[-1]

    torch.randn = fixed if drawn is None else noting
    try:
        yield
    finally:
        torch.randn = real


def arguments(kind, folder, **options):
    return kind(
        output_dir=str(folder), use_cpu=True, disable_tqdm=True, eval_strategy="no", save_steps=2,
        per_device_train_batch_size=BATCH // ranks.launched(), **{"save_strategy": "no"} | options,
    )  # fmt: skip


def gate_trainer(folder, sharded, steps=STEPS, **options):
    args = arguments(RunArguments, folder, max_steps=steps, per_device_eval_batch_size=1, **options)
    chosen = PruneSettings(target_sparsity=[0.3], lagrangian_warmup_epochs=0.25, settle_share=0.3)
    settings = gate_settings(chosen, DistillSettings(), steps, steps, 5.0, WidthRules(4))
    base = frozen(sharded)
    torch.manual_seed(0)
    return GateTrainer(GatedModel(base, -2.0), settings, args, blocks(64), blocks(7), {"model": "tiny"})


def gates(folder, sharded=False):
    """Ten steps, three of them settled, and the perplexity of the mask."""
    trainer = gate_trainer(folder, sharded)
    with noise():
        trainer.train()
    masks = trainer.gated.masks()
    value = trainer.score_mask()["eval_perplexity"]
    trainer.gated.detach_gates()
    tensors = [*masks.mu, *masks.log_variance, *trainer._objective.lagrangian.parameters(), torch.tensor([value])]
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def resumed(folder):
    """The gates of four steps, and of the last two of them gone on with, each process with its own noise."""
    found = []
    for checkpoint in (None, str(folder / "checkpoint-2")):
        trainer = gate_trainer(folder, False, steps=4, save_strategy="steps", overwrite_output_dir=True)
        trainer.train(resume_from_checkpoint=checkpoint)
        trainer.gated.detach_gates()
        masks = trainer.gated.masks()
        found.append(torch.cat([tensor.detach() for tensor in (*masks.mu, *masks.log_variance)]))
    return found


def first_step(folder):
    """What the gates of a training's first step were multiplied by; whether DDP keeps its gradients a second time."""
    trainer, drawn = gate_trainer(folder, False, steps=1), []
    with noise(drawn):
        trainer.train()
    trainer.gated.detach_gates()
    return drawn[0], not trainer.model_wrapped.gradient_as_bucket_view


def tuned(folder, sharded=False):
    """Three steps of LoRA towards a teacher, the validation perplexity, and what was logged of every step."""
    args = arguments(FinetuneRunArguments, folder, max_steps=3, learning_rate=1e-2, gradient_accumulation_steps=2,
                     load_best_model_at_end=False, per_device_eval_batch_size=2, logging_steps=1)  # fmt: skip
    base, teacher = frozen(sharded), LiveTeacher(frozen(sharded, seed=2), 2.0)
    torch.manual_seed(0)
    student = add_lora(base, LoraSettings(3, 4.0, 0.0, True))
    trainer = FinetuneTrainer(student, args, blocks(32), blocks(7), teacher, LossWeights(kl=0.5), {})
    trainer.train()
    value = trainer.evaluate()["eval_perplexity"]
    trained = [parameter.detach().flatten() for parameter in student.parameters() if parameter.requires_grad]
    logged = [row[name] for row in trainer.state.log_history if "ce" in row for name in ("loss", "ce", "kl")]
    return torch.cat([*trained, torch.tensor([value, *logged])])


def held():
    """The numbers of a sharded model's layers that each process holds once these have computed."""
    layers = shard(model(), CPU).get_decoder().layers
    own = [parameter.to_local() if isinstance(parameter, DTensor) else parameter for parameter in layers.parameters()]
    return ranks._gathered(sum(part.numel() for part in own))


def scores(method):
    with torch.no_grad():
        values = score_masks(model(), method, blocks(10), 0.3, batch_size=4).log_variance
    return torch.cat([*values.attn, *values.inter])


def refitted(reconstructs=False, kind="llama"):
    """The weights after a refit, perhaps a reconstruction too, and how far of the way the model went."""
    dense = model(kind=kind)
    masks = calibrate(score_masks(dense, "magnitude", blocks(4), 0.3), shape_of(dense.config), 0.3, WidthRules(4))
    plan = plan_from_masks(masks, shape_of(dense.config), WidthRules(4))
    pruned = fold(apply_plan(copy.deepcopy(dense), plan), plan)
    texts = blocks(24), blocks(10, seed=5)
    done = refit(dense, pruned, plan, *texts, batch_size=16)  # of one batch a split each process gets a part
    if reconstructs:  # a step of two processes is of their batches together
        done = reconstruct(dense, pruned, plan, *texts, batch_size=4 // ranks.count())
    weights = [parameter.detach().flatten() for parameter in pruned.parameters()]
    return torch.cat([*weights, torch.tensor([done.share, *done.divergences])])


def work(folder):
    """Everything, by name."""
    found = {"gates": gates(folder), "gates, sharded": gates(folder, sharded=ranks.launched() > 1)}
    found |= {"tuned": tuned(folder), "tuned, sharded": tuned(folder, sharded=ranks.launched() > 1)}
    found |= {method: scores(method) for method in METHODS} | {"refitted": refitted()}
    found |= {"reconstructed": refitted(reconstructs=True), "refitted gains": refitted(kind="gemma3_text")}
    loss = text_loss(model(), blocks(7), 2)
    return found | {"perplexity": torch.tensor([loss.perplexity, *loss.windows], dtype=torch.float64)}


def refusals():
    """What all processes are told where they differ, and where main cannot go on."""

    def refuse():
        raise InputError("main says no")

    told = []
    for attempt in (lambda: ranks.agree({"seed": ranks.index(), "dtype": "auto"}), lambda: ranks.on_main(refuse)):
        try:
            attempt()
        except InputError as error:
            told.append(str(error))
    return ranks._gathered(told)


def main():
    """One process fails in the end, while the other waits for it."""
    folder = Path(sys.argv[1])
    found = work(folder)
    drawn, found["gradients kept twice"] = first_step(folder)
    found["noise"] = ranks._gathered(drawn)
    found["resumed"] = resumed(folder)
    found["refusals"] = refusals()
    found["held"] = held()
    if ranks.is_main():
        torch.save(found, folder / "found.pt")
    if ranks.index() == 1:
        raise InputError(WAITED_FOR)
    ranks.total(1.0)


if __name__ == "__main__":
    sys.exit(run_command(main))
