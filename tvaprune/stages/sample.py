"""`tvaprune sample --model_name_or_path DIR --output_dir OUT`: text that a model writes, for masks to be learned from.

``OUT/text.jsonl`` is then a ``--dataset_name`` for every other command. An interrupted run keeps its pages, and the
same command goes on.
"""

import argparse
import math
import os
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from tvaprune.errors import InputError, running_out_in
from tvaprune.files import as_json, holding_folders, prepare_folder
from tvaprune.identity import IDENTITY_NAME, Identity, check_identity, content, model_digest, write_identity
from tvaprune.models.load import load_model
from tvaprune.phases import told_bar
from tvaprune.text.sampled import kinds_of, longest_page, pages

TEXT_NAME = "text.jsonl"
DTYPES = ("auto", "float32", "float16", "bfloat16")
HOTTEST = 2.0  # beyond it any model's text is noise
_WRITING = (" in writing text", "{part} --batch_size or --page would fit; the pages that were written are kept")


@dataclass(frozen=True)
class Writing:
    """What is written.

    Attributes:
        tokens: At least; batches are whole.
        page: Tokens of a page.
        batch_size: Pages written at a time; another number gives other pages.
        temperature: 1 draws as the model predicts, less what is likelier.
        seed: Of the words that pages open with, and of the draws.
        dtype: Precision of the model, of `DTYPES`.
    """

    tokens: int = 1_000_000
    page: int = 256
    batch_size: int = 64
    temperature: float = 0.8
    seed: int = 42
    dtype: str = "auto"


@holding_folders()
def sample(
    model: str, folder: str | Path, writing: Writing | None = None, overwrite: bool = False, use_cpu: bool = False
) -> Path:
    """Has a model write a text, documents and conversations in turn, and returns its file.

    Args:
        model: Checkpoint folder, hub id or name of what was fetched.
        folder: Where `TEXT_NAME` comes to lie.
        writing: Default: a million tokens.
        overwrite: Replace the text of an earlier run.
        use_cpu: Leave a GPU alone.

    Raises:
        InputError: If a value cannot be used, or the folder holds the text of another model or of other settings.
    """
    writing = writing or Writing()
    _check(writing)
    folder = Path(folder)
    prepare_folder("output_dir", folder, may_hold_files=True)
    device = torch.device("cuda" if torch.cuda.is_available() and not use_cpu else "cpu")
    writer, tokenizer = load_model(model, writing.dtype, device)
    longest = longest_page(writer.config)
    if writing.page > longest:
        raise InputError(
            f"--page {writing.page}: the model was trained on {longest} tokens at a time; give {longest} or less"
        )
    file, part = folder / TEXT_NAME, folder / f"{TEXT_NAME}.part"
    if overwrite:
        for path in (folder / IDENTITY_NAME, file, part):
            path.unlink(missing_ok=True)
    identity: Identity = {
        "flags": asdict(writing),
        "contents": {"model_name_or_path": content(model, model_digest(writer))},
        "settings": {},
    }
    if (folder / IDENTITY_NAME).is_file():
        check_identity("text", folder, identity)
    elif file.exists() or part.exists():
        raise InputError(f"{folder}: holds a {TEXT_NAME} and nothing says of what settings; give another folder")
    write_identity(folder, identity)
    if not file.is_file():
        _write(writing, writer, tokenizer, part)
        os.replace(part, file)
    return file


def _check(writing: Writing) -> None:
    for name, least in (("tokens", 1), ("page", 16), ("batch_size", 1), ("seed", 0)):
        if getattr(writing, name) < least:
            raise InputError(f"--{name} is {getattr(writing, name)}: give a whole number of {least} or more")
    if not 0 < writing.temperature <= HOTTEST:
        raise InputError(f"--temperature is {writing.temperature}: give a number above 0, at most {HOTTEST}")


def _write(writing: Writing, model: PreTrainedModel, tokenizer: Any, part: Path) -> None:
    """Writes the batches of pages that are not there yet, each kind in turn."""
    kinds, size = kinds_of(tokenizer), writing.batch_size
    batches = math.ceil(writing.tokens / (writing.page * size * len(kinds))) * len(kinds)
    there = _whole_batches(part, size)
    label = f"pages of {writing.page} tokens"
    with told_bar(batches, label, "batch") as advance, part.open("w", encoding="utf-8") as out:
        out.writelines(chain.from_iterable(there))
        for batch in range(batches):
            if batch >= len(there):
                kind, seed = kinds[batch % len(kinds)], (writing.seed, batch)
                with running_out_in(_WRITING):
                    found = pages(model, tokenizer, kind, size, writing.page, writing.temperature, seed)
                out.writelines(as_json({"text": text, "kind": kind}, indent=None) + "\n" for text in found)
                out.flush()
            advance()


def _whole_batches(part: Path, size: int) -> list[list[str]]:
    """Returns the lines of the batches that an interrupted run wrote to their end."""
    if not part.is_file():
        return []
    lines = [line for line in part.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
    return [lines[first : first + size] for first in range(0, len(lines) - size + 1, size)]


def parser() -> argparse.ArgumentParser:
    """Returns the parser of this verb's flags."""
    usual = Writing()
    flags = argparse.ArgumentParser(prog="tvaprune sample", description=__doc__, allow_abbrev=False)
    flags.add_argument("--model_name_or_path", required=True, help="the checkpoint that writes: the one to be pruned")
    flags.add_argument("--output_dir", required=True, help=f"folder that {TEXT_NAME} comes to lie in")
    flags.add_argument("--overwrite_output_dir", action="store_true", help="replace the text of an earlier run")
    numbers = {
        "tokens": "tokens written, at least",
        "page": "tokens of a page",
        "batch_size": "pages written at a time; another number gives other pages",
        "temperature": "1: as the model predicts; less: what is likelier",
        "seed": "of the words that pages open with, and of the draws",
    }
    for name, told in numbers.items():
        default = getattr(usual, name)
        flags.add_argument(f"--{name}", type=type(default), default=default, help=f"{told}; default: {default:,}")
    flags.add_argument("--dtype", default=usual.dtype, choices=DTYPES, help=f"precision; default: {usual.dtype}")
    flags.add_argument("--use_cpu", action="store_true", help="leave a GPU alone")
    return flags


def main(arguments: list[str]) -> Path:
    """Parses the flags, has the text written and prints where it is."""
    given = vars(parser().parse_args(arguments))
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model, folder = given.pop("model_name_or_path"), given.pop("output_dir")
    overwrite, use_cpu = given.pop("overwrite_output_dir"), given.pop("use_cpu")
    file = sample(model, folder, Writing(**given), overwrite, use_cpu)
    print(f"text: {file}; learn from it by --dataset_name {file}")
    return file
