"""Perplexity over non-overlapping windows."""

import math
from typing import Any

import torch
from datasets import Dataset
from torch.nn import functional
from tqdm.auto import tqdm


@torch.inference_mode()
def perplexity(model: Any, blocks: Dataset, batch_size: int = 8, description: str | None = None) -> float:
    """Returns ``exp`` of the mean negative log-likelihood of a text's tokens.

    Each window stands alone; its first token is context only, so a window of ``n`` tokens gives ``n - 1`` predictions.

    Args:
        model: A causal LM: called with ``input_ids`` of shape ``(batch, window)``.
        blocks: Windows, as `tvaprune.text.blocks.token_blocks` gives them.
        description: Label of a progress bar; ``None`` shows none.
    """
    assert len(blocks) > 0 and len(blocks[0]["input_ids"]) > 1, "a perplexity needs a prediction"
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    starts = range(0, len(blocks), batch_size)
    for start in tqdm(starts, desc=description, disable=description is None, leave=False, unit="batch"):
        ids = blocks[start : start + batch_size]["input_ids"].to(device)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        total += float(functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"))
        count += ids[:, 1:].numel()
    model.train(was_training)
    return math.exp(min(total / count, 700.0))  # exp overflows a float above 709; a collapsed model stays comparable
