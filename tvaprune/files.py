"""Files and folders that appear whole or not at all, the marks that say which are this tool's own.

A file or folder is written beside its place, as ``.tvaprune-part-HOST-PID-NAME``, and takes its name in one step. What
a killed process left under such a name goes when the next run writes there.
"""

import ctypes
import hashlib
import json
import math
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from tvaprune.errors import InputError, reason
from tvaprune.locks import at_the_end, hold

CONFIG_NAME = "config.json"  # by which a folder is known to be a checkpoint
CARD_NAME = "README.md"  # its model card
MARK_NAME = ".tvaprune.json"  # in a folder that this tool wrote: the files that it wrote there
_HOST = hashlib.sha256(platform.node().encode()).hexdigest()[:8]  # on a shared disk a process has a number per machine
_LEFT = re.compile(r"\.tvaprune-(part|old)-([0-9a-f]{8})-(\d+)-(.+)")
_UMASK = os.umask(0)  # which only setting tells
os.umask(_UMASK)
_in_use: set[Path] = set()  # this process's own temporaries: its number may be that of a dead one


def cache_folder() -> Path:
    """Returns where texts, token blocks and fetched models are kept: ``$TVAPRUNE_CACHE``, else the user's cache."""
    own, users = os.environ.get("TVAPRUNE_CACHE"), os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(own or f"{users}/tvaprune").expanduser()


def write_json(content: Mapping[str, object], path: Path) -> None:
    """Writes JSON, whole or not at all; NaN and infinities, which JSON lacks, become null."""
    write_text(as_json(content) + "\n", path)


def as_json(content: object, indent: int | None = 2, default: Callable[[object], object] | None = None) -> str:
    """Returns a value as JSON: what is no finite number is null, where Python would write what JSON does not know."""
    return json.dumps(_finite(content), indent=indent, default=default, allow_nan=False)


def _finite(value: object) -> object:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    return [_finite(entry) for entry in value] if isinstance(value, list | tuple) else value


def read_json(path: Path) -> Any:
    """Returns what a JSON file holds.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is no JSON, or nested too deep for any file of ours.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError("nested too deep") from error


def write_text(content: str, path: Path) -> None:
    """Writes a text, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(content, encoding="utf-8")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a name beside ``path``: the file written there takes the path's name at the end, if all went well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _temporary(path, "part") as temporary:
        yield temporary
        _let_read(temporary)
        os.replace(temporary, path)


def _let_read(*paths: Path) -> None:
    """Gives files the rights of any that the user writes: safetensors lets their owner alone read what it writes."""
    for path in paths:
        if path.is_file() and not path.is_symlink():
            path.chmod(path.stat().st_mode | 0o666 & ~_UMASK)


@contextmanager
def _temporary(path: Path, kind: str) -> Iterator[Path]:
    """Yields a temporary name that tells its process; what is left there at the end goes."""
    name = path.parent / f".tvaprune-{kind}-{_HOST}-{os.getpid()}-{path.name}"
    _remove(name)  # of a dead process with this one's number
    _in_use.add(name)
    try:
        yield name
    finally:
        _remove(name)
        _in_use.discard(name)


def clear_leftovers(folder: Path) -> None:
    """Removes what killed processes left in a folder; an older folder whose successor never came gets its name back."""
    for left in folder.glob(".tvaprune-*"):
        match = _LEFT.fullmatch(left.name)
        if match is None or left in _in_use or _is_alive(match[2], int(match[3])):
            continue
        if match[1] == "old" and not os.path.lexists(folder / match[4]):
            with suppress(OSError):
                os.replace(left, folder / match[4])
        else:
            _remove(left)


def _is_alive(host: str, pid: int) -> bool:
    if host != _HOST or pid == os.getpid():  # of another machine's processes nothing is known
        return host != _HOST
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def discard(folder: Path) -> None:
    """Removes a folder, which loses its name before anything in it goes."""
    with _temporary(folder, "part") as gone, suppress(FileNotFoundError):
        os.replace(folder, gone)


def prepare_folder(flag: str, folder: Path, may_hold_files: bool) -> None:
    """Makes an output folder, refuses one that is in use, and clears what a killed run left.

    Within `tvaprune.locks.holding_folders` the folder is this command's until its end; if nothing is in it then, as it
    was refused, the folders that were made go again.

    Args:
        flag: The flag that named it, for the message.
        may_hold_files: Whether the user said so: overwriting, or going on with an earlier run.

    Raises:
        InputError: If the folder cannot be written, another run holds it, or it holds files that nothing says to touch.
    """
    with _writing(flag, folder):
        made = [place for place in (folder, *folder.parents) if not place.exists()]
        at_the_end(lambda: _drop_empty(made))
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    hold(flag, folder)
    if holds_files(folder) and not may_hold_files:
        raise InputError(
            f"--{flag} {folder}: is not empty; go on with --resume_from_checkpoint True, replace it with "
            "--overwrite_output_dir, or give another folder"
        )
    for place in (folder, *(path for path in folder.iterdir() if path.is_dir())):
        clear_leftovers(place)


def _drop_empty(folders: list[Path]) -> None:
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


@contextmanager
def _writing(flag: str, folder: str | Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"--{flag} {folder}: cannot be written ({error.strerror}); give another folder") from error


def holds_files(folder: Path) -> bool:
    """Tells whether a folder holds more than locks and leftovers of this tool."""
    return folder.is_dir() and any(not path.name.startswith(".tvaprune-") for path in folder.iterdir())


