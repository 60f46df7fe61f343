"""Keep plan -> narrower model: the one knife that cuts.

Works in place, one module at a time: the peak of memory is the dense model and one weight. Source: method, section 5.3.
"""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from tvaprune.models.families import family_of
from tvaprune.plan.edits import Edit, edits_of
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
    family, tied = family_of(model.config), plan.shape.tie_word_embeddings
    head: Any = getattr(model, family.head)
    if tied:
        head.weight = None  # it is the embedding, and would hold the dense one
    for name, edit in edits_of(plan, family, next(model.parameters()).device).items():
        _cut(model, name, edit)
    if tied:
        head.weight, head.in_features = model.get_parameter(f"{family.embedding_path}.weight"), plan.hidden_size
    for index, layer in enumerate(getattr(getattr(model, family.decoder), family.layers)):
        if plan.num_key_value_heads[index] == 0:
            output = getattr(getattr(layer, family.attention), family.output)
            setattr(layer, family.attention, NoAttention(index, output.bias))
        mlp = getattr(layer, family.mlp)
        layer.hidden_size = mlp.hidden_size = plan.hidden_size
        mlp.intermediate_size = plan.intermediate_size[index]
    _update_config(model.config, plan)
    return model


def narrow_parameter(model: PreTrainedModel, name: str) -> torch.Tensor | None:
    """Returns a sliced model's parameter by its stock name; None: it went with its layer's attention.

    The bias of an output projection outlives the attention: `NoAttention` keeps it.
    """
    module, _, kind = name.rpartition(".")
    parent, _, role = module.rpartition(".")
    owner = model.get_submodule(parent)
    if isinstance(owner, NoAttention):
        return owner.bias if (role, kind) == (family_of(model.config).output, "bias") else None
    return model.get_parameter(name)


def _cut(model: PreTrainedModel, name: str, edit: Edit) -> None:
    """Replaces a parameter by its kept rows and columns; nothing holds the dense one past this call."""
    path, _, kind = name.rpartition(".")
    module: Any = model.get_submodule(path)
    dense = getattr(module, kind)
    weight = dense if edit.rows is None else dense.index_select(0, edit.rows)
    weight = weight if edit.columns is None else weight.index_select(1, edit.columns)
    setattr(module, kind, nn.Parameter(weight, requires_grad=dense.requires_grad))
    if isinstance(module, nn.Embedding):
        module.embedding_dim = weight.shape[1]
    elif isinstance(module, nn.Linear) and kind == "weight":
        module.out_features, module.in_features = weight.shape


def _update_config(config: Any, plan: KeepPlan) -> None:
    config.head_dim = plan.shape.head_dim
    config.hidden_size = plan.hidden_size
    if len(set(plan.num_key_value_heads)) == 1 and plan.num_key_value_heads[0] > 0:
        config.num_key_value_heads = plan.num_key_value_heads[0]
        config.num_attention_heads = plan.num_key_value_heads[0] * plan.shape.group_size
    if len(set(plan.intermediate_size)) == 1:
        config.intermediate_size = plan.intermediate_size[0]
