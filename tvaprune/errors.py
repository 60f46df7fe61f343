"""The user's mistakes: what every command turns into one line and exit code 2."""

import argparse
import math
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

LONGEST = 200  # characters of a library's message within ours
# Memory that ran out in the words of libraries that have no error of its own: CUDA's and its matrix products', mmap's.
_RAN_OUT_ON_GPU = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUSOLVER_STATUS_ALLOC_FAILED")
_RAN_OUT = ("DefaultCPUAllocator", "Cannot allocate memory")
_ASKED = re.compile(r"[Tt]ried to allocate ([\d.]+) ?([KMG]i?B|bytes)")
_FREE = re.compile(r"of which ([\d.]+) ?([KMG]i?B|bytes) is free")
_BYTES = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


class InputError(ValueError):
    """Something the user gave cannot be used; the message says what came, what was needed and what to do."""


class InOneLine(argparse.ArgumentParser):
    """Says what is wrong with a command line in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Raises `InputError`."""
        raise InputError(f"{message}; see --help")


def check_file(given: str, path: str | Path, wanted: str) -> None:
    """Raises `InputError` if there is no file of a path.

    Args:
        given: What the user gave, as a message begins.
        wanted: What to give.
    """
    if not str(path) or not Path(path).exists():
        raise InputError(f"{given}: there is no such file; give {wanted}")
    if Path(path).is_dir():
        raise InputError(f"{given}: is a folder; give {wanted}")


def program() -> list[str]:
    """Returns the words that started this process, before its flags: a script, a module, an installed command."""
    path, home = Path(sys.argv[0]), Path(__file__).resolve().parents[1]
    if path.name == "__main__.py" and path.resolve().is_relative_to(home):  # all that Python keeps of ``-m``
        return ["python", "-m", ".".join(path.resolve().relative_to(home).parent.parts)]
    return [path.name] if path.name == "tvaprune" else ["python", sys.argv[0]]


def one_line(text: str) -> str:
    """Returns a text without line breaks and control characters: a name in a stranger's file can forge no line."""
    return "".join(letter if letter.isprintable() else "?" for letter in " ".join(text.split()))


def reason(error: BaseException) -> str:
    """Returns a library's message as a part of one line, and not an endless one."""
    words = one_line(str(error)) or type(error).__name__
    if isinstance(error, KeyError) and error.args:  # its message is the key alone
        words = f"unknown: {words}"
    return words if len(words) <= LONGEST else f"{words[:LONGEST].rpartition(' ')[0] or words[:LONGEST]} ..."


def quoted(name: object, longest: int = 80) -> str:
    """Returns a name that a file gave, as Python writes it: it can forge no line of ours."""
    return repr(name if isinstance(name, str | int) else type(name).__name__)[:longest]


def out_of_memory(error: BaseException) -> str | None:
    """Returns the line that tells of memory that ran out, and what would fit; None for any other error."""
    text = str(error)
    on_gpu = type(error).__name__ == "OutOfMemoryError" or any(words in text for words in _RAN_OUT_ON_GPU)
    if not (on_gpu or isinstance(error, MemoryError) or any(words in text for words in _RAN_OUT)):
        return None
    asked, free = (pattern.search(text) for pattern in (_ASKED, _FREE))
    told, part = "", "a smaller"
    if asked and free and asked[2] in _BYTES and free[2] in _BYTES:
        told = f" ({asked[1]} {asked[2]} asked for, {free[1]} {free[2]} free)"
        want, have = (float(match[1]) * _BYTES[match[2]] for match in (asked, free))
        part = f"1/{math.ceil(want / have)} of the" if 0 < have < want else "half the"
    doing, helps = getattr(error, "while_doing", ("", _HELPS))
    return f"the {'GPU' if on_gpu else 'machine'} is out of memory{doing}{told}: {helps.format(part=part)}"


_HELPS = (
    "{part} batch (--per_device_eval_batch_size, --per_device_train_batch_size) or window (--ctx_length, --block_size) "
    "would fit; else --dtype bfloat16, or a smaller --memory"
)
# What is done when memory may run out, and the flag that makes it need less.
EVALUATING = (" in an evaluation", "{part} --per_device_eval_batch_size or --ctx_length would fit")
TRAINING = (
    " in training",
    "a smaller --memory, or {part} --per_device_train_batch_size or --block_size would fit; what was saved is in "
    "--output_dir",
)
SCORING_UNITS = (" while units are scored", "{part} --per_device_eval_batch_size or --block_size would fit")
REFITTING = (" in the refit", "--refit_offload True needs less, and --weight_update fold next to nothing")


@contextmanager
def running_out_in(phase: tuple[str, str]) -> Iterator[None]:
    """Has `out_of_memory` tell of a phase, and of what helps in it, where memory runs out within."""
    try:
        yield
    except Exception as error:
        if out_of_memory(error) is not None and not hasattr(error, "while_doing"):
            error.while_doing = phase  # type: ignore[attr-defined]
        raise
