"""What a mask, a checkpoint, an adapter, a teacher's cache or a result belongs to: written beside it, read back.

An identity has three parts, compared in this order; the first in which something differs is told, since what comes
later may follow from it: *flags* by name and value; *contents*, things that are known by a digest (the model by its
config and all its weights, a text by its tokens), whatever their name; *settings*, flags whose default was resolved.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedModel

from tvaprune.errors import InputError
from tvaprune.files import read_json, write_json

IDENTITY_NAME = "identity.json"  # written last into a checkpoint or an adapter: it says what they belong to
Identity = dict[str, dict[str, Any]]
Parts = Callable[[str], Iterable[torch.Tensor]]
_VOLATILE = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "_attn_implementation_autoset")


def content(name: str | None, digest: str) -> dict[str, str]:
    """Returns an entry of the contents: compared by its digest, told by its name too."""
    return {"name": str(name), "digest": digest}


def digest_of(value: object) -> str:
    """Returns 16 hex digits of a plain value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def write_identity(folder: Path, identity: Identity) -> None:
    """Writes what a checkpoint or an adapter belongs to."""
    write_json(identity, folder / IDENTITY_NAME)


def read_identity(name: str, folder: Path) -> Identity:
    """Returns what a checkpoint or an adapter, ``name`` in words, was written with.

    Raises:
        InputError: If nothing says what it belongs to.
    """
    try:
        found: Identity = read_json(folder / IDENTITY_NAME)
        if not all(isinstance(found[part], dict) for part in ("flags", "contents", "settings")):
            raise TypeError("a part is no object")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder}: is no {name} that this version wrote (no readable {IDENTITY_NAME})") from error
    return found


def check_identity(name: str, folder: Path, identity: Identity) -> None:
    """Compares what a checkpoint or an adapter belongs to with what it is wanted for.

    Raises:
        InputError: If they differ, naming the flags with both values, or nothing says what it belongs to.
    """
    differing = differences(read_identity(name, folder), identity)
    if differing:
        raise InputError(f"{folder}: is the {name} of a run with {differing}; give the flags that it was made with")


def differences(found: Mapping[str, Any], wanted: Identity) -> str:
    """Returns how an identity differs from the one wanted, as ``--flag was, not is``; nothing where they are one."""
    for part, values in json.loads(json.dumps(wanted)).items():  # tuples are lists in a file
        own = found.get(part, {})
        differing = [name for name, value in values.items() if _key(own.get(name)) != _key(value)]
        if differing:
            return ", ".join(f"--{name} {_told(own.get(name))}, not {_told(values[name])}" for name in differing)
    return ""


def _key(value: object) -> object:
    return value["digest"] if isinstance(value, dict) and "digest" in value else value


def _told(value: object) -> str:
    if isinstance(value, dict) and "digest" in value:
        return f"{value.get('name')} [{value['digest'][:8]}]"
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def model_digest(model: PreTrainedModel, parts: Parts | None = None) -> str:
    """Returns 16 hex digits that tell a model's config and weights from any other's, in whatever precision it came.

    Args:
        parts: Yields a weight's rows, in order, where the model does not hold them.
    """
    config = {key: value for key, value in model.config.to_dict().items() if key not in _VOLATILE}
    return digest_of([json.loads(json.dumps(config, default=str)), weights_digest(model, parts)])


def weights_digest(model: torch.nn.Module, parts: Parts | None = None) -> str:
    """Returns 16 hex digits of all of a model's weights.

    They are read as float32, so that a checkpoint loaded in its own precision and in a wider one is the same. All are
    read: some seconds for 7B on 16 threads, and no edit slips through.

    Args:
        parts: As for `model_digest`; one weight is read at a time then.
    """

    def one(item: tuple[str, torch.Tensor]) -> str:
        name, tensor = item
        digest = hashlib.sha256(f"{name} {tuple(tensor.shape)} ".encode())
        for part in [tensor] if parts is None else parts(name):
            values = part.detach().cpu()
            values = values.float() if values.is_floating_point() else values
            digest.update(values.contiguous().flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    with ThreadPoolExecutor(None if parts is None else 1) as pool:
        return digest_of(list(pool.map(one, sorted(model.state_dict().items()))))


def blocks_digest(*texts: Dataset) -> str:
    """Returns 16 hex digits of the tokens of some blocks, in order."""
    digest = hashlib.sha256()
    for blocks in texts:
        tokens = np.ascontiguousarray(blocks.with_format("numpy")["input_ids"][:])
        digest.update(f"{tokens.shape} {tokens.dtype} ".encode() + tokens.tobytes())
    return digest.hexdigest()[:16]
