"""LLM-Pruner: how much the loss would change, to first order, if a group's weights were zero.

Source: Ma et al., LLM-Pruner (NeurIPS 2023), section 3.2.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from tvaprune.choose.scores.calibration import Calibration
from tvaprune.choose.scores.ranking import layerwise, per_unit
from tvaprune.models.families import family_of
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
    its rows of ``gate_proj`` and ``up_proj`` and its column of ``down_proj``; a KV head is its rows of ``k_proj`` and
    ``v_proj``, the rows of ``q_proj`` of all query heads that share it and their columns of ``o_proj``. Within a group
    importances are added: the default of the released code, and of the paper's four the one that counts every weight.

    What differs from the released code: its script for grouped queries scores KV head ``j`` with the query heads
    ``j, j + n_kv, ...``, this with those that share it; it scores on 10 windows of 64 tokens, this on all of the
    calibration text.
    """
    model, shape = calibration.model, calibration.shape
    layers = [_linears(layer, model) for layer in _layers(model)]
    with _trainable(model, [linear.weight for layer in layers for linear in layer.values()]):
        for ids in calibration.batches("Taylor"):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            (loss * len(ids) / len(calibration.blocks)).backward()
        attn = [_heads(layer, shape.num_key_value_heads) for layer in layers]
        inter = [_rows(layer["gate"]) + _rows(layer["up"]) + _columns(layer["down"]) for layer in layers]
    return attn, inter


def _layers(model: PreTrainedModel) -> Any:
    family = family_of(model.config)
    return getattr(getattr(model, family.decoder), family.layers)


def _linears(layer: Any, model: PreTrainedModel) -> dict[str, Any]:
    """Returns a layer's seven projections by the names of a family's row."""
    family = family_of(model.config)
    attention, mlp = getattr(layer, family.attention), getattr(layer, family.mlp)
    names = {attention: ("query", "key", "value", "output"), mlp: ("gate", "up", "down")}
    return {name: getattr(part, getattr(family, name)) for part, parts in names.items() for name in parts}


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


def _heads(layer: dict[str, Any], num_key_value_heads: int) -> torch.Tensor:
    """Adds up each KV head's group; its rows and columns stand side by side in all four projections."""
    features = (_rows(layer["query"]), _rows(layer["key"]), _rows(layer["value"]), _columns(layer["output"]))
    return torch.stack([sums.unflatten(0, (num_key_value_heads, -1)).sum(1) for sums in features]).sum(0)


def _rows(linear: Any) -> torch.Tensor:
    return _salience(linear).sum(1, dtype=torch.float64)


def _columns(linear: Any) -> torch.Tensor:
    return _salience(linear).sum(0, dtype=torch.float64)


def _salience(linear: Any) -> torch.Tensor:
    return (linear.weight.detach().float() * linear.weight.grad.float()).abs()
