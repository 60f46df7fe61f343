"""The user's mistakes: what every command turns into one line and exit code 2."""

import math
import re

LONGEST = 200  # characters of a library's message within ours
_ASKED = re.compile(r"[Tt]ried to allocate ([\d.]+) ?([KMG]i?B|bytes)")
_FREE = re.compile(r"of which ([\d.]+) ?([KMG]i?B|bytes) is free")
_BYTES = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


class InputError(ValueError):
    """Something the user gave cannot be used; the message says what came, what was needed and what to do."""


def one_line(text: str) -> str:
    """Returns a text without line breaks and control characters: a name in a stranger's file can forge no line."""
    return "".join(letter if letter.isprintable() else "?" for letter in " ".join(text.split()))


def reason(error: BaseException) -> str:
    """Returns a library's message as a part of one line, and not an endless one."""
    return (one_line(str(error)) or type(error).__name__)[:LONGEST]


def quoted(name: object, longest: int = 80) -> str:
    """Returns a name that a file gave, as Python writes it: it can forge no line of ours."""
    return repr(name if isinstance(name, str | int) else type(name).__name__)[:longest]


def out_of_memory(error: BaseException) -> str | None:
    """Returns the line that tells of memory that ran out, and what would fit; None for any other error."""
    text = str(error)
    on_gpu = type(error).__name__ == "OutOfMemoryError"
    if not (on_gpu or isinstance(error, MemoryError) or "DefaultCPUAllocator" in text):
        return None
    asked, free = (pattern.search(text) for pattern in (_ASKED, _FREE))
    told, part = "", "a smaller"
    if asked and free and asked[2] in _BYTES and free[2] in _BYTES:
        told = f" ({asked[1]} {asked[2]} asked for, {free[1]} {free[2]} free)"
        want, have = (float(match[1]) * _BYTES[match[2]] for match in (asked, free))
        part = f"1/{math.ceil(want / have)} of the" if 0 < have < want else "half the"
    return (
        f"the {'GPU' if on_gpu else 'machine'} is out of memory{told}: {part} batch (--per_device_eval_batch_size, "
        "--per_device_train_batch_size) or window (--ctx_length, --block_size) would fit; else --dtype bfloat16, or "
        "--refit_offload True while weights are refitted"
    )
