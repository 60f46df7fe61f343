"""Wanda-sp's walk by halves of layers: what whole passes through the model give, in two passes of each layer."""

import pytest
import torch
from support.families import MORE_ROWS, ROWS
from support.other_families import OTHER_ROWS
from support.scored import BLOCKS

from tvaprune.choose.gated_model import GatedModel
from tvaprune.choose.scores import score_masks
from tvaprune.choose.scores.activations import wanda_sp_scores
from tvaprune.choose.scores.calibration import Calibration, output_projections, read_inputs
from tvaprune.choose.scores.ranking import by_head, heads_kept, layerwise, places, ranked
from tvaprune.errors import InputError
from tvaprune.models.shape import shape_of
from tvaprune.models.units import PerUnit


@pytest.mark.parametrize("row", ROWS | MORE_ROWS | OTHER_ROWS)
def test_wandas_walk_gives_what_whole_passes_give(row, make_model, other_families):
    """Of each family: norms past a block, parallel blocks, fused projections; what is not scored is refused."""
    model_type, values = (ROWS | MORE_ROWS | OTHER_ROWS)[row]
    model = make_model(model_type, **values)
    shape, calibration = shape_of(model.config), Calibration(model, BLOCKS, 0.5, 0, 4)
    if any(shape.experts) or "without attention" in row:
        with pytest.raises(InputError, match="the one-shot scores compare the two layer by layer"), torch.no_grad():
            wanda_sp_scores(calibration)
        return
    with torch.no_grad():
        found = wanda_sp_scores(calibration)
    kept, heads, gated = PerUnit.full(shape, 1.0), heads_kept(shape, 0.5), GatedModel(model)
    attn, inter, plain = [], [], []
    for layer, projections in enumerate(output_projections(model)):
        with gated.using(kept):
            output, down = read_inputs(calibration, projections, None)
        with gated.off():
            plain.append(read_inputs(calibration, projections, None)[1].wanda())
        attn.append(by_head(output.wanda(), shape))
        inter.append(down.wanda())
        kept.attn[layer].copy_(places(attn[-1]) >= len(attn[-1]) - heads[layer])
        kept.inter[layer].copy_(ranked(inter[-1]) > 0.5)
    gated.detach_gates()
    expected, unpruned = (layerwise(shape, 0.5, attn, sums) for sums in (inter, plain))
    for mine, whole in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, whole)
    assert not torch.equal(found.inter[-1], unpruned.inter[-1])  # control: what is pruned before matters


def test_wanda_passes_each_layer_twice_whatever_their_number(make_model):
    model, calls = make_model("llama", num_hidden_layers=6), []
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda module, args, output: calls.append(module))
    score_masks(model, "wanda_sp", BLOCKS, batch_size=len(BLOCKS))
    assert [calls.count(layer.mlp) for layer in model.model.layers] == [2] * 6
    model(BLOCKS[:]["input_ids"])
    assert len(calls) == 6 * 3  # control: it is called
