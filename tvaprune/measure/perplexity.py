"""Perplexity over non-overlapping windows, in the memory that the model's layers need.

The logits of 8 windows of 8,192 tokens over 128,256 tokens are 63 GiB in float32, some ten times all else: the decoder
runs on a batch, the head and the loss on a chunk of its positions at a time.
"""

import math
from typing import Any

import torch
from datasets import Dataset
from torch.nn import functional
from tqdm.auto import tqdm

from tvaprune import ranks
from tvaprune.losses import Predictions
from tvaprune.models.layers import Half, Layers, attention_options, embed, paths_of
from tvaprune.models.logits import head_of, predictions

FORWARD_TOKENS = 8192  # of a pass through the layers; more make no GPU quicker
FORWARD_WINDOWS = 8
CHUNK_TOKENS = 2048  # whose logits are in memory at a time: without gradients, so more than in training
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


@torch.inference_mode()
def perplexity(model: Any, blocks: Dataset, batch_size: int = 0, description: str | None = None) -> float:
    """Returns ``exp`` of the mean negative log-likelihood of a text's tokens.

    Each window stands alone; its first token is context only, so a window of ``n`` tokens gives ``n - 1`` predictions.
    The processes of a run share the windows out, and all return the same.

    Args:
        model: A transformers causal LM, a module around one, or the layers of one, which are worked through in turn.
        blocks: Windows, as `tvaprune.text.blocks.token_blocks` gives them.
        batch_size: Windows of a pass; 0: as `windows_of_pass` says.
        description: Label of a progress bar; ``None`` shows none.
    """
    if isinstance(model, Layers):
        return _by_layers(model, blocks, batch_size, description)
    assert len(blocks) > 0 and len(blocks[0]["input_ids"]) > 1, "a perplexity needs a prediction"
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    total, count, step = 0.0, 0.0, windows_per_pass(blocks, batch_size)
    starts = list(ranks.rounds(range(0, len(blocks), step)))
    for start, counts in tqdm(starts, desc=description, disable=description is None, leave=False, unit="batch"):
        ids = blocks[start : start + step]["input_ids"].to(device)
        value = _negative_log_likelihood(model, ids)
        if counts:
            total, count = total + value, count + ids[:, 1:].numel()
    model.train(was_training)
    total, count = ranks.total(total, count)
    return _exponent(total / count)


def _exponent(mean: float) -> float:
    return math.exp(min(mean, 700.0))  # exp overflows a float above 709; a collapsed model stays comparable


def _negative_log_likelihood(model: Any, ids: torch.Tensor) -> float:
    """Returns the sum over the predictions of a batch of windows, shape ``(batch, window)``."""
    return _summed(predictions(model, input_ids=ids, use_cache=False)[0], ids)


def _summed(found: Predictions, ids: torch.Tensor) -> float:
    """Returns the same of what is predicted."""
    (batch, window), total = ids.shape, 0.0
    size = max(1, CHUNK_TOKENS // batch)
    for start in range(0, window - 1, size):
        wanted = ids[:, start + 1 : start + 1 + size]
        logits = found.logits(start, start + size)[:, : wanted.shape[1]].float()
        targets = wanted.flatten().to(logits.device)
        total += float(functional.cross_entropy(logits.flatten(0, 1), targets, reduction="sum"))
    return total


def _by_layers(layers: Layers, blocks: Dataset, batch_size: int, description: str | None) -> float:
    """Returns the same perplexity of a model whose layers are held one half at a time."""
    step, tokens = windows_per_pass(blocks, batch_size), blocks[0]["input_ids"].numel()
    options = attention_options(layers, tokens)
    batches = [blocks[start : start + step]["input_ids"] for start in range(0, len(blocks), step)]
    size = max(1, STREAM_TOKENS // (step * tokens))
    groups = [batches[first : first + size] for first in range(0, len(batches), size)]
    total, halves = 0.0, list(layers.blocks())
    with tqdm(total=len(groups) * len(halves), desc=description, disable=description is None, leave=False) as shown:
        for group in groups:
            states = [layers.room((*ids.shape, layers.model.config.hidden_size)) for ids in group]
            embed(layers, group, states)
            for index, block, is_attention in halves:
                half = Half.of(layers, block, options[index] if is_attention else {})
                with layers.holding(*paths_of(block)):
                    for hidden in states:
                        hidden.copy_(half(hidden.to(layers.device)))
                shown.update()
            with layers.holding(*layers.ends):
                ending = Half.ending(layers)
                for ids, hidden in zip(group, states, strict=True):
                    normed = ending.norm(hidden.to(layers.device))
                    total += _summed(Predictions(normed, head_of(layers.model)), ids.to(layers.device))
    return _exponent(total / sum(ids[:, 1:].numel() for ids in batches))
