"""What a run will take, of its flags and the config alone: told before it begins, refused where it cannot fit."""

import copy
import io
import math
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass, field, replace
from typing import Any

import psutil
import torch

from tvaprune.budget import Sizes, both_fit, fit_cut, fit_gates, fit_tuning
from tvaprune.choose.choose import DEFAULT_TRAIN_SAMPLES
from tvaprune.errors import InputError
from tvaprune.flags.arguments import Arguments
from tvaprune.measure.cost import GIB, Phase, Work, narrower, phases
from tvaprune.models.load import load_config, precision
from tvaprune.models.parameters import dense_parameters
from tvaprune.models.shape import ModelShape, shape_of
from tvaprune.plan.keep_plan import KeepPlan
from tvaprune.plan.masks import Masks
from tvaprune.run import CHOICE_SAMPLES, plan_of, window_of
from tvaprune.text.protocols import C4_WINDOWS

TFLOPS = 150.0  # TFLOP/s: about half of what an A100 does in bfloat16


@dataclass(frozen=True)
class Estimate:
    """What a run will take.

    Attributes:
        phases: Of the run, in order; on a CPU the host's memory is the device's.
        on_card: Whether the device is a card.
        fits: Of cards by name, where they were asked for: whether the run fits, and with what.
    """

    verb: str
    work: Work
    phases: tuple[Phase, ...]
    on_card: bool
    fits: Mapping[str, str] = field(default_factory=dict)

    @property
    def largest(self) -> Phase:
        """The phase that needs the most of the device."""
        return max(self.phases, key=lambda phase: phase.device)

    @property
    def host(self) -> float:
        """Bytes of the host's memory at the peak, beside the device's."""
        return max(phase.host for phase in self.phases)

    @property
    def flops(self) -> float:
        """Floating-point operations of the whole run."""
        return sum(phase.flops for phase in self.phases)

    def minutes(self, tflops: float = TFLOPS) -> float:
        """Returns the minutes that these operations take at a speed in TFLOP/s."""
        return self.flops / tflops / 1e12 / 60

    def line(self) -> str:
        """Returns the line that a run begins with."""
        where = "on the GPU" if self.on_card else "of memory"
        line = f"estimate: {in_gib(self.largest.device)} {where} ({self.largest.name})"
        if self.on_card:
            line += f", {in_gib(self.host)} of the host's memory"
        line += f", {self.flops / 1e15:.2g} PFLOP"
        return line + (f" ({self.minutes():.0f} min at {TFLOPS:g} TFLOP/s)" if self.on_card else "")


def in_gib(size: float) -> str:
    """Returns bytes in words."""
    return f"{size / GIB:.1f} GiB" if size >= 0.1 * GIB else f"{size / 2**20:.0f} MiB"


def estimate_of(
    args: Arguments,
    units: Masks | KeepPlan | None = None,
    on_card: bool | None = None,
    memory: float | None = None,
) -> Estimate:
    """Returns what the run of these flags will take, with what ``--memory`` sets.

    Args:
        units: Of ``--mask_loc`` or ``--plan``; None: every layer loses the same share, ``--target_sparsity``.
        on_card: Whether it runs on a GPU; None: as the flags and the machine say.
        memory: In place of ``--memory``, in GiB.
    """
    verb, config = str(args.recipe["verb"]), load_config(args.source.model_name_or_path)
    on_card = args.training.device.type == "cuda" if on_card is None else on_card
    shape = shape_of(config)
    plan = None if units is None else plan_of(args, units)
    pruned = narrower(shape, min(args.prune.target_sparsity)) if plan is None else _shape_after(plan)
    device = torch.device("cuda" if on_card else "cpu")
    trains = verb == "finetune" or (verb == "prune" and args.prune.prune_method == "vib")
    sizes = Sizes(shape, dense_parameters(pruned), precision(args.source.dtype, device, config.dtype, trains).itemsize)
    args = _fitted(args, verb, sizes, memory)
    work = replace(_work(args, verb, config, sizes, pruned), redraws=on_card)
    found = phases(verb, work)
    if not on_card:
        found = [replace(phase, device=phase.device + phase.host, host=0) for phase in found]
    return Estimate(verb, work, tuple(found), on_card)


