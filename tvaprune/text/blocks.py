"""Documents as blocks of tokens.

They are tokenised without special tokens, joined by the tokenizer's end-of-text token and cut into non-overlapping
blocks; WikiText-2 and PTB are one document, joined as the field does (method: perplexity over non-overlapping windows).
"""

import hashlib
import json
import tempfile
from pathlib import Path

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from tvaprune.errors import InputError
from tvaprune.text.sources import _cached, cache_folder, load_documents

_TOKENIZE_BATCH = 256  # documents a call


def token_blocks(
    tokenizer: PreTrainedTokenizerBase,
    dataset_name: str,
    split: str,
    block_size: int,
    max_blocks: int | None = None,
    seed: int = 0,
    data_dir: str | Path = "data",
) -> Dataset:
    """Returns a split as non-overlapping blocks of tokens, tokenised once and cached.

    Args:
        max_blocks: How many blocks to draw (without repeats, by ``seed``, in the text's order); ``None`` keeps all.

    Returns:
        A dataset of ``input_ids`` of shape ``(block_size,)``, formatted as torch tensors.

    Raises:
        InputError: If the text cannot be had or is shorter than one block.
    """
    documents = load_documents(dataset_name, split, data_dir)
    identity = [block_size, tokenizer.eos_token_id, _rules(tokenizer)]
    digest = hashlib.sha256(json.dumps(identity).encode())
    for document in documents:
        digest.update(document.encode() + b"\0")

    def build(target: Path) -> None:
        cut = _cut(tokenizer, documents, block_size)
        if not cut:
            raise InputError(
                f"--dataset_name {dataset_name}: its {split} split is shorter than one block of {block_size} tokens; "
                "give a longer text or a smaller --block_size"
            )
        Dataset.from_dict({"input_ids": cut}).save_to_disk(target)

    blocks = _cached(cache_folder() / f"blocks-{digest.hexdigest()[:16]}", build)
    if max_blocks is not None and max_blocks < len(blocks):
        chosen = np.random.default_rng(seed).permutation(len(blocks))[:max_blocks]
        blocks = blocks.select(np.sort(chosen))
    return blocks.with_format("torch")


def _rules(tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns all that settles how a tokenizer cuts; one without a backend is known by the files it saves."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        return str(backend.to_str())
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        return json.dumps([[path.name, hashlib.sha256(path.read_bytes()).hexdigest()] for path in files])


def _cut(tokenizer: PreTrainedTokenizerBase, documents: list[str], block_size: int) -> list[list[int]]:
    """Tokenises, joins by the end-of-text token and cuts; the last incomplete block is dropped."""
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    stream: list[int] = []
    for first in range(0, len(documents), _TOKENIZE_BATCH):
        batch = tokenizer(documents[first : first + _TOKENIZE_BATCH], add_special_tokens=False, verbose=False)
        for ids in batch["input_ids"]:
            stream += ids + end
    return [stream[i : i + block_size] for i in range(0, len(stream) - block_size + 1, block_size)]
