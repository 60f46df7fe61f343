"""What the files of a checkpoint may not be, looked at before anything of them is loaded.

A folder is a stranger's: it may name files and code outside itself, hold what git has not fetched, or numbers that are
no weights. Of a hub id that is not a folder only the config is looked at; the hub's client keeps the rest together.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import CONFIG_MAPPING

from tvaprune.errors import InputError, quoted, reason
from tvaprune.files import read_json, write_json
from tvaprune.models.families import FAMILIES, row_of

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
QUANTISED_KEYS = ("quantization_config", "compression_config")
QUANTISED_FILES = ("quantize_config.json", "quant_config.json", "quant_strategy.json", "hf_quant_config.json")
CODE_KEYS = ("auto_map", "custom_pipelines")  # by which a JSON file has a reader run a Python file
# What weights are stored in, in the words of safetensors and GGUF; the rest needs scales to be weights.
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_POINTER = b"version https://git-lfs"  # how a file begins that git left on the server
_READ = ("*.json", "*.jinja", "additional_chat_templates/*.jinja", "*.txt", "*.model")
_READ_AS_WEIGHTS = ("*.safetensors", "*.bin")  # where no file of `shards` goes before them
_MUCH = 10**8
_SIZES = {  # the largest that can be meant: masks number layers by four digits
    "hidden_size": _MUCH,
    "intermediate_size": _MUCH,
    "num_hidden_layers": 9999,
    "num_attention_heads": _MUCH,
    "num_key_value_heads": _MUCH,
    "head_dim": _MUCH,
    "vocab_size": _MUCH,
    "max_position_embeddings": _MUCH,
    "sliding_window": _MUCH,
}
_SIZES_OF_EXPERTS = {  # of a mixture: a dense model's config may hold them too, for nothing
    "num_experts": _MUCH,
    "num_local_experts": _MUCH,
    "num_experts_per_tok": _MUCH,
    "moe_intermediate_size": _MUCH,
    "decoder_sparse_step": 9999,
}
_MAY_BE_NULL = ("num_key_value_heads", "head_dim", "sliding_window")


def check_folder(path: str | Path, named: str) -> None:
    """Refuses a folder whose files are not there, lead elsewhere, or are quantised; a hub id passes.

    Args:
        named: How a message begins, here and below: the flag and the folder.

    Raises:
        InputError: Naming the file.
    """
    folder = Path(path)
    files = _matching(folder, _READ)
    _check_files(files, folder, named)
    for name in (file.name for file in files if file.name in QUANTISED_FILES):
        raise InputError(
            f"{named}: holds a {name}, its weights are quantised: give the unquantised checkpoint, "
            "or dequantise this one first"
        )
    if (folder / ADAPTER).is_file():
        raise InputError(
            f"{named}: holds an {ADAPTER}, which would change the weights while they are loaded: "
            "merge the adapter first, or move it away"
        )
    _check_files(shards(path, named) or _matching(folder, _READ_AS_WEIGHTS), folder, named)


def _matching(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    return sorted(file for pattern in patterns for file in folder.glob(pattern)) if folder.is_dir() else []


def _check_files(files: list[Path], folder: Path, named: str) -> None:
    for file in files:
        if file.is_file():
            _check_fetched(file, named)
            _check_within(folder.resolve(), file, named)


def _check_fetched(file: Path, named: str) -> None:
    with file.open("rb") as opened:
        if opened.read(len(_POINTER)) == _POINTER:
            raise InputError(
                f"{named}: {file.name} is a git-lfs pointer, not the file; run `git lfs pull` in that folder"
            )


def _check_within(folder: Path, file: Path, named: str) -> None:
    """Refuses a link that leaves the folder: what it leads to would go into the saved folder.

    The hub's cache links a snapshot to its repository's blobs. Weights are often linked, and nothing else passes as
    weights.
    """
    home = folder.parent.parent if folder.parent.name == "snapshots" else folder
    if file.suffix != ".safetensors" and not file.resolve().is_relative_to(home):
        raise InputError(f"{named}: {file.name} is a link out of the folder: put a copy of the file there")


def shards(path: str | Path, named: str) -> list[Path]:
    """Returns the safetensors files of a folder, as its index names them; none of a hub id.

    Raises:
        InputError: If the index is damaged or missing, or names a file outside the folder.
    """
    folder = Path(path)
    if (folder / WEIGHTS).is_file():  # one file goes before an index
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        parts = sorted(path.name for path in folder.glob("model-*-of-*.safetensors"))
        if parts and not any(folder.glob("pytorch_model*.bin")):  # which serve beside half a download
            raise InputError(f"{named}: holds {parts[0]}, but no {INDEX}, which says what lies in which file; fetch it")
        return []
    try:
        names = set(read_json(folder / INDEX)["weight_map"].values())
    except Exception as error:  # a broken index raises nearly anything
        raise InputError(f"{named}: {INDEX} cannot be read ({reason(error)}); mend it") from error
    if not names:
        raise InputError(f"{named}: {INDEX} names no file; give the checkpoint as it was published")
    for name in names:
        if not isinstance(name, str) or name in ("", ".", "..") or Path(name).name != name or "\\" in name:
            raise InputError(
                f"{named}: {INDEX} names {quoted(name)}, which is no file of this folder: give the "
                "checkpoint as it was published"
            )
    for name in sorted(names):
        if not (folder / name).is_file():
            raise InputError(f"{named}: {quoted(name)} of {INDEX} is missing; fetch it")
    return [folder / name for name in sorted(names)]


def check_config(config: dict[str, Any], named: str) -> None:
    """Refuses a config of quantised weights, or one whose sizes are no sizes, before a class is built of it.

    Raises:
        InputError: Naming the entry.
    """
    for key, value in config.items():
        if not _is_json(value):
            raise InputError(
                f"{named}: {quoted(key)} in config.json holds NaN or an infinity, which no model "
                "computes with; mend config.json"
            )
    for key in QUANTISED_KEYS:
        value = config.get(key)
        if value:
            method = value.get("quant_method") if isinstance(value, dict) else None
            raise InputError(
                f"{named}: its weights are quantised ({key} in config.json"
                f"{f', {quoted(method)}' if method else ''}), and pruning needs plain ones: give the unquantised "
                "checkpoint, or dequantise this one first"
            )
    if "auto_map" in config and config.get("model_type") not in CONFIG_MAPPING:
        raise InputError(
            f"{named}: its type {quoted(config.get('model_type'))} is code of its own (auto_map in config.json), which "
            f"is never run; give a checkpoint of a type that transformers itself knows, of {', '.join(FAMILIES)}"
        )
    family = row_of(config.get("model_type"))
    for key, most in (_SIZES if family.experts is None else _SIZES | _SIZES_OF_EXPERTS).items():
        value = config.get(key)
        if value is None and (key in _MAY_BE_NULL or key not in config):
            continue
        if type(value) is not int or not 1 <= value <= most:
            raise InputError(
                f"{named}: {key} in config.json is {json.dumps(value)[:80]}: a whole number from 1 "
                f"to {most} is needed; mend config.json"
            )


def check_stored(path: str | Path, wanted: dict[str, tuple[int, ...]], named: str) -> None:
    """Compares the tensors of a folder's files with those that its config builds, before any memory is taken for them.

    Args:
        wanted: The config's tensors and their shapes.

    Raises:
        InputError: Naming the first that is of another size, or of numbers that are no weights.
    """
    check_sizes(stored_in(shards(path, named), named), wanted, named)


@dataclass(frozen=True)
class Stored:
    """A tensor of a safetensors file: its shape, the type of its numbers in the file's words, the file."""

    shape: tuple[int, ...]
    dtype: str
    file: Path


