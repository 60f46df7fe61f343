"""Scores from the weights that a unit writes through and the size of what it writes: magnitude and Wanda-sp."""

from collections.abc import Iterator

import torch
from tqdm.auto import tqdm

from tvaprune.choose.gated_model import GatedModel
from tvaprune.choose.scores.calibration import Calibration, both_blocks, output_projections, summed_inputs
from tvaprune.choose.scores.ranking import by_head, heads_kept, layerwise, places, ranked
from tvaprune.models.layers import Half, Layers, attention_options, embed
from tvaprune.models.units import PerUnit


def magnitude_scores(calibration: Calibration) -> PerUnit:
    """Scores a unit by the norm of its columns of the output or down projection, ranked within each layer.

    Source: the structured magnitude baseline of An et al. (FLAP, AAAI 2024): a column's 2-norm, averaged over a head;
    the same share of units goes in every layer. Reads no text.
    """
    shape = calibration.shape
    projections = output_projections(calibration.model)
    attn = [by_head(output.weight.double().norm(dim=0), shape) for output, _ in projections]
    inter = [down.weight.double().norm(dim=0) for _, down in projections]
    return layerwise(shape, calibration.target, attn, inter)


def wanda_sp_scores(calibration: Calibration) -> PerUnit:
    """Scores a unit by ``|W| * ||x||`` of its columns of the output or down projection, ranked within each layer.

    Source: Wanda (Sun et al., ICLR 2024, eq. 1) in the structured form of An et al. (FLAP, AAAI 2024): averaged over
    the rows of a column and the columns of a head. The same share of units goes in every layer. As in Wanda's
    procedure (section 3), layers are walked in order: each is scored on what comes out of the layers before it, pruned.
    As in the code released with FLAP the number of heads that go is rounded down; here the channels meet the target.
    """
    shape = calibration.shape
    values, kept_heads = PerUnit.full(shape, 1.0), heads_kept(shape, calibration.target)
    attn, inter = [], []
    gated, layers = GatedModel(calibration.model), Layers(calibration.model)
    try:
        with gated.using(values):
            options = attention_options(layers, len(calibration.blocks[0]["input_ids"]))
            states = [_embedded(layers, ids, shape.hidden_size) for ids in calibration.batches(None)]
        for layer, pair in enumerate(tqdm(both_blocks(gated.model), desc="Wanda-sp", unit="layer")):
            halves = [Half.of(layers, block, given) for block, given in zip(pair, (options[layer], {}), strict=True)]
            with gated.using(values), summed_inputs([half.writer for half in halves]) as (output, down):
                for _ in _passed(halves, states):
                    pass
            attn.append(by_head(output.wanda(), shape))
            inter.append(down.wanda())
            values.attn[layer].copy_(places(attn[-1]) >= len(attn[-1]) - kept_heads[layer])
            values.inter[layer].copy_(ranked(inter[-1]) > calibration.target)
            with gated.using(values):
                for before, past in zip(states, _passed(halves, states), strict=True):
                    before.copy_(past)
    finally:
        gated.detach_gates()
    return layerwise(shape, calibration.target, attn, inter)


def _embedded(layers: Layers, ids: torch.Tensor, width: int) -> torch.Tensor:
    """Returns the states of a batch before the first layer."""
    room = layers.room_of(ids, width)
    embed(layers, [ids], [room])
    return room


def _passed(halves: list[Half], states: list[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Yields the states past some halves, batch by batch."""
    for hidden in states:
        for half in halves:
            hidden = half(hidden)
        yield hidden
