"""The pruned model as a Hugging Face folder, out and in.

The widths stand in ``config.json`` under transformers' own ``per_layer_config``, and the folder carries the modeling
file that builds them; where all layers are equally wide it is a stock checkpoint and carries none. A layer that lost
all its heads or channels gets a group of zeros: the same function, and no reader meets an empty layer.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from tvaprune.checkpoint.card import model_card
from tvaprune.errors import InputError
from tvaprune.files import CONFIG_NAME, clear_leftovers, new_folder, write_json
from tvaprune.models.auto_classes import PREFIX, auto_map
from tvaprune.models.families import FAMILIES
from tvaprune.plan.keep_plan import KeepPlan

PADDING_HEADS = 1  # KV groups of a layer that lost all: vLLM and llama.cpp need attention in every layer


PADDING_CHANNELS = 32  # MLP channels of a layer that lost all: the smallest block of llama.cpp's formats


PER_LAYER = ("num_attention_heads", "num_key_value_heads", "intermediate_size")


def save_pruned(
    model: PreTrainedModel,
    plan: KeepPlan,
    tokenizer: Any,
    folder: str | Path,
    overwrite: bool = False,
    record: dict[str, Any] | None = None,
    beside: Mapping[str, dict[str, Any]] | None = None,
) -> Path:
    """Writes a model that was sliced by ``plan`` as a checkpoint; the model stays as it is.

    Args:
        model: What `apply_plan` returned, its weights updated or not.
        tokenizer: The base model's tokenizer; None writes none.
        folder: The checkpoint's folder; it appears whole or not at all.
        overwrite: Whether a checkpoint that stands there may be replaced.
        record: What the model card tells: the results of the measurement, or the run's record.
        beside: Further files of JSON, by name.

    Raises:
        InputError: If the folder is in use or cannot be written.
    """
    heads = [count or PADDING_HEADS for count in plan.num_key_value_heads]
    channels = [count or PADDING_CHANNELS for count in plan.intermediate_size]
    config = config_of_widths(model.config, heads, channels, plan.shape.group_size)
    with new_folder("save_pruned", folder, overwrite) as temporary:
        write_checkpoint(model, config, tokenizer, temporary)
        (temporary / "README.md").write_text(model_card(config, plan, record or {}, Path(folder).name), "utf-8")
        for name, content in (beside or {}).items():
            write_json(content, temporary / name)
    return Path(folder)


def load_pruned(folder: str | Path, **options: Any) -> PreTrainedModel:
    """Loads a checkpoint of `save_pruned`, after its sizes have been compared with its config's.

    Args:
        options: Passed on to ``from_pretrained``.

    Raises:
        InputError: If the folder is no such checkpoint, or a damaged one.
    """
    config = read_config(folder)
    _check_sizes(Path(folder), config)
    try:
        return AutoModelForCausalLM.from_pretrained(folder, config=config, **options).eval()
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{folder}: cannot be loaded ({_short(error)}); prune again") from error


def read_config(folder: str | Path) -> PretrainedConfig:
    """Reads the config of a pruned checkpoint.

    Raises:
        InputError: If the folder has none, or one of another kind of model.
    """
    path = Path(folder) / CONFIG_NAME
    clear_leftovers(Path(folder).resolve().parent)  # a swap that did not end gives the older one back
    if not path.is_file():
        raise InputError(f"{folder}: not a pruned checkpoint (no {CONFIG_NAME}); give a folder of --save_pruned")
    try:
        model_type = json.loads(path.read_text(encoding="utf-8"))["model_type"]
        if model_type.removeprefix(PREFIX) in FAMILIES:
            return AutoConfig.from_pretrained(folder)
    except Exception as error:  # a broken config raises nearly anything
        raise InputError(f"{folder}: {CONFIG_NAME} cannot be read ({_short(error)}); prune again") from error
    raise InputError(f"{folder}: not a pruned checkpoint (its type is '{model_type}'); give a folder of --save_pruned")


def base_type(config: PretrainedConfig) -> str:
    """Returns the family of a checkpoint's config, pruned or stock."""
    return config.model_type.removeprefix(PREFIX)


def layer_widths(config: PretrainedConfig) -> tuple[list[int], list[int]]:
    """Returns the KV heads and the MLP channels of every layer of a config."""
    layers: list[Any] = [config.per_layer_config[index] for index in range(config.num_hidden_layers)]
    return [layer.num_key_value_heads for layer in layers], [layer.intermediate_size for layer in layers]


