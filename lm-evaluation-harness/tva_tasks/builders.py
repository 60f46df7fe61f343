"""Builds the offline tasks' examples from the test split of `python_docs`, at run time: only the recipe is shipped.

Every example is a function of the documents alone: two runs on the same package versions score the same examples.
"""

import random
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from datasets import Dataset, DatasetDict

MAX_EXAMPLES = 300
NUM_CHOICES = 4
CONTEXT_WORDS = 16  # read before the continuation
BEFORE_ORDER_WORDS = 8  # read before the words whose order is asked for
CONTINUATION_WORDS = 12
DESCRIPTION_WORDS = 24
PASSAGE_WORDS = 60  # a last word lies within these: well inside a window of 256 tokens of the miniature tokenizers
MAX_HEADER = 160  # characters; a longer signature leaves no room for text
_HEADER = re.compile(r"(?P<name>[A-Za-z_]\w*(\.\w+)*)(\(.*\))?")
_PARAGRAPH_BREAK = re.compile(r"\n\s*\n")
_NOT_PROSE = re.compile(r"::|>>>|---|===|~~~|^\s*[-*@:]|\w :\s|^\w[\w ]*:$", re.MULTILINE)
_WORD = re.compile(r"\b[a-z]{4,}\b")


@dataclass(frozen=True)
class Docstring:
    """What a docstring documents, and its prose on one line."""

    name: str
    header: str
    words: tuple[str, ...]

    @property
    def package(self) -> str:
        """The first part of the dotted name."""
        return self.name.split(".", 1)[0]


def parse(document: str) -> Docstring | None:
    """Returns the docstring of a document, up to its first paragraph that is not prose; ``None`` where none is left."""
    header, _, body = document.strip().partition("\n\n")
    match = _HEADER.fullmatch(header)
    if match is None or len(header) > MAX_HEADER:
        return None
    words: list[str] = []
    for paragraph in _PARAGRAPH_BREAK.split(body):
        if _NOT_PROSE.search(paragraph) or not paragraph.rstrip().endswith("."):
            break
        words += paragraph.split()
    return Docstring(match["name"], header, tuple(words)) if words else None


def continuation_examples(docstrings: list[Docstring], rng: random.Random) -> Iterator[dict[str, Any]]:
    """Yields continuations of `CONTINUATION_WORDS` words, with the beginning that each continues among others."""
    end = CONTEXT_WORDS + CONTINUATION_WORDS
    long_enough = [docstring for docstring in docstrings if len(docstring.words) >= end]
    for docstring, others in _with_others(long_enough, rng):
        choices = [f"{each.header}\n\n{' '.join(each.words[:CONTEXT_WORDS])}" for each in (docstring, *others)]
        yield _shuffled({"continuation": " ".join(docstring.words[CONTEXT_WORDS:end])}, choices, rng)


def name_examples(docstrings: list[Docstring], rng: random.Random) -> Iterator[dict[str, Any]]:
    """Yields descriptions, with the name that each describes among others."""
    for docstring, others in _with_others(docstrings, rng):
        description = " ".join(docstring.words[:DESCRIPTION_WORDS])
        yield _shuffled({"description": description}, [each.name for each in (docstring, *others)], rng)


def word_order_examples(docstrings: list[Docstring], rng: random.Random) -> Iterator[dict[str, Any]]:
    """Yields beginnings with their continuation among the same words with one neighbouring pair exchanged."""
    end = BEFORE_ORDER_WORDS + CONTINUATION_WORDS
    for docstring in docstrings:
        words = docstring.words[BEFORE_ORDER_WORDS:end]
        pairs = [place for place in range(len(words) - 1) if words[place] != words[place + 1]]
        if len(words) == CONTINUATION_WORDS and len(pairs) >= NUM_CHOICES - 1:
            wrong = [_exchanged(words, place) for place in rng.sample(pairs, NUM_CHOICES - 1)]
            query = f"{docstring.header}\n\n{' '.join(docstring.words[:BEFORE_ORDER_WORDS])}"
            yield _shuffled({"query": query}, [" ".join(words), *wrong], rng)


def _exchanged(words: tuple[str, ...], place: int) -> str:
    return " ".join([*words[:place], words[place + 1], words[place], *words[place + 2 :]])


def last_word_examples(docstrings: list[Docstring], rng: random.Random) -> Iterator[dict[str, Any]]:
    """Yields passages up to a sentence's last word, with that word among others; all stand earlier in the passage."""
    for docstring in docstrings:
        for index in range(CONTEXT_WORDS, min(PASSAGE_WORDS, len(docstring.words))):
            query, word = f"{docstring.header}\n\n{' '.join(docstring.words[:index])}", docstring.words[index]
            seen = sorted(set(_WORD.findall(query)))
            others = [each for each in seen if each != word[:-1]]
            if word.endswith(".") and word[:-1] in seen and len(others) >= NUM_CHOICES - 1:
                yield _shuffled({"query": query}, [word[:-1], *rng.sample(others, NUM_CHOICES - 1)], rng)
                break


def _with_others(docstrings: list[Docstring], rng: random.Random) -> Iterator[tuple[Docstring, list[Docstring]]]:
    """Yields each docstring with distractors of its package, where the package has enough."""
    packages = defaultdict(list)
    for docstring in docstrings:
        packages[docstring.package].append(docstring)
    for docstring in docstrings:
        others = [
            each
            for each in packages[docstring.package]
            if each.words != docstring.words and each.name != docstring.name
        ]
        if len(others) >= NUM_CHOICES - 1:
            yield docstring, rng.sample(others, NUM_CHOICES - 1)


def _shuffled(example: dict[str, Any], choices: list[str], rng: random.Random) -> dict[str, Any]:
    """Adds the choices, the first of which is the truth, in random order, and where the truth went."""
    order = rng.sample(range(len(choices)), len(choices))
    return example | {"choices": [choices[place] for place in order], "label": order.index(0)}


def _build(examples: Callable[[list[Docstring], random.Random], Iterator[dict[str, Any]]]) -> DatasetDict:
    from tvaprune.text.blocks import load_documents  # here, so that the harness can list the tasks without it

    docstrings = [docstring for document in load_documents("python_docs", "test") if (docstring := parse(document))]
    rng = random.Random(0)
    found = list(examples(docstrings, rng))
    kept = sorted(rng.sample(range(len(found)), min(MAX_EXAMPLES, len(found))))
    return DatasetDict({"test": Dataset.from_list([found[index] for index in kept])})


def continuation(**metadata: Any) -> DatasetDict:
    """Returns the task `tva_continuation`: ``continuation``, four beginnings as ``choices``, ``label``."""
    return _build(continuation_examples)


def name(**metadata: Any) -> DatasetDict:
    """Returns the task `tva_name`: ``description``, four names as ``choices``, ``label``."""
    return _build(name_examples)


def word_order(**metadata: Any) -> DatasetDict:
    """Returns the task `tva_word_order`: ``query``, four ``choices``, ``label``."""
    return _build(word_order_examples)


def last_word(**metadata: Any) -> DatasetDict:
    """Returns the task `tva_last_word`: ``query``, four ``choices``, ``label``."""
    return _build(last_word_examples)
