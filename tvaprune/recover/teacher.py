"""What a student is trained towards: the teacher beside it in memory, or its likeliest tokens on disk.

The cache's folder is named by what it holds (weights, text, number of tokens kept, temperature), so that a stale one is
never read; it appears whole, so that half a one is never read either.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from datasets import Dataset
from tqdm.auto import tqdm

from tvaprune.errors import InputError
from tvaprune.files import clear_leftovers, first_folder, reserve
from tvaprune.identity import Identity, blocks_digest, check_identity, digest_of, model_digest, write_identity
from tvaprune.losses import Predictions, distillation, evaluated, hidden_loss, likelihood, top_k, top_k_distillation
from tvaprune.measure.perplexity import windows_per_pass
from tvaprune.models.logits import Context, predictions, predictions_within
from tvaprune.models.modes import in_mode
from tvaprune.plan.keep_plan import KeepPlan

_FILES = ("tokens.npy", "log_probs.npy")


States = tuple[torch.Tensor, ...] | None  # of the embedding and every layer, shape (batch, length, hidden)


class Teacher(Protocol):
    """Compares a student's predictions with what they should have been: the text, and the teacher's."""

    needs_hidden_states: bool

    def terms(
        self, student: Predictions, states: States, batch: dict[str, torch.Tensor], context: Context = nullcontext
    ) -> dict[str, torch.Tensor]:
        """Returns the terms of the loss, unweighted: ``ce``, ``kl`` and, where hidden states are compared, ``hidden``.

        Args:
            student: The student's predictions.
            states: Its hidden states, where they are needed.
            batch: ``input_ids``, ``labels`` and ``index`` (the rows' places in the training set).
            context: Within which models run: the training's autocast.
        """


@dataclass(frozen=True)
class HiddenTarget:
    """What of the teacher's hidden states a perfect student has: the kept dims, times the factors of the update.

    Attributes:
        kept: The teacher's dims that the student has, int64.
        factors: Of each layer's state, shape ``(len(kept),)``: the hidden gates' means, which the folded weights write
            to the stream and the refit aims at. After the final norm of a tied model, which divides by them, 1.
    """

    kept: torch.Tensor
    factors: tuple[torch.Tensor, ...]

    @classmethod
    def of(cls, plan: KeepPlan, weight_update: str) -> "HiddenTarget":
        """Returns the target of a student that was cut by a plan and updated as ``--weight_update`` says."""
        scale = plan.scale.hidden
        ones = torch.ones_like(scale)
        stream = ones if weight_update == "none" else scale
        last = ones if plan.shape.tie_word_embeddings else stream
        return cls(plan.kept.hidden, (*[stream] * (plan.shape.num_hidden_layers - 1), last))


class LiveTeacher:
    """The teacher in memory: frozen, in evaluation mode, without gradients.

    Args:
        model: The teacher.
        temperature: That of the distillation.
        hidden: What the student's hidden states are compared with, where they are compared too.
    """

    def __init__(self, model: Any, temperature: float, hidden: HiddenTarget | None = None) -> None:
        self.model = model.eval().requires_grad_(False)
        self.temperature, self.hidden = temperature, hidden
        self.needs_hidden_states = hidden is not None

    def terms(
        self, student: Predictions, states: States, batch: dict[str, torch.Tensor], context: Context = nullcontext
    ) -> dict[str, torch.Tensor]:
        """Returns ``ce``, ``kl`` and, as asked, ``hidden`` (every layer; the last after the final norm)."""
        with torch.inference_mode():
            own, output = predictions_within(
                context,
                self.model,
                input_ids=batch["input_ids"],
                use_cache=False,
                output_hidden_states=self.needs_hidden_states,
            )
        labels = batch["labels"]
        ce, kl = evaluated(student, likelihood(labels), distillation(own, self.temperature, labels))
        found = {"ce": ce, "kl": kl}
        if self.hidden is not None and states is not None:
            kept, *factors = (values.to(student.states.device) for values in (self.hidden.kept, *self.hidden.factors))
            found["hidden"] = hidden_loss(states[1:], output.hidden_states[1:], kept, tuple(factors))
        return found


class CachedTeacher:
    """The teacher's likeliest tokens for every position of a training set, on disk.

    Args:
        folder: A folder that `cache_teacher` returned.
        temperature: The one that it was written at.

    Raises:
        InputError: If the folder's files are damaged.
    """

    needs_hidden_states = False

    def __init__(self, folder: Path, temperature: float) -> None:
        self.temperature = temperature
        try:
            self.tokens, self.log_probs = (np.load(folder / name, mmap_mode="r") for name in _FILES)
        except (OSError, ValueError) as error:
            raise InputError(f"--teacher_cache {folder}: is damaged ({error}); remove it") from error

    def terms(
        self, student: Predictions, states: States, batch: dict[str, torch.Tensor], context: Context = nullcontext
    ) -> dict[str, torch.Tensor]:
        """Returns ``ce``, and ``kl`` over the tokens kept."""
        rows, device, labels = batch["index"].cpu().numpy(), student.states.device, batch["labels"]
        tokens, log_probs = (torch.from_numpy(array[rows]).to(device) for array in (self.tokens, self.log_probs))
        compared = top_k_distillation(tokens, log_probs, self.temperature, labels)
        ce, kl = evaluated(student, likelihood(labels), compared)
        return {"ce": ce, "kl": kl}


def cache_teacher(
    folder: str | Path, model: Any, blocks: Dataset, k: int, temperature: float, batch_size: int = 0
) -> Path:
    """Writes the teacher's likeliest tokens for every block, unless they are there; returns their folder.

    Args:
        folder: Where caches lie, each in a subfolder.
        model: The teacher.
        blocks: Rows of ``input_ids``, shape ``(length,)``.
        k: Tokens kept per position: 8 bytes each.

    Raises:
        InputError: If the folder cannot be written.
    """
    identity = _identity(model, blocks, k, temperature)
    target = Path(folder) / f"teacher-{digest_of(identity)}"
    if target.is_dir():
        check_identity("cache", target, identity)
        return target
    try:
        clear_leftovers(target.parent)
        with first_folder(target) as temporary:
            _write(temporary, model, blocks, k, temperature, batch_size)
            write_identity(temporary, identity)
    except OSError as error:
        raise InputError(f"--teacher_cache {folder}: cannot be written ({error}); give another folder") from error
    return target


@torch.inference_mode()
def _write(folder: Path, model: Any, blocks: Dataset, k: int, temperature: float, batch_size: int) -> None:
    device, length = next(model.parameters()).device, len(blocks[0]["input_ids"])
    shape = (len(blocks), length, min(k, model.config.vocab_size))
    arrays = [
        _reserved(folder / name, dtype, shape) for name, dtype in zip(_FILES, (np.int32, np.float32), strict=True)
    ]
    step = windows_per_pass(blocks, batch_size)
    with in_mode(False, model):
        for start in tqdm(range(0, len(blocks), step), desc="teacher", leave=False, unit="batch"):
            ids = blocks[start : start + step]["input_ids"].to(device)
            found = top_k(predictions(model, input_ids=ids, use_cache=False)[0], k, temperature)
            for array, values in zip(arrays, found, strict=True):
                array[start : start + len(ids)] = values.cpu().numpy()
    for array in arrays:
        array.flush()


def _reserved(path: Path, dtype: Any, shape: tuple[int, ...]) -> Any:
    """Returns a mapped file whose room on the disk is taken."""
    array = np.lib.format.open_memmap(path, "w+", dtype, shape)
    reserve(path, path.stat().st_size)
    return array


def _identity(model: Any, blocks: Dataset, k: int, temperature: float) -> Identity:
    """Returns what a cache belongs to."""
    return {
        "flags": {"teacher_top_k": k, "distill_temp": temperature, "dtype": str(model.dtype)},
        "contents": {"model": model_digest(model), "blocks": blocks_digest(blocks)},
        "settings": {},
    }
