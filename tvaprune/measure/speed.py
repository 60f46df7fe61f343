"""Speed of one model over another: side by side in one run, on the same inputs, turn about."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedModel, TrainingArguments

from tvaprune.losses import cross_entropy
from tvaprune.models.logits import predictions
from tvaprune.models.modes import in_mode

WARM_UP_BATCHES = 2


@dataclass(frozen=True)
class SpeedUp:
    """How many times faster the second model runs; seconds are of this run and this machine only.

    Attributes:
        per_batch: Median over the batches of the ratio of their two times.
        whole_set: Ratio of the times of all batches.
        reference_seconds: The first model's time for all batches.
        seconds: The second model's.
        num_batches: Batches timed, each shape ``(batch_size, window)``.
    """

    per_batch: float
    whole_set: float
    reference_seconds: float
    seconds: float
    num_batches: int
    batch_size: int
    window: int


def speed_up(
    reference: PreTrainedModel, model: PreTrainedModel, blocks: Dataset, batch_size: int = 8, max_batches: int = 20
) -> SpeedUp:
    """Times a forward pass of both models over the same batches, alternating which goes first.

    Args:
        reference: The unpruned model; both must be on the same device.
        max_batches: Batches timed, repeating the blocks where there are fewer.
    """
    with in_mode(False, reference, model), torch.inference_mode():
        return _compare((reference, _forward), (model, _forward), blocks, batch_size, max_batches)


def training_speed_up(
    reference: PreTrainedModel, model: nn.Module, blocks: Dataset, args: TrainingArguments, max_batches: int = 10
) -> SpeedUp:
    """Times a training step of both models: forward, backward, and AdamW over what has gradients.

    The learning rate is 0: the weights stay as they are. A teacher's forward, the same for both, is not in it.

    Args:
        reference: The unpruned model; both must be on the same device.
        args: Of the training: its batch size, precision and gradient checkpointing are those of both.
    """
    sides = (reference, _TrainingStep(reference, args)), (model, _TrainingStep(model, args))
    try:
        with in_mode(True, reference, model), _checkpointing(args, reference, model):
            return _compare(*sides, blocks, args.per_device_train_batch_size, max_batches)
    finally:  # a step may have ended for lack of memory
        for _, step in sides:
            step.optimizer.zero_grad()


def _forward(model: PreTrainedModel, ids: torch.Tensor) -> None:
    model(input_ids=ids, use_cache=False)


class _TrainingStep:
    def __init__(self, model: nn.Module, args: TrainingArguments) -> None:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0)
        self.precision = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None

    def __call__(self, model: PreTrainedModel, ids: torch.Tensor) -> None:
        with torch.autocast(ids.device.type, self.precision, enabled=self.precision is not None):
            loss = cross_entropy(predictions(model, input_ids=ids, use_cache=False)[0], ids)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


@contextmanager
def _checkpointing(args: TrainingArguments, *models: Any) -> Iterator[None]:
    """Switches gradient checkpointing on as `Trainer` does, and off again."""
    if not args.activation_checkpointing:
        yield
        return
    given: Any = args.activation_checkpointing_kwargs
    options = dict(given or {})
    placed = {name: options.pop(name) for name in ("every_n_layers", "offload") if name in options}
    for model in models:
        model.activation_checkpointing_enable(options or None, **placed)
    try:
        yield
    finally:
        for model in models:
            model.activation_checkpointing_disable()


_Side = tuple[Any, Callable[[Any, torch.Tensor], None]]


def _compare(reference: _Side, model: _Side, blocks: Dataset, batch_size: int, max_batches: int) -> SpeedUp:
    """Times both over the same batches, alternating which goes first."""
    device = next(model[0].parameters()).device
    batch_size = min(batch_size, len(blocks))
    starts = range(0, len(blocks) - batch_size + 1, batch_size)
    batches = [blocks[start : start + batch_size]["input_ids"].to(device) for start in starts[:max_batches]]

    def step(side: _Side) -> Callable[[int], None]:
        return lambda index: side[1](side[0], batches[index % len(batches)])

    slow, fast = turn_about(step(reference), step(model), max_batches, device)
    return SpeedUp(
        per_batch=median(a / b for a, b in zip(slow, fast, strict=True)),
        whole_set=sum(slow) / sum(fast),
        reference_seconds=sum(slow),
        seconds=sum(fast),
        num_batches=max_batches,
        batch_size=batch_size,
        window=batches[0].shape[1],
    )


def turn_about(
    reference: Callable[[int], object], model: Callable[[int], object], repeats: int, device: torch.device | None = None
) -> tuple[list[float], list[float]]:
    """Returns the seconds of two steps, each done ``repeats`` times, alternating which goes first.

    Args:
        reference: A step; it takes the number of the repeat.
        device: Where they run, if it is a GPU, which is waited for.
    """
    for index in range(WARM_UP_BATCHES):
        reference(index), model(index)
    slow: list[float] = []
    fast: list[float] = []
    for index in range(repeats):
        pairs = [(reference, slow), (model, fast)]
        for step, taken in pairs if index % 2 == 0 else reversed(pairs):
            taken.append(seconds(partial(step, index), device))
    return slow, fast


def seconds(step: Callable[[], object], device: torch.device | None) -> float:
    """Returns the seconds that a step takes; a GPU is waited for."""
    on_gpu = device is not None and device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    step()
    if on_gpu:
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin
