"""Speed of one model over another: side by side in one run, on the same inputs, turn about."""

import time
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from datasets import Dataset

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


@torch.inference_mode()
def speed_up(reference: Any, model: Any, blocks: Dataset, batch_size: int = 8, max_batches: int = 20) -> SpeedUp:
    """Times a forward pass of both models over the same batches, alternating which goes first.

    Args:
        reference: The unpruned model; both must be on the same device.
        max_batches: Batches timed, repeating the blocks where there are fewer.
    """
    device = next(model.parameters()).device
    batch_size = min(batch_size, len(blocks))
    starts = range(0, len(blocks) - batch_size + 1, batch_size)
    batches = [blocks[start : start + batch_size]["input_ids"].to(device) for start in starts][:max_batches]
    was_training = reference.training, model.training
    reference.eval(), model.eval()
    for index in range(WARM_UP_BATCHES):
        _seconds(reference, batches[index % len(batches)])
        _seconds(model, batches[index % len(batches)])
    slow: list[float] = []
    fast: list[float] = []
    for index in range(max_batches):
        ids = batches[index % len(batches)]
        pairs = [(reference, slow), (model, fast)]
        for timed, seconds in pairs if index % 2 == 0 else reversed(pairs):
            seconds.append(_seconds(timed, ids))
    reference.train(was_training[0]), model.train(was_training[1])
    return SpeedUp(
        per_batch=median(a / b for a, b in zip(slow, fast, strict=True)),
        whole_set=sum(slow) / sum(fast),
        reference_seconds=sum(slow),
        seconds=sum(fast),
        num_batches=max_batches,
        batch_size=batch_size,
        window=batches[0].shape[1],
    )


def _seconds(model: Any, ids: torch.Tensor) -> float:
    if ids.is_cuda:
        torch.cuda.synchronize(ids.device)
    begin = time.perf_counter()
    model(input_ids=ids, use_cache=False)
    if ids.is_cuda:
        torch.cuda.synchronize(ids.device)
    return time.perf_counter() - begin
