"""LLM-Pruner: how much the loss would change, to first order, if a group's weights were zero.

Source: Ma et al., LLM-Pruner (NeurIPS 2023), section 3.2.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from tvaprune import ranks
from tvaprune.choose.scores.calibration import Calibration, both_blocks
from tvaprune.choose.scores.ranking import layerwise, per_unit
from tvaprune.losses import cross_entropy
from tvaprune.models.layout import Block
from tvaprune.models.logits import predictions
from tvaprune.models.units import PerUnit

# LLM-Pruner leaves the first 4 and the last 2 of 32 layers alone; shares, for other depths.
PROTECTED_FIRST, PROTECTED_LAST = 4 / 32, 2 / 32


def taylor_scores(calibration: Calibration) -> PerUnit:
    """Scores by `group_importance`, ranked within each layer, as LLM-Pruner's released command lines do.

    They also leave the first 4 and the last 2 of 32 layers unpruned, since the loss is most sensitive there; here that
    share of the layers goes after all others, so that a target which the others cannot meet is met.
    """
    shape = calibration.shape
    attn, inter = group_importance(calibration)
    return layerwise(shape, calibration.target, attn, inter, last=protected_layers(shape.num_hidden_layers))


def taylor_global_scores(calibration: Calibration) -> PerUnit:
    """Scores by the log of `group_importance`, ranked over all layers and both kinds of unit at once.

    The released code's ``--global_pruning``, without layers left alone. Not what its command lines run; here because on
    the miniature Mistral it is far better, and a baseline should be given a form that suits the model.
    """
    attn, inter = group_importance(calibration)

    def logs(layers: list[torch.Tensor]) -> list[torch.Tensor]:
        return [importance.clamp(min=torch.finfo(torch.float64).tiny).log() for importance in layers]

    return per_unit(calibration.shape, logs(attn), logs(inter))


def protected_layers(num_layers: int) -> list[int]:
    """Returns the layers that `taylor_scores` prunes after all others: of 32, the first 4 and the last 2."""
    first, last = round(PROTECTED_FIRST * num_layers), round(PROTECTED_LAST * num_layers)
    return [*range(first), *range(num_layers - last, num_layers)]


def group_importance(calibration: Calibration) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Returns ``sum |w * dL/dw|`` over all weights that go with each layer's KV heads and MLP channels (float64).

    Element-wise and first-order (the paper's "Element^1", its eq. 5 without the second-order term: what its command
    line runs), ``dL/dw`` being the gradient of the mean loss over all calibration windows. Groups: an MLP channel is
    its rows of the gate and up projections and its column of the down projection; a KV head is its rows of the key and
    value projections, the rows of the query projection of all query heads that share it and their columns of the output
    projection. Within a group importances are added: the default of the released code, and of the paper's four the one
    that counts every weight.

    What differs from the released code: its script for grouped queries scores KV head ``j`` with the query heads
    ``j, j + n_kv, ...``, this with those that share it; it scores on 10 windows of 64 tokens, this on all of the
    calibration text.
    """
    model, shape = calibration.model, calibration.shape
    layers = both_blocks(model)
    paths = {path for layer in layers for block in layer for path in (*block.reading_linears, block.writer)}
    with _trainable(model, [model.get_parameter(f"{path}.weight") for path in paths]):
        for ids in calibration.batches("Taylor"):
            loss = cross_entropy(predictions(model, input_ids=ids, use_cache=False)[0], ids)
            (loss * len(ids) / len(calibration.blocks)).backward()
        for path in sorted(paths):
            ranks.add_up(_gradient(model, path))
        width = {"query": shape.group_size * shape.head_dim, "key": shape.head_dim, "value": shape.head_dim}
        attn = [_group(model, attention, width) for attention, _ in layers]
        inter = [_group(model, mlp, dict.fromkeys(mlp.readers, 1)) for _, mlp in layers]
    return attn, inter


def _group(model: PreTrainedModel, block: Block, width: Mapping[str, int]) -> torch.Tensor:
    """Adds up what belongs to each unit of a block, whose rows and columns stand side by side in all projections.

    Args:
        width: Rows of a unit in each reading projection; in the writer it has as many columns as the first has rows.
    """
    features = []
    for role, reader in block.readers.items():
        rows = _salience(model, reader.path).sum(1, dtype=torch.float64)[reader.start : reader.stop]
        features.append(rows.unflatten(0, (-1, width[role])))
    features.append(_salience(model, block.writer).sum(0, dtype=torch.float64).view_as(features[0]))
    return torch.stack([sums.sum(1) for sums in features]).sum(0)


@contextmanager
def _trainable(model: PreTrainedModel, weights: list[torch.nn.Parameter]) -> Iterator[None]:
    """Lets only these weights have gradients: one more copy of the decoder's projections, no more."""
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.requires_grad_(False)
    try:
        for weight in weights:
            weight.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for parameter, required in before.items():
            parameter.requires_grad_(required)
            parameter.grad = None


def _salience(model: PreTrainedModel, path: str) -> torch.Tensor:
    weight = model.get_parameter(f"{path}.weight")
    return (weight.detach().float() * _gradient(model, path).float()).abs()


def _gradient(model: PreTrainedModel, path: str) -> torch.Tensor:
    weight = model.get_parameter(f"{path}.weight")
    if weight.grad is None:  # a process that no block fell to
        weight.grad = torch.zeros_like(weight)
    return weight.grad
