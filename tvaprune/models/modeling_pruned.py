"""Llama, Mistral, Qwen2 and Qwen3 whose layers differ in width; a checkpoint carries a copy of this file.

It needs transformers (4.57 or later) and nothing else. The widths are ``per_layer_config`` of the config: transformers'
own key from 5.14 on, read here as plain JSON before that. All the arithmetic is the stock classes'.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from huggingface_hub.dataclasses import strict
from torch import nn
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer, LlamaForCausalLM, LlamaModel
from transformers.models.mistral.configuration_mistral import MistralConfig
from transformers.models.mistral.modeling_mistral import (
    MistralAttention,
    MistralDecoderLayer,
    MistralForCausalLM,
    MistralModel,
)
from transformers.models.qwen2.configuration_qwen2 import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, Qwen2DecoderLayer, Qwen2ForCausalLM, Qwen2Model
from transformers.models.qwen3.configuration_qwen3 import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3DecoderLayer, Qwen3ForCausalLM, Qwen3Model


def layer_config(config: Any, layer_idx: int) -> Any:
    """Returns the config of one layer: a copy that holds the layer's own widths."""
    if hasattr(config, "is_heterogeneous"):
        return config.per_layer_config[layer_idx]
    layer = copy.copy(config)
    for key, overrides in (getattr(config, "per_layer_config", None) or {}).items():
        if int(key) == layer_idx:
            layer.__dict__.update(overrides)
    return layer


@contextmanager
def _globals_readable(config: Any) -> Iterator[None]:
    """Lets stock code read the global widths, which transformers forbids: scaled rotary settings do before they ask."""
    if not hasattr(config, "is_heterogeneous"):
        yield
        return
    config.allow_global_per_layer_attribute_access = True
    try:
        yield
    finally:
        config.__dict__.pop("allow_global_per_layer_attribute_access", None)  # else it would be saved


@contextmanager
def _without_layers(config: Any) -> Iterator[None]:
    """Lets a stock constructor build everything but the layers, which it would build from the global widths."""
    depth = config.num_hidden_layers
    config.num_hidden_layers = 0
    try:
        with _globals_readable(config):
            yield
    finally:
        config.num_hidden_layers = depth


def _rebuilt(config_class: Any) -> Any:
    """Collects the validators of a config class anew where transformers has any (from 5 on)."""
    return strict(config_class) if hasattr(config_class, "__dataclass_fields__") else config_class


class _PrunedConfig:
    """Writes the rotary settings in the words of transformers 4 as well, which reads no ``rope_parameters``."""

    def validate_rope(self) -> None:
        """Checks the rotary settings, some of which are held against the global widths."""
        with _globals_readable(self):
            super().validate_rope()  # type: ignore[misc]

    def to_dict(self) -> dict[str, Any]:
        """Returns the config as plain values."""
        values: dict[str, Any] = super().to_dict()  # type: ignore[misc]
        rope = dict(values.get("rope_parameters") or {})
        if "rope_theta" in rope:
            values["rope_theta"] = rope.pop("rope_theta")
            values["rope_scaling"] = None if rope.get("rope_type", "default") == "default" else rope
        return values


class _PrunedLayer(nn.Module):
    """A stock decoder layer at the widths of its place."""

    self_attn: Any

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(layer_config(config, layer_idx), layer_idx)
        self.self_attn.config = config  # the copy would miss a later set_attn_implementation


class _PrunedModel(nn.Module):
    """A stock decoder whose layers are of ``layer_class``."""

    layer_class: Any
    rotary_emb: Any
    post_init: Any

    def __init__(self, config: Any) -> None:
        with _without_layers(config):
            super().__init__(config)
        self.rotary_emb.config = layer_config(config, 0)  # read again where the frequencies follow the text's length
        self.layers = nn.ModuleList(self.layer_class(config, index) for index in range(config.num_hidden_layers))
        self.post_init()


class _PrunedForCausalLM(nn.Module):
    """A stock language model whose decoder is of ``model_class``."""

    model_class: Any
    post_init: Any

    def __init__(self, config: Any) -> None:
        with _without_layers(config):
            super().__init__(config)
        self.model = self.model_class(config)
        self.post_init()