def _fitted(args: Arguments, verb: str, sizes: Sizes, memory: float | None) -> Arguments:
    """Returns a copy of the flags as the run will set them to fit ``--memory``; what it says then, it says itself."""
    args = copy.copy(args)
    args.source, args.prune, args.training = copy.copy(args.source), copy.copy(args.prune), copy.copy(args.training)
    args.source.memory = args.source.memory if memory is None else memory
    with redirect_stdout(io.StringIO()):
        if verb == "finetune":
            rank = None if args.finetune.full_ft else args.finetune.lora_r
            fit_tuning(args, sizes, rank, rank is not None and _trains_head(args, sizes.shape))
        elif verb == "prune" and args.prune.prune_method == "vib":
            fit_gates(args, sizes)
        else:
            fit_cut(args, sizes)
    return args


def _trains_head(args: Arguments, shape: ModelShape) -> bool:
    asked = args.finetune.train_lm_head
    return not shape.tie_word_embeddings if asked is None else asked


def _work(args: Arguments, verb: str, config: Any, sizes: Sizes, pruned: ModelShape) -> Work:
    training, evaluation, finetune = args.training, args.evaluation, args.finetune
    passes, scorings = _passes(args)
    return Work(
        dense=sizes.shape,
        pruned=pruned,
        weight_bytes=sizes.itemsize,
        sliding_window=getattr(config, "sliding_window", None),
        block=args.data.block_size,
        batch=training.per_device_train_batch_size,
        steps=passes,
        checkpointing=bool(training.activation_checkpointing or training.gradient_checkpointing),
        distill=args.distill.distill and not (verb == "finetune" and finetune.teacher_cache),
        window=window_of(args, config),
        windows=args.data.max_eval_samples or C4_WINDOWS,
        eval_batch=training.per_device_eval_batch_size,
        scorings=scorings,
        choice_blocks=CHOICE_SAMPLES,
        refits=args.prune.weight_update == "refit",
        refit_blocks=args.prune.refit_samples,
        refit_offload=args.prune.refit_offload,
        keep_dense=evaluation.compare_dense or (evaluation.speed_batches > 0 and both_fit(args, sizes)),
        lora_r=0 if finetune.full_ft else finetune.lora_r,
        train_lm_head=_trains_head(args, sizes.shape),
    )


def _shape_after(plan: KeepPlan) -> ModelShape:
    """Returns the sizes of what a plan leaves."""
    return replace(
        plan.shape,
        hidden_size=plan.hidden_size,
        num_key_value_heads=plan.num_key_value_heads,
        intermediate_size=plan.intermediate_size,
    )


def _passes(args: Arguments) -> tuple[int, int]:
    """Returns the passes through a model that a training of these flags makes, and its evaluations."""
    training = args.training
    blocks = args.data.max_train_samples or DEFAULT_TRAIN_SAMPLES
    epochs = args.finetune.epoch_f or training.num_train_epochs
    accumulated = max(1, training.gradient_accumulation_steps)
    steps = math.ceil(epochs * math.ceil(blocks / (training.per_device_train_batch_size * accumulated)))
    steps = training.max_steps if training.max_steps > 0 else steps
    every = training.eval_steps or steps
    each = every if every >= 1 else max(1, math.ceil(every * steps))
    return steps * accumulated, 0 if training.eval_strategy == "no" else int(steps // each)


def announce(args: Arguments, units: Masks | KeepPlan | None = None) -> None:
    """Prints a run's line before it begins.

    Raises:
        InputError: If it cannot fit the GPU's free memory, or on a CPU the machine's whole.
    """
    found = estimate_of(args, units)
    print(found.line())
    if found.on_card:
        there, name = torch.cuda.mem_get_info(args.training.device)[0], "are free on the GPU"
    else:
        there, name = psutil.virtual_memory().total, "are this machine's memory"
    if found.largest.device > there:
        raise InputError(
            f"the {found.largest.name} needs {in_gib(found.largest.device)}, and {in_gib(there)} {name}: give "
            f"{found.largest.helps}; else --dtype bfloat16, or a smaller model; `tvaprune estimate` shows all phases"
        )
