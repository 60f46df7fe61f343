"""Fine-tuning any causal LM towards a teacher, on `transformers.Trainer`.

``loss = CE + alpha * KL(teacher || student) [+ beta * distance of hidden states]``, on the shifted tokens whose label
counts, the mean per token. Accumulation, precision, checkpoints, their resumption and early stopping are `Trainer`'s
own.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import EarlyStoppingCallback, TrainingArguments

from tvaprune import ranks
from tvaprune.checkpoints import CheckpointedTrainer
from tvaprune.errors import InputError
from tvaprune.identity import Identity
from tvaprune.losses import cross_entropy
from tvaprune.measure.figures import with_error
from tvaprune.measure.perplexity import perplexity
from tvaprune.models.logits import predictions_within
from tvaprune.phases import FINE_TUNING, Phases, TrainingBar
from tvaprune.recover.teacher import Teacher


@dataclass(frozen=True)
class LossWeights:
    """The terms' weights beside the cross-entropy's 1."""

    kl: float = 0.0
    hidden: float = 0.0


class FinetuneTrainer(CheckpointedTrainer):
    """Trains what of the model has gradients; keeps the checkpoint of the best validation perplexity.

    Args:
        model: A causal LM, with LoRA or without.
        train_blocks: Rows of ``input_ids``, shape ``(length,)``, and optionally ``labels``.
        eval_blocks: Windows of the validation perplexity.
        teacher: What the student is compared with; None: the cross-entropy alone.
        weights: The weights of the teacher's terms.
        identity: What the checkpoints belong to.
        patience: Evaluations without a better perplexity after which training ends; None: never.
        phases: Of the command; its bar says where in them it is.
    """

    def __init__(
        self,
        model: Any,
        args: TrainingArguments,
        train_blocks: Dataset,
        eval_blocks: Dataset,
        teacher: Teacher | None,
        weights: LossWeights,
        identity: Identity,
        patience: int | None = None,
        phases: Phases | None = None,
    ) -> None:
        drawn = train_blocks.flatten_indices(keep_in_memory=True)  # else a copy is left in the text's cache
        indexed = drawn.add_column("index", list(range(len(drawn)))).with_format("torch")
        bar = _FinetuneProgress(phases or Phases(), FINE_TUNING)
        super().__init__(model, args, train_dataset=indexed, eval_dataset=eval_blocks, identity=identity, bar=bar)
        self.teacher, self.weights = teacher, {"ce": 1.0, "kl": weights.kl, "hidden": weights.hidden}
        self._sums: dict[str, torch.Tensor] = {}
        self._count = 0
        if patience is not None:
            self.add_callback(EarlyStoppingCallback(patience))

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *unused: Any, **options: Any) -> torch.Tensor:
        """Returns the weighted sum of the terms of a batch."""
        batch = {"labels": inputs["input_ids"], **inputs}
        with_hidden = self.teacher is not None and self.teacher.needs_hidden_states
        inputs = {"input_ids": batch["input_ids"], "use_cache": False, "output_hidden_states": with_hidden}
        student, output = predictions_within(self.accelerator.autocast, model, **inputs)
        if self.teacher is None:
            terms = {"ce": cross_entropy(student, batch["labels"])}
        else:
            terms = self.teacher.terms(student, output.hidden_states, batch, self.accelerator.autocast)
        loss = torch.stack([self.weights[name] * value for name, value in terms.items()]).sum()
        if not torch.isfinite(loss):
            raise InputError(
                f"the loss is {loss.item()} at step {self.state.global_step}; lower --learning_rate, or use "
                "--dtype float32 or bfloat16; what was saved is in --output_dir"
            )
        for name, value in terms.items():
            self._sums[name] = self._sums.get(name, 0.0) + value.detach()
        self._count += 1
        return self.of_step(loss, len(batch["input_ids"]))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the terms' means since the last log."""
        if "loss" in logs and self._count:
            count, *sums = ranks.total(self._count, *map(float, self._sums.values()))
            logs |= {name: value / count for name, value in zip(self._sums, sums, strict=True)}
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


class _FinetuneProgress(TrainingBar):
    """One bar with the figures that matter, in place of a printed dictionary per log."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if self.training_bar is None or logs is None:  # only the first process has a bar
            return
        if "ce" in logs:
            terms = ", ".join(f"{name} {logs[name]:.3f}" for name in ("ce", "kl", "hidden") if name in logs)
            self.training_bar.set_postfix_str(terms)
        if "eval_perplexity" in logs:
            self.training_bar.write(
                f"step {state.global_step}: validation perplexity {with_error(logs['eval_perplexity'], None)}"
            )
