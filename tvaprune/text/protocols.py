"""The test texts as the field takes them, so that a perplexity can stand beside published ones.

The scripts that most papers on pruning share (SparseGPT's ``datautils.py``, then Wanda's ``lib/data.py`` and
``lib/eval.py``, SliceGPT for WikiText-2) make one text of a set's rows, tokenise it once as the tokenizer does by
itself, so with one BOS at the very start where the tokenizer adds one, and cut it into non-overlapping windows; what
the last one lacks is dropped. WikiText-2: the raw test rows joined by a blank line. PTB: the test sentences joined by
a space. C4: the first 1,100 documents of the first validation file joined by a space, of whose tokens the first 256
windows count. The windows are 2,048 or 4,096 tokens long, and papers differ in which: the name says it.

`tvaprune.text.blocks`, this project's own protocol, ends each document by the end-of-text token and has no BOS.
"""

from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from tvaprune.errors import InputError
from tvaprune.text.blocks import with_bos
from tvaprune.text.sources import HUB_SETS, hub_rows

OWN = "own"
SPLIT = "test"  # our name; C4's validation file is its test text
C4_WINDOWS = 256


@dataclass(frozen=True)
class Protocol:
    """How a text becomes windows.

    Attributes:
        dataset_name: The text.
        join: What stands between its rows.
        window: Tokens of a window.
        rows: How many of the rows are read; None: all.
        num_windows: How many windows count, at most; None: all.
    """

    dataset_name: str
    join: str
    window: int
    rows: int | None = None
    num_windows: int | None = None


@dataclass(frozen=True)
class EvaluationText:
    """What a perplexity may be compared by.

    Attributes:
        name: Of a protocol of `PROTOCOLS`, or `OWN`.
        join: What joins the rows of a document; None: a row is a document.
        end: What ends each document; None: nothing does.
        bos: Whether the first window begins with BOS.
        window: Tokens of a window.
        every_bos: Whether every window does.
    """

    name: str
    dataset_name: str
    split: str
    join: str | None
    end: str | None
    bos: bool
    window: int
    num_windows: int
    every_bos: bool = False

    @property
    def line(self) -> str:
        """How the text became windows, in a line."""
        joined = "" if self.join is None else f"rows joined by {self.join!r}, "
        ended = "" if self.end is None else f"documents ended by {self.end}, "
        bos = "a BOS before each window" if self.every_bos else "one BOS at the start" if self.bos else "no BOS"
        return f"{self.name}: {joined}{ended}{bos}, {self.num_windows} windows"


PROTOCOLS = {
    f"{name}-{window}": Protocol(name, join, window, rows, num_windows)
    for name, join, rows, num_windows in (("wikitext2", "\n\n", None, None), ("ptb", " ", None, None),
                                          ("c4", " ", 1100, C4_WINDOWS))
    for window in (2048, 4096)
}  # fmt: skip


def protocol_windows(
    tokenizer: PreTrainedTokenizerBase, name: str, data_dir: str | Path = "data", bos: int | None = None
) -> Dataset:
    """Returns the windows of a protocol of `PROTOCOLS`: ``input_ids`` of shape ``(window,)``, as torch tensors.

    Args:
        bos: The token that every window begins with, the first among its tokens; None: only the text does, if at all.

    Raises:
        InputError: If the text cannot be had or is shorter than one window.
    """
    protocol = PROTOCOLS[name]
    rows = hub_rows(protocol.dataset_name, SPLIT, data_dir)
    text = protocol.join.join(islice(rows, protocol.rows))
    ids = tokenizer(text, verbose=False, add_special_tokens=bos is None)["input_ids"]
    stream, width = np.asarray(ids, dtype=np.int64), protocol.window - (bos is not None)
    count = min(len(stream) // width, protocol.num_windows or len(stream))
    if not count:
        raise InputError(
            f"--protocol {name}: the text has {len(stream)} tokens, less than one window of {protocol.window}: the "
            f"copy of {protocol.dataset_name} is not whole; replace it"
        )
    windows = stream[: count * width].reshape(count, width)
    windows = windows if bos is None else with_bos(windows, bos)
    return Dataset.from_dict({"input_ids": windows}).with_format("torch")


def evaluation_text(
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    dataset_name: str,
    split: str,
    windows: Dataset,
    bos: int | None = None,
) -> EvaluationText:
    """Returns what windows are of: a protocol of `PROTOCOLS`, or a split of a text by `OWN`."""
    sizes, every = (len(windows[0]["input_ids"]), len(windows)), bos is not None
    if name == OWN:
        join = HUB_SETS[dataset_name].join if dataset_name in HUB_SETS else None
        return EvaluationText(name, dataset_name, split, join, tokenizer.eos_token, every, *sizes, every)
    text = PROTOCOLS[name]
    return EvaluationText(
        name, text.dataset_name, SPLIT, text.join, None, every or starts_with_bos(tokenizer), *sizes, every
    )


def starts_with_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Returns whether a tokenizer by itself begins a text with its BOS token."""
    ids = tokenizer("a")["input_ids"]
    return tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]
