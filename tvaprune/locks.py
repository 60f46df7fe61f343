"""What one process does while others wait or are refused: one run a folder, one that makes what many use.

Every lock is `flock`'s and ends with its process, however that ends.
"""

import fcntl
import os
import platform
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TextIO

from tvaprune.errors import InputError

_LOCK_NAME = ".tvaprune-lock"
_held: list[tuple[ExitStack, set[Path]]] = []  # the folders that the running command holds


@contextmanager
def holding_folders() -> Iterator[None]:
    """Holds every folder that is prepared within, so that no two runs write into one; a decorator for a command."""
    with ExitStack() as stack:
        _held.append((stack, set()))
        stack.callback(_held.pop)
        yield


def hold(flag: str, folder: Path) -> None:
    """Holds a folder until the end of `holding_folders`, if that is under way.

    Raises:
        InputError: If another process holds it.
    """
    if _held and folder.resolve() not in _held[-1][1]:
        stack, held = _held[-1]
        stack.enter_context(lock_folder(flag, folder))
        held.add(folder.resolve())


def at_the_end(call: Callable[[], None]) -> None:
    """Calls something at the end of `holding_folders`, if that is under way, once what is held from now on is free."""
    if _held:
        _held[-1][0].callback(call)


@contextmanager
def lock_folder(flag: str, folder: Path) -> Iterator[None]:
    """Holds a folder.

    Raises:
        InputError: If another process holds it.
    """

    def refuse(holder: TextIO) -> None:
        with holder:
            holder.seek(0)
            who = holder.read(300).strip() or "another process"
        raise InputError(f"--{flag} {folder}: is in use by {who}; wait for its end, or give another folder")

    with _locked(folder / _LOCK_NAME, refuse) as file:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()} ({shlex.join(sys.argv)[:200]})\n")
        file.flush()
        yield


@contextmanager
def one_at_a_time(path: Path) -> Iterator[None]:
    """Waits while another process is within for the same path; on a file system without locks for nobody."""

    def wait(holder: TextIO) -> None:
        print(f"note: another process makes {path}; waiting for it")
        fcntl.flock(holder, fcntl.LOCK_EX)

    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path.with_name(f".{path.name}.lock"), wait):
        yield


@contextmanager
def _locked(path: Path, busy: Callable[[TextIO], None]) -> Iterator[TextIO]:
    """Yields a file that this process has locked, and removes it at the end.

    Args:
        busy: What to do with the file where another process has the lock: raise, or wait for it.
    """
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            busy(file)
        except OSError:  # a file system without locks
            print(f"note: {path.parent} cannot be locked; let no second run write there meanwhile")
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                break  # else its last holder removed it meanwhile
        file.close()
    with file:
        try:
            yield file
        finally:
            with suppress(OSError):
                path.unlink(missing_ok=True)
