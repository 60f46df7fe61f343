"""Files and folders that appear whole or not at all: written under a temporary name, then renamed."""

import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from tvaprune.errors import InputError

CONFIG_NAME = "config.json"  # by which a folder is known to be a checkpoint


def write_json(content: dict[str, Any], path: Path) -> None:
    """Writes JSON under a temporary name, then renames it; NaN and infinities, which JSON lacks, become null."""
    write_text(as_json(content) + "\n", path)


def as_json(content: Any, indent: int | None = 2, default: Callable[[Any], Any] | None = None) -> str:
    """Returns a value as JSON: what is no finite number is null, where Python would write what JSON does not know."""
    return json.dumps(_finite(content), indent=indent, default=default, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    return [_finite(entry) for entry in value] if isinstance(value, list | tuple) else value


def write_text(content: str, path: Path) -> None:
    """Writes a text under a temporary name, then renames it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text(content, encoding="utf-8")
    os.replace(temporary, path)


def prepare_folder(flag: str, folder: Path, may_hold_files: bool) -> None:
    """Makes an output folder, and refuses one that is in use.

    Args:
        flag: The flag that named it, for the message.
        may_hold_files: Whether the user said so: overwriting, or going on with an earlier run.

    Raises:
        InputError: If the folder cannot be written, or holds files that nothing says to touch.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"--{flag} {folder}: cannot be written ({error.strerror}); give another folder") from error
    if any(folder.iterdir()) and not may_hold_files:
        raise InputError(
            f"--{flag} {folder}: is not empty; go on with --resume_from_checkpoint True, replace it with "
            "--overwrite_output_dir, or give another folder"
        )


def check_output(flag: str, folder: str | Path, overwrite: bool) -> None:
    """Raises `InputError` if the folder may not be written: call it before the work begins."""
    folder = Path(folder)
    if folder.is_file():
        raise InputError(f"--{flag} {folder}: is a file; give a folder")
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not overwrite:
        raise InputError(f"--{flag} {folder}: is not empty; replace it with --overwrite_output_dir, or give another")
    if not (folder / CONFIG_NAME).is_file():
        raise InputError(f"--{flag} {folder}: holds something else than a checkpoint; give another folder")


@contextmanager
def new_folder(flag: str, folder: str | Path, overwrite: bool) -> Iterator[Path]:
    """Yields an empty folder that takes its name at the end, and only if all went well.

    Raises:
        InputError: If the folder is in use, or it cannot be written (a full disk).
    """
    folder = Path(folder).absolute()
    check_output(flag, folder, overwrite)
    temporary = folder.with_name(f".{folder.name}.part-{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        _take_name(temporary, folder)
    except (OSError, SafetensorError) as error:
        raise InputError(f"--{flag} {folder}: cannot be written ({_short(error)}); nothing was left there") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _take_name(new: Path, folder: Path) -> None:
    """Puts a finished folder in the place of an older one, which goes last."""
    if not folder.exists():
        os.replace(new, folder)
        return
    old = folder.with_name(f".{folder.name}.old-{os.getpid()}")
    os.replace(folder, old)
    try:
        os.replace(new, folder)
    except OSError:
        os.replace(old, folder)
        raise
    shutil.rmtree(old)


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
