"""Perplexity over non-overlapping windows and its standard error, in the memory that the model's layers need.

The logits of 8 windows of 8,192 tokens over 128,256 tokens are 63 GiB in float32, some ten times all else: the decoder
runs on a batch, the head and the loss on a chunk of its positions at a time.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch.nn import functional

from tvaprune import ranks
from tvaprune.losses import Predictions
from tvaprune.models.layers import Half, Layers, attention_options, embed, paths_of
from tvaprune.models.logits import head_of, predictions
from tvaprune.models.modes import in_mode
from tvaprune.phases import told_bar

FORWARD_TOKENS = 8192  # of a pass through the layers; more make no GPU quicker
FORWARD_WINDOWS = 8
EVALUATED_TOKENS = 2048  # whose logits are there at a time: without gradients, so more than of a loss
STREAM_TOKENS = 2**18  # whose hidden states are there at a time where layers are fetched: each time from disk


def windows_per_pass(blocks: Dataset, batch_size: int = 0) -> int:
    """Returns how many windows of a text go through the layers at a time, as `windows_of_pass`."""
    return windows_of_pass(len(blocks[0]["input_ids"]), batch_size)


def windows_of_pass(window: int, batch_size: int = 0) -> int:
    """Returns how many windows of so many tokens go through the layers at a time.

    Args:
        batch_size: Those asked for; 0: as many as make `FORWARD_TOKENS`, at most `FORWARD_WINDOWS`.
    """
    return batch_size or max(1, min(FORWARD_WINDOWS, FORWARD_TOKENS // window))


@dataclass(frozen=True, eq=False)
class TextLoss:
    """How well a model predicts a text: negative log-likelihoods in nats.

    A standard error takes the windows as a sample, of which their text has more; it says nothing of other texts, or of
    another training. Neighbouring windows, of one document, are alike: what they have in common is counted.

    Attributes:
        mean: Over all predictions.
        windows: The mean of each window, in their order, shape ``(number of windows,)``, float64. All are as long.
    """

    mean: float
    windows: torch.Tensor

    @property
    def perplexity(self) -> float:
        """``exp`` of the mean."""
        return math.exp(min(self.mean, 700.0))  # exp overflows a float above 709; a collapsed model stays comparable

    @property
    def stderr(self) -> float | None:
        """The standard error of the mean, so of the log perplexity; None: of a single window there is none."""
        return _stderr(self.windows)

    @property
    def perplexity_stderr(self) -> float | None:
        """The same of the perplexity, to first order: the perplexity times that of its logarithm."""
        return None if self.stderr is None else self.perplexity * self.stderr

    def gap_stderr(self, other: "TextLoss") -> float | None:
        """Returns the standard error of this mean minus another model's over the same windows, paired by window."""
        return _stderr(self.windows - other.windows)


