"""What a score of many rounds has after each, kept in a file: an interrupted run goes on from it."""

import time
from pathlib import Path
from typing import Any

import torch

from tvaprune import ranks
from tvaprune.files import replacing


class KeptRounds:
    """The state between two rounds, in a file.

    Attributes:
        path: The file; the caller's to name, so that it tells one scoring from any other.
        seconds: What the interrupted runs took for the rounds that are gone on from.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.seconds, self._begun = path, 0.0, time.perf_counter()

    def read(self) -> dict[str, Any] | None:
        """Returns the state that an interrupted run left, in all processes; None where there is none to go on from."""
        state, self.seconds = ranks.on_main(_read, self.path)
        return state

    def write(self, state: dict[str, Any]) -> None:
        """Replaces the state by that after one round more: tensors and plain values."""
        ranks.on_main(_write, state | {"seconds": self.seconds + time.perf_counter() - self._begun}, self.path)

    def discard(self) -> None:
        """Removes the file, once what it led to is kept elsewhere."""
        ranks.on_main(self.path.unlink, missing_ok=True)


def _read(path: Path) -> tuple[dict[str, Any] | None, float]:
    if not path.is_file():
        return None, 0.0
    try:
        state: dict[str, Any] = torch.load(path, weights_only=True)
        return state, state.pop("seconds")
    except Exception:  # each kind of damage raises kinds of its own; what was lost is measured again
        return None, 0.0


def _write(state: dict[str, Any], path: Path) -> None:
    with replacing(path) as temporary:
        torch.save(state, temporary)
