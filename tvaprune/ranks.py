"""The processes of one run, as ``torchrun`` or ``accelerate launch`` starts them: a GPU each, all in the same code.

Process 0 is *main*: it alone looks at folders and writes (`on_main`), and builds caches before the others read them
(`main_first`). Work over a text is shared out (`share`) and its sums are added up (`total`, `add_up`). Whatever these
decide is then the same everywhere. One process alone, the usual case, needs no torch here and pays nothing.
"""

import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from datetime import timedelta
from typing import Any, ParamSpec, TypeVar

from tvaprune.errors import InputError, quoted

# The others wait for what main does alone, of any length; a process that died is noticed at once, by its connection.
_PATIENCE = timedelta(days=7)
_LOST = ("Connection closed by peer", "Connection reset by peer", "gloo", "NCCL", "Broken pipe")
_NUMBERS = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE")  # that a launcher gives to each process
_alone: list[bool] = []  # within `on_main`, and before any other process is known
_side: list[Any] = []  # a group over the CPU, for what is small: made once
Value = TypeVar("Value")
Item = TypeVar("Item")
Default = TypeVar("Default", int, None)
Given = ParamSpec("Given")


def check_numbers() -> None:
    """Refuses an environment that no launcher made.

    Raises:
        InputError: If what numbers the processes is no number.
    """
    for name in _NUMBERS:
        if _number(name, otherwise=None) is None and os.environ.get(name):
            raise InputError(
                f"{name} is {quoted(os.environ[name])} in the environment, and torchrun or accelerate launch would say "
                "a whole number: start the command by one of them, or unset it"
            )


def _number(name: str, otherwise: Default) -> int | Default:
    """Returns a number of the launcher's; what is none counts as not given, so that all can say that it is none."""
    try:
        return int(os.environ.get(name, ""))
    except ValueError:
        return otherwise


def launched() -> int:
    """Returns how many processes the launcher started."""
    return _number("WORLD_SIZE", otherwise=1)


def launched_here() -> int:
    """Returns how many of them it started on this machine."""
    return _number("LOCAL_WORLD_SIZE", otherwise=launched())


def index() -> int:
    """Returns this process's number among all; 0 is main."""
    if (distributed := _distributed()) is not None:
        return int(distributed.get_rank())
    return _number("RANK", otherwise=0) if launched() > 1 else 0


def is_main() -> bool:
    """Tells whether this process is the one that writes."""
    return index() == 0


def count() -> int:
    """Returns how many processes share the work at hand: 1 within `on_main`."""
    distributed = _distributed()
    return 1 if distributed is None or _alone else int(distributed.get_world_size())


def _distributed() -> Any:
    """Returns torch.distributed where the processes know each other."""
    distributed = sys.modules.get("torch.distributed")
    return distributed if distributed is not None and distributed.is_initialized() else None


def _group() -> Any:
    """Returns a group whose members wait long and hold no GPU meanwhile; all processes must get here."""
    if not _side:
        _side.append(_distributed().new_group(backend="gloo", timeout=_PATIENCE))
    return _side[0]


def on_main(function: Callable[Given, Value], *args: Given.args, **options: Given.kwargs) -> Value:
    """Calls a function in process 0 alone and returns what it returned, a plain value, everywhere.

    Raises:
        InputError: Everywhere, if the function raises it. What else it raises ends the run.
    """
    if count() == 1:
        return function(*args, **options)
    found: list[Any] = [None, None]
    if is_main():
        _alone.append(True)
        try:
            found[0] = function(*args, **options)
        except InputError as error:
            found[1] = error
        finally:
            _alone.pop()
    _distributed().broadcast_object_list(found, src=0, group=_group())
    if found[1] is not None:
        raise found[1]
    value: Value = found[0]
    return value


@contextmanager
def main_first() -> Iterator[None]:
    """Lets process 0 through first, for what builds a cache that the others then read."""
    if count() > 1 and not is_main():
        wait()
    yield
    if count() > 1 and is_main():
        wait()


