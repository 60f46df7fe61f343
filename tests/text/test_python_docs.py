import random

import numpy as np
import pytest

from tvaprune.errors import InputError
from tvaprune.text import python_docs
from tvaprune.text.python_docs import Document, overlap, shingles, split_documents, split_of

SPLITS = ("train", "validation", "test")


def words(prefix, number=30):
    return " ".join(f"{prefix}{i}" for i in range(number))


def module_in(split, number=0):
    """The name of a module that the hash puts into a split."""
    names = (f"package.module{i}" for i in range(10_000))
    return [name for name in names if split_of(name) == split][number]


def document(split, text, number=0):
    return Document(module_in(split, number), "name", text)


def test_shingles_by_hand():
    assert len(shingles("a b c d e f g")) == 0  # seven words: none
    assert len(shingles("a b c d e f g h")) == 1
    assert len(shingles(words("w", 12))) == 12 - 8 + 1
    assert len(shingles("a " * 20)) == 1  # the same run 13 times
    assert len(shingles("a b " * 10)) == 2  # runs from a and runs from b


def test_shingles_do_not_depend_on_case_and_white_space_but_on_the_order_of_words():
    text = "One two three four five six seven eight"
    assert np.array_equal(shingles(text), shingles("one  two\nthree\tfour five six\n\nseven EIGHT "))
    assert not np.isin(shingles(text), shingles("two one three four five six seven eight")).any()
    found = shingles(words("w"))
    assert (np.diff(found.astype(object)) > 0).all()  # sorted, distinct


def test_overlap_by_hand():
    # 8 + 3 words have 4 shingles; the training text holds the first 9 words, so 2 of them
    assert overlap(shingles(words("w", 11)), shingles(words("w", 9), words("x"))) == 0.5
    assert overlap(shingles(words("w")), shingles(words("x"))) == 0.0
    assert overlap(shingles(words("w")), shingles(words("x"), words("w"))) == 1.0
    # 4 shingles of which 2 stand in the training text, and 4 of which none does
    assert overlap(shingles(words("w", 11), words("y", 11)), shingles(words("w", 9))) == 0.25


def test_a_module_is_in_one_split_by_its_name_alone():
    found = [split_of(f"package.module{i}") for i in range(5000)]
    shares = {split: found.count(split) / 5000 for split in SPLITS}
    assert shares == pytest.approx({"train": 0.92, "validation": 0.04, "test": 0.04}, abs=0.015)
    assert found == [split_of(f"package.module{i}") for i in range(5000)]


def test_the_split_does_not_depend_on_the_order_of_documents():
    texts = [words(f"m{i}d{j}w") for i in range(60) for j in range(2)]
    documents = [Document(f"package.module{k // 2}", f"name{k % 2}", text) for k, text in enumerate(texts)]
    # Two held-out near-copies of which one has to go, whichever comes first
    documents += [document("validation", words("twin")), document("test", words("twin"))]
    expected = split_documents(documents)
    assert all(expected[split] for split in SPLITS)
    for seed in range(3):
        shuffled = random.Random(seed).sample(documents, len(documents))
        assert split_documents(shuffled) == expected
    modules = [{d.module for d in expected[split]} for split in SPLITS]
    assert not (modules[0] & modules[1] or modules[0] & modules[2] or modules[1] & modules[2])


@pytest.mark.parametrize(
    ("number_shared", "kept"),
    # 107 words have 100 shingles; the first 7 + n words copied are n of them; more than 5% shared is a near-copy
    [(0, True), (5, True), (6, False), (100, False)],
)
@pytest.mark.parametrize("split", ["validation", "test"])
def test_a_near_copy_of_training_text_is_dropped(split, number_shared, kept):
    held_out = document(split, words("w", 107))
    training = document("train", words("w", 7 + number_shared) + " " + words("x"))
    splits = split_documents([held_out, training])
    assert splits["train"] == [training]
    assert splits[split] == ([held_out] if kept else [])


def test_a_near_copy_of_an_earlier_held_out_split_is_dropped():
    training, first, second = (
        document(split, text) for split, text in zip(SPLITS, (words("x"), words("w"), words("w")), strict=True)
    )
    splits = split_documents([training, first, second])
    assert splits == {"train": [training], "validation": [first], "test": []}


def test_a_held_out_document_too_short_to_compare_is_dropped():
    splits = split_documents(
        [document("train", words("x")), document("test", "only seven words, which tell too little")]
    )
    assert splits["test"] == []


def test_docstrings_stand_under_their_dotted_names_with_arguments():
    long = " ".join(["prose"] * 30)
    source = f'''
"""{long} module"""
class Thing:
    """{long} class"""
    def method(self, x: int = 3, *rest) -> str:
        """{long} method

        Then:
            indented
        """
def short():
    """Too short."""
def foreign():
    """{long} caf\u00e9"""
def without():
    pass
'''
    found = {d.name: d.text for d in python_docs._docstrings("package.module", source)}
    assert found == {
        "package.module": f"package.module\n\n{long} module\n",
        "package.module.Thing": f"package.module.Thing\n\n{long} class\n",
        "package.module.Thing.method": (
            f"package.module.Thing.method(self, x: int=3, *rest)\n\n{long} method\n\nThen:\n    indented\n"
        ),
    }
    assert list(python_docs._docstrings("package.module", "def broken(:")) == []


def test_files_are_read_not_imported_and_tests_are_left_out(tmp_path):
    package = tmp_path / "package"
    for name in ("__init__.py", "b.py", "a.py", "tests/test_a.py", "inner/__init__.py", "inner/_vendor/c.py"):
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text("raise RuntimeError")
    found = dict(python_docs._python_files("package", package))
    assert list(found) == ["package", "package.a", "package.b", "package.inner"]
    assert dict(python_docs._python_files("package.a", package / "a.py")) == {"a": package / "a.py"}


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(python_docs, "PACKAGES", ("torch", "no_such_package"))
    with pytest.raises(InputError, match="no_such_package is not installed: pip install -r requirement.txt, or choose"):
        python_docs._package_folders()
