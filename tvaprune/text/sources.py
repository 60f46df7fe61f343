"""Text sets as documents per split: local copies first, then the hub, and a clear line where neither is there."""

import glob
import gzip
import hashlib
import json
import os
import random
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from huggingface_hub import hf_hub_download

from tvaprune.errors import InputError, reason
from tvaprune.files import cache_folder, clear_leftovers, first_folder
from tvaprune.locks import one_at_a_time
from tvaprune.text import english_prose, package_readmes, python_docs

SPLITS = python_docs.SPLITS
ROWS = 100

PATH_SHARES = {"train": (0.0, 0.9), "validation": (0.9, 0.95), "test": (0.95, 1.0)}  # of a file without splits


@dataclass(frozen=True)
class HubSet:
    """Where a public text set stands on the hub, and how its rows become documents.

    Attributes:
        repo: Hub id; a folder of the same name under ``--data_dir`` is read in its place.
        files: Split -> the data files within the repository.
        column: The column that holds the text.
        join: What joins all rows to one document; ``None`` keeps a row a document, and reads no more than is asked for.
        rows: Split -> which of every `ROWS` rows of its file it takes; a split that is not there takes all.
    """

    repo: str
    files: dict[str, str]
    column: str
    join: str | None
    rows: dict[str, range] = field(default_factory=dict)
    revision: str | None = None


HUB_SETS = {
    "wikitext2": HubSet(
        repo="Salesforce/wikitext",
        files={split: f"wikitext-2-raw-v1/{split}-00000-of-00001.parquet" for split in SPLITS},
        column="text",
        join="\n\n",
    ),
    "ptb": HubSet(  # the parquet copy that the hub keeps: `datasets` no longer runs the repository's script
        repo="ptb-text-only/ptb_text_only",
        files={split: f"penn_treebank/{split}/0000.parquet" for split in SPLITS},
        column="sentence",
        join="\n\n",
        revision="refs/convert/parquet",
    ),
    "c4": HubSet(  # C4 has no test split: the field reports its validation file, so ours is cut from the training file
        repo="allenai/c4",
        files={
            "train": "en/c4-train.00000-of-01024.json.gz",
            "validation": "en/c4-train.00000-of-01024.json.gz",
            "test": "en/c4-validation.00000-of-00008.json.gz",
        },
        column="text",
        join=None,
        rows={"train": range(0, 97), "validation": range(97, ROWS)},
    ),
}
STREAMED = {name for name, hub_set in HUB_SETS.items() if hub_set.join is None}


LOCAL_SETS: dict[str, Any] = {  # modules with `read_splits()` and the `PACKAGES` whose versions settle the text
    "python_docs": python_docs,
    "package_readmes": package_readmes,
    english_prose.NAME: english_prose,
}


DATASET_NAMES = (*LOCAL_SETS, *HUB_SETS)
MIXED = ","  # between the names of a mixture


def load_documents(
    dataset_name: str, split: str, data_dir: str | Path = "data", enough: int | None = None
) -> list[str]:
    """Returns the documents of one split.

    Args:
        dataset_name: One of `DATASET_NAMES`, or a path: ``.txt``, ``.jsonl``, ``.parquet``, a ``save_to_disk`` folder;
            or several of these, `MIXED` between them.
        split: ``train``, ``validation`` or ``test``.
        data_dir: Folder that holds local copies of hub repositories.
        enough: Characters after which a set of `STREAMED` is read no further; ``None`` reads all.

    Raises:
        InputError: If the name is unknown, the text cannot be had, or the split is empty.
    """
    if len(names := names_in(dataset_name)) > 1:
        documents = _mixture([load_documents(name, split, data_dir, enough) for name in names], random.Random(split))
    elif dataset_name in LOCAL_SETS:
        documents = _local_documents(dataset_name, split)
    elif dataset_name in HUB_SETS:
        documents = _hub_documents(dataset_name, split, data_dir, enough)
    else:
        documents = _path_documents(Path(dataset_name), split)
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise InputError(
            f"--dataset_name {dataset_name}: its {split} split holds no text; give a longer text{_enough(dataset_name)}"
        )
    return documents


def names_in(dataset_name: str) -> list[str]:
    """Returns the texts of a mixture; a path that is there is one, whatever its name.

    Raises:
        InputError: If a name is empty.
    """
    names = [dataset_name] if os.path.exists(dataset_name) else [name.strip() for name in dataset_name.split(MIXED)]
    if len(names) > 1 and "" in names:
        raise InputError(f"--dataset_name {dataset_name}: a name is missing beside a comma; give names or paths")
    return names


def is_streamed(dataset_name: str) -> bool:
    """Tells whether a text, or one of a mixture, is too large to be read whole."""
    return not STREAMED.isdisjoint(names_in(dataset_name))


