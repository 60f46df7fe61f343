"""The closed-form instant update: a ridge least-squares refit of the kept weights, centred on the folded ones.

For a linear layer whose dense input is ``x`` and whose input in the pruned model is ``xhat`` (docs/method.md,
section 6):

    W' = (W C + lam W_fold) (H + lam I)^-1,   C = sum x xhat^T,   H = sum xhat xhat^T

The sums are over tokens; for what writes to the residual stream each counts the less, the larger the stream past it is.
``lam`` infinite is folding, so folding is the fallback. The layers are walked in order with two residual streams: the
dense model's gives the targets, the pruned model's, whose earlier layers are refitted already, the inputs. What writes
to the residual stream aims at the dense one minus the pruned one, which repairs what earlier layers got wrong. Before a
norm after the block it aims at what the dense block writes, and the norm's gain, dim by dim, at what the stream lacks.
Sources: least squares on the kept channels after GRAIL and OSSCAR, statistics of the pruned prefix after
Tyr-the-Pruner (arXiv 2503.09657); the centre and the residual target are this project's.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from datasets import Dataset
from torch import nn

from tvaprune import ranks
from tvaprune.cut.ridge import Moments, Outputs, Ridge, fit_linear, nearest, with_one
from tvaprune.cut.walk import Batch, Settled, Walk, importance
from tvaprune.measure.update_cost import REFIT_SHARES, STRENGTHS
from tvaprune.models.families import residual_factor
from tvaprune.models.layers import Half, Layers, paths_of
from tvaprune.models.layout import Block
from tvaprune.phases import REFIT, REFIT_CHOICE, Phases, told_bar
from tvaprune.plan.edits import edits_of
from tvaprune.plan.keep_plan import KeepPlan


@dataclass(frozen=True)
class RefitReport(Settled):
    """What a refit did, on the way from the fold.

    Attributes:
        strengths: The relative ``lam`` of every linear; None: it stays folded.
    """

    strengths: dict[str, float | None]


@torch.no_grad()
def refit_layers(
    dense: Layers,
    pruned: Layers,
    plan: KeepPlan,
    calibration: Dataset,
    held_out: Dataset,
    batch_size: int = 8,
    strengths: Sequence[float] = STRENGTHS,
    shares: Sequence[float] = REFIT_SHARES,
    phases: Phases | None = None,
) -> RefitReport:
    """Refits a model that was sliced by ``plan`` and folded, half a layer at a time.

    Every linear takes the ``lam`` of least held-out error, infinity among them: what reads a norm is refitted only
    where that helps. The model then goes from the fold towards the refit as far as brings its
    held-out predictions nearest to the dense model's. Adds no parameters: biases are refitted where there are some.

    Args:
        dense: The unpruned model; it has the room for both residual streams.
        pruned: The narrower one; it is left settled at the best share.
        calibration: Windows whose statistics are fitted, all of one length.
        held_out: Windows of the same length that choose among fits.
        batch_size: Windows of a forward pass.
        phases: Of the command; the bars say where in them it is.
    """
    at = (phases or Phases()).at
    walk = _Refit(dense, pruned, plan, strengths)
    walk.begin(calibration, held_out, batch_size)
    walk.fit(partial(at, REFIT))
    done = walk.settle(shares, partial(at, REFIT_CHOICE))
    chosen = {name: strength if math.isfinite(strength) else None for name, strength in walk.chosen.items()}
    return RefitReport(done.shares, done.divergences, done.share, chosen)


class _Refit(Walk):
    """A walk that refits the linears of each half it passes."""

    def __init__(self, dense: Layers, pruned: Layers, plan: KeepPlan, strengths: Sequence[float]) -> None:
        super().__init__(dense, pruned, plan)
        self.strengths, self.edits = strengths, edits_of(plan, dense.family, self.device)
        self.chosen: dict[str, float] = {}

    def fit(self, at: Callable[[float], str]) -> None:
        """Walks all layers, attention, then MLP, and the head; a tied one is the embedding, whose output is exact.

        Args:
            at: Told how much of that is done; what it returns stands in the bar.
        """
        halves, has_head = self.halves(), not self.plan.shape.tie_word_embeddings
        with told_bar(len(halves) + has_head, "refitting", "half layer", at) as advance:
            for index, block, options in halves:
                with self.dense.holding(*paths_of(block)), self.pruned.changing(*paths_of(block)):
                    self._half(f"layer {index} ", block, options)
                advance()
            if has_head:
                self._head()
                advance()

    def _head(self) -> None:
        """Refits the lm_head."""
        with self.dense.holding(*self.dense.ends), self.pruned.changing(*self.pruned.ends):
            self._fit_readers("", Half.ending(self.dense), Half.ending(self.pruned))

    def _half(self, prefix: str, block: Block, options: dict[str, Any]) -> None:
        """Refits half a layer and moves both streams past it."""
        dense, pruned = (Half.of(layers, block, options) for layers in (self.dense, self.pruned))
        name = prefix + _last(block.writer)
        # Which expert a token passes is chosen: no least-squares target, they stay folded; so does what was lost.
        stays = block.mixture is not None or not self.edits[f"{block.writer}.weight"].constant
        if not stays:
            self._fit_readers(prefix, dense, pruned)
        if not stays and block.post_norm is not None:
            self._fit_writer(name, pruned, lambda batch: self._written(dense, batch))
        self.move(self.dense, dense)
        if not stays and block.post_norm is not None:
            self.chosen[prefix + _last(block.post_norm)] = self._fit_gain(pruned)
        elif not stays:
            self._fit_writer(name, pruned, self._lacking)
        self.move(self.pruned, pruned)

    def _lacking(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns what the pruned stream, before a half, lacks of the dense one past it, and the latter."""
        aim = self.aim(batch)
        lacking = aim - batch.pruned[0].to(self.device).float()
        return lacking / residual_factor(self.dense.model.config), aim

    def _written(self, dense: Half, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns what the dense half writes on the kept dims, twice: the norm after it divides any factor out."""
        with _captured(dense.post_norm) as inputs:
            dense(batch.dense.to(self.device))
        written = inputs[0].index_select(-1, self.plan.kept.hidden.to(self.device))
        return written, written

    def _fit_writer(
        self, name: str, pruned: Half, target: Callable[[Batch], tuple[torch.Tensor, torch.Tensor]]
    ) -> None:
        """Refits the linear that writes a half's output to a target, whose error counts beside the second."""

        def tokens(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
            with _captured(pruned.writer) as inputs:
                pruned(batch.pruned.to(self.device))
            aim, beside = target(batch)
            weights = importance(beside).sqrt().unsqueeze(-1)
            return with_one(inputs[0], pruned.writer) * weights, aim * weights

        fit, held = self._moments(tokens)
        self.chosen[name] = fit_linear(pruned.writer, self._ridges(fit), fit, held)

    def _fit_gain(self, pruned: Half) -> float:
        """Refits the gain of the norm past a half, dim by dim, to what the stream lacks; returns the strength."""
        norm, offset = pruned.post_norm, self.dense.family.norm_offset
        sums = torch.zeros(2, 2, len(norm.weight), dtype=torch.float64, device=self.device)  # held out, square or cross
        for batch in self.batches:
            with _captured(norm) as inputs:
                pruned(batch.pruned.to(self.device))
            aim, beside = self._lacking(batch)
            output, weights = norm(inputs[0]).float(), importance(beside).unsqueeze(-1)
            for into, other in zip(sums[int(batch.held_out)], (output, aim), strict=True):
                into += (output * other * weights).sum((0, 1))
        ranks.add_up(sums)
        (square, cross), held = sums
        alone = torch.where(square > 0, cross / square, 1.0)
        found = [1 + (alone - 1) / (1 + strength) for strength in self.strengths]
        errors = [float((held[0] * factor.square() - 2 * held[1] * factor).sum()) for factor in found]
        best = nearest(errors)
        norm.weight.copy_((norm.weight.double() + offset) * found[best] - offset)
        return self.strengths[best]

    def _fit_readers(self, prefix: str, dense: Half, pruned: Half) -> None:
        """Refits the linears that read a norm to the outputs of the dense ones."""
        like = next(iter(pruned.readers.values()))

        def tokens(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
            inputs, targets = pruned.normed(batch.pruned.to(self.device)), dense.normed(batch.dense.to(self.device))
            return with_one(inputs, like), with_one(targets, like)

        fit, held = self._moments(tokens)
        ridges = self._ridges(fit)
        for path, linear in pruned.readers.items():
            outputs = Outputs(dense.readers[path], self.edits[f"{path}.weight"].rows)
            self.chosen[prefix + _last(path)] = fit_linear(linear, ridges, fit, held, outputs)

    def _ridges(self, fit: Moments) -> list[Ridge]:
        return [Ridge(fit.inputs, strength) for strength in self.strengths]

    def _moments(self, tokens: Callable[[Batch], tuple[torch.Tensor, torch.Tensor]]) -> tuple[Moments, Moments]:
        """Returns the moments of the calibration windows and of the held-out ones."""
        sums: dict[bool, Moments] = {}
        for batch in self.batches:
            inputs, targets = tokens(batch)
            if batch.held_out not in sums:
                sums[batch.held_out] = Moments.zeros(inputs.shape[-1], targets.shape[-1], self.device)
            sums[batch.held_out].add(inputs, targets)
        for held_out in (False, True):
            ranks.add_up(sums[held_out].inputs, sums[held_out].cross)
        return sums[False], sums[True]


@contextmanager
def _captured(module: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Yields a list that a module's inputs are added to."""
    inputs: list[torch.Tensor] = []
    with module.register_forward_pre_hook(lambda module, args: inputs.append(args[0])):
        yield inputs


def _last(path: str) -> str:
    return path.rpartition(".")[2]
