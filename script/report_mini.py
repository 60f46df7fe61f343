"""Reports a miniature model: validation perplexity beside n-gram baselines on the same tokens, and continuations.

The baselines are interpolated n-gram models with absolute discounting (Ney et al., 1994) of the training split.
"""

import argparse
import math
import sys
from typing import Any

import numpy as np
import torch
from transformers import set_seed

from tvaprune.cli import run_command
from tvaprune.measure.perplexity import perplexity
from tvaprune.models.load import load_model
from tvaprune.report.tables import table
from tvaprune.text.blocks import token_blocks

DISCOUNT = 0.75
PROMPTS = ("Return the number of", "Parameters\n----------\nx : ", "The following example shows how to")


def ngram_perplexities(train: np.ndarray, held_out: np.ndarray, vocabulary: int, order: int = 3) -> list[float]:
    """Returns the held-out perplexity of the unigram, bigram, ... model, each interpolated with the one before.

    Args:
        train: Token blocks, shape ``(blocks, length)``.
        held_out: Token blocks; as for the language model, a block's first token is context only.
    """
    probability = np.full((len(held_out), held_out.shape[1] - 1), 1.0 / vocabulary)
    perplexities = []
    for n in range(1, order + 1):
        grams, counts = np.unique(_keys(train, n, vocabulary), return_counts=True)
        contexts, members = np.unique(grams // vocabulary, return_inverse=True)
        totals, distinct = np.bincount(members, weights=counts), np.bincount(members)
        first = max(n - 1, 1)  # the first predicted place that has n - 1 tokens before it
        keys = _keys(held_out, n, vocabulary)[:, first - (n - 1) :]
        total = np.maximum(_look_up(contexts, totals, keys // vocabulary), 1)
        share = np.maximum(_look_up(grams, counts, keys) - DISCOUNT, 0) / total
        known = np.isin(keys // vocabulary, contexts)
        left = np.where(known, DISCOUNT * _look_up(contexts, distinct, keys // vocabulary) / total, 1.0)
        probability[:, first - 1 :] = share + left * probability[:, first - 1 :]
        perplexities.append(math.exp(-np.log(probability).mean()))
    return perplexities


def _look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Returns the value of each wanted key among sorted keys, 0 where it is not there."""
    places = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[places] == wanted, values[places], 0)


def _keys(blocks: np.ndarray, n: int, vocabulary: int) -> np.ndarray:
    """Returns the n-grams of each block as integers, shape ``(blocks, length - n + 1)``."""
    length = blocks.shape[1] - n + 1
    keys = np.zeros((len(blocks), length), dtype=np.int64)
    for offset in range(n):
        keys = keys * vocabulary + blocks[:, offset : offset + length]
    return keys


def report(path: str, block_size: int) -> None:
    """Prints the figures of one model."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model: Any
    model, tokenizer = load_model(path, "float32", device)
    train, validation, test = (
        token_blocks(tokenizer, "python_docs", split, block_size) for split in ("train", "validation", "test")
    )
    counted, held_out = (np.array(blocks.with_format("numpy")["input_ids"]) for blocks in (train, validation))
    unigram, bigram, trigram = ngram_perplexities(counted, held_out, len(tokenizer))
    rows = [
        ("tokens of training text", f"{len(train) * block_size:,}"),
        ("windows of validation and test text", f"{len(validation)} and {len(test)} of {block_size} tokens"),
        ("validation perplexity, unigram", f"{unigram:.1f}"),
        ("validation perplexity, bigram", f"{bigram:.1f}"),
        ("validation perplexity, trigram", f"{trigram:.1f}"),
        ("validation perplexity, this model", f"{perplexity(model, validation, description='validation'):.2f}"),
        ("test perplexity, this model", f"{perplexity(model, test, description='test'):.2f}"),
    ]
    print(table(rows))
    set_seed(0)
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"].to(device)
        output = model.generate(ids, max_new_tokens=60, do_sample=True, temperature=0.7, top_p=0.9)
        print(f"\n--- {prompt!r} continued:\n{tokenizer.decode(output[0])}")


def main() -> None:
    """Parses the flags and prints the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", help="the miniature model's folder")
    parser.add_argument("--block_size", type=int, default=256, help="tokens of a window")
    args = parser.parse_args()
    report(args.model, args.block_size)


if __name__ == "__main__":
    sys.exit(run_command(main))
