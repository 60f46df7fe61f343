"""What an evaluation needs beside the model: all logits of a batch at once, as a model's own loss has them, and ours.

A random Llama of 2 layers, width 64, over a vocabulary of 32,000 tokens, in float32 on a CPU; a pass of 4 windows of
2,048 tokens. Peak resident memory over what was there before, and that over the number of logits.

    python -m benchmarks.memory

    ours (chunks of 2,048 tokens): 754 MiB, 3.0 bytes a logit, perplexity 32340.68
    all logits at once: 2,993 MiB, 12.0 bytes a logit, perplexity 32340.70
    ratio 4.0; the same perplexity to 5.7e-07

(12 bytes a logit of one chunk, whatever the pass. By the batch flag's default, 8 windows of 8,192 tokens, all logits at
once were 65,536 tokens' where a chunk is 2,048.)
"""

import math
from collections.abc import Callable

import torch
from datasets import Dataset
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from tvaprune.measure.memory import PeakMemory
from tvaprune.measure.perplexity import EVALUATED_TOKENS, perplexity

WINDOWS, WINDOW, VOCABULARY = 4, 2048, 32_000


def all_at_once(model: LlamaForCausalLM, blocks: Dataset) -> float:
    """Returns the perplexity of one batch from all its logits in float32."""
    ids = blocks[:]["input_ids"]
    with torch.inference_mode():
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        return math.exp(functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))


def measured(name: str, work: Callable[[], float]) -> tuple[float, int]:
    """Does the work and tells what it gave and needed; returns both."""
    with PeakMemory(torch.device("cpu")) as memory:
        value = work()
    needed = memory.peak - memory.before
    each = needed / (WINDOWS * WINDOW * VOCABULARY)
    print(f"{name}: {needed / 2**20:,.0f} MiB, {each:.1f} bytes a logit, perplexity {value:.2f}", flush=True)
    return value, needed


def main() -> None:
    """Measures both and prints their ratio."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                         num_attention_heads=4, max_position_embeddings=WINDOW)  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(0, VOCABULARY, (WINDOWS, WINDOW)).tolist()
    blocks = Dataset.from_dict({"input_ids": ids}).with_format("torch")
    perplexity(model, blocks.select([0]), 1)  # what the first call alone sets up
    chunked, less = measured(
        f"ours (chunks of {EVALUATED_TOKENS:,} tokens)", lambda: perplexity(model, blocks, WINDOWS)
    )
    whole, more = measured("all logits at once", lambda: all_at_once(model, blocks))
    print(f"ratio {more / less:.1f}; the same perplexity to {abs(chunked / whole - 1):.1e}")


if __name__ == "__main__":
    main()