def mark(folder: Path, files: list[str] | None = None) -> None:
    """Says that this tool wrote a folder, and which files in it."""
    write_json({"written_by": "tvaprune", "files": files or []}, folder / MARK_NAME)


def is_ours(folder: Path) -> bool:
    """Tells whether this tool wrote a folder."""
    return (folder / MARK_NAME).is_file()


def add_files(folder: Path, contents: Mapping[str, str]) -> None:
    """Writes texts into a folder of this tool, each whole; where it is marked, the mark names them first.

    Args:
        contents: By their names within the folder.
    """
    if contents and is_ours(folder):
        mark(folder, sorted({*_marked(folder), *contents} - {MARK_NAME}))
    for name, content in contents.items():
        write_text(content, folder / name)


def foreign_files(folder: Path) -> list[str]:
    """Returns the files in a folder that its mark does not name: somebody else's."""
    own = _marked(folder)
    return [name for name in _files_in(folder) if name not in own]


def _marked(folder: Path) -> set[str]:
    """Returns the files that a folder's mark names, and the mark; none where it cannot be read."""
    try:
        return {*read_json(folder / MARK_NAME)["files"], MARK_NAME}
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def _files_in(folder: Path) -> list[str]:
    found = (path for path in folder.rglob("*") if not path.is_dir() and "__pycache__" not in path.parts)
    return sorted(str(path.relative_to(folder)) for path in found)


def reserve(path: Path, size: int) -> None:
    """Takes a file's room on the disk, in bytes: a full disk is told now, by an error, not by a bus error in a map."""
    with path.open("r+b") as file:
        if hasattr(os, "posix_fallocate"):  # not on macOS
            os.posix_fallocate(file.fileno(), 0, size)
        else:
            file.truncate(size)


def check_apart(flag: str, folder: str | Path, other_flag: str, other: str | Path | None) -> None:
    """Raises `InputError` if a folder that is written whole is, or is within, or holds a path that must stay."""
    if other is None or not os.path.exists(other):
        return
    mine, its = Path(folder).resolve(), Path(other).resolve()
    if mine == its or mine in its.parents or its in mine.parents:
        how = "is" if mine == its else "holds" if mine in its.parents else "is within"
        raise InputError(f"--{flag} {folder}: {how} {other_flag} {other}; give a folder apart from it")


def check_output(flag: str, folder: str | Path, overwrite: bool) -> None:
    """Raises `InputError` if the folder may not be written: call it before the work begins."""
    path = Path(folder).resolve()
    clear_leftovers(path.parent)
    if path.is_file():
        raise InputError(f"--{flag} {folder}: is a file; give a folder")
    with _writing(flag, folder):  # beside its place, where it is written first
        tempfile.TemporaryFile(dir=next(above for above in path.parents if os.path.exists(above))).close()
    if not path.exists() or not any(path.iterdir()):
        return
    if not overwrite:
        raise InputError(f"--{flag} {folder}: is not empty; replace it with --overwrite_output_dir, or give another")
    foreign = foreign_files(path)
    if foreign:
        raise InputError(
            f"--{flag} {folder}: holds {foreign[0]}, which this tool did not write ({MARK_NAME} names what it did); "
            "move it away, or give another folder"
        )


@contextmanager
def new_folder(flag: str, folder: str | Path, overwrite: bool) -> Iterator[Path]:
    """Yields an empty folder that takes its name at the end, and only if all went well.

    Where a folder of this tool has the name, the two change places in one step: there is always one of them.

    Raises:
        InputError: If the folder is in use, or it cannot be written (a full disk).
    """
    check_output(flag, folder, overwrite)
    place = Path(folder).resolve()
    try:
        with _temporary(place, "part") as temporary:
            temporary.mkdir(parents=True)
            yield temporary
            mark(temporary, _files_in(temporary))
            _let_read(*temporary.rglob("*"))
            _take_name(temporary, place)
    except (OSError, SafetensorError) as error:
        raise InputError(f"--{flag} {folder}: cannot be written ({reason(error)}); nothing was left there") from error


@contextmanager
def scratch_folder(path: Path) -> Iterator[Path]:
    """Yields an empty folder beside ``path`` for what is gone at the end; a killed run's goes with its leftovers."""
    with _temporary(path.resolve().with_name(f"{path.resolve().name}.scratch"), "part") as temporary:
        temporary.mkdir(parents=True)
        yield temporary


@contextmanager
def first_folder(folder: Path) -> Iterator[Path]:
    """Yields an empty folder that takes its name at the end; where another process was quicker, its folder stays.

    For caches, whose name says what they hold.
    """
    with _temporary(folder, "part") as temporary:
        temporary.mkdir(parents=True)
        yield temporary
        _let_read(*temporary.rglob("*"))
        try:
            os.rename(temporary, folder)
        except OSError:
            if not folder.exists():
                raise


def _take_name(new: Path, folder: Path) -> None:
    """Puts a finished folder in the place of an older one, which is ``new`` then and goes, or goes last."""
    if not folder.exists():
        os.replace(new, folder)
        return
    if _exchange(new, folder):
        return
    with _temporary(folder, "old") as old:
        try:
            os.replace(folder, old)
            os.replace(new, folder)
        except BaseException:
            if old.exists() and not folder.exists():
                os.replace(old, folder)
            raise


def _exchange(first: Path, second: Path) -> bool:
    """Lets two names change places in one step, as Linux can on most file systems; tells whether it did."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    at_folder, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if rename is None:
        return False
    return bool(rename(at_folder, os.fsencode(first), at_folder, os.fsencode(second), exchange) == 0)
