"""What an instant weight update takes, from sizes alone: the refit's fits and streams, the reconstruction's windows.

Closed formulas as in `tvaprune.measure.cost`, with the letters of `tvaprune.measure.work`.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from tvaprune.losses import chunk_tokens
from tvaprune.measure.work import (
    Work,
    copies,
    forward_flops,
    head_flops,
    layer_sizes,
    layer_widths,
    pairs_kept,
    weights,
)
from tvaprune.models.layers import ROWS
from tvaprune.models.shape import ModelShape

# Of `tvaprune.cut.refit`: lam relative to the mean diagonal of H; infinite: the fold.
STRENGTHS = (math.inf, 1.0, 1e-1, 1e-2, 1e-3, 1e-4)
# How far to go from the fold to the refit. Every linear's optimum is that of the residual stream, not of the model's
# predictions, and going all the way overshoots: on the miniature models the best share is near 0.6.
REFIT_SHARES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
# Of `tvaprune.cut.reconstruct`.
WINDOW = 4  # half layers that are trained together
EPOCHS = 4  # over the calibration windows
RECONSTRUCT_SHARES = (0.0, 0.5, 1.0)  # of the way from the refit


@dataclass(frozen=True)
class Fit:
    """One least-squares fit of the refit: ``linears`` of n features each, whose moments with m targets are summed.

    Attributes:
        outputs: Rows of every linear; `tvaprune.models.layers.ROWS` are solved at a time.
        reads: Whether the targets are a dense linear's inputs, and the rows' cross moments are to be computed.
    """

    features: int
    targets: int
    outputs: tuple[int, ...]
    reads: bool

    @property
    def bytes(self) -> int:
        """What it holds at the peak: both splits' moments, and of some rows the errors or the solution; float64.

        `torch.cholesky_solve` works on copies of the factor and of the right side.
        """
        n, rows = self.features, min(ROWS, max(self.outputs))
        errors, solution = (7 if self.reads else 5) * rows * n, 2 * n * n + (5 if self.reads else 3) * rows * n
        return 8 * (2 * n * (n + self.targets) + max(errors, solution))

    def flops(self, tokens: int) -> float:
        """The operations of the moments, and of every strength's factor, solution and error."""
        n, solutions = self.features, len(STRENGTHS)  # in place of the fold's the best one's, once more
        moments = 2 * tokens * n * (n + self.targets)
        each = solutions * 2 * n * n + len(STRENGTHS) * 2 * n * n + self.reads * 3 * 2 * self.targets * n
        factors = sum(-(-rows // ROWS) for rows in self.outputs) * solutions * n**3 / 3
        return moments + each * sum(self.outputs) + factors


def _fits(work: Work) -> Iterator[Fit]:
    h, hidden = work.dense.hidden_size, work.pruned.hidden_size
    for (q, k, _), f in zip(layer_widths(work.pruned), work.pruned.intermediate_size, strict=True):
        yield Fit(hidden, h, (q, k, k), True)
        yield Fit(q, hidden, (hidden,), False)
        if not f:  # experts stay folded
            continue
        yield Fit(hidden, h, (f,) * (1 + work.pruned.gated_mlp), True)
        yield Fit(f, hidden, (hidden,), False)
    if not work.dense.tie_word_embeddings:
        yield Fit(hidden, h, (work.dense.vocab_size,), True)


def _refit_tokens(work: Work) -> int:
    return (work.refit_blocks + work.held_blocks) * work.block


def streams(work: Work) -> int:
    """Returns the bytes of both residual streams of the refit; of a parallel model a layer's input waits too."""
    width = (1 + work.dense.is_parallel) * (work.dense.hidden_size + work.pruned.hidden_size)
    return work.weight_bytes * width * _refit_tokens(work)


def head_share(dense: ModelShape, hidden: int, itemsize: int) -> int:
    """Returns the bytes of a head at a share of the way: before, after, itself, and of some rows these in float32.

    Args:
        hidden: Hidden dims of the narrower model, whose head it is; one that is tied is not refitted.
        itemsize: Bytes of a weight.
    """
    v = dense.vocab_size
    return 0 if dense.tie_word_embeddings else 3 * hidden * (itemsize * v + 4 * min(ROWS, v))


def refit(work: Work) -> float:
    """Returns the bytes on the card in the refit: both models, both streams, and the widest fit, or the head's share.

    With ``--refit_offload`` the dense model and the streams are on the host, and a layer or the head comes over.
    """
    there = weights(work.dense, work) + streams(work)
    if work.refit_offload:
        there = work.weight_bytes * max(work.dense.hidden_size * work.dense.vocab_size, *layer_sizes(work.dense))
    share = head_share(work.dense, work.pruned.hidden_size, work.weight_bytes)
    return there + weights(work.pruned, work) + max(share, compared(work), *(fit.bytes for fit in _fits(work)))


def refit_host(work: Work) -> float:
    """Returns the bytes on the host in the refit: with ``--refit_offload`` the dense model and the streams.

    The narrower one as it was folded is made of these again, weight by weight.
    """
    head = (not work.dense.tie_word_embeddings) * work.dense.vocab_size  # cut alone; others are cut, then folded
    cut = work.weight_bytes * work.pruned.hidden_size * max(head, 2 * max(work.pruned.intermediate_size))
    return work.refit_offload * (weights(work.dense, work) + streams(work) + cut)


def compared(work: Work) -> int:
    """Returns the bytes of comparing predictions at a share of the way: of a window's chunk, both models'.

    Logits in the models' precision, in float32, as log-probabilities, and their difference; and where the head is
    refitted, what it was.
    """
    dense, b = work.dense, work.weight_bytes
    chunk = dense.vocab_size * min(chunk_tokens(dense.vocab_size), work.block)
    return (2 * b + 20) * chunk + (not dense.tie_word_embeddings) * b * work.pruned.hidden_size * dense.vocab_size


def refit_flops(work: Work) -> float:
    """Returns the operations of the refit: a pass of the dense stream, two of the pruned one, fits, the shares.

    Before a norm past the block what the dense one writes is asked for, and the norm's gain is fitted: one pass more.
    """
    tokens, more = _refit_tokens(work), work.post_norms
    dense, pruned = (forward_flops(shape, tokens, work.block, head=False) for shape in (work.dense, work.pruned))
    return (
        (1 + more) * dense
        + (2 + more) * pruned
        + sum(fit.flops(tokens) for fit in _fits(work))
        + choice_flops(work, len(REFIT_SHARES))
    )


def choice_flops(work: Work, shares: int) -> float:
    """Returns those of them that choose among shares of the way, by the held-out predictions."""
    held = work.held_blocks * work.block
    return shares * (forward_flops(work.pruned, held, work.block) + head_flops(work.dense, held))


def reconstruct(work: Work) -> float:
    """Returns the bytes on the card in the reconstruction: both models, both streams, and a window in training.

    Of what is trained there are a float32 copy where it is in half precision, the best so far, two moments, and at the
    end of a step its gradients in both precisions; before that the activations, the norms' inputs in float32, and past
    the last window a chunk of the predictions.
    """
    there: float = weights(work.dense, work) + streams(work)
    if work.refit_offload:
        there = max(_held(work, work.dense))
    return there + weights(work.pruned, work) + max(_window_training(work))


def reconstruct_host(work: Work) -> float:
    """Returns the bytes on the host in the reconstruction: the layers before it, and what is offloaded.

    Where the dense model is not needed again, its layers leave the memory window by window as these come.
    """
    before = work.weight_bytes * sum(layer_sizes(work.pruned))
    if not work.refit_offload:
        return before
    first = work.weight_bytes * sum(layer_sizes(work.pruned)[_windows(work)[0]])
    return weights(work.dense, work) + streams(work) + (before if work.keep_dense else first)


def reconstruct_streamed(work: Work) -> float:
    """Returns the bytes of the largest window where nothing else is there: of both models, and its training."""
    held = zip(_held(work, work.dense), _held(work, work.pruned), _window_training(work), strict=True)
    return max(map(sum, held))


def _windows(work: Work) -> list[slice]:
    """Returns the layers that are trained together; the last ones are as many as can be."""
    count, layers = work.dense.num_hidden_layers, WINDOW // 2
    stops = range(count % layers or layers, count + 1, layers)
    return [slice(max(0, stop - layers), stop) for stop in stops]


def _held(work: Work, shape: ModelShape) -> list[float]:
    """Returns the bytes of a model's weights in each window, the head beside the last."""
    sizes = [sum(layer_sizes(shape)[window]) for window in _windows(work)]
    sizes[-1] += shape.hidden_size * shape.vocab_size
    return [work.weight_bytes * size for size in sizes]


def _window_training(work: Work) -> list[float]:
    """Returns the bytes that training each window takes beside the weights, as `reconstruct` says."""
    b, h, windows = work.weight_bytes, work.pruned.hidden_size, _windows(work)
    copy, tokens = 4 * (b < 4), work.pass_tokens(work.block)
    sizes = layer_sizes(work.pruned)
    h_own = 4 * h + copies(work.pruned)
    per_token = [
        b * (h_own + 2 * q + 2 * k + 4 * f) + 8 * h + pairs
        for (q, k, f), pairs in zip(layer_widths(work.pruned), pairs_kept(work.pruned, work), strict=True)
    ]
    predictions = (21 + 2 * b) * work.dense.vocab_size * min(chunk_tokens(work.dense.vocab_size), tokens)
    losses = [12 * h * tokens] * (len(windows) - 1) + [predictions]
    return [
        (copy + b + 8) * sum(sizes[window])
        + max((copy + b) * sum(sizes[window]), tokens * sum(per_token[window]) + loss)
        for window, loss in zip(windows, losses, strict=True)
    ]


def reconstruct_flops(work: Work) -> float:
    """Returns the operations of the reconstruction: both streams, the training, held-out errors, shares."""
    fit, held = work.refit_blocks * work.block, work.held_blocks * work.block

    def passes(shape: ModelShape, tokens: int) -> float:
        return forward_flops(shape, tokens, work.block, head=False)

    both = passes(work.dense, fit + held) + passes(work.pruned, fit + held)
    training = 3 * EPOCHS * passes(work.pruned, fit) + (EPOCHS + 1) * passes(work.pruned, held)
    heads = head_flops(work.pruned, held) + head_flops(work.dense, held)
    last = EPOCHS * (2 * head_flops(work.pruned, fit) + head_flops(work.dense, fit))
    return both + training + last + (EPOCHS + 1) * heads + choice_flops(work, len(RECONSTRUCT_SHARES))