def config_of_widths(
    source: PretrainedConfig, heads: Sequence[int], channels: Sequence[int], group_size: int
) -> PretrainedConfig:
    """Returns the config of a model with these KV heads and MLP channels per layer, stock where all are equal.

    The globals hold the largest width, the overrides what differs from it: an engine that reads the globals alone gives
    each layer enough room.
    """
    values = source.to_dict()
    for key in ("architectures", "auto_map", "model_type", "per_layer_config", "transformers_version"):
        values.pop(key, None)
    rows = [dict(zip(PER_LAYER, (k * group_size, k, f), strict=True)) for k, f in zip(heads, channels, strict=True)]
    widest = {key: max(row[key] for row in rows) for key in PER_LAYER}
    values |= widest
    model_type = base_type(source)
    if all(row == widest for row in rows):
        model_type = _stock_type(model_type, values)
    else:
        model_type = PREFIX + model_type
        differing = {i: {k: v for k, v in row.items() if v != widest[k]} for i, row in enumerate(rows)}
        values["per_layer_config"] = {str(i): row for i, row in differing.items() if row}
    if model_type.startswith(PREFIX):
        values["auto_map"] = auto_map(base_type(source))
    return CONFIG_MAPPING[model_type].from_dict(values)


def _stock_type(model_type: str, values: dict[str, Any]) -> str:
    """Returns the stock type of uniform widths.

    transformers 5 refuses a Llama config whose hidden width is no multiple of its heads, even with ``head_dim`` given.
    Mistral's takes it: without a window and without biases the two are one model, down to the names of the weights.
    """
    if model_type != "llama" or values["hidden_size"] % values["num_attention_heads"] == 0:
        return model_type
    if values.get("attention_bias") or values.get("mlp_bias"):
        return PREFIX + model_type
    values["sliding_window"] = None
    return "mistral"


def write_checkpoint(model: PreTrainedModel, config: PretrainedConfig, tokenizer: Any, folder: Path) -> None:
    """Writes a model's weights under a config that is at least as wide: what a layer lacks is zero."""
    with torch.device("meta"):
        target = AutoModelForCausalLM.from_config(config)
    source = {name.replace("self_attn.bias", "self_attn.o_proj.bias"): t for name, t in model.state_dict().items()}
    empty = next(model.parameters()).new_zeros(0)
    state = {name: _padded(source.get(name), tensor.shape, empty) for name, tensor in target.state_dict().items()}
    target.load_state_dict(state, assign=True)
    target.tie_weights()
    target.generation_config = model.generation_config
    target.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    _complete_config(folder / CONFIG_NAME, config)


def _padded(source: torch.Tensor | None, shape: torch.Size, empty: torch.Tensor) -> torch.Tensor:
    """Returns ``source`` in the corner of zeros of ``shape``; a lost tensor is all zero."""
    if source is None:
        return empty.new_zeros(shape)
    if source.shape == shape:
        return source
    target = source.new_zeros(shape)
    target[tuple(slice(size) for size in source.shape)] = source
    return target


def _complete_config(path: Path, config: PretrainedConfig) -> None:
    """Writes out what readers would otherwise take from their own defaults.

    transformers 4 and readers of the raw JSON know the rotary settings by two keys at the top, transformers 5 by one.
    """
    content = json.loads(path.read_text(encoding="utf-8"))
    rope = dict(config.rope_parameters)
    content["rope_parameters"] = dict(rope)
    content["rope_theta"] = rope.pop("rope_theta")
    content["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    for key in ("head_dim", "tie_word_embeddings", "sliding_window"):
        if hasattr(config, key):
            content[key] = getattr(config, key)
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _check_sizes(folder: Path, config: PretrainedConfig) -> None:
    """Compares the tensors on disk with what the config builds."""
    wanted, found = _sizes_of(folder, config), _sizes_on_disk(folder)
    if config.tie_word_embeddings:
        for sizes in (wanted, found):
            sizes.pop("lm_head.weight", None)
    wrong = [name for name in sorted(wanted.keys() | found.keys()) if wanted.get(name) != found.get(name)]
    if wrong:
        name = wrong[0]
        raise InputError(
            f"{folder}: '{name}' is {found.get(name, 'missing')} in the weights and {wanted.get(name, 'missing')} by "
            f"{CONFIG_NAME} ({len(wrong)} such tensors); the checkpoint is damaged, prune again"
        )


def _sizes_of(folder: Path, config: PretrainedConfig) -> dict[str, tuple[int, ...]]:
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # sizes that fit no model raise nearly anything
        raise InputError(f"{folder}: {CONFIG_NAME} builds no model ({_short(error)}); prune again") from error
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _sizes_on_disk(folder: Path) -> dict[str, tuple[int, ...]]:
    sizes: dict[str, tuple[int, ...]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                sizes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
        except (OSError, SafetensorError) as error:
            raise InputError(f"{path}: not a whole safetensors file ({_short(error)}); prune again") from error
    if not sizes:
        raise InputError(f"{folder}: not a pruned checkpoint (no *.safetensors); give a folder of --save_pruned")
    return sizes


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
