"""The config and class of a model at given widths: stock where its layers are alike, else its family's pruned one."""

import copy
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from tvaprune.models.auto_classes import auto_map
from tvaprune.models.families import PREFIX, base_type, family_of
from tvaprune.models.modeling_pruned import WIDTHS
from tvaprune.models.shape import ModelShape, shape_of

ALIGNED = 8  # numbers in half precision that are 16 bytes
MISTRALS = ("llama", "internlm3")  # are Mistrals without a window, where they have no biases


def config_of_widths(source: PretrainedConfig, widths: ModelShape) -> PretrainedConfig:
    """Returns the config of a model with these KV heads and MLP channels per layer, stock where all are equal.

    The globals hold the largest width, the overrides what differs from it: an engine that reads the globals alone gives
    each layer enough room.

    Args:
        source: The config of the model that it is cut from: all that is no width.
        widths: The channels of a layer of experts are none: it has them as they were.
    """
    values = source.to_dict()
    own = max(widths.intermediate_size) or values["intermediate_size"]
    channels = [own if n else c for c, n in zip(widths.intermediate_size, widths.experts, strict=True)]
    others = ("architectures", "auto_map", "model_type", "per_layer_config", "transformers_version", "_name_or_path")
    for key in others:
        values.pop(key, None)
    rows = [dict(zip(WIDTHS, (k * widths.group_size, k, f), strict=True))
            for k, f in zip(widths.num_key_value_heads, channels, strict=True)]  # fmt: skip
    widest = {key: max(row[key] for row in rows) for key in WIDTHS}
    values |= widest | {"hidden_size": widths.hidden_size, "head_dim": widths.head_dim}
    model_type = base_type(source)
    if all(row == widest for row in rows):
        model_type = _stock_type(model_type, values)
    else:
        model_type = PREFIX + model_type
        differing = {i: {k: v for k, v in row.items() if v != widest[k]} for i, row in enumerate(rows)}
        values["per_layer_config"] = {str(i): row for i, row in differing.items() if row}
    if model_type.startswith(PREFIX):
        values["auto_map"] = auto_map(base_type(source))
    return with_kernel(CONFIG_MAPPING[model_type].from_dict(values))


def with_kernel(config: PretrainedConfig) -> PretrainedConfig:
    """Returns a config that names, saved too, how experts are computed where transformers' own choice does not do.

    Its kernel stops at rows that are not of whole 16 bytes.
    """
    if family_of(config).experts is not None:
        shape = shape_of(config)
        is_odd = shape.hidden_size % ALIGNED or shape.expert_size % ALIGNED
        config._experts_implementation = "eager" if is_odd else None
        config.__dict__.pop("experts_implementation", None)
        if is_odd:
            config.experts_implementation = "eager"
    return config


def _stock_type(model_type: str, values: dict[str, Any]) -> str:
    """Returns the stock type of uniform widths, or the pruned one where no stock config takes them.

    Some configs of transformers 5 want a hidden width that is a multiple of the heads, even with ``head_dim`` given.
    Mistral's does not: without a window and without biases Llama and it are one model, down to the weights' names.
    """
    try:
        CONFIG_MAPPING[model_type].from_dict(copy.deepcopy(values))
    except StrictDataclassClassValidationError:
        if model_type not in MISTRALS or values.get("attention_bias") or values.get("mlp_bias"):
            return PREFIX + model_type
        values["sliding_window"] = None
        return "mistral"
    return model_type


def empty_model(config: PretrainedConfig, like: PreTrainedModel, device: torch.device | None = None) -> PreTrainedModel:
    """Returns a model without weights: they are on the meta device, what its class computes itself is real.

    Args:
        like: The model that its device, precision, attention and generation settings are those of.
        device: Where it will compute, if ``like`` has no weights either.
    """
    model = bare_model(config, like.dtype, like.config._attn_implementation, device or like.device)
    model.generation_config = like.generation_config
    return model.train(like.training)


def bare_model(
    config: PretrainedConfig, dtype: torch.dtype, attention: str | None, device: torch.device
) -> PreTrainedModel:
    """Returns a config's model without weights, as `empty_model`, in evaluation mode."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            copy.deepcopy(config), dtype=dtype, attn_implementation=attention, trust_remote_code=False
        )
    for module in list(model.modules()):
        names = [name for name in module._non_persistent_buffers_set if getattr(module, name) is not None]
        for name in names:  # NaN: what the class forgets to compute is heard
            setattr(module, name, torch.full_like(getattr(module, name), torch.nan, device=device))
        if names:
            model._init_weights(module)  # rotary frequencies and the like; weights on meta stay there
    return model.eval()


def shared_names(model: nn.Module) -> list[list[str]]:
    """Returns the names of every parameter: a tied one has two."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return list(names.values())


def set_parameter(model: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
    """Sets one of a model's parameters by its full name."""
    path, _, kind = name.rpartition(".")
    setattr(model.get_submodule(path), kind, parameter)
