"""What a refit out of core needs, by arithmetic: memory for its largest step, disk for what waits."""

from tvaprune.measure.update_cost import (
    RECONSTRUCT_SHARES,
    REFIT_SHARES,
    Fit,
    compared,
    head_share,
    reconstruct_streamed,
)
from tvaprune.measure.work import Work
from tvaprune.plan.keep_plan import KeepPlan


def memory_needed(plan: KeepPlan, itemsize: int, tokens: int, reconstructs: bool = False) -> int:
    """Returns the bytes of the largest step, which do not grow with the number of layers.

    That is half a layer of the dense model and of the pruned one, or both heads; what the fit of a linear of it holds,
    or the head's share and what is predicted with it, as `tvaprune.measure.update_cost` says; and what a batch makes
    within that half. A reconstruction after it holds and trains a window of both models.

    Args:
        itemsize: Bytes of a weight.
        tokens: Of a batch.
        reconstructs: Whether the refit is followed by one.
    """
    shape = plan.shape
    wide, narrow = shape.hidden_size, plan.hidden_size
    states = tokens * (4 + 2 * shape.is_parallel) * wide  # a batch's, before and after, and what is made of it
    head = Fit(narrow, wide, (shape.vocab_size,), True).bytes
    work = Work(shape, plan.shape_after, weight_bytes=itemsize, block=tokens, eval_batch=1)  # one pass, one batch
    now = (2 - shape.tie_word_embeddings) * narrow  # the head at a share, and after; `compared` has it before
    steps = [
        itemsize * shape.vocab_size * (wide + narrow + 2) + head,
        itemsize * shape.vocab_size * wide + head_share(shape, narrow, itemsize),
        itemsize * shape.vocab_size * (wide + now) + compared(work),
    ]
    for heads, kept in zip(shape.num_key_value_heads, map(len, plan.padded.attn), strict=True):
        queries, rows = shape.head_dim * shape.group_size, 2 * shape.head_dim * (1 + shape.group_size)
        weights = rows * (heads * wide + kept * narrow)
        inside = tokens * 3 * queries * heads + states
        steps.append(itemsize * (weights + inside) + _fits(wide, narrow, kept * queries))
    for channels, kept in zip(shape.intermediate_size, map(len, plan.padded.inter), strict=True):
        weights = (2 + shape.gated_mlp) * (channels * wide + kept * narrow)
        inside = tokens * 3 * channels + states
        steps.append(itemsize * (weights + inside) + _fits(wide, narrow, kept))
    if reconstructs:
        steps.append(round(reconstruct_streamed(work)))
    return max(steps)


def _fits(wide: int, narrow: int, features: int) -> int:
    """Returns the bytes of the larger of half a layer's fits: what reads its norm, or what writes its output."""
    return max(Fit(narrow, wide, (features,), True).bytes, Fit(features, narrow, (narrow,), False).bytes)


def disk_needed(plan: KeepPlan, itemsize: int, calibration: int, held_out: int, reconstructs: bool = False) -> int:
    """Returns the bytes of what waits on disk: two residual streams, one for each share, the refitted weights.

    A reconstruction keeps its own weights beside these, and tries fewer shares.

    Args:
        itemsize: Bytes of a weight and of a number of a stream.
        calibration: Tokens that are fitted.
        held_out: Tokens that choose.
        reconstructs: Whether the refit is followed by one.
    """
    lanes = 1 + plan.shape.is_parallel
    share = lanes * held_out * plan.hidden_size
    streams = lanes * (calibration + held_out) * (plan.shape.hidden_size + plan.hidden_size)
    waiting = (len(REFIT_SHARES) - 1) * share + plan.num_parameters
    if reconstructs:
        waiting = max(waiting, (len(RECONSTRUCT_SHARES) - 1) * share + 2 * plan.num_parameters)
    return itemsize * (streams + waiting)
