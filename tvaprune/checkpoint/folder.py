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
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from tvaprune.checkpoint.card import model_card
from tvaprune.checkpoint.eval_results import write_eval_results
from tvaprune.checkpoint.tokenizer import write_tokenizer
from tvaprune.checkpoint.weights import write_weights
from tvaprune.errors import InputError, reason
from tvaprune.files import CARD_NAME, CONFIG_NAME, clear_leftovers, new_folder, read_json, write_json
from tvaprune.models import load
from tvaprune.models.families import FAMILIES, PREFIX, family_of
from tvaprune.models.layers import Streamed
from tvaprune.models.layout import Projection, layout_of
from tvaprune.models.modeling_pruned import rope_of_transformers_4
from tvaprune.models.pruned import empty_model
from tvaprune.models.shape import shape_of
from tvaprune.models.vetting import check_folder, drop_code
from tvaprune.plan.keep_plan import KeepPlan


def save_pruned(
    model: PreTrainedModel | Streamed,
    plan: KeepPlan,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: str | Path,
    overwrite: bool = False,
    record: dict[str, object] | None = None,
    beside: Mapping[str, dict[str, object]] | None = None,
) -> Path:
    """Writes a model that was sliced by ``plan`` as a checkpoint; the model stays as it is.

    Args:
        model: What `apply_plan` returned, its weights updated or not; streamed, one weight is in memory at a time.
        tokenizer: The base model's tokenizer; None writes none.
        folder: The checkpoint's folder; it appears whole or not at all.
        overwrite: Whether a checkpoint that stands there may be replaced.
        record: What the model card tells: the results of the measurement, or the run's record.
        beside: Further files of JSON, by name.

    Raises:
        InputError: If the folder is in use or cannot be written.
    """
    with new_folder("save_pruned", folder, overwrite) as temporary:
        if isinstance(model, Streamed):
            config = model.model.config
            _write_streamed(model, tokenizer, temporary)
        else:
            config = model.config
            write_checkpoint(model, config, tokenizer, temporary)
        (temporary / CARD_NAME).write_text(model_card(config, plan, record or {}, Path(folder).name), "utf-8")
        write_eval_results(temporary, record or {}, "pruned")
        for name, content in (beside or {}).items():
            write_json(content, temporary / name)
    return Path(folder)


def load_pruned(folder: str | Path, **options: object) -> PreTrainedModel:
    """Loads a checkpoint of `save_pruned` whose weights are exactly its config's.

    Args:
        options: Passed on to ``from_pretrained``.

    Raises:
        InputError: If the folder is no such checkpoint, or a damaged one.
    """
    check_folder(folder, str(folder))
    model: PreTrainedModel = load.load_whole(folder, read_config(folder), str(folder), **options)
    return model


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
        model_type = read_json(path)["model_type"]
        if model_type.removeprefix(PREFIX) in FAMILIES:
            return load.read_config(folder)
    except Exception as error:  # a broken config raises nearly anything
        raise InputError(f"{folder}: {CONFIG_NAME} cannot be read ({reason(error)}); prune again") from error
    raise InputError(f"{folder}: not a pruned checkpoint (its type is '{model_type}'); give a folder of --save_pruned")


def write_checkpoint(model: PreTrainedModel, config: PretrainedConfig, tokenizer: Any, folder: Path) -> None:
    """Writes a model's weights under a config that is at least as wide: what a layer lacks is zero.

    In the precision that the config names, where that is the shorter: a CPU computes in float32 what came in bfloat16.
    """
    stored = _stored_dtype(config, model)
    target = empty_model(config, model)
    wanted, parts = target.state_dict(), _parts(model.config, config)
    weights = {
        name: _padded(tensor.to(stored), wanted[name].shape, parts.get(name.rpartition(".")[0], ()))
        for name, tensor in model.state_dict().items()
    }
    target.load_state_dict(weights, assign=True)
    target.tie_weights()
    target.save_pretrained(folder)
    _complete(folder, config, tokenizer)


def _write_streamed(layers: Streamed, tokenizer: PreTrainedTokenizerBase | None, folder: Path) -> None:
    """Writes the same of a model whose weights are fetched one at a time."""
    config = layers.model.config
    stored = _stored_dtype(config, layers.model)
    target = empty_model(config, layers.model)
    module: nn.Module = target
    module.to(stored)
    target.save_pretrained(folder, state_dict={})  # all but the weights
    write_weights(target, layers.weight, folder)
    _complete(folder, config, tokenizer)


def _stored_dtype(config: PretrainedConfig, model: PreTrainedModel) -> torch.dtype:
    named = config.dtype or model.dtype
    named = getattr(torch, named) if isinstance(named, str) else named  # a name once the config was saved
    return min(model.dtype, named, key=lambda dtype: dtype.itemsize)


def _complete(folder: Path, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Writes what stands beside the weights, and takes out what would run as code."""
    if tokenizer is not None:
        write_tokenizer(tokenizer, folder)
    drop_code(folder / "generation_config.json")
    _complete_config(folder / CONFIG_NAME, config)


def _parts(config: PretrainedConfig, wider: PretrainedConfig) -> dict[str, list[tuple[Projection, Projection]]]:
    """Returns where the projections of each reading module lie in it, and where in the wider model's."""
    family = family_of(config)
    narrow, wide = (layout_of(family, shape_of(each)) for each in (config, wider))
    parts: dict[str, list[tuple[Projection, Projection]]] = {}
    for block, room in zip((*narrow.attention, *narrow.mlp), (*wide.attention, *wide.mlp), strict=True):
        if block is not None and room is not None:
            for role, reader in block.readers.items():
                parts.setdefault(reader.path, []).append((reader, room.readers[role]))
    return parts


def _padded(source: torch.Tensor, shape: torch.Size, parts: Sequence[tuple[Projection, Projection]]) -> torch.Tensor:
    """Returns ``source`` in zeros of ``shape``: its parts each where the wider begins, without parts in the corner."""
    if source.shape == shape:
        return source
    target = source.new_zeros(shape)
    columns = tuple(slice(size) for size in source.shape[1:])
    for part, room in parts or [(Projection("", 0, len(source)), Projection("", 0, shape[0]))]:
        rows = source[part.start : part.stop]
        target[(slice(room.start, room.start + len(rows)), *columns)] = rows
    return target


def _complete_config(path: Path, config: PretrainedConfig) -> None:
    """Writes out what readers would otherwise take from their own defaults.

    transformers 4 and readers of the raw JSON know the rotary settings by two keys at the top, transformers 5 by one.
    """
    content = read_json(path)
    rope = {"rope_parameters": dict(config.rope_parameters)}
    content |= rope | rope_of_transformers_4(config.rope_parameters)
    for key in ("head_dim", "tie_word_embeddings", "sliding_window", "num_experts"):
        if hasattr(config, key):
            content[key] = getattr(config, key)
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
