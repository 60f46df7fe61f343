"""`tvaprune sample --model_name_or_path DIR --output_dir OUT`: text that a model writes, for masks to be learned from.

``OUT/text.jsonl`` is then a ``--dataset_name`` for every other command. An interrupted run keeps its pages, and the
same command goes on; so does one that asks for more tokens than are there.
"""

import math
import os
import shutil
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from tvaprune.errors import InputError, quoted, running_out_in
from tvaprune.files import as_json, prepare_folder, write_text
from tvaprune.flags.arguments import parse_sampling
from tvaprune.flags.settings import SampleSettings
from tvaprune.identity import IDENTITY_NAME, Identity, check_identity, content, model_digest, write_identity
from tvaprune.locks import holding_folders
from tvaprune.models.load import load_config, load_model
from tvaprune.phases import told_bar
from tvaprune.text.sampled import check_page, kinds_of, longest_page, pages

TEXT_NAME = "text.jsonl"
PART_NAME = f"{TEXT_NAME}.part"
_OWN = (TEXT_NAME, PART_NAME, IDENTITY_NAME)  # the last says whose the others are
NEW_NAME = ".new"  # folder of what takes a text's place once it is whole
_WRITING = (" in writing text", "{part} --batch_size or --page would fit; the pages that were written are kept")
_SETTLING = ("page", "batch_size", "temperature", "seed", "dtype")  # which text it is; --tokens, how much of it


@holding_folders()
def sample(settings: SampleSettings) -> Path:
    """Has a model write a text, documents and conversations in turn, and returns its file.

    Raises:
        InputError: If a value cannot be used, or the folder holds anything but this text, whole or in part.
    """
    folder = Path(settings.output_dir)
    _check_folder(folder)
    longest = longest_page(load_config(settings.model_name_or_path))
    if settings.page > longest:
        raise InputError(
            f"--page {settings.page}: the model was trained on {longest} tokens at a time; give {longest} or less"
        )
    prepare_folder("output_dir", folder, may_hold_files=True)
    device = torch.device("cuda" if torch.cuda.is_available() and not settings.use_cpu else "cpu")
    model, tokenizer = load_model(settings.model_name_or_path, settings.dtype, device)
    kinds = kinds_of(tokenizer)
    check_page(tokenizer, settings.page)
    identity: Identity = {
        "flags": {name: value for name, value in asdict(settings).items() if name in _SETTLING},
        "contents": {"model_name_or_path": content(settings.model_name_or_path, model_digest(model))},
        "settings": {},
    }
    place = folder / NEW_NAME if settings.overwrite_output_dir and (folder / TEXT_NAME).is_file() else folder
    file, part = place / TEXT_NAME, place / PART_NAME
    if settings.overwrite_output_dir:
        _begin(place, identity)
    elif (folder / IDENTITY_NAME).is_file():
        check_identity("text", folder, identity)
    write_identity(place, identity)
    batches = math.ceil(settings.tokens / (settings.page * settings.batch_size * len(kinds))) * len(kinds)
    if len(_whole_batches(file, settings.batch_size)) < batches:
        there = _whole_batches(part if part.is_file() else file, settings.batch_size)
        _write(settings, model, tokenizer, there, batches, part)
        os.replace(part, file)
    if place != folder:
        (folder / IDENTITY_NAME).unlink()
        for name in (TEXT_NAME, IDENTITY_NAME):
            os.replace(place / name, folder / name)
    shutil.rmtree(folder / NEW_NAME, ignore_errors=True)
    return folder / TEXT_NAME


def _begin(place: Path, identity: Identity) -> None:
    """Makes a folder for a text; what an interrupted run wrote there stays if it is of the same."""
    place.mkdir(exist_ok=True)
    try:
        check_identity("text", place, identity)
    except InputError:
        for name in _OWN:
            (place / name).unlink(missing_ok=True)


def _check_folder(folder: Path) -> None:
    """Refuses a folder of another command's, or a stranger's: nothing there is read or replaced.

    Raises:
        InputError: Naming a file that is no part of such a text, or a text that nothing says the settings of.
    """
    found = sorted(path.name for path in folder.iterdir() if not path.name.startswith(".")) if folder.is_dir() else []
    strange = [name for name in found if name not in _OWN or IDENTITY_NAME not in found]
    if strange:
        raise InputError(
            f"--output_dir {folder}: holds {quoted(strange[0])}, no text of this command; give a new folder"
        )


def _write(
    settings: SampleSettings,
    model: PreTrainedModel,
    tokenizer: Any,
    there: list[list[str]],
    batches: int,
    part: Path,
) -> None:
    """Writes what is there, a list of lines for each batch, and the batches that are not, each kind in turn."""
    kinds, size = kinds_of(tokenizer), settings.batch_size
    label = f"pages of {settings.page} tokens"
    write_text("".join(chain.from_iterable(there)), part)  # at once: a kill must not lose what was there
    with told_bar(batches, label, "batch") as advance, part.open("a", encoding="utf-8") as out:
        for batch in range(batches):
            if batch >= len(there):
                kind, seed = kinds[batch % len(kinds)], (settings.seed, batch)
                with running_out_in(_WRITING):
                    found = pages(model, tokenizer, kind, size, settings.page, settings.temperature, seed)
                out.writelines(as_json({"text": text, "kind": kind}, indent=None) + "\n" for text in found)
                out.flush()
            advance()


def _whole_batches(file: Path, size: int) -> list[list[str]]:
    """Returns the lines of the batches that a run wrote to their end."""
    if not file.is_file():
        return []
    lines = [line for line in file.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
    return [lines[first : first + size] for first in range(0, len(lines) - size + 1, size)]


def main(arguments: list[str]) -> Path:
    """Parses the flags, has the text written and prints where it is."""
    settings = parse_sampling(arguments)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    file = sample(settings)
    print(f"text: {file}; learn from it by --dataset_name {file}")
    return file
