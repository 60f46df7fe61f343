"""How a command may end early, or must not: signals, a reader that leaves, a full disk.

Python raises `KeyboardInterrupt` wherever it is, and what is raised in a destructor's callback is lost: so a signal is
noted, and looked at before every step of a training; elsewhere, where nothing is half done, it ends the command, and
is sent again where a destructor lost it.
"""

import errno
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TextIO, cast

from tvaprune import ranks
from tvaprune.errors import reason

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# The same in the words of safetensors and of torch's own writer, which carry no number.
_FULL_WORDS = (
    "os error 28", "os error 122", "os error 27", "PytorchStreamWriter failed writing", "unexpected pos",
    "basic_ios::clear: iostream error",
)  # fmt: skip
_PASSED_ON = 10.0  # seconds in which a launcher sends its processes what the terminal has sent them already
_AGAIN = 0.05  # seconds after which a signal is sent again: what lost it has ended by then
_asked: list[tuple[int, float]] = []  # the signals that came, and when
_waiting: list[bool] = []  # whether they wait for the next step


class Interrupted(KeyboardInterrupt):
    """The user, or the machine, asked the command to end.

    Attributes:
        number: The signal's.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"signal {number}")
        self.number = number


@contextmanager
def watched() -> Iterator[None]:
    """Turns both signals into `Interrupted` within."""
    if threading.current_thread() is not threading.main_thread():  # only that one may set handlers
        yield
        return
    before = {number: signal.signal(number, _note) for number in _SIGNALS}
    tells, sys.unraisablehook = sys.unraisablehook, lambda lost: _send_again(lost) or tells(lost)
    try:
        yield
    finally:
        sys.unraisablehook = tells
        _asked.clear()
        for number, handler in before.items():  # a launcher ends the others when one has: they are at it
            signal.signal(number, handler if ranks.launched() == 1 else signal.SIG_IGN)


@contextmanager
def at_steps() -> Iterator[None]:
    """Lets signals within wait for the next `check`; a second one does not wait."""
    _waiting.append(True)
    try:
        yield
        check()
    finally:
        _waiting.pop()


def check() -> None:
    """Raises `Interrupted` if a signal came: call it where nothing is half done."""
    if _asked:
        raise Interrupted(_asked[0][0])


def check_together() -> None:
    """Raises `Interrupted` in all processes of the run, at the same step, if a signal came to one."""
    number = ranks.largest(_asked[0][0] if _asked else 0)
    if number:
        raise Interrupted(number)


def _note(number: int, frame: FrameType | None) -> None:
    _asked.append((number, time.monotonic()))
    again = len(_asked) > 1 and (ranks.launched() == 1 or _asked[-1][1] - _asked[0][1] > _PASSED_ON)
    if not _waiting or again:
        raise Interrupted(number)


def _send_again(lost: "sys.UnraisableHookArgs") -> bool:
    """Sends a signal again whose `Interrupted` Python ignored, in a moment; False: something else was ignored."""
    error, main = lost.exc_value, threading.main_thread().ident
    if not isinstance(error, Interrupted) or main is None:
        return False
    number = error.number

    def send() -> None:
        if _asked:  # else the command has ended
            signal.pthread_kill(main, number)

    threading.Timer(_AGAIN, send).start()
    return True


@contextmanager
def unclosed() -> Iterator[None]:
    """Lets the output's reader leave, as `head -1` does: what is written after that goes nowhere, and nothing ends.

    So does what is written where an output was closed before the start (``>&-``): Python has None for it.
    """
    before = sys.stdout, sys.stderr
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        sys.stdout, sys.stderr = (cast(TextIO, _Unclosed(stream or nowhere)) for stream in before)
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            sys.stdout, sys.stderr = before


class _Unclosed:
    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except UnicodeEncodeError:  # a terminal without our letters ends no run either
            encoding = self._stream.encoding
            return self.write(text.encode(encoding, "replace").decode(encoding))
        except BrokenPipeError:
            self._leave()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._leave()

    def _leave(self) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)


def close_bars() -> None:
    """Ends the line of every bar that an error left open, a training's: what is said next has a line of its own."""
    bars = getattr(sys.modules.get("tqdm"), "tqdm", None)
    for bar in list(getattr(bars, "_instances", ())):
        bar.close()


def full_disk(error: BaseException) -> str | None:
    """Returns a line if an error means that there is no room on the disk; None if it means something else."""
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    for one in chain:
        if getattr(one, "errno", None) in _FULL or any(word in str(one) for word in _FULL_WORDS):
            return f"there is no room on the disk ({reason(one)}); make room, and run again"
    return None
