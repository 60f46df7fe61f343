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

FORWARD_TOKENS = 8192  # of a pass through the layers; more make no GPU quicker
CHUNK_TOKENS = 2048  # whose logits are in memory at a time


def windows_per_pass(blocks: Dataset, batch_size: int) -> int:
    """Returns how many windows go through the layers at a time: those asked for, of at most `FORWARD_TOKENS`."""
    return max(1, min(batch_size, FORWARD_TOKENS // len(blocks[0]["input_ids"])))


@torch.inference_mode()
def perplexity(model: Any, blocks: Dataset, batch_size: int = 8, description: str | None = None) -> float:
    """Returns ``exp`` of the mean negative log-likelihood of a text's tokens.

    Each window stands alone; its first token is context only, so a window of ``n`` tokens gives ``n - 1`` predictions.

    Args:
        model: A transformers causal LM, or a module around one.
        blocks: Windows, as `tvaprune.text.blocks.token_blocks` gives them.
        batch_size: Windows of a pass, where `windows_per_pass` does not make it fewer.
        description: Label of a progress bar; ``None`` shows none.
    """
    assert len(blocks) > 0 and len(blocks[0]["input_ids"]) > 1, "a perplexity needs a prediction"
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    total, count, step = 0.0, 0, windows_per_pass(blocks, batch_size)
    starts = range(0, len(blocks), step)
    for start in tqdm(starts, desc=description, disable=description is None, leave=False, unit="batch"):
        ids = blocks[start : start + step]["input_ids"].to(device)
        total += _negative_log_likelihood(model, ids)
        count += ids[:, 1:].numel()
    model.train(was_training)
    return math.exp(min(total / count, 700.0))  # exp overflows a float above 709; a collapsed model stays comparable


def _negative_log_likelihood(model: Any, ids: torch.Tensor) -> float:
    """Returns the sum over the predictions of a batch of windows, shape ``(batch, window)``."""
    causal = next(module for module in model.modules() if hasattr(module, "get_decoder"))
    head, hidden = causal.get_output_embeddings(), causal.get_decoder()(input_ids=ids, use_cache=False)[0]
    (batch, window), total = ids.shape, 0.0
    size = max(1, CHUNK_TOKENS // batch)
    for start in range(0, window - 1, size):
        wanted = ids[:, start + 1 : start + 1 + size]
        logits = head(hidden[:, start : start + size])[:, : wanted.shape[1]].float()
        total += float(functional.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="sum"))
    return total
