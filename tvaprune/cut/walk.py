"""Walks over the layers of a dense model and the one that was cut from it, with the residual streams of both.

What an instant weight update fits and what it is judged by: the streams of calibration and of held-out windows go past
the layers half a layer at a time, and the held-out predictions say how far of the way from the old weights to the new
ones to go.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset

from tvaprune import ranks
from tvaprune.cut.ridge import nearest
from tvaprune.losses import Predictions, distillation_loss
from tvaprune.models.layers import Half, Layers, attention_options, embed, paths_of
from tvaprune.models.layout import Block
from tvaprune.models.logits import head_of
from tvaprune.phases import told_bar
from tvaprune.plan.keep_plan import KeepPlan


@dataclass
class Batch:
    """One batch of windows and the states of both models, as a `Half` takes them: the residual streams come first."""

    input_ids: torch.Tensor
    dense: torch.Tensor
    pruned: torch.Tensor
    held_out: bool


@dataclass(frozen=True)
class Settled:
    """How far of the way from its old weights to the new ones a model went.

    Attributes:
        shares: Shares of the way that were tried, 0 among them as a rule: the old weights.
        divergences: KL from the dense model's next-token distributions on the held-out windows, at each share.
        share: The share that the model was left at: that of the smallest divergence.
    """

    shares: tuple[float, ...]
    divergences: tuple[float, ...]
    share: float

    @property
    def ends(self) -> tuple[float, float]:
        """The divergence of the old weights, NaN where they were not tried, and that of those it was left at."""
        known = dict(zip(self.shares, self.divergences, strict=True))
        return known.get(0.0, math.nan), known[self.share]

    @property
    def way(self) -> str:
        """The share in words that go before "of the way"."""
        return {0.0: "none", 1.0: "all"}.get(self.share, f"{self.share:g}")


def importance(states: torch.Tensor) -> torch.Tensor:
    """Returns what the squared error of each token counts: less, the larger its state, as the next norm divides by it.

    Some tokens of a trained model, the first above all, are a thousand times as large as the others: their error would
    be nearly all that a fit sees (massive activations, Sun et al., 2024, arXiv 2402.17762).

    Args:
        states: What an error is beside, shape ``(..., hidden)``.

    Returns:
        Shape ``(...)``, float32.
    """
    sizes = states.float().square().sum(-1)
    return 1 / sizes.clamp(min=torch.finfo(torch.float32).tiny)


class Walk:
    """One walk over the layers.

    Args:
        dense: The unpruned model; it has the room for both residual streams.
        pruned: The same model, sliced by ``plan`` and folded at least; its weights are what changes.
    """

    def __init__(self, dense: Layers, pruned: Layers, plan: KeepPlan) -> None:
        self.dense, self.pruned, self.plan = dense, pruned, plan
        self.device = pruned.device
        self.batches: list[Batch] = []
        self.options: list[dict[str, Any]] = []

    def begin(self, calibration: Dataset, held_out: Dataset, batch_size: int) -> None:
        """Starts the streams of both texts, all of whose windows are of one length."""
        for blocks in (calibration, held_out):
            self._read(blocks, batch_size, held_out=blocks is held_out)
        self.options = attention_options(self.dense, self.batches[-1].input_ids.shape[1])

    def _read(self, blocks: Dataset, batch_size: int, held_out: bool) -> None:
        """Starts the streams of these windows: the embeddings."""
        widths = self.plan.shape.hidden_size, self.plan.hidden_size
        batches = []
        batch_size = min(batch_size, len(blocks) // ranks.count())  # one at least falls to every process
        for start in ranks.share(range(0, len(blocks), batch_size)):
            ids = blocks[start : start + batch_size]["input_ids"]
            dense, pruned = (self.dense.room_of(ids, width) for width in widths)
            batches.append(Batch(ids, dense, pruned, held_out))
        ids = [batch.input_ids for batch in batches]
        embed(self.dense, ids, [batch.dense for batch in batches])
        embed(self.pruned, ids, [batch.pruned for batch in batches])
        self.batches += batches

    def halves(self) -> list[tuple[int, Block, dict[str, Any]]]:
        """Returns the halves of the layers in order, each with what it is called with."""
        found = self.dense.blocks()
        return [(index, block, self.options[index] if is_attention else {}) for index, block, is_attention in found]

    def aim(self, batch: Batch) -> torch.Tensor:
        """Returns where the pruned stream should be: the dense one on the kept dims, times their factors; float32."""
        kept, scale = (values.hidden.to(self.device) for values in (self.plan.kept, self.plan.scale))
        return batch.dense[0].to(self.device).index_select(-1, kept).float() * scale

    def move(self, layers: Layers, *halves: Half) -> None:
        """Moves the stream of one of the models past some of its halves."""
        for batch in self.batches:
            stream = batch.dense if layers is self.dense else batch.pruned
            hidden = stream.to(self.device)
            for half in halves:
                hidden = half(hidden)
            stream.copy_(hidden)

    def settle(self, shares: Sequence[float], at: Callable[[float], str] | None = None) -> Settled:
        """Leaves the pruned model at the share of its way whose held-out predictions are nearest to the dense ones.

        Args:
            at: Told how much of that is done; what it returns stands in the bar.
        """
        divergences = self.divergences(shares, at)
        best = shares[nearest(divergences)]
        self.pruned.settle(best)
        return Settled(tuple(shares), tuple(divergences), best)

    def divergences(self, shares: Sequence[float], at: Callable[[float], str] | None = None) -> list[float]:
        """Returns the KL from the dense predictions to the pruned model's at each share: the mean over held-out tokens.

        The dense stream must have passed all layers.
        """
        passes = [shares[first : first + self.pruned.passes] for first in range(0, len(shares), self.pruned.passes)]
        with told_bar(len(passes) * len(self.halves()), "choosing a share", "half layer", at) as advance:
            return [value for some in passes for value in self._divergences(some, advance)]

    def _divergences(self, shares: Sequence[float], advance: Callable[[], None]) -> list[float]:
        """Returns the KL at some shares, whose streams go through a half layer while it is held."""
        held_out = [batch for batch in self.batches if batch.held_out]
        ids, own = [batch.input_ids for batch in held_out], [batch.pruned for batch in held_out]
        streams = [own, *([self.dense.room(hidden.shape) for hidden in own] for _ in shares[1:])]
        embed(self.pruned, ids, own)
        for stream in streams[1:]:
            for room, hidden in zip(stream, own, strict=True):
                room.copy_(hidden)
        for _, block, options in self.halves():
            half = Half.of(self.pruned, block, options)
            for stream, _ in zip(streams, self.pruned.at(shares, *paths_of(block)), strict=True):
                for hidden in stream:
                    hidden.copy_(half(hidden.to(self.device)))
            advance()
        dense, pruned = Half.ending(self.dense), Half.ending(self.pruned)
        with self.dense.holding(*self.dense.ends):
            totals = [
                self._summed(dense, pruned, held_out, stream)
                for stream, _ in zip(streams, self.pruned.at(shares, *self.pruned.ends), strict=True)
            ]
        windows, *totals = ranks.total(sum(map(len, ids)), *totals)
        return [total / windows for total in totals]

    def _summed(self, dense: Half, pruned: Half, batches: Sequence[Batch], stream: Sequence[torch.Tensor]) -> float:
        """Returns the KL of a stream, summed over the windows."""
        total = 0.0
        for batch, hidden in zip(batches, stream, strict=True):
            for own, other in zip(hidden.split(1, dim=1), batch.dense.split(1, dim=1), strict=True):
                student = Predictions(pruned.normed(own.to(self.device)), head_of(self.pruned.model))
                teacher = Predictions(dense.normed(other.to(self.device)), head_of(self.dense.model))
                total += float(distillation_loss(student, teacher))
        return total
