"""Documents as blocks of tokens.

They are tokenised without special tokens, joined by the tokenizer's end-of-text token and cut into non-overlapping
blocks; WikiText-2 and PTB are one document, their rows joined by a blank line. `protocols` has the field's own ways.

Of a large text, documents are drawn before they are tokenised, and no more are tokenised than are asked for: all of
C4's training file would take a quarter of an hour and gigabytes. A small one is tokenised whole, and blocks are drawn.
"""

import hashlib
import json
import tempfile
from itertools import chain
from pathlib import Path

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from tvaprune.errors import InputError
from tvaprune.text.sources import cache_folder, cached, is_streamed, load_documents

_TOKENIZE_BATCH = 256  # documents a call
WHOLE_CHARACTERS = 64 * 2**20  # a text up to this is tokenised whole: under a minute
# Characters that documents are drawn from, for each token that is asked for: some 8 times as many as are needed, so
# that seeds differ, and enough whatever the tokenizer.
DRAWN_FROM = 32


def token_blocks(
    tokenizer: PreTrainedTokenizerBase,
    dataset_name: str,
    split: str,
    block_size: int,
    max_blocks: int | None = None,
    seed: int = 0,
    data_dir: str | Path = "data",
    bos: int | None = None,
    flag: str = "block_size",
) -> Dataset:
    """Returns a split as non-overlapping blocks of tokens, tokenised once and cached.

    Args:
        max_blocks: How many blocks to draw (without repeats, by ``seed``, in the text's order, of a large text in the
            drawn documents' order); ``None`` keeps all.
        bos: The token that every block begins with, for a model that needs it; None: none does.
        flag: That says the size of a block.

    Returns:
        A dataset of ``input_ids`` of shape ``(block_size,)``, formatted as torch tensors.

    Raises:
        InputError: If the text cannot be had or is shorter than one block.
    """
    tokens = None if max_blocks is None else max_blocks * block_size
    enough = None if tokens is None else tokens * DRAWN_FROM
    documents = load_documents(dataset_name, split, data_dir, enough)
    if tokens is not None and _is_large(documents, tokens, is_streamed(dataset_name)):
        order = np.random.default_rng(seed).permutation(len(documents))
        documents = [documents[place] for place in order]
    else:
        tokens = None  # of the whole text blocks are drawn
    drawn, begun = [] if tokens is None else [tokens], [] if bos is None else ["bos", bos]
    digest = _digest([block_size, tokenizer.eos_token_id, _rules(tokenizer), *drawn, *begun], documents)

    def build(target: Path) -> None:
        cut = _cut(tokenizer, documents, block_size, tokens, bos)
        if not len(cut):
            raise InputError(
                f"--dataset_name {dataset_name}: its {split} split is shorter than one block of {block_size} tokens; "
                f"give a longer text or a smaller --{flag}"
            )
        Dataset.from_dict({"input_ids": cut}).save_to_disk(target)

    blocks = cached(cache_folder() / f"blocks-{digest}", build)
    if max_blocks is not None and max_blocks < len(blocks):
        chosen = np.random.default_rng(seed).permutation(len(blocks))[:max_blocks]
        blocks = blocks.select(np.sort(chosen))
    return blocks.with_format("torch")


def spread(blocks: Dataset, count: int) -> Dataset:
    """Returns so many blocks from all over a text, in its order; all of them where there are fewer."""
    return blocks.select(np.linspace(0, len(blocks) - 1, min(count, len(blocks)), dtype=int))


def _digest(identity: list[object], documents: list[str]) -> str:
    """Returns what tells a text's blocks from another's."""
    digest = hashlib.sha256(json.dumps(identity).encode())
    for document in documents:
        digest.update(document.encode() + b"\0")
    return digest.hexdigest()[:16]


def with_bos(windows: np.ndarray, bos: int) -> np.ndarray:
    """Puts a token before each row of tokens, shape ``(windows, tokens)``."""
    return np.pad(windows, ((0, 0), (1, 0)), constant_values=bos)


def _rules(tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns all that settles how a tokenizer cuts; one without a backend is known by the files it saves."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        return str(backend.to_str())
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        return json.dumps([[path.name, hashlib.sha256(path.read_bytes()).hexdigest()] for path in files])


def _is_large(documents: list[str], tokens: int, is_streamed: bool) -> bool:
    """Returns whether documents are drawn for so many tokens, in place of blocks; one document cannot be."""
    characters = sum(map(len, documents))
    least = 0 if is_streamed else WHOLE_CHARACTERS
    return len(documents) > 1 and characters >= max(tokens * DRAWN_FROM, least)


def _cut(
    tokenizer: PreTrainedTokenizerBase,
    documents: list[str],
    block_size: int,
    tokens: int | None = None,
    bos: int | None = None,
) -> np.ndarray:
    """Tokenises, joins by the end-of-text token and cuts, shape ``(blocks, block_size)``; an incomplete end is dropped.

    Args:
        tokens: How many are enough; ``None``: all.
        bos: What each block begins with; ``None``: nothing.
    """
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    pieces, count = [np.empty(0, dtype=np.int64)], 0
    for first in range(0, len(documents), _TOKENIZE_BATCH):
        batch = tokenizer(documents[first : first + _TOKENIZE_BATCH], add_special_tokens=False, verbose=False)
        pieces.append(np.fromiter(chain.from_iterable(ids + end for ids in batch["input_ids"]), dtype=np.int64))
        count += len(pieces[-1])
        if tokens is not None and count >= tokens:
            break
    stream, width = np.concatenate(pieces)[:tokens], block_size - (bos is not None)
    blocks = stream[: len(stream) // width * width].reshape(-1, width)
    return blocks if bos is None else with_bos(blocks, bos)
