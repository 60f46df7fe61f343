"""Documents of every source: how they are split, and what is refused in one line."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from datasets import Dataset, DatasetDict
from support import tiny
from support.texts import DOCUMENTS, SPLITS, write_hub_copies, write_text

from tvaprune.errors import InputError
from tvaprune.text import sources
from tvaprune.text.sources import check_named, is_streamed, load_documents


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "folder"])
def test_a_text_without_splits_is_cut_at_90_and_95_percent_of_its_documents(kind, tmp_path):
    path = write_text(tmp_path, kind)
    parts = [load_documents(path, split) for split in SPLITS]
    assert parts == [DOCUMENTS[:90], DOCUMENTS[90:95], DOCUMENTS[95:]]


def test_a_txt_file_is_cut_at_paragraphs_and_each_split_is_one_document(tmp_path):
    path = write_text(tmp_path, "txt")
    parts = [load_documents(path, split) for split in SPLITS]
    assert parts == [["\n\n".join(part)] for part in (DOCUMENTS[:90], DOCUMENTS[90:95], DOCUMENTS[95:])]


@pytest.mark.parametrize("num_documents", [1, 2, 3, 7, 19, 41])
def test_no_document_is_lost_or_in_two_splits(num_documents, tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": d}) + "\n" for d in DOCUMENTS[:num_documents]))
    found = []
    for split in SPLITS:
        try:
            found += load_documents(str(path), split)
        except InputError as error:  # a short text has splits without any
            assert "holds no text" in str(error)
    assert found == DOCUMENTS[:num_documents]


def test_a_folder_with_splits_gives_its_own(tmp_path):
    parts = {"train": ["a"], "validation": ["b", " \n"], "test": ["c", "d"]}
    DatasetDict({split: Dataset.from_dict({"text": texts}) for split, texts in parts.items()}).save_to_disk(tmp_path)
    assert load_documents(str(tmp_path), "train") == ["a"]
    assert load_documents(str(tmp_path), "validation") == ["b"]  # what is blank is no document
    assert load_documents(str(tmp_path), "test") == ["c", "d"]


def test_a_folder_without_the_split_is_refused(tmp_path):
    DatasetDict({"train": Dataset.from_dict({"text": ["a"]})}).save_to_disk(tmp_path)
    with pytest.raises(InputError, match="has splits train, needs test; save it with all three"):
        load_documents(str(tmp_path), "test")


def test_a_column_text_is_needed(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"content": "a", "id": 1}\n')
    with pytest.raises(InputError, match="has columns content, id, needs a column 'text'"):
        load_documents(str(tmp_path / "rows.jsonl"), "train")


def test_a_mixture_has_as_many_characters_of_every_text_in_a_random_order(tmp_path):
    texts = {"long": [f"a{number:04}" for number in range(900)], "short": [f"b{number:05}" for number in range(301)]}
    for name, rows in texts.items():
        lines = (json.dumps({"text": text}) + "\n" for text in rows)
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    mixed = f"{tmp_path / 'long.jsonl'},{tmp_path / 'short.jsonl'}"
    for split in SPLITS:
        parts = {name: load_documents(str(tmp_path / f"{name}.jsonl"), split) for name in ("long", "short")}
        found = load_documents(mixed, split)
        of_long, of_short = ([text for text in found if (text[0] == "a") is is_long] for is_long in (True, False))
        assert sorted(of_short) == sorted(parts["short"])
        assert sum(map(len, of_long)) == sum(map(len, parts["short"])) < sum(map(len, parts["long"]))
        assert all(any(text.startswith(cut) for text in parts["long"]) for cut in of_long)
        assert len(set(of_long)) == len(of_long) and sum(text not in parts["long"] for text in of_long) <= 1
        assert of_long != sorted(of_long) and found != of_long + of_short != of_short + of_long
        assert load_documents(mixed, split) == found


def test_what_is_wrong_with_a_part_of_a_mixture_is_told(tmp_path):
    path = write_text(tmp_path, "jsonl")
    for mixed in (f"{path},", f",{path}", f"{path}, ,{path}"):
        with pytest.raises(InputError, match="a name is missing beside a comma; give names or paths"):
            load_documents(mixed, "train")
    with pytest.raises(InputError, match="--dataset_name nowhere: neither a file or folder nor one of"):
        load_documents(f"{path}, nowhere", "train")


def test_a_mixture_with_a_text_too_large_to_read_whole_is_such_a_text():
    assert is_streamed("c4") and is_streamed("python_docs, c4") and not is_streamed("python_docs,wikitext2")


def test_a_name_too_long_for_a_file_is_refused_like_any_other():
    with pytest.raises(InputError, match="neither a file or folder nor one of"):
        load_documents("n" * 300, "train")


def test_a_path_with_a_comma_is_a_path(tmp_path):
    path = write_text(tmp_path, "jsonl")
    named = tmp_path / "one, two.jsonl"
    os.rename(path, named)
    assert load_documents(str(named), "train") == DOCUMENTS[:90]


def test_an_unknown_name_is_refused():
    with pytest.raises(
        InputError,
        match="--dataset_name wikitext3: neither a file or folder nor one of python_docs, package_readmes, english_pr",
    ):
        load_documents("wikitext3", "train")


def test_an_unknown_kind_of_file_is_refused(tmp_path):
    (tmp_path / "text.docx").write_text("a")
    with pytest.raises(InputError, match="cannot read '.docx'; give .txt, .jsonl or .parquet"):
        load_documents(str(tmp_path / "text.docx"), "train")
    with pytest.raises(InputError, match="cannot read"):
        check_named(str(tmp_path / "text.docx"))  # before a model is loaded


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
def test_the_case_of_a_files_kind_does_not_matter(kind, tmp_path):
    path = Path(write_text(tmp_path, kind))
    wanted = load_documents(str(path), "train")
    renamed = str(path.rename(path.with_suffix(f".{kind.upper()}")))
    check_named(renamed)
    assert load_documents(renamed, "train") == wanted and wanted


def test_an_empty_text_is_refused(tmp_path):
    (tmp_path / "text.txt").write_text(" \n\n \n")
    with pytest.raises(InputError, match="its train split holds no text; give a longer text"):
        load_documents(str(tmp_path / "text.txt"), "train")


@pytest.mark.parametrize("line", ['{"text": ', "[1]", "3", '"text"', "[" * 100_000])
def test_a_line_that_is_no_row_is_named(line, tmp_path):
    (tmp_path / "text.jsonl").write_text(f'{{"text": "a"}}\n\n{line}\n')
    with pytest.raises(InputError, match=r"text.jsonl: line 3 is no JSON object \(\w+\); mend it, or leave it out"):
        load_documents(str(tmp_path / "text.jsonl"), "train")


def test_an_editors_mark_is_no_part_of_a_plain_text(tmp_path):
    for encoding in ("utf-8", "utf-8-sig"):
        (tmp_path / f"{encoding}.txt").write_text("\n\n".join(DOCUMENTS[:40]), encoding=encoding)
    plain, marked = (load_documents(str(tmp_path / f"{name}.txt"), "train") for name in ("utf-8", "utf-8-sig"))
    assert marked == plain


def test_an_editors_mark_is_no_part_of_the_rows(tmp_path):
    rows = [{"text": document} for document in DOCUMENTS[:40]]
    text = "".join(json.dumps(one) + "\n" for one in rows)
    (tmp_path / "text.jsonl").write_text(text, encoding="utf-8-sig")
    assert load_documents(str(tmp_path / "text.jsonl"), "train") == DOCUMENTS[:36]
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(InputError, match="empty.jsonl: is empty; give a text"):
        load_documents(str(tmp_path / "empty.jsonl"), "train")


@pytest.mark.parametrize(
    "make",
    [
        lambda path: (path.mkdir(), path / "notes.md")[1].write_text("a"),
        lambda path: path.with_suffix(".jsonl").write_bytes(b'{"text": "caf\xe9"}\n'),
        lambda path: path.with_suffix(".parquet").write_bytes(b"PAR1 no more"),
        lambda path: path.with_suffix(".txt").write_bytes(b"caf\xe9"),
    ],
    ids=["a folder of something else", "jsonl that is not UTF-8", "broken parquet", "not UTF-8"],
)
def test_a_text_that_cannot_be_read_is_one_clear_line(make, tmp_path):
    make(tmp_path / "mine")
    (path,) = tmp_path.iterdir()
    with pytest.raises(InputError, match=f"--dataset_name {path}") as caught:
        load_documents(str(path), "train")
    assert "\n" not in str(caught.value)


def test_a_command_says_of_a_damaged_file_nothing_but_that_line(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 damaged")
    code = (
        "import sys\n"
        "from tvaprune.cli import run_command\n"
        "def command():\n"
        "    from tvaprune.text.sources import load_documents\n"
        "    load_documents(sys.argv[1], 'train')\n"
        "sys.exit(run_command(command))\n"
    )
    call = [sys.executable, "-c", code, str(tmp_path / "a.parquet")]
    environment = {name: value for name, value in os.environ.items() if name != "DATASETS_VERBOSITY"}
    done = subprocess.run(call, env=environment, cwd=tiny.ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "not a readable .parquet file" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_text_of_this_machine_is_read_anew_where_python_or_a_package_is_another(tmp_path, monkeypatch):
    monkeypatch.setenv("TVAPRUNE_CACHE", str(tmp_path))
    read, found = [], []
    monkeypatch.setattr(
        sources.python_docs, "read_splits", lambda: read.append(0) or dict.fromkeys(SPLITS, [f"reading {len(read)}"])
    )
    for installed, interpreter in (("1", "3.11"), ("1", "3.11"), ("2", "3.11"), ("2", "3.12"), ("1", "3.11")):
        monkeypatch.setattr(sources, "version", lambda package, installed=installed: installed)
        monkeypatch.setattr(sources, "sys", SimpleNamespace(version=interpreter))
        found += load_documents("python_docs", "test")
    assert found == ["reading 1", "reading 1", "reading 2", "reading 3", "reading 1"]


def test_local_copies_of_hub_repositories(tmp_path):
    write_hub_copies(tmp_path)
    for split in SPLITS:
        joined = [f"{split} 0\n\n{split} 1\n\n{split} 2\n\n{split} 3"]
        assert load_documents("wikitext2", split, tmp_path) == joined
        assert load_documents("ptb", split, tmp_path) == joined
    train, validation, test = (load_documents("c4", split, tmp_path) for split in SPLITS)
    assert train + validation == [f"train {i}" for i in range(100)]  # both from the training file, apart
    assert len(validation) == 3
    assert test == [f"held out {i}" for i in range(100)]


@pytest.mark.parametrize(
    ("name", "split", "file"),
    [
        ("wikitext2", "test", "Salesforce/wikitext/wikitext-2-raw-v1/test-00000-of-00001.parquet"),
        ("ptb", "train", "ptb-text-only/ptb_text_only/penn_treebank/train/0000.parquet"),
        ("c4", "validation", "allenai/c4/en/c4-train.00000-of-01024.json.gz"),
    ],
)
def test_offline_without_a_copy_one_clear_line_says_which_file_to_put_where(name, split, file, tmp_path):
    with pytest.raises(InputError, match=f"--dataset_name {name}: cannot load") as caught:
        load_documents(name, split, tmp_path)
    assert f"at {tmp_path / file}, or choose --dataset_name python_docs" in str(caught.value)
    assert "\n" not in str(caught.value)
    write_hub_copies(tmp_path)  # control: the file at that place is what was missing
    assert (tmp_path / file).exists()
    assert load_documents(name, split, tmp_path)


def test_a_damaged_copy_of_a_hub_file_is_one_clear_line(tmp_path):
    write_hub_copies(tmp_path)
    c4 = tmp_path / "allenai/c4/en/c4-train.00000-of-01024.json.gz"
    c4.write_bytes(c4.read_bytes()[:200])
    with pytest.raises(InputError, match="--dataset_name c4: cannot load allenai/c4") as caught:
        load_documents("c4", "train", tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "txt"])
@pytest.mark.parametrize("name", ["a[1]", "b*", "c?", "d[[]"])
def test_a_path_is_the_file_of_that_name(name, kind, tmp_path):
    """A name that reads as a pattern: its neighbours, which the pattern would find, stay out."""
    mine, other = tmp_path / "mine", tmp_path / "other"
    for folder, word in ((mine, "right"), (other, "wrong")):
        folder.mkdir()
        rows = [f"{word} {i}" for i in range(20)]
        Dataset.from_dict({"text": rows}).to_parquet(folder / "text.parquet")
        (folder / "text.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
        (folder / "text.txt").write_text("\n\n".join(rows))
    path = tmp_path / f"{name}.{kind}"
    os.rename(mine / f"text.{kind}", path)
    for neighbour in ("a1", "bb", "cc", "d["):
        (tmp_path / f"{neighbour}.{kind}").write_bytes((other / f"text.{kind}").read_bytes())
    documents = load_documents(str(path), "train")
    assert "\n\n".join(documents) == "\n\n".join(f"right {i}" for i in range(18))


@pytest.mark.parametrize(
    ("value", "kind"), [(None, "null"), (3, "int"), (2.5, "float"), (["a"], "list"), ({"a": "b"}, "dict")]
)
@pytest.mark.parametrize("row", [1, 30])  # in whatever split
def test_a_text_that_is_no_string_is_named_by_its_line(value, kind, row, tmp_path):
    rows = [{"text": document} for document in DOCUMENTS[:40]]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    assert load_documents(str(path), "train") == DOCUMENTS[:36]  # control
    rows[row - 1] = {"text": value}
    path.write_text("".join(json.dumps(one) + "\n\n" for one in rows))
    for split in SPLITS:
        with pytest.raises(InputError, match=f"'text' of line {2 * row - 1} is {kind}, needs a string") as caught:
            load_documents(str(path), split)
        assert "\n" not in str(caught.value)


def test_a_column_of_numbers_is_refused(tmp_path):
    Dataset.from_dict({"text": [1, 2, 3]}).to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(InputError, match="'text' of row 1 is int, needs a string"):
        load_documents(str(tmp_path / "rows.parquet"), "train")


def test_a_txt_file_without_blank_lines_is_cut_at_lines(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n".join(DOCUMENTS) + "\n\n")
    parts = [load_documents(str(path), split) for split in SPLITS]
    assert "\n".join(part for (part,) in parts) == path.read_text()  # nothing is lost, nothing is put in
    assert parts[1] == ["\n".join(DOCUMENTS[92:97])]
    path.write_text(DOCUMENTS[0])
    with pytest.raises(InputError, match="its test split holds no text; give a longer text, of 20 paragraphs or lines"):
        load_documents(str(path), "test")
    for count in range(20, 70):  # as many as the message says are enough
        path.write_text("\n".join(DOCUMENTS[:count]))
        assert all(load_documents(str(path), split) for split in SPLITS)


@pytest.mark.parametrize("name", ["text.txt", "text.jsonl", "text.parquet"])
def test_an_empty_file_is_refused_before_it_is_read(name, tmp_path):
    (tmp_path / name).touch()
    with pytest.raises(InputError, match=f"{name}: is empty; give a text"):
        check_named(f"python_docs,{tmp_path / name}")
    (tmp_path / name).write_text("x")
    check_named(str(tmp_path / name))  # control
