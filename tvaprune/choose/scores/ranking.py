"""From raw scores to scores that one threshold can cut, and the score that knows nothing: the floor for all others."""

from collections.abc import Sequence

import torch

from tvaprune.choose.scores.calibration import Calibration
from tvaprune.models.shape import ModelShape
from tvaprune.models.units import PerUnit

ALWAYS_KEPT = 1e3  # a score no threshold reaches
HAIR = 2e-5  # less than the step between two ranks, more than float32 loses, for all layers together


def per_unit(shape: ModelShape, attn: Sequence[torch.Tensor], inter: Sequence[torch.Tensor]) -> PerUnit:
    """Returns the scores of all layers' KV heads and MLP channels, hidden dims kept."""
    return PerUnit(torch.full((shape.hidden_size,), ALWAYS_KEPT), tuple(attn), tuple(inter))


def by_head(features: torch.Tensor, shape: ModelShape) -> torch.Tensor:
    """Returns the mean over each KV head's features before the output projection, those of all its query heads.

    Args:
        features: Shape ``(query heads of the layer * head_dim,)``.
    """
    return features.unflatten(0, (-1, shape.group_size * shape.head_dim)).mean(1)


def ranked(score: torch.Tensor, layer: int = 0, num_layers: int = 1) -> torch.Tensor:
    """Returns the rank within the layer as a share of its units, so that one threshold cuts all layers alike.

    Equal ranks differ by a hair, the last layer's the lowest, so that the threshold can fall between layers.
    """
    ranks = score.argsort(stable=True).argsort().double()
    return (ranks + 0.5) / len(score) + HAIR * (num_layers - layer) / num_layers


def layerwise(shape: ModelShape, attn: Sequence[torch.Tensor], inter: Sequence[torch.Tensor]) -> PerUnit:
    """Returns the scores of all layers as ranks within each layer: the same share goes in every one."""

    def ranks(layers: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return [ranked(score, layer, len(layers)) for layer, score in enumerate(layers)]

    return per_unit(shape, ranks(attn), ranks(inter))


def random_scores(calibration: Calibration) -> PerUnit:
    """Draws the order of each layer's units: the same share goes everywhere, which units is chance."""
    shape, generator = calibration.shape, torch.Generator().manual_seed(calibration.seed)

    def draw(units: Sequence[int]) -> list[torch.Tensor]:
        return [torch.rand(count, generator=generator) for count in units]

    return layerwise(shape, draw(shape.num_key_value_heads), draw(shape.intermediate_size))
