"""Reconstruction by sub-blocks, after the refit: some half layers at a time are trained to end where the dense ones do.

The closed form fits one linear at a time; what several make together, with the attention and the activation between
them, it cannot weigh. Here a window of half layers is trained at once: its input is the pruned residual stream, its aim
the dense stream past the window, on the kept dims; the aim of the last one, with the final norm, are the dense
predictions. Nothing passes backward beyond a window, so the memory is that of a few layers whatever the model's size,
and the weights stay as many as they were.
Source: "free lunch" in the compression of pretrained LLMs (arXiv 2510.14444): any window with a nonlinearity in it does
better than single matrices. The aim, the rate and the two stops (held-out error, held-out predictions) are this
project's.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from datasets import Dataset
from torch import nn

from tvaprune import ranks
from tvaprune.cut.walk import Batch, Settled, Walk, importance
from tvaprune.losses import Predictions, distillation_loss
from tvaprune.measure.update_cost import EPOCHS, RECONSTRUCT_SHARES, WINDOW
from tvaprune.models.layers import Half, Layers, paths_of
from tvaprune.models.layout import Block
from tvaprune.models.logits import head_of
from tvaprune.phases import RECONSTRUCT, RECONSTRUCT_CHOICE, Phases, told_bar
from tvaprune.plan.keep_plan import KeepPlan

# Adam's at the beginning, relative to the root mean square of each weight; a cosine ends it at 0. The second is tried
# where the first brings a window no nearer.
RATES = (0.03, 0.003)


@dataclass(frozen=True)
class Reconstruction(Settled):
    """What a reconstruction did, on the way from the refitted weights.

    Attributes:
        errors: Squared error of the stream past each window of half layers, relative to its square, of the last one the
            KL of the predictions, before and after its training: the mean over the held-out tokens.
    """

    errors: tuple[tuple[float, float], ...]


def reconstruct_layers(
    dense: Layers,
    pruned: Layers,
    plan: KeepPlan,
    calibration: Dataset,
    held_out: Dataset,
    batch_size: int = 8,
    shares: Sequence[float] = RECONSTRUCT_SHARES,
    seed: int = 0,
    phases: Phases | None = None,
) -> Reconstruction:
    """Trains a model that was sliced by ``plan`` towards the dense one, in place, a few half layers at a time.

    Args:
        dense: The unpruned model; it has the room for both residual streams.
        pruned: The narrower one; it is left settled at the best share.
        calibration: Windows that are trained on, all of one length.
        held_out: Windows of the same length: of every pass over the calibration windows that of their least error
            counts, and their predictions choose the share.
        batch_size: Windows of a pass; a training step is of one in each process.
        seed: Of the order of the steps.
        phases: Of the command; the bars say where in them it is.
    """
    at = (phases or Phases()).at
    with torch.no_grad():
        walk = _Reconstruction(dense, pruned, plan)
        walk.begin(calibration, held_out, batch_size)
        walk.layers(seed, partial(at, RECONSTRUCT))
        done = walk.settle(shares, partial(at, RECONSTRUCT_CHOICE))
    return Reconstruction(done.shares, done.divergences, done.share, tuple(walk.errors))


class _Trained:
    """A window of half layers while it is trained: Adam works on float32 copies of weights in half precision.

    Args:
        halves: What the stream passes.
        weights: What is trained.
    """

    def __init__(self, halves: Sequence[Half], weights: Iterable[nn.Parameter]) -> None:
        self.halves, self.weights = halves, [weight for weight in weights if weight.numel()]
        self.keep()

    def begin(self, rate: float, steps: int) -> None:
        """Starts from the best weights so far."""
        self.restore()
        self.masters = [weight.detach().float() for weight in self.weights]
        sizes = [float(master.square().mean().sqrt()) for master in self.masters]
        groups = [{"params": [master], "lr": rate * size} for master, size in zip(self.masters, sizes, strict=True)]
        self.optimizer = torch.optim.Adam(groups)
        self.cosine = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, steps)

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Returns the states past the window."""
        for half in self.halves:
            hidden = half(hidden)
        return hidden

    def keep(self) -> None:
        """Remembers the weights as the best so far."""
        self.best = [weight.detach().clone() for weight in self.weights]

    def restore(self) -> None:
        """Takes the best weights."""
        for weight, best in zip(self.weights, self.best, strict=True):
            weight.copy_(best)

    def step(self, loss: Callable[[], torch.Tensor] | None) -> None:
        """Moves the weights down a loss's gradients, which the processes add up: Adam does not mind the scale.

        Args:
            loss: None: this process has none, and the others do.
        """
        gradients = [torch.zeros_like(weight) for weight in self.weights] if loss is None else self._gradients(loss)
        for master, gradient in zip(self.masters, gradients, strict=True):
            master.grad = gradient.float()
            ranks.add_up(master.grad)
        self.optimizer.step()
        self.cosine.step()
        for weight, master in zip(self.weights, self.masters, strict=True):
            master.grad = None
            weight.copy_(master)

    def _gradients(self, loss: Callable[[], torch.Tensor]) -> Sequence[torch.Tensor]:
        with _wanting_gradients(True, self.weights), torch.enable_grad():
            return torch.autograd.grad(loss(), self.weights, allow_unused=True, materialize_grads=True)