def _mixture(texts: list[list[str]], order: random.Random) -> list[str]:
    """Returns documents of several texts in a random order, as many characters of each as the shortest has.

    What is too much of a text is left out from a random document on, which may be cut.
    """
    each, mixed = min(sum(map(len, documents)) for documents in texts), []
    for documents in texts:
        order.shuffle(documents)
        left = each
        for document in documents:
            mixed.append(document[:left])  # what is empty is no document: the caller leaves it out
            left -= len(mixed[-1])
    order.shuffle(mixed)
    return mixed


def _enough(dataset_name: str) -> str:
    """Returns how long a text of the user's own must be for three splits."""
    kind = "paragraphs or lines" if _kind(dataset_name) == ".txt" else "documents"
    return "" if dataset_name in DATASET_NAMES else f", of 20 {kind} or more: the splits are cut between them"


def _local_documents(dataset_name: str, split: str) -> list[str]:
    """Returns a split of a text of this machine, extracted once for each set of package versions."""
    module = LOCAL_SETS[dataset_name]
    versions = json.dumps([_version(package) for package in module.PACKAGES])
    source = Path(module.__file__).read_text(encoding="utf-8") + versions + sys.version
    folder = cache_folder() / f"{dataset_name}-{hashlib.sha256(source.encode()).hexdigest()[:16]}"

    def build(target: Path) -> None:
        texts = {name: Dataset.from_dict({"text": documents}) for name, documents in module.read_splits().items()}
        DatasetDict(texts).save_to_disk(target)

    documents: list[str] = cached(folder, build)[split]["text"][:]  # at once: row by row is far slower
    return documents


def _version(package: str) -> str:
    names = {"PIL": "pillow", "yaml": "PyYAML", "sklearn": "scikit-learn", "more_itertools": "more-itertools"}
    try:
        return f"{package} {version(names.get(package, package))}"
    except PackageNotFoundError:
        return package  # `read_splits` says so in one line


def cached(folder: Path, build: Callable[[Path], None]) -> Any:
    """Loads a ``save_to_disk`` folder; builds it where it is not there, or is damaged."""
    if folder.exists():
        try:
            return load_from_disk(str(folder))
        except Exception as error:  # each kind of damage raises kinds of its own: it is built again
            shutil.rmtree(folder, ignore_errors=True)
            if folder.exists():
                raise InputError(
                    f"the text cache {folder} is damaged ({type(error).__name__}) and cannot be removed; remove it, or "
                    "set TVAPRUNE_CACHE to another folder"
                ) from error
    clear_leftovers(folder.parent)
    try:
        with one_at_a_time(folder):
            if not folder.exists():  # else it was made while this process waited
                with first_folder(folder) as temporary:
                    build(temporary)
    except OSError as error:
        raise InputError(
            f"the text cache {folder.parent} cannot be written ({error.strerror or reason(error)}); set TVAPRUNE_CACHE "
            "to a folder that can, with room for the text"
        ) from error
    return load_from_disk(str(folder))


def _rows(path: str | Path) -> Iterator[dict[str, Any]]:
    """Yields the rows of a hub's file one by one: JSON Lines, compressed, or parquet."""
    if str(path).endswith(".json.gz"):
        with gzip.open(path, "rt", encoding="utf-8") as file:
            for line in file:
                yield json.loads(line)
    else:
        yield from load_dataset("parquet", data_files=glob.escape(str(path)), split="train", streaming=True)


def hub_rows(dataset_name: str, split: str, data_dir: str | Path) -> Iterator[str]:
    """Yields the rows of a split of a public set in order, each read when it is asked for.

    From ``data_dir`` where a copy of the repository lies there, else from the hub's file, downloaded once.

    Raises:
        InputError: If the file cannot be had or read.
    """
    hub_set = HUB_SETS[dataset_name]
    name = hub_set.files[split]
    local = Path(data_dir) / hub_set.repo / name
    try:
        path = (
            local
            if local.exists()
            else hf_hub_download(hub_set.repo, name, repo_type="dataset", revision=hub_set.revision)
        )
        taken = hub_set.rows.get(split, range(ROWS))
        for index, row in enumerate(_rows(path)):
            if index % ROWS in taken:
                yield row[hub_set.column]
    except Exception as error:  # the hub's client raises a dozen kinds for "no network"
        raise InputError(
            f"--dataset_name {dataset_name}: cannot load {hub_set.repo} ({type(error).__name__}); put the hub's "
            f"{name} at {local}, or choose --dataset_name python_docs"
        ) from error


