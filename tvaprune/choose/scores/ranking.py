"""From raw scores to scores that one threshold can cut, and the score that knows nothing: the floor for all others."""

import math
from collections.abc import Sequence

import torch

from tvaprune.choose.scores.calibration import Calibration
from tvaprune.models.parameters import channel_parameters, counted_parameters, head_parameters
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
    return (places(score).double() + 0.5) / len(score) + HAIR * (num_layers - layer) / num_layers


def places(score: torch.Tensor) -> torch.Tensor:
    """Returns each unit's place in the order of the scores, the lowest first (int64)."""
    return score.argsort(stable=True).argsort()


def layerwise(
    shape: ModelShape,
    target: float,
    attn: Sequence[torch.Tensor],
    inter: Sequence[torch.Tensor],
    last: Sequence[int] = (),
) -> PerUnit:
    """Returns the scores of all layers as ranks within each layer: the same share goes in every one.

    KV heads are few, so their number is rounded once, for all layers alike: those that go come before all channels,
    those that stay after, and a threshold that meets the target falls among the channels.

    Args:
        target: The sparsity that the scores are for.
        attn: A score per KV head, for every layer.
        inter: A score per MLP channel, for every layer.
        last: The layers whose units go only where all others' are not enough.
    """
    kept_heads, layers = heads_kept(shape, target, last), range(shape.num_hidden_layers)
    heads = [
        ranked(attn[layer], layer, len(layers)) + torch.where(places(attn[layer]) < len(attn[layer]) - kept, -2.0, 3.0)
        for layer, kept in zip(layers, kept_heads, strict=True)
    ]
    channels = [ranked(inter[layer], layer, len(layers)) + (layer in last) for layer in layers]
    return per_unit(shape, heads, channels)


def heads_kept(shape: ModelShape, target: float, last: Sequence[int] = ()) -> list[int]:
    """Returns how many KV heads each layer keeps where the same share of parameters goes in all of them.

    What goes of that share is rounded down, as in the released codes of FLAP and LLM-Pruner, but never so far that the
    channels cannot meet the rest of it: one number for the layers in ``last``, one for all others, which go first.
    """
    layers = range(shape.num_hidden_layers)
    widths = zip(shape.num_key_value_heads, shape.intermediate_size, strict=True)
    units = [heads * head_parameters(shape) + channels * channel_parameters(shape) for heads, channels in widths]
    wanted, first = target * counted_parameters(shape), sum(units[i] for i in layers if i not in last)
    share = min(1.0, wanted / first) if first else 0.0
    left = sum(units) - first
    rest = min(1.0, (wanted - share * first) / left) if left else 0.0
    return [_heads_at(shape, i, rest if i in last else share) for i in layers]


def _heads_at(shape: ModelShape, layer: int, share: float) -> int:
    """Returns the KV heads that a layer keeps which loses a share of its units' parameters."""
    heads, head = shape.num_key_value_heads[layer], head_parameters(shape)
    channels = shape.intermediate_size[layer] * channel_parameters(shape)
    left = (1 - share) * (heads * head + channels)
    most, least = math.floor(left / head), math.ceil((left - channels) / head)  # the channels make up for the rest
    kept = heads - math.floor(heads * share + 1e-9)
    return max(0, min(max(kept, least), most, heads))


def random_scores(calibration: Calibration) -> PerUnit:
    """Draws the order of each layer's units: the same share goes everywhere, which units is chance."""
    shape, generator = calibration.shape, torch.Generator().manual_seed(calibration.seed)

    def draw(units: Sequence[int]) -> list[torch.Tensor]:
        return [torch.rand(count, generator=generator) for count in units]

    return layerwise(shape, calibration.target, draw(shape.num_key_value_heads), draw(shape.intermediate_size))
