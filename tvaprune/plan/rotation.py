"""The rotation that a mask was learned under: a file beside the mask or the plan, which name it by its digest."""

import re
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from tvaprune.errors import InputError, quoted, reason
from tvaprune.files import read_json, replacing
from tvaprune.models.rotate import Rotation, check_rotation

_KEY, _STRETCH = "rotation", "stretch"
_DIGEST = re.compile(r"[0-9a-f]{16}")


def save_rotation(rotation: Rotation, folder: Path) -> Path:
    """Writes a rotation, whole or not at all, unless it is there."""
    path = folder / rotation_name(rotation.digest)
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        parts = {_KEY: rotation.matrix} | ({} if rotation.stretch is None else {_STRETCH: rotation.stretch})
        with replacing(path) as temporary:
            save_file({name: part.detach().float().cpu().contiguous() for name, part in parts.items()}, temporary)
    return path


def rotation_name(digest: str) -> str:
    """Returns the name of a rotation's file."""
    return f"rotation_{digest}.safetensors"


def read_rotation(beside: Path, digest: object, hidden_size: int) -> Rotation | None:
    """Returns the rotation that a mask's record, or a plan, names; None where it names none.

    Args:
        beside: The mask or the plan.
        digest: What it says of its rotation.

    Raises:
        InputError: If the file is missing, damaged, another one, or of another model.
    """
    if digest is None:
        return None
    if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
        raise InputError(f"{beside}: names {quoted(str(digest))} as its rotation, which is no digest; mend it")
    path = beside.parent / rotation_name(digest)
    if not path.is_file():
        raise InputError(f"{beside}: was made under a rotation, and {path.name} is not beside it: keep both together")
    try:
        parts = {name: part.float() for name, part in load_file(path).items()}
        found = Rotation(parts[_KEY], parts.get(_STRETCH))
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise InputError(f"{path}: is no rotation ({reason(error)}); give the file that the run wrote") from error
    check_rotation(found, hidden_size, str(path))
    if found.digest != digest:
        raise InputError(f"{path}: is not the rotation that {beside.name} names; give the file that the run wrote")
    return found


def drop_rotations(folder: Path) -> None:
    """Removes the rotations that no mask's record and no plan in a folder names any more."""
    found = list(folder.glob(rotation_name("*")))
    if not found:
        return
    named = set()
    for path in folder.glob("*.json"):
        try:
            content = read_json(path)
        except (OSError, ValueError):
            return  # it may name any
        if isinstance(content, dict):
            named.add(rotation_name(str(content.get("rotation"))))
    for path in found:
        if path.name not in named:
            path.unlink(missing_ok=True)