@contextmanager
def _wanting_gradients(wanted: bool, weights: Iterable[nn.Parameter]) -> Iterator[None]:
    """Lets weights want gradients or not, and then as they did."""
    before = [(weight, weight.requires_grad) for weight in weights]
    for weight, _ in before:
        weight.requires_grad_(wanted)
    yield
    for weight, asked in before:
        weight.requires_grad_(asked)


Distance = Callable[[_Trained, Batch], torch.Tensor]


class _Reconstruction(Walk):
    """A walk that trains what it passes."""

    def __init__(self, dense: Layers, pruned: Layers, plan: KeepPlan) -> None:
        super().__init__(dense, pruned, plan)
        self.errors: list[tuple[float, float]] = []

    def layers(self, seed: int, at: Callable[[float], str]) -> None:
        """Walks all layers, window by window; ``at`` is told how much of that is done."""
        halves = self.halves()
        stops = range(len(halves) % WINDOW or WINDOW, len(halves) + 1, WINDOW)  # the last window is a whole one
        windows = [halves[max(0, stop - WINDOW) : stop] for stop in stops]
        with told_bar(len(windows), "reconstructing", "window", at) as advance:
            for window in windows:
                self._pass(window, window is windows[-1], seed)
                advance()

    def _pass(self, window: Sequence[tuple[int, Block, dict[str, Any]]], last: bool, seed: int) -> None:
        """Trains a window, and moves both streams past it."""
        norm, head = self.pruned.ends
        paths = [path for _, block, _ in window for path in paths_of(block)]
        changing = [*paths, norm] if last else paths
        with ExitStack() as stack:
            if last:
                stack.enter_context(self.dense.holding(*self.dense.ends))
                stack.enter_context(self.pruned.holding(head))  # which stays as it is, tied or not
                stack.enter_context(_wanting_gradients(False, self.pruned.weights(head).values()))
            stack.enter_context(self.dense.holding(*paths))
            stack.enter_context(self.pruned.changing(*changing))
            self.move(self.dense, *(Half.of(self.dense, block, options) for _, block, options in window))
            own = [Half.of(self.pruned, block, options) for _, block, options in window]
            distance = self._of_predictions if last else self._of_streams
            self._train(_Trained(own, self.pruned.weights(*changing).values()), distance, seed)
            self.move(self.pruned, *own)
        self.dense.done(*(block.module for _, block, _ in window))

    def _train(self, window: _Trained, distance: Distance, seed: int) -> None:
        """Trains a window, as far as its held-out error falls."""
        before = best = self._error(window, distance)
        for rate in RATES if before > 0 and math.isfinite(before) else ():
            if best == before:
                best = self._tried(window, distance, rate, seed, before)
        window.restore()
        self.errors.append((before, best))

    def _tried(self, window: _Trained, distance: Distance, rate: float, seed: int, best: float) -> float:
        """Trains a window at a rate, and returns its error where it was least after a pass over the text."""
        fit = [batch for batch in self.batches if not batch.held_out]
        most, order = ranks.largest(len(fit)), torch.Generator().manual_seed(seed)
        window.begin(rate, EPOCHS * most)
        for _ in range(EPOCHS):
            for place in torch.randperm(most, generator=order).tolist():
                window.step(partial(distance, window, fit[place]) if place < len(fit) else None)
            if (error := self._error(window, distance)) < best:
                best = error
                window.keep()
        return best

    def _of_streams(self, window: _Trained, batch: Batch) -> torch.Tensor:
        """Returns the squared error of a batch's stream past the window, relative to it: the mean over tokens."""
        aim = self.aim(batch)
        missed = window(batch.pruned.to(self.device))[0].float() - aim
        return (missed.square().sum(-1) * importance(aim)).mean()

    def _of_predictions(self, window: _Trained, batch: Batch) -> torch.Tensor:
        """Returns the KL from the dense predictions of a batch to those that follow the window."""
        dense, pruned = Half.ending(self.dense), Half.ending(self.pruned)
        student = Predictions(pruned.normed(window(batch.pruned.to(self.device))), head_of(self.pruned.model))
        with torch.no_grad():
            states = dense.normed(batch.dense.to(self.device))
        teacher = Predictions(states, torch.no_grad()(head_of(self.dense.model)))
        return distillation_loss(student, teacher)

    def _error(self, window: _Trained, distance: Distance) -> float:
        """Returns the distance of all held-out windows; NaN counts as infinite."""
        held = [batch for batch in self.batches if batch.held_out]
        error = sum(float(distance(window, batch)) * len(batch.input_ids) for batch in held)
        total, windows = ranks.total(error, sum(len(batch.input_ids) for batch in held))
        return total / windows if math.isfinite(total) else math.inf
