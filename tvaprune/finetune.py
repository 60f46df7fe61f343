"""Fine-tuning any causal LM towards a teacher: LoRA or all weights, on `transformers.Trainer`.

``loss = CE + alpha * KL(teacher || student) [+ beta * distance of hidden states]`` (method: section 6), on the shifted
tokens whose label counts, the mean per token. Accumulation, precision, checkpoints, their resumption and early stopping
are `Trainer`'s own.
"""

import json
import math
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from torch import nn
from torch.nn import functional
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import ProgressCallback

from tvaprune.distill import IGNORE_INDEX
from tvaprune.errors import InputError
from tvaprune.evaluation.perplexity import perplexity
from tvaprune.teacher import Teacher

IDENTITY_NAME = "identity.json"  # written last into a checkpoint or an adapter: it says what they belong to


@dataclass(frozen=True)
class LoraSettings:
    """LoRA on every linear layer; the lm_head, where it is trained, is trained whole."""

    r: int
    alpha_ratio: float
    dropout: float
    train_lm_head: bool


@dataclass(frozen=True)
class LossWeights:
    """The terms' weights beside the cross-entropy's 1."""

    kl: float = 0.0
    hidden: float = 0.0


def add_lora(model: Any, settings: LoraSettings) -> PeftModel:
    """Returns the model with LoRA on all its linear layers, in place; at first it computes what the model does.

    What is trained is float32, whatever the model's precision: in half of it AdamW loses its steps.
    """
    config = LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha_ratio * settings.r,  # type: ignore[arg-type] # peft divides it by r, whole or not
        lora_dropout=settings.dropout,
        target_modules="all-linear",
        modules_to_save=["lm_head"] if settings.train_lm_head else None,
        task_type="CAUSAL_LM",
    )
    with _quiet():
        tuned = get_peft_model(model, config)
    if settings.train_lm_head:  # peft sees to LoRA's own weights alone
        head = tuned.get_output_embeddings().modules_to_save["default"]
        head.float().register_forward_pre_hook(_in_own_precision)
    return tuned


