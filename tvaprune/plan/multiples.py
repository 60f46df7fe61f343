"""``--dim_multiple auto``: the multiple at which linear layers of this model's narrower widths are quickest, measured.

A matrix product whose sizes are no multiple of what the hardware takes at a time computes some of it for nothing. Which
multiple pays depends on device, precision and widths: so layers as a mask leaves them are timed at each, and what
counts is the time by parameter, at equal sparsity.
"""

from collections.abc import Mapping

import torch

from tvaprune.measure.linears import relative_times
from tvaprune.models.shape import ModelShape
from tvaprune.plan.widths import WidthRules, Widths

CANDIDATES = (1, 8, 64, 128, 256)  # 1: off
WORTH = 0.02  # of the time: a coarser multiple must save it, as it keeps what the mask would not
_SPREAD = (0.55, 0.8, 1.0, 1.2, 1.45)  # channels of layers over their mean, as learned masks leave them
_TOKENS = {"cuda": 2048}  # of a pass; on a CPU fewer tell as much
_CPU_TOKENS = 128


def fastest_multiple(shape: ModelShape, sparsity: float, device: torch.device, dtype: torch.dtype) -> tuple[int, str]:
    """Returns the multiple measured best on a device at equal sparsity, and the line that says so.

    Args:
        shape: The dense model's sizes.
        sparsity: The target: share of the decoder's parameters that goes.
        dtype: What will be computed in.
    """
    widest = max(shape.intermediate_size) or shape.hidden_size
    choices = {m: linears_at(shape, sparsity, m) for m in CANDIDATES if 4 * m <= min(widest, shape.hidden_size)}
    times = relative_times(choices, _TOKENS.get(device.type, _CPU_TOKENS), device, dtype)
    best = choose(times)
    told = ", ".join(f"{0 if multiple == 1 else multiple}: {time:.2f}" for multiple, time in times.items())
    return best, f"--dim_multiple auto: {0 if best == 1 else best} (time by parameter at each: {told})"


def choose(times: Mapping[int, float]) -> int:
    """Returns the multiple of the least time; a finer one where what is saved is not `WORTH` it."""
    least = min(times.values())
    return next(multiple for multiple in sorted(times) if times[multiple] <= least * (1 + WORTH))


def linears_at(shape: ModelShape, sparsity: float, multiple: int) -> list[tuple[int, int]]:
    """Returns the inputs and outputs of the linear layers of a few layers whose widths are adjusted to a multiple.

    A quarter of the sparsity comes from the hidden dims, the rest from heads and channels. Before they are adjusted all
    widths are odd, as a threshold leaves them.
    """
    rules = Widths(shape, WidthRules(multiple))
    stays = (1 - sparsity) / (1 - sparsity / 4)
    hidden = rules.hidden(_odd(shape.hidden_size * (1 - sparsity / 4)))
    full, heads = max(shape.intermediate_size), max(1, round(max(shape.num_key_value_heads) * stays))
    keys, found = heads * shape.head_dim, []
    for share in _SPREAD:
        counts = [min(_odd(full * stays * share), width) for width in shape.intermediate_size]
        channels = max(rules.channels(counts))
        found += [(hidden, keys * shape.group_size), (hidden, keys), (hidden, keys), (keys * shape.group_size, hidden)]
        for width in filter(None, (channels, shape.expert_size)):
            found += [(hidden, width)] * (1 + shape.gated_mlp) + [(width, hidden)]
    return found


def _odd(width: float) -> int:
    return max(1, int(width) | 1)