def _hub_documents(dataset_name: str, split: str, data_dir: str | Path, enough: int | None) -> list[str]:
    """Loads a public set's split; where a row is a document, no more of them than have ``enough`` characters."""
    rows, join = hub_rows(dataset_name, split, data_dir), HUB_SETS[dataset_name].join
    if join is not None:
        return [join.join(rows)]
    documents, characters = [], 0
    for document in rows:
        documents.append(document)
        characters += len(document)
        if enough is not None and characters >= enough:
            break
    return documents


def check_named(dataset_name: str) -> None:
    """Raises `InputError` where a text, or one of a mixture, is unknown, not there, or empty: before any work."""
    for name in names_in(dataset_name):
        if name not in DATASET_NAMES and not os.path.exists(name):  # a name may be too long for any file
            raise InputError(
                f"--dataset_name {name}: neither a file or folder nor one of {', '.join(DATASET_NAMES)}; "
                "give a .txt, .jsonl, .parquet or save_to_disk folder"
            )
        if os.path.isfile(name) and (kind := _kind(name)) not in (".txt", ".jsonl", ".parquet"):
            raise InputError(f"--dataset_name {name}: cannot read '{kind}'; give .txt, .jsonl or .parquet")
        if os.path.isfile(name) and not os.path.getsize(name):
            raise InputError(f"--dataset_name {name}: is empty; give a text")


def _kind(path: str | Path) -> str:
    return os.path.splitext(path)[1].lower()


def _path_documents(path: Path, split: str) -> list[str]:
    """Loads a user's own text; what has no splits is cut at 90% and 95% of its documents, in order."""
    check_named(str(path))
    loaded = _read_path(path)
    own_splits = isinstance(loaded, DatasetDict)
    if own_splits and split not in loaded:
        raise InputError(
            f"--dataset_name {path}: has splits {', '.join(loaded)}, needs {split}; save it with all three"
        )
    rows = loaded[split] if own_splits else loaded
    if not rows.column_names:
        raise InputError(f"--dataset_name {path}: is empty; give a text")
    if "text" not in rows.column_names:
        raise InputError(f"--dataset_name {path}: has columns {', '.join(rows.column_names)}, needs a column 'text'")
    texts = rows["text"][:]
    for number, text in enumerate(texts, start=1):
        told = "null" if text is None else type(text).__name__
        if not isinstance(text, str) or (told := _no_unicode(text)):
            where = f"line {rows.lines[number - 1]}" if isinstance(rows, _Rows) else f"row {number}"
            raise InputError(
                f"--dataset_name {path}: 'text' of {where} is {told}, needs a string; leave it out, or mend it"
            )
    if not own_splits:
        first, last = (round(share * len(texts)) for share in PATH_SHARES[split])
        texts = texts[first:last]
    return [_joint(_text_of(path)).join(texts)] if _kind(path) == ".txt" else texts


def _no_unicode(text: str) -> str:
    """Returns what is wrong with a string that UTF-8 cannot hold; JSON can name half a character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return "a string with half a character (a lone surrogate)"
    return ""


def _text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8-sig")  # some editors begin a file with a mark


def _joint(text: str) -> str:
    """Returns where a plain text is cut: at blank lines, or at every line if there are none."""
    return "\n\n" if "\n\n" in text.strip() else "\n"


class _Rows:
    """The rows of a JSON Lines file; the JSON reader of `datasets` dies of some damaged ones, with all of Python.

    Attributes:
        lines: Their numbers in the file, blank lines counted.
    """

    def __init__(self, path: Path) -> None:
        self.rows: list[dict[str, Any]] = []
        self.lines: list[int] = []
        with path.open(encoding="utf-8-sig") as file:  # some editors begin a file with a mark
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    self.rows.append(dict(**json.loads(line)))
                    self.lines.append(number)
                except (ValueError, TypeError, RecursionError) as error:
                    raise InputError(
                        f"--dataset_name {path}: line {number} is no JSON object ({type(error).__name__}); mend it, or "
                        "leave it out"
                    ) from error
        self.column_names = list(dict.fromkeys(name for row in self.rows for name in row))

    def __getitem__(self, column: str) -> list[object]:
        return [row.get(column) for row in self.rows]


def _read_path(path: Path) -> Any:
    """Reads a file or folder by its kind: a ``Dataset`` or a ``DatasetDict``."""
    try:
        if path.is_dir():
            return load_from_disk(str(path))
        if _kind(path) == ".txt":
            text = _text_of(path)
            return Dataset.from_dict({"text": text.split(_joint(text))})
        if _kind(path) == ".jsonl":
            return _Rows(path)
        return load_dataset("parquet", data_files=glob.escape(str(path)), split="train")
    except InputError:
        raise
    except Exception as error:  # each reader raises kinds of its own
        kind = "folder of save_to_disk" if path.is_dir() else f"{path.suffix} file in UTF-8"
        raise InputError(
            f"--dataset_name {path}: not a readable {kind} ({type(error).__name__}); mend or replace it"
        ) from error
