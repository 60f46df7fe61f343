"""``--target_params``, ``--target_memory``, ``--target_speedup``: each is turned into a sparsity, by the config alone.

What each counts is a part that no cut of the decoder layers changes (embeddings, lm_head, final norm) and a part that
goes with the layers' parameters: at sparsity ``s``, ``whole - s * layers``. How many hidden dims stay is not known
before units are chosen: all are counted, and where some go, embeddings shrink with them and more is saved than was
asked for. What was reached is told beside the target.
"""

import math
from dataclasses import dataclass

import torch

from tvaprune.errors import InputError
from tvaprune.flags.arguments import Arguments
from tvaprune.flags.ranges import BYTES, NUMBERS, amount
from tvaprune.flags.verbs import TARGETS
from tvaprune.given import turned_shape
from tvaprune.measure.work import forward_flops
from tvaprune.models.load import load_config
from tvaprune.models.parameters import counted_parameters, model_parameters
from tvaprune.plan.keep_plan import KeepPlan
from tvaprune.run import window_of

_DIGITS = 4  # of the sparsity; the exact cut comes within half a percentage point


@dataclass(frozen=True)
class Target:
    """What is to be left of something that shrinks with the decoder layers.

    Attributes:
        name: The flag's, without dashes; ``given`` is its value in the user's words.
        whole: Of the dense model.
        layers: Of its decoder layers' part, which is in proportion to what stays of their parameters.
        left: What is to be left.
        unit: What a parameter counts.
        window: Tokens that operations are counted for.
    """

    name: str
    given: object
    whole: float
    layers: float
    left: float
    unit: int = 1
    window: int = 0

    @property
    def flag(self) -> str:
        """The flag as it was given."""
        return f"--{self.name} {self.given}"

    def sparsity(self) -> float:
        """Returns the share of the decoder that must go, rounded up: the whole share leaves no more than was asked.

        Raises:
            InputError: If no share of the decoder leaves that much.
        """
        least = self.whole - self.layers
        share = (self.whole - self.left) / self.layers
        if 0 < share < 1 and (found := math.ceil(round(share * 10**_DIGITS, 6)) / 10**_DIGITS) < 1:
            return found
        raise InputError(
            f"{self.flag}: cannot be reached by cutting the decoder layers: the dense model has "
            f"{self.words(self.whole)}, without its layers {self.words(least)}; give a number between"
        )

    def words(self, left: float) -> str:
        """Returns an amount of what is counted."""
        if self.name == "target_params":
            return f"{left:,.0f} parameters"
        if self.name == "target_memory":
            return f"{left / 1e6:,.1f}MB of weights"
        return f"{self.whole / left:.2f} times as few operations"


def target_of(args: Arguments) -> Target | None:
    """Returns what a run's flags ask for beside ``--target_sparsity``; None: nothing."""
    given = {name: value for name in TARGETS[1:] if (value := getattr(args.prune, name)) is not None}
    if not given:
        return None
    ((name, value),) = given.items()
    config = load_config(args.source.model_name_or_path)
    shape = turned_shape(args, config)
    if name == "target_speedup":
        window = window_of(args, config)
        whole, layers = (forward_flops(shape, window, window, head) for head in (True, False))
        return Target(name, value, whole, layers, whole / value, window=window)
    unit = 1 if name == "target_params" else _bytes(args, config.dtype)
    left = amount(name, value, NUMBERS if name == "target_params" else BYTES)
    return Target(name, value, model_parameters(shape) * unit, counted_parameters(shape) * unit, left, unit)


def _bytes(args: Arguments, stored: torch.dtype | None) -> int:
    """Returns the bytes of a weight in the precision that the narrower model is saved in."""
    dtype = getattr(torch, args.source.dtype, stored or torch.float32)
    size: int = dtype.itemsize
    return size


def settle_target(args: Arguments) -> Target | None:
    """Replaces a target by the sparsity that it asks for, in place, in the recipe too; returns it."""
    target = target_of(args)
    if target is not None:
        args.prune.target_sparsity = [target.sparsity()]
        args.recipe.pop(target.name)
        args.recipe["target_sparsity"] = args.prune.target_sparsity[0]
    return target


def settled(args: Arguments, target: Target) -> str:
    """Returns the line that says what a target was turned into."""
    counted = "all hidden dims counted"
    if target.name == "target_speedup":
        counted = f"operations counted, not timed, as if heads and channels went alike; {counted}"
    return f"{target.flag}: --target_sparsity {args.prune.target_sparsity[0]:g} ({counted})"


def reached(target: Target, plan: KeepPlan) -> str:
    """Returns the line that says what a plan leaves, beside what was asked for."""
    if target.name == "target_speedup":
        left = forward_flops(plan.shape_after, target.window, target.window)
    else:
        left = plan.num_parameters * target.unit
    return f"{target.flag}: reached {target.words(left)}"
