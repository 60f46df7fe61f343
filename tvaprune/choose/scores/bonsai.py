"""Bonsai: drop units at random, see what it does to the loss, and regress the one on the other. No gradients.

Source: Dery, Kolawole et al., Everybody Prune Now (arXiv 2402.05406), section 3, and its released code.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from tqdm.auto import tqdm

from tvaprune.choose.gated_model import GatedModel
from tvaprune.choose.scores.calibration import Calibration, output_projections, read_inputs
from tvaprune.choose.scores.ranking import by_head, per_unit, ranked
from tvaprune.measure.perplexity import perplexity
from tvaprune.models.parameters import channel_parameters, head_parameters
from tvaprune.models.units import PerUnit

PRUNED_PER_ROUND = 0.05  # share of the decoder's parameters, as released
SUB_MODELS_PER_ROUND = 100  # 200 as released
TOKENS_PER_SUB_MODEL = 1024  # 32 of the model's longest windows as released: hours on a CPU
TOKENS_PER_PRIOR = 8192  # 32 of the model's longest windows as released
RIDGES = (0.01, 0.1, 1.0, 10.0, 100.0)  # relative to the mean of the sub-models' squared distances


@dataclass
class _Draw:
    """One round's sub-models: whether each unit under consideration is there, and how good the sub-model is.

    Attributes:
        places: The units, shape ``(units, 2)``: the module (all attentions, then all MLPs) and the place in it.
        present: 0 or 1, shape ``(sub_models, units)``.
        utility: Negative loss, shape ``(sub_models,)``.
    """

    places: torch.Tensor
    present: torch.Tensor
    utility: torch.Tensor


def bonsai_scores(calibration: Calibration) -> PerUnit:
    """Scores a unit by the round that removes it and, within the round, by its regression coefficient.

    Each round: a prior, Wanda's ``|W| * ||x||`` of the model as pruned so far; in every module only the units of the
    lowest prior are looked at, twice the share that a round prunes; sub-models drop half of these, the likelier the
    lower the prior, each followed by its complement; a linear regression of the utility on what is present; the lowest
    coefficients go, over all layers and modules, until the round has removed its share of parameters. Rounds go on
    until the target is passed. A KV head with all its query heads is one unit (the original knows no GQA).

    What differs from the released code: fewer sub-models and tokens (the constants above); the utility is the negative
    loss, not the negative perplexity, which few bad sub-models rule; ridge in closed form, its strength chosen by
    leave-one-out error, in place of gradient descent, whose penalty is L1 by default, with a grid chosen by
    cross-validated Kendall tau (the two penalties end within each other's seed noise).
    """
    gated = GatedModel(calibration.model)
    try:
        return _Rounds(calibration, gated).run()
    finally:
        gated.detach_gates()


class _Rounds:
    """The state of the rounds. Modules are all layers' attentions, then all layers' MLPs."""

    def __init__(self, calibration: Calibration, gated: GatedModel) -> None:
        self.calibration, self.gated, self.shape = calibration, gated, calibration.shape
        self.generator = torch.Generator().manual_seed(calibration.seed)
        ones = PerUnit.full(self.shape, 1.0)
        self.present = [*ones.attn, *ones.inter]
        self.scores = [torch.zeros_like(module).double() for module in self.present]
        layers = self.shape.num_hidden_layers
        self.costs = [head_parameters(self.shape)] * layers + [channel_parameters(self.shape)] * layers
        self.total = sum(cost * len(module) for cost, module in zip(self.costs, self.present, strict=True))
        self.rounds = 0

    @property
    def removed(self) -> int:
        """How many parameters are gone."""
        return sum(cost * int((module == 0).sum()) for cost, module in zip(self.costs, self.present, strict=True))

    def run(self) -> PerUnit:
        """Prunes round by round past the target and returns when each unit went; what stays is ordered by the prior."""
        if self.calibration.kept is not None:
            self._go_on(self.calibration.kept.read())
        num_rounds, done = math.ceil(self.calibration.target / PRUNED_PER_ROUND) + 1, self.rounds * SUB_MODELS_PER_ROUND
        with tqdm(total=num_rounds * SUB_MODELS_PER_ROUND, initial=done, desc="Bonsai", unit="sub-model") as bar:
            while self.removed <= self.calibration.target * self.total and any(module.any() for module in self.present):
                draw = self._draw(self._sample(TOKENS_PER_SUB_MODEL), self._prior(), bar)
                self._remove(draw)
                self.rounds += 1
                if self.calibration.kept is not None:
                    self.calibration.kept.write(self._state())
        for score, module, prior in zip(self.scores, self.present, self._prior(), strict=True):
            score.copy_(torch.where(module > 0, self.rounds + ranked(prior), score))
        layers = self.shape.num_hidden_layers
        return per_unit(self.shape, self.scores[:layers], self.scores[layers:])

    def _state(self) -> dict[str, Any]:
        """Returns what the next round begins with."""
        state = {"rounds": self.rounds, "present": self.present, "scores": self.scores}
        return state | {"generator": self.generator.get_state()}

    def _go_on(self, state: dict[str, Any] | None) -> None:
        """Takes up the state that an interrupted run left, if there is one."""
        if state is None:
            return
        self.rounds, self.present, self.scores = state["rounds"], state["present"], state["scores"]
        self.generator.set_state(state["generator"])
        print(f"note: Bonsai goes on after {self.rounds} rounds that an interrupted run measured")

    def _sample(self, tokens: int) -> Calibration:
        """Draws windows: a round's own, the same for all its sub-models."""
        blocks, size = self.calibration.blocks, len(self.calibration.blocks[0]["input_ids"])
        count = min(len(blocks), max(1, tokens // size))
        chosen = torch.randperm(len(blocks), generator=self.generator)[:count].sort().values
        return replace(self.calibration, blocks=blocks.select(chosen.tolist()))

    def _units(self, modules: list[torch.Tensor]) -> PerUnit:
        layers = self.shape.num_hidden_layers
        hidden = torch.ones(self.shape.hidden_size)
        return PerUnit(hidden, tuple(modules[:layers]), tuple(modules[layers:]))

    def _prior(self) -> list[torch.Tensor]:
        """Returns each module's prior; 0 for what is gone already."""
        sample = self._sample(TOKENS_PER_PRIOR)
        linears = [linear for pair in output_projections(sample.model) for linear in pair]
        with self.gated.using(self._units(self.present)):
            sums = [entry.wanda().cpu() for entry in read_inputs(sample, linears, None)]
        return [by_head(features, self.shape) for features in sums[0::2]] + sums[1::2]

    def _draw(self, sample: Calibration, priors: list[torch.Tensor], bar: tqdm) -> _Draw:
        """Measures pairs of sub-models, each the complement of the other among the units under consideration."""
        considered = [_considered(p, module) for p, module in zip(priors, self.present, strict=True)]
        rows, utility = [], []
        for _ in range(SUB_MODELS_PER_ROUND // 2):
            dropped = [self._drop(*args) for args in zip(priors, self.present, considered, strict=True)]
            complement = [units * (1 - drop) for units, drop in zip(considered, dropped, strict=True)]
            for drops in (dropped, complement):
                left = [module * (1 - drop) for module, drop in zip(self.present, drops, strict=True)]
                with self.gated.using(self._units(left)):
                    utility.append(-math.log(perplexity(self.gated, sample.blocks, sample.batch_size)))
                rows.append(torch.cat([m[units > 0] for m, units in zip(left, considered, strict=True)]))
                bar.update()
        places = [torch.cartesian_prod(torch.tensor([i]), c.nonzero()[:, 0]) for i, c in enumerate(considered)]
        return _Draw(torch.cat(places), torch.stack(rows).double(), torch.tensor(utility, dtype=torch.float64))

    def _drop(self, prior: torch.Tensor, present: torch.Tensor, considered: torch.Tensor) -> torch.Tensor:
        """Draws what a sub-model drops of a module: 1 where a unit goes."""
        available = int(considered.sum())
        dropped = torch.zeros_like(present)
        if available == 1:  # half of one, such as of three KV heads: a coin for each module, or all would go together
            return considered * float(torch.rand((), generator=self.generator) < 0.5)
        if available:
            chances = (prior.max() - prior).clamp(min=float(prior.max()) * 1e-6 + 1e-30) * considered
            count = min(int(PRUNED_PER_ROUND * float(present.sum())) + 1, available)
            dropped[torch.multinomial(chances, count, generator=self.generator)] = 1.0
        return dropped

    def _remove(self, draw: _Draw) -> None:
        """Removes the units of the lowest coefficients, at least one."""
        order = coefficients(draw.present, draw.utility).argsort(stable=True)
        removed = 0
        for rank, (module, place) in enumerate(draw.places[order].tolist()):
            if removed and removed + self.costs[module] > PRUNED_PER_ROUND * self.total:
                break
            removed += self.costs[module]
            self.present[module][place] = 0.0
            self.scores[module][place] = self.rounds + rank / len(order)


def _considered(prior: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
    """Marks a module's units of the lowest prior: twice the share that a round prunes; the others are left alone."""
    active = int(present.sum())
    count = active - int(active * (1 - 2 * PRUNED_PER_ROUND))
    places = torch.where(present > 0, prior, math.inf).argsort(stable=True)[:count]
    return torch.zeros_like(present).index_fill_(0, places, 1.0)


def coefficients(present: torch.Tensor, utility: torch.Tensor) -> torch.Tensor:
    """Returns the ridge regression of the utility on what is present, the strength chosen by leave-one-out error.

    Args:
        present: 0 or 1, shape ``(sub_models, units)``, float64.
        utility: Shape ``(sub_models,)``, float64.

    Returns:
        A coefficient for each unit, shape ``(units,)``: what its presence is worth.
    """
    x, y = present - present.mean(0), utility - utility.mean()
    values, vectors = torch.linalg.eigh(x @ x.T)  # few sub-models, many units: the dual form
    values = values.clamp(min=0)
    projected = vectors.T @ y
    scale = values.mean().clamp(min=1e-12)
    best, fitted = math.inf, projected
    for ridge in RIDGES:
        shrunk = 1 / (values + ridge * scale)
        # Residual over (1 - leverage), the mean's 1 / n in it; in the dual: alpha_i over the inverse's diagonal.
        left_out = (vectors @ (shrunk * projected)) / (vectors.square() @ shrunk - 1 / (len(y) * ridge * scale))
        error = float(left_out.square().mean())
        if error < best:
            best, fitted = error, shrunk * projected
    return x.T @ (vectors @ fitted)
