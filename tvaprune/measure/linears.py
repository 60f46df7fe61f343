"""Time of linear layers by their parameters, several choices of widths side by side."""

from collections.abc import Mapping, Sequence
from functools import partial
from statistics import median

import torch
from torch.nn import functional

from tvaprune.measure.speed import seconds

ROUNDS = 7
Sizes = Sequence[tuple[int, int]]  # inputs and outputs of linear layers


@torch.inference_mode()
def relative_times(
    choices: Mapping[int, Sizes], tokens: int, device: torch.device, dtype: torch.dtype
) -> dict[int, float]:
    """Returns the time of each choice by parameter, over the first one's: the median over rounds of all in turn.

    Args:
        choices: Linear layers by what is chosen.
        tokens: Rows of the inputs.
    """
    layers = {
        choice: [
            (
                torch.randn(tokens, inputs, device=device, dtype=dtype),
                torch.randn(outputs, inputs, device=device, dtype=dtype),
            )
            for inputs, outputs in dict.fromkeys(sizes)
        ]
        for choice, sizes in choices.items()
    }
    found: dict[int, list[float]] = {choice: [] for choice in choices}
    first = next(iter(choices))
    for _ in range(ROUNDS + 1):
        each = {
            choice: seconds(partial(_multiply, parts), device) / sum(weight.numel() for _, weight in parts)
            for choice, parts in layers.items()
        }
        for choice, taken in each.items():
            found[choice].append(taken / each[first])
    return {choice: median(ratios[1:]) for choice, ratios in found.items()}  # the first round warms up


def _multiply(parts: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
    for values, weight in parts:
        functional.linear(values, weight)