def _stderr(values: torch.Tensor) -> float | None:
    """Returns the standard error of a mean of values whose neighbours may be alike; None: of one there is none.

    Newey and West (Econometrica 1987), with the lags of their rule of 1994, of few values none.
    """
    count = len(values)
    if count < 2:
        return None
    centred, lags = values - values.mean(), min(count // 8, int(4 * (count / 100) ** (2 / 9)))
    shared = [(1 - lag / (lags + 1)) * float(centred[lag:] @ centred[:-lag]) for lag in range(1, lags + 1)]
    summed = float(centred @ centred) + 2 * sum(shared)
    return math.sqrt(max(summed, 0.0) / (count - 1) / count)  # in this order NaN stays NaN


def perplexity(model: Any, blocks: Dataset, batch_size: int = 0, description: str | None = None) -> float:
    """Returns ``exp`` of the mean negative log-likelihood of a text's tokens, as `text_loss` finds it."""
    return text_loss(model, blocks, batch_size, description).perplexity


@torch.inference_mode()
def text_loss(
    model: Any,
    blocks: Dataset,
    batch_size: int = 0,
    description: str | None = None,
    at: Callable[[float], str] | None = None,
) -> TextLoss:
    """Returns the negative log-likelihood of a text's tokens.

    Each window stands alone; its first token is context only, so a window of ``n`` tokens gives ``n - 1`` predictions.
    The processes of a run share the windows out, and all return the same.

    Args:
        model: A transformers causal LM, a module around one, or the layers of one, which are worked through in turn.
        blocks: Windows, as `tvaprune.text.blocks.token_blocks` gives them.
        batch_size: Windows of a pass; 0: as `windows_of_pass` says.
        description: Label of a progress bar; ``None`` shows none.
        at: Told the share that is done; what it returns stands in the bar.
    """
    if isinstance(model, Layers):
        return _by_layers(model, blocks, batch_size, description, at)
    assert len(blocks) > 0 and len(blocks[0]["input_ids"]) > 1, "a perplexity needs a prediction"
    device = next(model.parameters()).device
    total, count, step = 0.0, 0.0, windows_per_pass(blocks, batch_size)
    sums = torch.zeros(len(blocks), dtype=torch.float64)
    starts = list(ranks.rounds(range(0, len(blocks), step)))
    with in_mode(False, model), told_bar(len(starts), description, "batch", at) as advance:
        for start, counts in starts:
            ids = blocks[start : start + step]["input_ids"].to(device)
            value, each = _summed(predictions(model, input_ids=ids, use_cache=False)[0], ids)
            if counts:
                total, count = total + value, count + ids[:, 1:].numel()
                sums[start : start + step] = each
            advance()
    total, count = ranks.total(total, count)
    ranks.add_up(sums)
    return TextLoss(total / count, sums / (count / len(blocks)))


def _summed(found: Predictions, ids: torch.Tensor) -> tuple[float, torch.Tensor]:
    """Returns the sum over the predictions of a batch of windows, shape ``(batch, window)``, and that of each window.

    The first is not the sum of the others to the last bit: it is added up as the model's own loss is.
    """
    (batch, window), total = ids.shape, 0.0
    each = torch.zeros(batch, dtype=torch.float64)
    size = max(1, EVALUATED_TOKENS // batch)
    for start in range(0, window - 1, size):
        wanted = ids[:, start + 1 : start + 1 + size]
        logits = found.logits(start, start + size)[:, : wanted.shape[1]].float()
        value, by_window = _of_chunk(logits, wanted.to(logits.device))
        total, each = total + value, each + by_window
    return total, each


def _of_chunk(logits: torch.Tensor, wanted: torch.Tensor) -> tuple[float, torch.Tensor]:
    """Returns the same of a chunk of positions, whose log-probabilities are gone before the next one's logits come."""
    logs, targets = functional.log_softmax(logits.flatten(0, 1), dim=-1), wanted.flatten()
    each = functional.nll_loss(logs, targets, reduction="none").view(len(wanted), -1)
    return float(functional.nll_loss(logs, targets, reduction="sum")), each.double().sum(1).cpu()


def _by_layers(
    layers: Layers,
    blocks: Dataset,
    batch_size: int,
    description: str | None,
    at: Callable[[float], str] | None,
) -> TextLoss:
    """Returns the same of a model whose layers are held one half at a time."""
    step, tokens = windows_per_pass(blocks, batch_size), blocks[0]["input_ids"].numel()
    options = attention_options(layers, tokens)
    batches = [blocks[start : start + step]["input_ids"] for start in range(0, len(blocks), step)]
    size = max(1, STREAM_TOKENS // (step * tokens))
    groups = [batches[first : first + size] for first in range(0, len(batches), size)]
    total, windows, halves = 0.0, list[torch.Tensor](), list(layers.blocks())
    with told_bar(len(groups) * len(halves), description, "half layer", at) as advance:
        for group in groups:
            states = [layers.room_of(ids, layers.model.config.hidden_size) for ids in group]
            embed(layers, group, states)
            for index, block, is_attention in halves:
                half = Half.of(layers, block, options[index] if is_attention else {})
                with layers.holding(*paths_of(block)):
                    for hidden in states:
                        hidden.copy_(half(hidden.to(layers.device)))
                advance()
            with layers.holding(*layers.ends):
                ending = Half.ending(layers)
                for ids, hidden in zip(group, states, strict=True):
                    normed = ending.normed(hidden.to(layers.device))
                    value, each = _summed(Predictions(normed, head_of(layers.model)), ids.to(layers.device))
                    total += value
                    windows.append(each / (tokens - 1))
    return TextLoss(total / sum(ids[:, 1:].numel() for ids in batches), torch.cat(windows))
