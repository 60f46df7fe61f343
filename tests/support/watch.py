"""Counts the file operations of a process, and kills it at one of them."""

import contextlib
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


@dataclass
class Watch:
    """Counts the operations that write below a folder, and kills at one of them."""

    root: str
    at: int | None = None
    halves: bool = False
    seen: list[str] = field(default_factory=list)
    written: str | None = None  # the file that was opened last, if nothing came after

    def audit(self, event: str, args: tuple) -> None:
        """The audit hook."""
        if event == "open":
            path, mode, flags = args
            if isinstance(path, int) or not (any(c in (mode or "") for c in "wax+") or (flags or 0) & WRITES):
                return
            self.note(event, _whole(path, None), writes=True)
        elif event in ("os.remove", "os.rmdir"):
            self.note(event, _whole(args[0], args[1]))
        elif event == "os.mkdir":
            self.note(event, _whole(args[0], args[2]))
        elif event == "os.rename":
            self.note(event, _whole(args[1], args[3]))

    def note(self, event: str, path: str, writes: bool = False) -> None:
        """Counts one operation."""
        if not path.startswith(self.root):
            return
        self.seen.append(f"{event} {os.path.relpath(path, self.root)}")
        if len(self.seen) == self.at:
            if self.halves and self.written and os.path.isfile(self.written):
                os.truncate(self.written, os.path.getsize(self.written) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        self.written = path if writes else None

    def wrapped(self, name: str, write: Callable, place: int) -> Callable:
        """Returns a writer that Python does not audit, counted too."""

        def call(*args: object, **options: object) -> object:
            self.note(name, os.path.abspath(str(args[place])), writes=True)
            return write(*args, **options)

        return call

    def install(self) -> None:
        """Begins to count in this process, for good."""
        import safetensors.torch
        import torch

        from tvaprune import files

        torch.save = self.wrapped("torch.save", torch.save, 1)
        safetensors.torch.serialize_file = self.wrapped("safetensors", safetensors.torch.serialize_file, 1)
        files._exchange = self.wrapped("exchange", files._exchange, 1)
        sys.addaudithook(self.audit)


def _whole(path: object, folder: object) -> str:
    name = os.fsdecode(path)  # type: ignore[arg-type]
    if isinstance(folder, int) and folder >= 0 and not os.path.isabs(name):
        with contextlib.suppress(OSError):
            return os.path.join(os.readlink(f"/proc/self/fd/{folder}"), name)
    return os.path.abspath(name)
