"""What a refit out of core needs, by arithmetic: memory for its largest step, disk for what waits."""

import math

from tvaprune.cut.refit import SHARES, STRENGTHS
from tvaprune.cut.ridge import ROWS
from tvaprune.plan.keep_plan import KeepPlan

_DOUBLE = 8  # bytes of what is solved in float64
_FACTORS = sum(map(math.isfinite, STRENGTHS)) + 1  # one for each strength, and the matrix that is factored
_TEMPORARY = 6  # matrices of a linear's size while its errors are told


def memory_needed(plan: KeepPlan, itemsize: int, tokens: int) -> int:
    """Returns the bytes of the refit's largest step, which do not grow with the number of layers.

    That is half a layer of the dense model and of the pruned one, or both heads; the moments of the linear that is
    fitted, on calibration and on held-out windows; their factors; and what a batch makes within that half.

    Args:
        itemsize: Bytes of a weight.
        tokens: Of a batch.
    """
    shape = plan.shape
    wide, narrow = shape.hidden_size, plan.hidden_size
    read = _solved(narrow, wide, narrow)
    steps = [itemsize * shape.vocab_size * (wide + narrow + 2) + read]
    for heads, kept in zip(shape.num_key_value_heads, map(len, plan.padded.attn), strict=True):
        queries, rows = shape.head_dim * shape.group_size, 2 * shape.head_dim * (1 + shape.group_size)
        weights = rows * (heads * wide + kept * narrow)
        inside = tokens * (3 * queries * heads + 4 * wide)
        steps.append(itemsize * (weights + inside) + max(read, _solved(kept * queries, narrow, narrow)))
    for channels, kept in zip(shape.intermediate_size, map(len, plan.padded.inter), strict=True):
        weights = (2 + shape.gated_mlp) * (channels * wide + kept * narrow)
        inside = tokens * (3 * channels + 4 * wide)
        steps.append(itemsize * (weights + inside) + max(read, _solved(kept, narrow, narrow)))
    return max(steps)


def _solved(features: int, targets: int, outputs: int) -> int:
    """Returns the bytes of a linear's least squares: moments twice, factors, and some of its rows."""
    matrices = 2 * (features + targets) * features + _FACTORS * features**2
    return _DOUBLE * (matrices + _TEMPORARY * min(outputs, ROWS) * features)


def disk_needed(plan: KeepPlan, itemsize: int, calibration: int, held_out: int) -> int:
    """Returns the bytes of what waits on disk: two residual streams, one for each share, the refitted weights.

    Args:
        itemsize: Bytes of a weight and of a number of a stream.
        calibration: Tokens that are fitted.
        held_out: Tokens that choose.
    """
    streams = (calibration + held_out) * (plan.shape.hidden_size + plan.hidden_size)
    return itemsize * (streams + (len(SHARES) - 1) * held_out * plan.hidden_size + plan.num_parameters)