def _in_own_precision(module: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(value.to(module.weight.dtype) for value in inputs)


@contextmanager
def trainable(model: Any, settings: LoraSettings | None) -> Iterator[Any]:
    """Yields a model as it would be trained, and leaves it frozen, as it was: what LoRA would train is a copy.

    Args:
        settings: What is trained; None: all weights, which are not put back.
    """
    head = model.get_output_embeddings()
    tuned = model.requires_grad_(True) if settings is None else add_lora(model, settings)
    try:
        yield tuned
    finally:
        if settings is not None:
            tuned.unload()
            model.set_output_embeddings(head)  # peft leaves the copy that was trained
        model.requires_grad_(False)


def save_adapter(model: PeftModel, folder: Path, identity: dict[str, Any]) -> None:
    """Writes the adapter as peft does, and what it belongs to."""
    model.save_pretrained(str(folder), save_embedding_layers=False)
    write_identity(folder, identity)


def merge(model: PeftModel) -> Any:
    """Adds LoRA's updates to the weights, in place, and returns the model without LoRA, in its own precision."""
    with _quiet():
        merged = model.merge_and_unload()
    merged.get_output_embeddings().to(merged.dtype)
    return merged


def load_adapter(model: Any, folder: str | Path, identity: dict[str, Any]) -> PeftModel:
    """Puts a saved adapter on the model that it was trained on.

    Args:
        identity: What the model is: the entries that the adapter was saved with.

    Raises:
        InputError: If the folder holds no adapter, or one of another model.
    """
    check_identity("adapter", Path(folder), identity)
    try:
        with _quiet():
            return PeftModel.from_pretrained(model, str(folder)).eval()
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(
            f"{folder}: cannot be loaded ({' '.join(str(error).split())[:200]}); train it again"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Drops warnings of peft: it asks by a deprecated name, and tells of an lm_head that leaves its tie, as asked."""
    with warnings.catch_warnings():
        for tied in ("Model has .tie_word_embeddings=True.", "Input and output embeddings are no longer tied"):
            warnings.filterwarnings("ignore", tied, UserWarning)
        warnings.filterwarnings("ignore", ".is_gradient_checkpointing. is deprecated", FutureWarning)
        yield


def write_identity(folder: Path, identity: dict[str, Any]) -> None:
    """Writes what a checkpoint or an adapter belongs to, under a temporary name first."""
    temporary = folder / f".{IDENTITY_NAME}.part"
    temporary.write_text(json.dumps(identity, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, folder / IDENTITY_NAME)


def check_identity(name: str, folder: Path, identity: dict[str, Any]) -> None:
    """Compares what a checkpoint or an adapter belongs to with what it is wanted for.

    Raises:
        InputError: If they differ, or nothing says what it belongs to.
    """
    try:
        found = json.loads((folder / IDENTITY_NAME).read_text(encoding="utf-8"))
        differing = [key for key, value in identity.items() if found.get(key) != value]
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"{folder}: is no {name} of a fine-tuning (no readable {IDENTITY_NAME})") from error
    if differing:
        raise InputError(
            f"{folder}: is the {name} of another {' and '.join(differing)}; give the flags that it was made with"
        )


def last_checkpoint(folder: Path) -> Path | None:
    """Returns the last checkpoint of an output folder that was written to its end."""
    whole = [path.parent for path in folder.glob(f"checkpoint-*/{IDENTITY_NAME}")]
    numbered = [path for path in whole if path.name.split("-")[-1].isdigit()]
    return max(numbered, key=lambda path: int(path.name.split("-")[-1]), default=None)


class FinetuneTrainer(Trainer):
    """Trains what of the model has gradients; keeps the checkpoint of the best validation perplexity.

    Args:
        model: A causal LM, with LoRA or without.
        train_blocks: Rows of ``input_ids``, shape ``(length,)``, and optionally ``labels``.
        eval_blocks: Windows of the validation perplexity.
        teacher: What the student is compared with; None: the cross-entropy alone.
        weights: The weights of the teacher's terms.
        identity: What the checkpoints belong to.
        patience: Evaluations without a better perplexity after which training ends; None: never.
    """

    def __init__(
        self,
        model: Any,
        args: TrainingArguments,
        train_blocks: Dataset,
        eval_blocks: Dataset,
        teacher: Teacher | None,
        weights: LossWeights,
        identity: dict[str, Any],
        patience: int | None = None,
    ) -> None:
        indexed = train_blocks.add_column("index", list(range(len(train_blocks)))).with_format("torch")
        super().__init__(model=model, args=args, train_dataset=indexed, eval_dataset=eval_blocks, data_collator=_stack)
        self.model_accepts_loss_kwargs = False  # the loss is a mean: Trainer divides it by the accumulation steps
        self.teacher, self.weights = teacher, {"ce": 1.0, "kl": weights.kl, "hidden": weights.hidden}
        self._sums: dict[str, torch.Tensor] = {}
        self._count = 0
        self.add_callback(_Mark(identity))
        if patience is not None:
            self.add_callback(EarlyStoppingCallback(patience))
        if not args.disable_tqdm:
            self.remove_callback(ProgressCallback)
            self.add_callback(_FinetuneProgress)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *unused: Any, **options: Any) -> torch.Tensor:
        """Returns the weighted sum of the terms of a batch."""
        batch = {"labels": inputs["input_ids"], **inputs}
        with_hidden = self.teacher is not None and self.teacher.needs_hidden_states
        output = model(input_ids=batch["input_ids"], use_cache=False, output_hidden_states=with_hidden)
        terms = {"ce": cross_entropy(output.logits, batch["labels"])}
        if self.teacher is not None:
            terms |= self.teacher.terms(output, batch)
        loss = torch.stack([self.weights[name] * value for name, value in terms.items()]).sum()
        if not torch.isfinite(loss):
            raise InputError(
                f"the loss is {loss.item()} at step {self.state.global_step}; lower --learning_rate, or use "
                "--dtype float32 or bfloat16; the last checkpoint is in --output_dir"
            )
        for name, value in terms.items():
            self._sums[name] = self._sums.get(name, 0.0) + value.detach()
        self._count += 1
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the terms' means since the last log."""
        if "loss" in logs and self._count:
            logs |= {name: float(total) / self._count for name, total in self._sums.items()}
            self._sums, self._count = {}, 0
        super().log(logs, start_time)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Measures the validation perplexity."""
        value = perplexity(self.model, self.eval_dataset, self.args.per_device_eval_batch_size)
        if not math.isfinite(value):
            raise InputError(f"the validation perplexity is {value} at step {self.state.global_step}; lower "
                             "--learning_rate, or use --dtype float32 or bfloat16")  # fmt: skip
        metrics = {"eval_perplexity": value}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _set_signature_columns_if_needed(self) -> None:
        """Keeps the column by which a cached teacher finds a block: the model's forward does not take it."""
        super()._set_signature_columns_if_needed()
        self._signature_columns: Any = [*(self._signature_columns or []), "index"]


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Returns the mean negative log-likelihood of the counted labels; the logits at ``i`` predict label ``i + 1``."""
    flat, wanted = logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten()
    total = functional.cross_entropy(flat, wanted, ignore_index=IGNORE_INDEX, reduction="sum")
    return total / (wanted != IGNORE_INDEX).sum().clamp(min=1)


def _stack(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.stack([torch.as_tensor(row[name]) for row in rows]) for name in rows[0]}


class _Mark(TrainerCallback):
    """Writes into each checkpoint what it belongs to, once all else is there."""

    def __init__(self, identity: dict[str, Any]) -> None:
        self.identity = identity

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            write_identity(Path(args.output_dir) / f"checkpoint-{state.global_step}", self.identity)


class _FinetuneProgress(ProgressCallback):
    """One bar with the figures that matter, in place of a printed dictionary per log."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or self.training_bar is None or logs is None:
            return
        if "ce" in logs:
            terms = ", ".join(f"{name} {logs[name]:.3f}" for name in ("ce", "kl", "hidden") if name in logs)
            self.training_bar.set_postfix_str(terms)
        if "eval_perplexity" in logs:
            self.training_bar.write(f"step {state.global_step}: validation perplexity {logs['eval_perplexity']:.3f}")
