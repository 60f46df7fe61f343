"""The text set `python_docs`: English prose that is on every machine where the requirements are installed.

Docstrings of CPython's standard library and of a fixed list of installed packages, and the language reference that
`pydoc` carries. The files are parsed, never imported. Held-out text is honest: whole modules are held out by a hash of
their name (so neither the order of files nor the version of a package moves a module between splits), and a held-out
document that shares more than `MAX_SHARED` of its 8-word shingles with the training text, or with an earlier held-out
split, is dropped. What remains is measured by `overlap` and tested.
"""

import ast
import hashlib
import importlib.util
import inspect
import sysconfig
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from tvaprune.errors import InputError
from tvaprune.garbage import uncollected

# Packages of requirement.txt, and of what it pulls in, that carry prose. A fixed list: what else is installed on a
# machine must not change the text.
PACKAGES = (
    "accelerate", "aiohttp", "click", "datasets", "dill", "evaluate", "filelock", "fontTools", "fsspec",
    "huggingface_hub", "jinja2", "joblib", "lm_eval", "lxml", "matplotlib", "more_itertools", "mpmath", "multiprocess",
    "networkx", "nltk", "numpy", "packaging", "pandas", "peft", "PIL", "psutil", "pyarrow", "pydantic", "pygments",
    "regex", "requests", "rich", "sacrebleu", "safetensors", "scipy", "sklearn", "sympy", "tokenizers", "torch", "tqdm",
    "transformers", "typer", "urllib3", "yaml",
)  # fmt: skip
SPLITS = ("train", "validation", "test")
HELD_OUT_MODULES = {"validation": range(0, 4), "test": range(4, 8)}  # of 100 hash buckets; the rest is training text
SHINGLE_WORDS = 8
MAX_SHARED = 0.05  # of one held-out document's shingles; keeps the share over the whole split below 2% (measured: test)
MIN_CHARACTERS = 120  # a shorter docstring is a label rather than prose
_SKIPPED_FOLDERS = {"tests", "test", "testing", "_vendor", "site-packages", "idlelib", "lib2to3", "__pycache__"}


@dataclass(frozen=True)
class Document:
    """One docstring under the dotted name (and arguments) of what it documents."""

    module: str
    name: str
    text: str


def _package_folders() -> dict[str, Path]:
    """Import name -> folder, for the standard library (``""``) and `PACKAGES`.

    Raises:
        InputError: If a package of the list is not installed.
    """
    folders = {"": Path(sysconfig.get_paths()["stdlib"])}
    specs = {name: importlib.util.find_spec(name) for name in PACKAGES}
    missing = [name for name, spec in specs.items() if spec is None]
    if missing:
        raise InputError(
            f"python_docs is the text of the installed requirements, and {', '.join(missing)} is not installed: "
            "pip install -r requirement.txt, or choose another --dataset_name"
        )
    for name, spec in specs.items():
        if spec is not None and spec.origin is not None:
            origin = Path(spec.origin)
            folders[name] = origin.parent if origin.name == "__init__.py" else origin
    return folders


def _python_files(package: str, folder: Path) -> Iterator[tuple[str, Path]]:
    """Yields (dotted module name, file) in the order of the names."""
    files = [folder] if folder.is_file() else folder.rglob("*.py")
    for path in sorted(files):
        parts = path.relative_to(folder.parent if package else folder).with_suffix("").parts
        if not _SKIPPED_FOLDERS.intersection(parts):
            yield ".".join(parts).removesuffix(".__init__"), path


def _docstrings(module: str, source: str) -> Iterator[Document]:
    """Yields the docstrings of one file, each under its dotted name with the arguments of its function."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):  # templates and files for another Python
        return
    stack: list[tuple[str, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]] = [(module, tree)]
    while stack:
        name, node = stack.pop()
        text = ast.get_docstring(node, clean=True)
        if text and len(text) >= MIN_CHARACTERS and text.isascii():
            arguments = f"({ast.unparse(node.args)})" if isinstance(node, ast.FunctionDef) else ""
            yield Document(module, name, f"{name}{arguments}\n\n{text.strip()}\n")
        for child in node.body:
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                stack.append((f"{name}.{child.name}", child))


def _language_reference() -> Iterator[Document]:
    """Yields the chapters of the language reference that `help()` shows."""
    from pydoc_data.topics import topics  # large: only read where the text is asked for

    for topic, text in sorted(topics.items()):
        if text.isascii() and len(text) >= MIN_CHARACTERS:
            yield Document(f"pydoc_data.topics.{topic}", topic, f"{inspect.cleandoc(text).strip()}\n")


def collect() -> list[Document]:
    """Reads every document of this machine, without exact repeats, in the order of their names."""
    documents = list(_language_reference())
    with uncollected():  # syntax trees have no cycle
        for package, folder in tqdm(_package_folders().items(), desc="reading python_docs", unit="package"):
            for module, path in _python_files(package, folder):
                documents += _docstrings(module, path.read_text(encoding="utf-8", errors="replace"))
    documents.sort(key=lambda document: (document.module, document.name, document.text))
    unique = {" ".join(document.text.split("\n\n", 1)[-1].split()): document for document in reversed(documents)}
    return sorted(unique.values(), key=lambda document: (document.module, document.name, document.text))


def split_of(module: str) -> str:
    """Returns the split of a module by a hash of its name alone."""
    bucket = int.from_bytes(hashlib.blake2b(module.encode(), digest_size=8).digest(), "big") % 100
    return next((split for split, buckets in HELD_OUT_MODULES.items() if bucket in buckets), "train")


def shingles(*texts: str) -> np.ndarray:
    """Returns the hashes of the texts' distinct runs of `SHINGLE_WORDS` words: sorted ``uint64``, shape ``(n,)``."""
    return np.unique(np.concatenate([np.empty(0, dtype=np.uint64), *map(_runs, texts)]))


def _runs(text: str) -> np.ndarray:
    words = np.fromiter((zlib.crc32(word.encode()) for word in text.lower().split()), dtype=np.uint64)
    if len(words) < SHINGLE_WORDS:
        return np.empty(0, dtype=np.uint64)
    hashes = np.zeros(len(words) - SHINGLE_WORDS + 1, dtype=np.uint64)
    for offset in range(SHINGLE_WORDS):  # a polynomial hash; uint64 wraps around
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + words[offset : offset + len(hashes)]
    return hashes


def overlap(own: np.ndarray, seen: np.ndarray) -> float:
    """Returns the share of a text's shingles that stand among others'; quick for a short one, unlike `np.isin`."""
    places = np.minimum(np.searchsorted(seen, own), len(seen) - 1)
    return float((seen[places] == own).mean())


def split_documents(documents: list[Document]) -> dict[str, list[Document]]:
    """Splits documents by module and drops held-out near-copies; the order of the input does not matter."""
    splits: dict[str, list[Document]] = {split: [] for split in SPLITS}
    for document in sorted(documents, key=lambda document: (document.module, document.name, document.text)):
        splits[split_of(document.module)].append(document)
    seen = shingles(*(document.text for document in splits["train"]))
    for split in HELD_OUT_MODULES:
        own = [(document, shingles(document.text)) for document in splits[split]]
        kept = [(d, s) for d, s in own if len(s) and overlap(s, seen) <= MAX_SHARED]
        splits[split] = [document for document, _ in kept]
        seen = np.unique(np.concatenate([seen, *(s for _, s in kept)]))
    return splits


def read_splits() -> dict[str, list[str]]:
    """Reads the text of this machine: split -> its documents."""
    return {split: [document.text for document in kept] for split, kept in split_documents(collect()).items()}
