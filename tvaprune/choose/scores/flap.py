"""FLAP: a unit whose output hardly fluctuates is replaced by its mean.

Source: An et al., Fluctuation-based Adaptive Structured Pruning for Large Language Models (AAAI 2024), and its released
code where the two differ.
"""

import torch
from datasets import Dataset
from transformers import PreTrainedModel

from tvaprune.choose.scores.calibration import Calibration, InputSums, both_blocks, output_projections, read_inputs
from tvaprune.choose.scores.ranking import ALWAYS_KEPT, by_head, per_unit
from tvaprune.models.families import family_of
from tvaprune.models.units import PerUnit
from tvaprune.plan.edits import edits_of
from tvaprune.plan.keep_plan import KeepPlan


def flap_scores(calibration: Calibration) -> PerUnit:
    """Scores a unit by the variance of its input times the squared norm of its weights, compared over all layers.

    The paper's WIFV metric and AL-AM structure: scores are standardised over the input features of each module, then
    averaged over a KV head's features, and one threshold serves all heads and channels of all layers; a head counts
    against the target with all its parameters, as everywhere here. As in the released code the metric of the output
    projection is squared before it is standardised. A module that never fluctuates has no spread to be measured by:
    its units go before all others.
    """
    shape = calibration.shape
    linears = [linear for pair in output_projections(calibration.model) for linear in pair]
    sums = read_inputs(calibration, linears, "FLAP")
    attn = [by_head(_standardised(_fluctuation(entry).square()), shape) for entry in sums[0::2]]
    inter = [_standardised(_fluctuation(entry)) for entry in sums[1::2]]
    return per_unit(shape, attn, inter)


def _fluctuation(entry: InputSums) -> torch.Tensor:
    return entry.variance * entry.linear.weight.double().square().sum(0)


def _standardised(score: torch.Tensor) -> torch.Tensor:
    if not bool(score.any()):
        return torch.full_like(score, -ALWAYS_KEPT)
    return (score - score.mean()) / score.std().clamp(min=torch.finfo(score.dtype).tiny)


@torch.no_grad()
def compensate_bias(model: PreTrainedModel, plan: KeepPlan, blocks: Dataset, batch_size: int = 4) -> PreTrainedModel:
    """Adds the mean contribution of the units that a plan removes to the biases of an unpruned model, in place.

    The paper's baseline bias compensation, ``b += sum_j E[x_j] W[:, j]`` over the removed input features ``j`` of
    the output and down projections. Where these carry no bias nothing is added: an architecture gets no new parameters.
    Comes before `tvaprune.cut.slice.apply_plan`, which cuts the biases with everything else.
    """
    calibration = Calibration(model, blocks, plan.sparsity, 0, batch_size)
    edits = edits_of(plan, family_of(model.config), model.device)
    writers = [block.writer for pair in both_blocks(model) for block in pair]
    writers = [path for path in writers if model.get_submodule(path).bias is not None]
    if writers:
        sums = read_inputs(calibration, [model.get_submodule(path) for path in writers], "FLAP's bias")
        for path, entry in zip(writers, sums, strict=True):
            lost, linear = entry.mean, entry.linear
            edit = edits[f"{path}.weight"].on(lost.device)
            if edit.columns is not None and edit.constant:  # a stand-in for what is lost passes nothing on
                lost = lost.index_fill(0, edit.columns, 0.0)
            linear.bias.copy_(linear.bias.double() + linear.weight.double() @ lost)
    return model