@_rebuilt
class PrunedLlamaConfig(_PrunedConfig, LlamaConfig):
    """Llama with per-layer widths."""

    model_type = "pruned_llama"

    def validate_architecture(self) -> None:
        """Checks nothing: a pruned hidden width need not be a multiple of the number of heads."""


class PrunedLlamaDecoderLayer(_PrunedLayer, LlamaDecoderLayer):
    """A Llama layer at its own widths."""


class PrunedLlamaModel(_PrunedModel, LlamaModel):
    """The decoder."""

    config_class = PrunedLlamaConfig
    layer_class = PrunedLlamaDecoderLayer
    _no_split_modules = ["PrunedLlamaDecoderLayer"]
    _can_record_outputs = {"hidden_states": PrunedLlamaDecoderLayer, "attentions": LlamaAttention}


class PrunedLlamaForCausalLM(_PrunedForCausalLM, LlamaForCausalLM):
    """The language model."""

    config_class = PrunedLlamaConfig
    model_class = PrunedLlamaModel
    _no_split_modules = ["PrunedLlamaDecoderLayer"]


@_rebuilt
class PrunedMistralConfig(_PrunedConfig, MistralConfig):
    """Mistral with per-layer widths."""

    model_type = "pruned_mistral"


class PrunedMistralDecoderLayer(_PrunedLayer, MistralDecoderLayer):
    """A Mistral layer at its own widths."""


class PrunedMistralModel(_PrunedModel, MistralModel):
    """The decoder."""

    config_class = PrunedMistralConfig
    layer_class = PrunedMistralDecoderLayer
    _no_split_modules = ["PrunedMistralDecoderLayer"]
    _can_record_outputs = {"hidden_states": PrunedMistralDecoderLayer, "attentions": MistralAttention}


class PrunedMistralForCausalLM(_PrunedForCausalLM, MistralForCausalLM):
    """The language model."""

    config_class = PrunedMistralConfig
    model_class = PrunedMistralModel
    _no_split_modules = ["PrunedMistralDecoderLayer"]


@_rebuilt
class PrunedQwen2Config(_PrunedConfig, Qwen2Config):
    """Qwen2 with per-layer widths."""

    model_type = "pruned_qwen2"


class PrunedQwen2DecoderLayer(_PrunedLayer, Qwen2DecoderLayer):
    """A Qwen2 layer at its own widths."""


class PrunedQwen2Model(_PrunedModel, Qwen2Model):
    """The decoder."""

    config_class = PrunedQwen2Config
    layer_class = PrunedQwen2DecoderLayer
    _no_split_modules = ["PrunedQwen2DecoderLayer"]
    _can_record_outputs = {"hidden_states": PrunedQwen2DecoderLayer, "attentions": Qwen2Attention}


class PrunedQwen2ForCausalLM(_PrunedForCausalLM, Qwen2ForCausalLM):
    """The language model."""

    config_class = PrunedQwen2Config
    model_class = PrunedQwen2Model
    _no_split_modules = ["PrunedQwen2DecoderLayer"]


@_rebuilt
class PrunedQwen3Config(_PrunedConfig, Qwen3Config):
    """Qwen3 with per-layer widths."""

    model_type = "pruned_qwen3"


class PrunedQwen3DecoderLayer(_PrunedLayer, Qwen3DecoderLayer):
    """A Qwen3 layer at its own widths."""


class PrunedQwen3Model(_PrunedModel, Qwen3Model):
    """The decoder."""

    config_class = PrunedQwen3Config
    layer_class = PrunedQwen3DecoderLayer
    _no_split_modules = ["PrunedQwen3DecoderLayer"]
    _can_record_outputs = {"hidden_states": PrunedQwen3DecoderLayer, "attentions": Qwen3Attention}


class PrunedQwen3ForCausalLM(_PrunedForCausalLM, Qwen3ForCausalLM):
    """The language model."""

    config_class = PrunedQwen3Config
    model_class = PrunedQwen3Model
    _no_split_modules = ["PrunedQwen3DecoderLayer"]
