"""The text set `package_readmes`: a second text that is on every machine, by other hands than `python_docs`.

The long descriptions that installed packages carry in their metadata: what they are for and how to begin, written as
Markdown or reStructuredText for people who choose a package, where `python_docs` is docstrings for people who call one.
It is there to be evaluated on, so most of it is test text: what a model or mask learned on another text is worth here.
Only paragraphs of English prose are taken: badges, tables, listings and link targets say little about a model.
"""

import hashlib
import re
from importlib.metadata import PackageNotFoundError, distribution

from tvaprune.errors import InputError

# The requirements (those of the exports and checks aside), without dill, multiprocess, networkx, Pygments and tqdm:
# their descriptions are also their module docstrings, which are training text of python_docs.
PACKAGES = (
    "accelerate", "aiohttp", "click", "datasets", "evaluate", "fonttools", "fsspec", "huggingface_hub", "Jinja2",
    "joblib", "lm_eval", "lxml", "matplotlib", "more-itertools", "mpmath", "nltk", "numpy", "packaging",
    "pandas", "peft", "pillow", "psutil", "pyarrow", "pydantic", "PyYAML", "regex", "requests", "rich", "sacrebleu",
    "safetensors", "scikit-learn", "scipy", "sympy", "tokenizers", "torch", "transformers", "typer", "urllib3",
)  # fmt: skip
SPLITS = {"train": range(0, 15), "validation": range(15, 25), "test": range(25, 100)}  # of 100 hash buckets
MIN_WORDS = 8  # a shorter paragraph is a heading or an item
MIN_LETTERS = 0.85  # letters and white space, of a paragraph's characters; below it stands a table or a listing
MAX_CHARACTERS = 20_000  # of one package: changelogs would be half of the text

_REPLACED = (
    (re.compile(r"\r"), ""),
    (re.compile(r"<!--.*?-->", re.DOTALL), ""),
    (re.compile(r"!\[[^\]]*\]\([^)]*\)"), ""),  # Markdown: image, then link
    (re.compile(r"\[([^\]]*)\]\([^)]*\)"), r"\1"),
    (re.compile(r"`([^`<]*?)\s*<[^>`]*>`_+"), r"\1"),  # reStructuredText: link
    (re.compile(r"</?[a-zA-Z][^>\n]*>|<?https?://\S+"), ""),  # HTML tags, bare addresses
)


def prose(description: str) -> str:
    """Returns the paragraphs of English prose of a description, markup of links and images taken out."""
    for pattern, replacement in _REPLACED:
        description = pattern.sub(replacement, description)
    paragraphs = (paragraph.strip("\n") for paragraph in re.split(r"\n\s*\n", description))
    return "\n\n".join(paragraph for paragraph in paragraphs if _is_prose(paragraph))


def _is_prose(paragraph: str) -> bool:
    letters = sum(character.isalpha() or character.isspace() for character in paragraph)
    return paragraph.isascii() and len(paragraph.split()) >= MIN_WORDS and letters >= MIN_LETTERS * len(paragraph)


def split_of(name: str, splits: dict[str, range] = SPLITS) -> str:
    """Returns the split of a package, or of what else has a name, by a hash of its name alone."""
    bucket = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") % 100
    return next(split for split, buckets in splits.items() if bucket in buckets)


def read_splits() -> dict[str, list[str]]:
    """Reads the descriptions: split -> a document for each of its packages.

    Raises:
        InputError: If a package of the list is not installed.
    """
    splits: dict[str, list[str]] = {split: [] for split in SPLITS}
    missing = []
    for package in PACKAGES:
        try:
            description = str(distribution(package).metadata.json.get("description", ""))
        except PackageNotFoundError:
            missing.append(package)
            continue
        text = prose(description)
        if len(text) > MAX_CHARACTERS:
            text = text[:MAX_CHARACTERS].rpartition("\n\n")[0]
        splits[split_of(package)].append(f"{package}\n\n{text}\n")
    if missing:
        raise InputError(
            f"package_readmes is the text of the installed requirements, and {', '.join(missing)} is not installed: "
            "pip install -r requirement.txt, or choose another text"
        )
    return splits
