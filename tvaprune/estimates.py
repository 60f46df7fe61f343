"""What a run will take, of its flags and the config alone: told before it begins, refused where it cannot fit."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import psutil
import torch

from tvaprune.budget import fitted, rotation_batch, work_of
from tvaprune.choose.choose import DEFAULT_CALIBRATION_SAMPLES, DEFAULT_TRAIN_SAMPLES, scored_windows
from tvaprune.choose.rotation import wants_rotation
from tvaprune.choose.scores import BACKWARD
from tvaprune.choose.settings import Cadence
from tvaprune.errors import InputError
from tvaprune.flags.arguments import EVAL_STEPS, Arguments
from tvaprune.measure.cost import Phase, phases
from tvaprune.measure.work import GIB, Work
from tvaprune.models.load import load_config
from tvaprune.plan.keep_plan import KeepPlan
from tvaprune.plan.masks import Masks

TFLOPS = 150.0  # TFLOP/s: about half of what an A100 does in bfloat16


@dataclass(frozen=True)
class Estimate:
    """What a run will take.

    Attributes:
        phases: Of the run, in order; on a CPU the host's memory is the device's.
        on_card: Whether the device is a card.
        is_spread: Whether the model is spread over several, which hold this together.
        target: What ``--target_params`` and its kin were turned into, in a line; empty where none was given.
        fits: Of cards by name, where they were asked for: whether the run fits, and with what.
    """

    verb: str
    work: Work
    phases: tuple[Phase, ...]
    on_card: bool
    is_spread: bool = False
    fits: Mapping[str, str] = field(default_factory=dict)
    target: str = ""

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
        return sum(phase.times * phase.flops for phase in self.phases)

    @property
    def counted(self) -> dict[str, float]:
        """The operations of each phase's parts, by their names; of what is done once for each target, of one."""
        return {part: flops for phase in self.phases for part, flops in phase.parts.items()}

    def minutes(self, tflops: float = TFLOPS) -> float:
        """Returns the minutes that these operations take at a speed in TFLOP/s."""
        return self.flops / tflops / 1e12 / 60

    def line(self) -> str:
        """Returns the line that a run begins with."""
        where = "on the GPU" + "s" * self.is_spread if self.on_card else "of memory"
        where += ", for the whole model" * self.is_spread
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
    verb = str(args.recipe["verb"])
    on_card = args.training.device.type == "cuda" if on_card is None else on_card
    work = _counted(args, fitted(args, work_of(args, units, on_card), memory))
    if verb == "prune" and wants_rotation(args, load_config(args.source.model_name_or_path)):
        work = replace(work, rotation_batch=rotation_batch(args, work, memory))
    return Estimate(verb, work, tuple(phases(verb, work, on_card)), on_card, args.is_spread)


def _counted(args: Arguments, work: Work) -> Work:
    """Returns a work with the passes of its training, and how often what is trained is scored."""
    training, method, blocks = args.training, args.prune.prune_method, args.data.max_train_samples
    if args.recipe["verb"] == "prune" and method != "vib":  # what goes forward alone to score units is not counted
        batch = scored_windows(work.block, work.eval_batch) if method in BACKWARD else 0
        scored = blocks or DEFAULT_CALIBRATION_SAMPLES
        return replace(work, steps=0, scorings=1, scored_batch=batch, scored_blocks=scored)
    epochs = args.finetune.epoch_f or training.num_train_epochs
    cadence = Cadence.of(args, epochs, blocks or DEFAULT_TRAIN_SAMPLES, work.selection_blocks)
    given = training.eval_steps if training.eval_steps_given else None
    scorings = 0 if training.eval_strategy == "no" else math.ceil(cadence.num_steps / cadence.steps(given, EVAL_STEPS))
    return replace(work, steps=cadence.num_tokens // work.tokens, scorings=scorings)


def announce(args: Arguments, units: Masks | KeepPlan | None = None, cuts: bool = True) -> Estimate:
    """Prints a run's line before it begins, and returns what it will take.

    Args:
        cuts: Whether it cuts anything; else the dense model is measured, and that is all.

    Raises:
        InputError: If it cannot fit the GPU's free memory, or on a CPU the machine's whole. Of one
            that is spread it is not known.
    """
    found = estimate_of(args, units)
    if not cuts:
        found = replace(found, phases=found.phases[:1])
    print(found.line())
    if found.is_spread:
        return found
    if found.on_card:
        there, name = torch.cuda.mem_get_info(args.training.device)[0], "are free on the GPU"
    else:
        there, name = psutil.virtual_memory().total, "are this machine's memory"
    if found.largest.device > there:
        raise InputError(
            f"the {found.largest.name} needs {in_gib(found.largest.device)}, and {in_gib(there)} {name}: give a "
            f"smaller --memory, {found.largest.helps}; else --dtype bfloat16, or a smaller model; `tvaprune estimate` "
            "shows all phases"
        )
    return found
