"""The instant weight update: the learned means of the kept gates go into the weights of the sliced model.

Source: method, section 5.1. Each factor enters once: the hidden means where a block writes to the residual stream, the
means of heads and channels where ``o_proj`` and ``down_proj`` read them.
"""

from typing import Any

import torch
from transformers import PreTrainedModel

from tvaprune.models.families import family_of
from tvaprune.plan.keep_plan import KeepPlan


@torch.no_grad()
def fold(model: PreTrainedModel, plan: KeepPlan) -> PreTrainedModel:
    """Multiplies a model that was sliced by ``plan`` by the plan's factors, in place, and returns it.

    With tied embeddings the factor must not reach the lm_head: the final norm is divided by it, which keeps the tie
    exactly, ``(n w / mu) @ (E mu).T = (n w) @ E.T``.
    """
    family = family_of(model.config)
    decoder = getattr(model, family.decoder)
    embedding = getattr(decoder, family.embedding)
    scale = plan.scale.map(lambda values: values.to(embedding.weight.device))
    _multiply(embedding.weight, scale.hidden)
    if plan.shape.tie_word_embeddings:
        _multiply(getattr(decoder, family.final_norm).weight, 1 / scale.hidden)
    features = plan.shape.head_dim * plan.shape.group_size
    for layer, attn, inter in zip(getattr(decoder, family.layers), scale.attn, scale.inter, strict=True):
        attention = getattr(layer, family.attention)
        if len(attn):
            _fold_linear(getattr(attention, family.output), scale.hidden, attn.repeat_interleave(features))
        elif attention.bias is not None:
            _multiply(attention.bias, scale.hidden)
        _fold_linear(getattr(getattr(layer, family.mlp), family.down), scale.hidden, inter)
    return model


def _fold_linear(linear: Any, rows: torch.Tensor, columns: torch.Tensor) -> None:
    linear.weight.copy_(linear.weight.float() * rows.unsqueeze(1) * columns)  # one rounding, in the weights' own dtype
    if linear.bias is not None:
        _multiply(linear.bias, rows)


def _multiply(weight: torch.Tensor, factors: torch.Tensor) -> None:
    weight.copy_(weight.float() * factors)
