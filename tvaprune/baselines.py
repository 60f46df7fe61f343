"""One-shot scores of KV heads and MLP channels, in the form of masks: the same file, plan and knife as learned gates.

Hidden dims are kept, as these methods do. A score becomes a mask of mean 1 whose ``log_alpha`` is the negated score, so
`tvaprune.plan.calibrate` finds the threshold for the exact sparsity. The group form under GQA: a KV head's score is the
mean over the ``o_proj`` input features of all query heads that share it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from tvaprune.families import family_of, shape_of
from tvaprune.masks import Masks
from tvaprune.units import PerUnit

ALWAYS_KEPT = 1e3  # a score no threshold reaches
SCORES = ("magnitude", "wanda_sp", "flap")


@dataclass
class _Inputs:
    """Running sums over the inputs of one linear layer; shapes ``(features,)``, float64."""

    weight: torch.Tensor
    total: torch.Tensor
    squares: torch.Tensor
    count: int = 0

    def add(self, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        """Forward pre-hook: adds a batch, shape ``(batch, length, features)``."""
        x = args[0].detach().flatten(0, -2).double()
        self.total += x.sum(0)
        self.squares += x.square().sum(0)
        self.count += len(x)

    @property
    def variance(self) -> torch.Tensor:
        """Variance of each feature around its mean."""
        return (self.squares / self.count - (self.total / self.count).square()).clamp(min=0)


def score_masks(model: PreTrainedModel, method: str, blocks: Dataset, batch_size: int = 4) -> Masks:
    """Scores every KV head and MLP channel.

    Args:
        method: ``magnitude``: the norm of a unit's output weights. ``wanda_sp``: Wanda's ``|W| * ||x||`` (Sun et al.,
            2023) per column, in the structured form of An et al.; both rank within a layer. ``flap``: the fluctuation
            of a unit's input times the squared norm of its weights, standardised per layer and ranked over all layers
            and modules (An et al., FLAP, AAAI 2024, eq. 4-5), without its bias.
        blocks: Calibration windows.
    """
    score = {"magnitude": _magnitude, "wanda_sp": _wanda_sp, "flap": _flap}[method]
    inputs = list(_collect(model, blocks, batch_size, needed=method != "magnitude"))
    shape = shape_of(model.config)
    features = shape.head_dim * shape.group_size
    attn = [score(site).unflatten(0, (-1, features)).mean(1) for site in inputs[0::2]]
    inter = [score(site) for site in inputs[1::2]]
    normalise = _standardised if method == "flap" else _ranked
    kept = torch.full((shape.hidden_size,), ALWAYS_KEPT)
    scores = PerUnit(kept, tuple(map(normalise, attn)), tuple(map(normalise, inter)))
    return Masks(mu=PerUnit.full(shape, 1.0), log_variance=scores.map(lambda score: -score.float().cpu()))


@torch.inference_mode()
def _collect(model: PreTrainedModel, blocks: Dataset, batch_size: int, needed: bool) -> Iterator[_Inputs]:
    """Yields the input sums of each layer's ``o_proj`` and ``down_proj``, in turn."""
    family = family_of(model.config)
    sites = []
    for layer in getattr(getattr(model, family.decoder), family.layers):
        sites.append(getattr(getattr(layer, family.attention), family.output))
        sites.append(getattr(getattr(layer, family.mlp), family.down))
    zeros = [torch.zeros(site.in_features, dtype=torch.float64, device=site.weight.device) for site in sites]
    sums = [_Inputs(site.weight.double(), zero, zero.clone()) for site, zero in zip(sites, zeros, strict=True)]
    handles = [site.register_forward_pre_hook(entry.add) for site, entry in zip(sites, sums, strict=True)]
    try:
        for start in tqdm(range(0, len(blocks), batch_size), desc="calibrating", disable=not needed, unit="batch"):
            if needed:
                ids = blocks[start : start + batch_size]["input_ids"]
                model(input_ids=ids.to(sites[0].weight.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    yield from sums


def _magnitude(site: _Inputs) -> torch.Tensor:
    return site.weight.norm(dim=0)


def _wanda_sp(site: _Inputs) -> torch.Tensor:
    return site.weight.abs().mean(0) * site.squares.sqrt()


def _flap(site: _Inputs) -> torch.Tensor:
    return site.variance * site.weight.square().sum(0)


def _standardised(score: torch.Tensor) -> torch.Tensor:
    return (score - score.mean()) / score.std().clamp(min=1e-12)


def _ranked(score: Any) -> torch.Tensor:
    """Returns the rank within the layer as a share of its units, so that one threshold cuts all layers alike."""
    ranks = score.argsort().argsort().double()
    return (ranks + 0.5) / len(score)