def check_sizes(stored: dict[str, Stored], wanted: dict[str, tuple[int, ...]], named: str) -> None:
    """Compares what files hold with the tensors that a config builds, as `check_stored`."""
    for name in sorted(wanted.keys() & stored.keys()):
        shape, dtype = stored[name].shape, stored[name].dtype
        if dtype not in FLOATS:
            raise InputError(
                f"{named}: '{name}' holds {dtype} numbers, its weights are quantised: give the "
                "unquantised checkpoint, or dequantise this one first"
            )
        if shape != wanted[name]:
            raise InputError(
                f"{named}: the weights are not those of its config: '{name}' is {shape} in the "
                f"file and {wanted[name]} by config.json; give the config.json that they were saved with"
            )


def stored_in(files: Iterable[Path], named: str) -> dict[str, Stored]:
    """Returns the tensors of safetensors files by their names, read from the headers.

    Raises:
        InputError: If a file is no whole one.
    """
    found: dict[str, Stored] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():
                    part = opened.get_slice(name)
                    found[name] = Stored(tuple(part.get_shape()), str(part.get_dtype()), file)
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"{named}: {file.name} is no whole safetensors file ({reason(error)}); get it again"
            ) from error
    return found


def finite(name: str, values: torch.Tensor, named: str) -> None:
    """Refuses a weight that holds NaN or infinity: whatever is cut of it or measured would hold them too.

    Raises:
        InputError: If it does.
    """
    if values.is_floating_point() and not bool(values.isfinite().all()):
        raise InputError(f"{named}: {name} holds NaN or infinity; give a checkpoint that is whole")


def drop_code(file: Path) -> None:
    """Takes out of a JSON file what would have its reader run a Python file of the folder, and what is no JSON.

    A missing file is fine, and one that holds neither stays as it is.
    """
    if not file.is_file():
        return
    content = read_json(file)
    if any(key in content for key in CODE_KEYS) or not _is_json(content):
        plain = {key: value for key, value in content.items() if key not in CODE_KEYS}
        write_json(plain, file)


def _is_json(content: Any) -> bool:
    """Tells whether a value is JSON: Python reads NaN and infinities too."""
    try:
        json.dumps(content, allow_nan=False)
    except ValueError:
        return False
    return True
