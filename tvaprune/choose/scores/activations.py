"""Scores from the weights that a unit writes through and the size of what it writes: magnitude and Wanda-sp."""

from tqdm.auto import tqdm

from tvaprune.choose.gated_model import GatedModel
from tvaprune.choose.scores.calibration import Calibration, output_projections, read_inputs
from tvaprune.choose.scores.ranking import by_head, heads_kept, layerwise, places, ranked
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
    gated = GatedModel(calibration.model)
    try:
        for layer, projections in enumerate(tqdm(output_projections(gated.model), desc="Wanda-sp", unit="layer")):
            with gated.using(values):
                output, down = read_inputs(calibration, projections, None)
            attn.append(by_head(output.wanda(), shape))
            inter.append(down.wanda())
            values.attn[layer].copy_(places(attn[-1]) >= len(attn[-1]) - kept_heads[layer])
            values.inter[layer].copy_(ranked(inter[-1]) > calibration.target)
    finally:
        gated.detach_gates()
    return layerwise(shape, calibration.target, attn, inter)
