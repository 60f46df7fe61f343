import random
import sys

import pytest
from conftest import ROOT
from support.documents import document

from tvaprune.measure.zeroshot import task_folder

sys.path.insert(0, str(ROOT / "lm-evaluation-harness"))
from tva_tasks import builders  # noqa: E402
from tva_tasks.builders import CONTEXT_WORDS, CONTINUATION_WORDS, parse  # noqa: E402


@pytest.fixture
def documents(monkeypatch):
    made = [document(package, index) for package in ("one", "two") for index in range(6)]
    monkeypatch.setattr("tvaprune.text.blocks.load_documents", lambda name, split: made if split == "test" else [])
    return made


def test_parse_keeps_the_prose_before_the_first_table():
    found = parse("a.b.f(x: int=1)\n\nReturns it\nat once.\n\nAnd more.\n\nArgs:\n    x: what.\n\nNot this.\n")
    assert (found.name, found.package, found.header) == ("a.b.f", "a", "a.b.f(x: int=1)")
    assert found.words == ("Returns", "it", "at", "once.", "And", "more.")
    assert parse("Some prose that is no docstring.\n\nMore of it.") is None
    assert parse("a.b.f\n\n>>> f(1)\n2") is None
    assert parse(f"a.f({'x' * 200})\n\nReturns it.") is None


def test_continuations_follow_their_beginning(documents):
    rows = builders.continuation()["test"]
    assert len(rows) == 12
    texts = [" ".join(parse(each).words) for each in documents]
    for row in rows:
        assert len(set(row["choices"])) == 4 and len(row["continuation"].split()) == CONTINUATION_WORDS
        beginnings = [choice.split("\n\n")[1] for choice in row["choices"]]
        assert all(len(beginning.split()) == CONTEXT_WORDS for beginning in beginnings)
        fits = [any(f"{beginning} {row['continuation']}" in text for text in texts) for beginning in beginnings]
        assert [place for place, fit in enumerate(fits) if fit] == [row["label"]]
    assert len({row["label"] for row in rows}) > 1  # the truth is not always in the same place


def test_names_are_those_of_the_description_and_of_its_package(documents):
    truth = {" ".join(parse(each).words[: builders.DESCRIPTION_WORDS]): parse(each).name for each in documents}
    rows = builders.name()["test"]
    assert len(rows) == 12
    for row in rows:
        assert row["choices"][row["label"]] == truth[row["description"]]
        assert len({name.split(".")[0] for name in row["choices"]}) == 1 and len(set(row["choices"])) == 4


def test_only_the_true_order_of_the_words_is_in_the_text(documents):
    texts = [" ".join(parse(each).words) for each in documents]
    rows = builders.word_order()["test"]
    assert len(rows) == 12
    for row in rows:
        beginning = row["query"].split("\n\n")[1]
        fits = [any(f"{beginning} {choice}" in text for text in texts) for choice in row["choices"]]
        assert [place for place, fit in enumerate(fits) if fit] == [row["label"]]
        assert len({tuple(sorted(choice.split())) for choice in row["choices"]}) == 1 and len(set(row["choices"])) == 4


def test_the_last_word_and_the_others_stand_earlier_in_the_passage(documents):
    rows = builders.last_word()["test"]
    assert len(rows) == 12
    for row in rows:
        assert row["choices"][row["label"]] == "value" and len(set(row["choices"])) == 4
        assert all(choice in row["query"] for choice in row["choices"])


def test_the_same_text_gives_the_same_examples_and_no_more_than_the_most(documents, monkeypatch):
    assert builders.continuation()["test"].to_list() == builders.continuation(version=1.0)["test"].to_list()
    monkeypatch.setattr(builders, "MAX_EXAMPLES", 5)
    assert len(builders.name()["test"]) == 5
    assert builders.name()["test"].to_list() == builders.name()["test"].to_list()


def test_packages_with_too_few_docstrings_are_left_out():
    few = [parse(document("one", index)) for index in range(3)]
    assert list(builders.name_examples(few, random.Random(0))) == []
    four = [*few, parse(document("one", 3))]
    assert len(list(builders.name_examples(four, random.Random(0)))) == 4


def test_the_package_pins_the_harness_that_is_installed_and_carries_its_tasks():
    import lm_eval

    project = (ROOT / "lm-evaluation-harness" / "pyproject.toml").read_text()
    assert f'"lm_eval[hf]=={lm_eval.__version__}"' in project and 'tva_tasks = ["*.yaml"]' in project
    assert (task_folder() / "tva_offline.yaml").is_file()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--tasks", "tva_offline"], ["--tasks", "tva_offline", "--include_path", str(task_folder())]),
        (["ls", "tasks"], ["ls", "tasks", "--include_path", str(task_folder())]),
        (["--tasks", "t", "--include_path=mine"], ["--tasks", "t", "--include_path=mine"]),
        (["--help"], ["--help"]),
        ([], []),
    ],
)
def test_the_command_is_the_harnesss_with_our_folder(given, expected):
    from tva_tasks.command import with_tasks

    assert with_tasks(given) == expected
