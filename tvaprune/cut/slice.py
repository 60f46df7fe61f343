"""Keep plan -> narrower model: the one knife that cuts.

Works in place, one module at a time: the peak of memory is the dense model and one weight. Source: method, section 5.3.
"""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from tvaprune.models.families import ModelFamily, ModelShape, family_of
from tvaprune.models.units import head_features
from tvaprune.plan.keep_plan import KeepPlan


class NoAttention(nn.Module):
    """Stands where a layer lost all its KV heads: its output is zero, or the projection's bias if it has one.

    It tells the cache how many tokens passed; a cache counts its length in the first layer, whichever that is.
    """

    def __init__(self, layer_idx: int, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(
        self, hidden_states: torch.Tensor, past_key_values: Any = None, **unused: Any
    ) -> tuple[torch.Tensor, None]:
        """Returns zeros of the shape of ``hidden_states``, plus the bias, and no attention weights."""
        if past_key_values is not None:
            tick = hidden_states.new_zeros(hidden_states.shape[0], 1, hidden_states.shape[1], 1)
            past_key_values.update(tick, tick, self.layer_idx)
        output = torch.zeros_like(hidden_states)
        return (output if self.bias is None else output + self.bias), None


@torch.no_grad()
def apply_plan(model: PreTrainedModel, plan: KeepPlan) -> PreTrainedModel:
    """Slices a stock model in place and returns it; the factors of the plan are left to `tvaprune.cut.fold`.

    The config's sizes follow where all layers agree; the modules' own attributes follow everywhere.
    """
    family = family_of(model.config)
    decoder = getattr(model, family.decoder)
    device = next(model.parameters()).device
    hidden = plan.kept.hidden.to(device)

    embedding, head = getattr(decoder, family.embedding), getattr(model, family.head)
    embedding.weight = _parameter(embedding.weight.index_select(1, hidden), embedding.weight)
    embedding.embedding_dim = len(hidden)
    if plan.shape.tie_word_embeddings:
        head.weight, head.in_features = embedding.weight, len(hidden)
    else:
        _slice_linear(head, columns=hidden)
    _slice_norm(getattr(decoder, family.final_norm), hidden)
    for index, layer in enumerate(getattr(decoder, family.layers)):
        kv_heads, channels = plan.kept.attn[index].to(device), plan.kept.inter[index].to(device)
        _slice_attention(layer, index, family, plan.shape, hidden, kv_heads)
        mlp = getattr(layer, family.mlp)
        _slice_linear(getattr(mlp, family.gate), rows=channels, columns=hidden)
        _slice_linear(getattr(mlp, family.up), rows=channels, columns=hidden)
        _slice_linear(getattr(mlp, family.down), rows=hidden, columns=channels)
        mlp.hidden_size, mlp.intermediate_size = len(hidden), len(channels)
        for norm in (family.attention_norm, family.mlp_norm):
            _slice_norm(getattr(layer, norm), hidden)
        layer.hidden_size = len(hidden)
    _update_config(model.config, plan)
    return model


def _slice_attention(
    layer: nn.Module, index: int, family: ModelFamily, shape: ModelShape, hidden: torch.Tensor, kv_heads: torch.Tensor
) -> None:
    """Cuts a layer's attention to whole KV groups, or replaces it where none is left."""
    attention = getattr(layer, family.attention)
    output = getattr(attention, family.output)
    if len(kv_heads) == 0:
        bias = None if output.bias is None else output.bias.index_select(0, hidden)
        setattr(layer, family.attention, NoAttention(index, bias))
        return
    keys = head_features(kv_heads, shape.head_dim)
    queries = head_features(kv_heads, shape.head_dim * shape.group_size)
    _slice_linear(getattr(attention, family.query), rows=queries, columns=hidden)
    _slice_linear(getattr(attention, family.key), rows=keys, columns=hidden)
    _slice_linear(getattr(attention, family.value), rows=keys, columns=hidden)
    _slice_linear(output, rows=hidden, columns=queries)


def _slice_linear(linear: Any, rows: torch.Tensor | None = None, columns: torch.Tensor | None = None) -> None:
    weight = linear.weight
    if rows is not None:
        weight = weight.index_select(0, rows)
        if linear.bias is not None:
            linear.bias = _parameter(linear.bias.index_select(0, rows), linear.bias)
    if columns is not None:
        weight = weight.index_select(1, columns)
    linear.weight = _parameter(weight, linear.weight)
    linear.out_features, linear.in_features = weight.shape


def _slice_norm(norm: Any, hidden: torch.Tensor) -> None:
    norm.weight = _parameter(norm.weight.index_select(0, hidden), norm.weight)


def _parameter(values: torch.Tensor, like: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(values, requires_grad=like.requires_grad)


def _update_config(config: Any, plan: KeepPlan) -> None:
    config.head_dim = plan.shape.head_dim
    config.hidden_size = plan.hidden_size
    if len(set(plan.num_key_value_heads)) == 1 and plan.num_key_value_heads[0] > 0:
        config.num_key_value_heads = plan.num_key_value_heads[0]
        config.num_attention_heads = plan.num_key_value_heads[0] * plan.shape.group_size
    if len(set(plan.intermediate_size)) == 1:
        config.intermediate_size = plan.intermediate_size[0]
