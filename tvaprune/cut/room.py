"""What a refit out of core needs, by arithmetic: memory for its largest step, disk for what waits."""

from tvaprune.cut.refit import SHARES
from tvaprune.measure.cost import Fit, head_share
from tvaprune.plan.keep_plan import KeepPlan


def memory_needed(plan: KeepPlan, itemsize: int, tokens: int) -> int:
    """Returns the bytes of the refit's largest step, which do not grow with the number of layers.

    That is half a layer of the dense model and of the pruned one, or both heads; what the fit of a linear of it holds,
    or the head's share, as `tvaprune.measure.cost` says; and what a batch makes within that half.

    Args:
        itemsize: Bytes of a weight.
        tokens: Of a batch.
    """
    shape = plan.shape
    wide, narrow = shape.hidden_size, plan.hidden_size
    head = Fit(narrow, wide, (shape.vocab_size,), True).bytes
    steps = [
        itemsize * shape.vocab_size * (wide + narrow + 2) + head,
        itemsize * shape.vocab_size * wide + head_share(shape, narrow, itemsize),
    ]
    for heads, kept in zip(shape.num_key_value_heads, map(len, plan.padded.attn), strict=True):
        queries, rows = shape.head_dim * shape.group_size, 2 * shape.head_dim * (1 + shape.group_size)
        weights = rows * (heads * wide + kept * narrow)
        inside = tokens * (3 * queries * heads + 4 * wide)
        steps.append(itemsize * (weights + inside) + _fits(wide, narrow, kept * queries))
    for channels, kept in zip(shape.intermediate_size, map(len, plan.padded.inter), strict=True):
        weights = (2 + shape.gated_mlp) * (channels * wide + kept * narrow)
        inside = tokens * (3 * channels + 4 * wide)
        steps.append(itemsize * (weights + inside) + _fits(wide, narrow, kept))
    return max(steps)


def _fits(wide: int, narrow: int, features: int) -> int:
    """Returns the bytes of the larger of half a layer's fits: what reads its norm, or what writes its output."""
    return max(Fit(narrow, wide, (features,), True).bytes, Fit(features, narrow, (narrow,), False).bytes)


def disk_needed(plan: KeepPlan, itemsize: int, calibration: int, held_out: int) -> int:
    """Returns the bytes of what waits on disk: two residual streams, one for each share, the refitted weights.

    Args:
        itemsize: Bytes of a weight and of a number of a stream.
        calibration: Tokens that are fitted.
        held_out: Tokens that choose.
    """
    streams = (calibration + held_out) * (plan.shape.hidden_size + plan.hidden_size)
    return itemsize * (streams + (len(SHARES) - 1) * held_out * plan.hidden_size + plan.num_parameters)
