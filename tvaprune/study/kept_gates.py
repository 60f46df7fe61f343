"""What a comparison's gate training goes on from: `Trainer`'s checkpoints, and what the runs that left them took."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tvaprune.checkpoints import last_checkpoint, own_checkpoints
from tvaprune.files import discard, read_json, write_json

_NAME = "comparison.json"  # in each checkpoint


class KeptGates(TrainerCallback):
    """The last whole checkpoint of a gate training; as its callback it notes the seconds in each.

    Args:
        folder: The training's own.
        settings: What the comparison trains by: a checkpoint of others is none to go on from.

    Attributes:
        checkpoint: None: training begins anew.
        seconds: What the interrupted runs took up to the checkpoint.
    """

    def __init__(self, folder: Path, settings: Mapping[str, object]) -> None:
        self._folder, self._settings, self._begun = folder, dict(settings), time.perf_counter()
        self.checkpoint, self.seconds = None, 0.0
        last = last_checkpoint(folder)
        if last is None:
            return
        seconds = self._seconds(last)
        if seconds is None:
            print(f"note: {last} is of other settings, or does not say of which: gate training begins anew")
            return
        self.checkpoint, self.seconds = str(last), seconds
        print(f"note: gate training goes on from {last}")

    def _seconds(self, checkpoint: Path) -> float | None:
        """Returns what a checkpoint took; None: it is of other settings, or does not say."""
        try:
            content = read_json(checkpoint / _NAME)
            return float(content["seconds"]) if content["settings"] == self._settings else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Notes the settings, and the seconds of all runs so far."""
        content = {"settings": self._settings, "seconds": self.seconds + time.perf_counter() - self._begun}
        write_json(content, self._folder / f"checkpoint-{state.global_step}" / _NAME)

    def discard(self) -> None:
        """Removes the checkpoints, once the masks are kept elsewhere."""
        for path in own_checkpoints(self._folder):
            discard(path)