def wait() -> None:
    """Waits until every process is here."""
    if count() > 1:
        _distributed().barrier(group=_group())


def share(items: Sequence[Item]) -> Sequence[Item]:
    """Returns this process's share: every ``count()``-th item."""
    return items[index() :: count()] if count() > 1 else items


def rounds(items: Sequence[Item]) -> Iterator[tuple[Item, bool]]:
    """Yields this process's share, as many items in every process: a sharded model computes in all at once.

    Yields:
        An item, and whether it counts; the first fills up where there are too few.
    """
    mine = share(items)
    yield from ((item, True) for item in mine)
    for _ in range(math.ceil(len(items) / count()) - len(mine)):
        yield items[0], False


def total(*values: float) -> list[float]:
    """Returns the sums over the processes (float64): one process's own values where it is alone."""
    if count() == 1:
        return list(values)
    import torch

    sums = torch.tensor(values, dtype=torch.float64)
    add_up(sums)
    return [float(value) for value in sums]


def add_up(*tensors: Any) -> None:
    """Adds tensors up over the processes, in place; all hold the same sums then."""
    for tensor in tensors if count() > 1 else ():
        _distributed().all_reduce(tensor, group=_group() if tensor.device.type == "cpu" else None)


def largest(value: int) -> int:
    """Returns the largest of the processes' values."""
    if count() == 1:
        return value
    return max(_gathered(value))


def agree(values: Mapping[str, object]) -> None:
    """Compares what should be the same in all processes.

    Args:
        values: By the flag that says it.

    Raises:
        InputError: Everywhere, if a process differs from main.
    """
    if count() == 1:
        return
    all_values = _gathered(dict(values))
    for process, own in enumerate(all_values):
        for name in dict.fromkeys((*all_values[0], *own)):
            mine, theirs = all_values[0].get(name), own.get(name)
            if mine != theirs:
                raise InputError(
                    f"--{name} is {theirs} in process {process} and {mine} in process 0: start all with one command, "
                    "on the same files"
                )


def _gathered(value: Any) -> list[Any]:
    found: list[Any] = [None] * count()
    _distributed().all_gather_object(found, value, group=_group())
    return found


@contextmanager
def quiet() -> Iterator[None]:
    """Lets process 0 alone print: notes, bars and tables are everywhere the same."""
    if is_main():
        yield
        return
    with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


def ends_first() -> bool:
    """Tells whether this process is the first to end before its time: it tells the user, by `told`."""
    if launched() == 1:
        return True
    if _distributed() is None:  # the flags were wrong, in all alike: one of each machine tells
        return _number("LOCAL_RANK", otherwise=0) == 0
    with suppress(RuntimeError):  # of a store whose process is gone
        return int(_store().add("tvaprune-ends", 1)) == 1
    return False


def told(code: int) -> None:
    """Lets the other processes end, with the same exit code."""
    if launched() > 1 and _distributed() is not None:
        with suppress(RuntimeError):
            _store().set("tvaprune-code", str(code))


def code_told(otherwise: int) -> int:
    """Waits until the first process that ended has told, and returns its exit code."""
    if _distributed() is not None:
        with suppress(RuntimeError):
            _store().wait(["tvaprune-code"], timedelta(seconds=10))
            return int(_store().get("tvaprune-code"))
    return otherwise


def _store() -> Any:
    """Returns what the processes found each other by: the launcher keeps it, so that it outlives them."""
    from torch.distributed.distributed_c10d import _get_default_store

    return _get_default_store()


def finish() -> None:
    """Takes leave of the other processes, all of which did their work."""
    distributed = _distributed()
    if distributed is not None:
        wait()
        _side.clear()
        distributed.destroy_process_group()


def lost(error: BaseException) -> bool:
    """Tells whether an error means that another process of the run is gone."""
    name, text = type(error).__name__, str(error)
    return launched() > 1 and (name.startswith("Dist") or any(word in text for word in _LOST))
