"""From the units that a threshold leaves to the widths that a model may have: the dimension adjustment and its kin.

Multiples that the hardware likes (TVA-Prune, eq. 4), equal widths for engines that know one for all layers, multiples
of the number of devices that will share a layer.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tvaprune.errors import InputError
from tvaprune.models.shape import ModelShape

DIM_MULTIPLES = {1024: 128, 512: 32, 0: 8}  # from so many hidden dims on: tensor cores, llama.cpp's kernels, miniatures


def default_dim_multiple(hidden_size: int) -> int:
    """Returns the multiple that widths are adjusted to, by the dense model's hidden dims."""
    return next(multiple for least, multiple in DIM_MULTIPLES.items() if hidden_size >= least)


def adjust_width(width: int, full: int, multiple: int) -> int:
    """Returns the width rounded to the nearest multiple (eq. 4), at least one multiple, at most the full width."""
    rounded = (2 * width + multiple) // (2 * multiple) * multiple
    return min(max(rounded, multiple), full)


@dataclass(frozen=True)
class WidthRules:
    """What the widths of a narrower model must satisfy, whatever the model.

    Attributes:
        dim_multiple: What hidden and MLP widths are rounded to; 1: no adjustment.
        min_key_value_heads: KV heads that every layer keeps at least; 0 lets a layer lose its attention.
        uniform: Whether all layers keep as many: the mean of what the cut leaves them.
        tensor_parallel: What KV heads and channels are multiples of, at least one multiple in every layer.
    """

    dim_multiple: int = 1
    min_key_value_heads: int = 0
    uniform: bool = False
    tensor_parallel: int = 1


NO_RULES = WidthRules()


@dataclass(frozen=True)
class Widths:
    """From the units that a cut leaves of a model to the widths of the plan.

    Raises:
        InputError: If no width of the model obeys the rules.
    """

    shape: ModelShape
    rules: WidthRules = NO_RULES

    def __post_init__(self) -> None:
        widest = max(self.shape.hidden_size, *self.shape.intermediate_size)
        if self.rules.dim_multiple > widest:  # nothing would be cut
            raise InputError(
                f"--dim_multiple {self.rules.dim_multiple}: no width of the model is as large, the widest is {widest}; "
                "give less"
            )
        parts = self.rules.tensor_parallel
        for name in ("num_key_value_heads", "intermediate_size"):
            for size in sorted(set(getattr(self.shape, name))):
                if size % parts:
                    raise InputError(
                        f"--tensor_parallel is {parts}: the model's {name}, {size}, is no multiple of it; give a "
                        "divisor"
                    )

    def hidden(self, count: int) -> int:
        """Returns the hidden width."""
        return adjust_width(count, self.shape.hidden_size, self.rules.dim_multiple)

    def heads(self, counts: Sequence[int]) -> list[int]:
        """Returns the KV heads of every layer."""
        least = 1 if self.rules.uniform else self.rules.min_key_value_heads
        full, multiple = self.shape.num_key_value_heads, self.rules.tensor_parallel
        counts = [min(max(count, least), most) for count, most in zip(self._evened(counts, full), full, strict=True)]
        if multiple == 1:
            return counts
        return [adjust_width(count, most, multiple) for count, most in zip(counts, full, strict=True)]

    def channels(self, counts: Sequence[int]) -> list[int]:
        """Returns the MLP channels of every layer."""
        multiple = math.lcm(self.rules.dim_multiple, self.rules.tensor_parallel)
        full = self.shape.intermediate_size
        return [adjust_width(c, most, multiple) for c, most in zip(self._evened(counts, full), full, strict=True)]

    def _evened(self, counts: Sequence[int], full: tuple[int, ...]) -> list[int]:
        """Returns the counts, or where they must be equal the mean of the layers that have such units.

        No layer is too narrow for it.
        """
        layers = len(full) - full.count(0)
        if not self.rules.uniform or not layers:
            return list(counts)
        mean = (2 * sum(counts) + layers) // (2 * layers)
        return [min(mean, *filter(None, full))] * len(counts)
