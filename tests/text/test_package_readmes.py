import re

import pytest
from support import tiny

from tvaprune.errors import InputError
from tvaprune.text import package_readmes
from tvaprune.text.package_readmes import PACKAGES, SPLITS, prose, read_splits, split_of
from tvaprune.text.sources import load_documents

SENTENCE = "A paragraph of English prose has some words and few signs."


@pytest.mark.parametrize(
    ("description", "expected"),
    [
        (SENTENCE, SENTENCE),
        (f"# Title\r\n\r\n{SENTENCE}\n\n\n{SENTENCE}\n", f"{SENTENCE}\n\n{SENTENCE}"),  # a heading is too short
        (f"[![CI](https://a.b/c.svg)](https://a.b)\n\n{SENTENCE}", SENTENCE),
        ("Read [the manual](https://a.b/c) of it, of many pages.", "Read the manual of it, of many pages."),
        ("Read `the manual <https://a.b/c>`__ of it, which has some pages.",
         "Read the manual of it, which has some pages."),
        ("Read <b>all</b> of it at once, it <!-- no\n\n --> takes time.", "Read all of it at once, it  takes time."),
        (f"| a | b |\n|---|---|\n| 1 | 2 |\n| 3 | 4 |\n\n{SENTENCE}", SENTENCE),
        (f"{SENTENCE} Caf\u00e9.\n\n{SENTENCE}", SENTENCE),
        ("only seven words here are too few", ""),
    ],
)  # fmt: skip
def test_prose_is_what_remains_of_a_description(description, expected):
    assert prose(description) == expected


def test_the_packages_are_pinned_so_that_the_text_is_the_same_everywhere():
    files = (tiny.ROOT / name for name in ("requirement.txt", "requirement-text.txt"))
    lines = [line for path in files for line in path.read_text(encoding="utf-8").splitlines()]
    pinned = {line.split("==")[0] for line in lines if re.match(r"[\w-]+==", line)}
    assert set(PACKAGES) - pinned == set()
    assert len(set(PACKAGES)) == len(PACKAGES)


def test_the_splits_are_by_package_and_mostly_test_text():
    splits = read_splits()
    names = {split: [document.split("\n", 1)[0] for document in documents] for split, documents in splits.items()}
    assert sorted(name for found in names.values() for name in found) == sorted(PACKAGES)
    assert all(split_of(name) == split for split, found in names.items() for name in found)
    assert all(names[split] for split in SPLITS)
    assert max(map(len, splits["test"])) < package_readmes.MAX_CHARACTERS + 100
    assert sum(map(len, splits["test"])) > 130_000  # over 200 windows of 256 tokens of the miniature models
    assert read_splits() == splits


def test_a_missing_package_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("TVAPRUNE_CACHE", str(tmp_path))
    monkeypatch.setattr(package_readmes, "PACKAGES", ("torch", "no_such_package"))
    with pytest.raises(InputError, match="no_such_package is not installed: pip install -r requirement.txt"):
        load_documents("package_readmes", "test")


def test_the_text_is_kept_after_the_first_reading(monkeypatch, tmp_path):
    monkeypatch.setenv("TVAPRUNE_CACHE", str(tmp_path))
    first = load_documents("package_readmes", "test")
    assert first == read_splits()["test"]
    monkeypatch.setattr(package_readmes, "read_splits", None)
    assert load_documents("package_readmes", "test") == first
