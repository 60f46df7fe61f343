import gzip
import json
import os

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, PythonBackend

from tvaprune.errors import InputError
from tvaprune.text import blocks as data
from tvaprune.text import sources
from tvaprune.text.blocks import token_blocks
from tvaprune.text.sources import load_documents

SPLITS = ("train", "validation", "test")
DOCUMENTS = [f"document {i} of one hundred" for i in range(100)]
WORDS = ["[UNK]", "[END]", "[STOP]", *sorted({word for document in DOCUMENTS for word in document.split()})]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TVAPRUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def tokenizer():
    return make_tokenizer("[END]")


def make_tokenizer(end, pre_tokenizer=None):
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizer or pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token=end)


def write_text(folder, kind):
    path = folder / f"text.{kind}"
    if kind == "txt":
        path.write_text("\n\n".join(DOCUMENTS))
    elif kind == "jsonl":
        path.write_text("".join(json.dumps({"text": d, "source": "made up"}) + "\n" for d in DOCUMENTS))
    elif kind == "parquet":
        Dataset.from_dict({"text": DOCUMENTS}).to_parquet(path)
    else:
        Dataset.from_dict({"text": DOCUMENTS}).save_to_disk(path)
    return str(path)


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


def test_an_unknown_name_is_refused():
    with pytest.raises(
        InputError,
        match="--dataset_name wikitext3: neither a file or folder nor one of python_docs, package_readmes, wi",
    ):
        load_documents("wikitext3", "train")


def test_an_unknown_kind_of_file_is_refused(tmp_path):
    (tmp_path / "text.docx").write_text("a")
    with pytest.raises(InputError, match="cannot read '.docx'; give .txt, .jsonl or .parquet"):
        load_documents(str(tmp_path / "text.docx"), "train")


def test_an_empty_text_is_refused(tmp_path):
    (tmp_path / "text.txt").write_text(" \n\n \n")
    with pytest.raises(InputError, match="its train split holds no text; give a longer text"):
        load_documents(str(tmp_path / "text.txt"), "train")


@pytest.mark.parametrize(
    "make",
    [
        lambda path: (path.mkdir(), path / "notes.md")[1].write_text("a"),
        lambda path: path.with_suffix(".jsonl").write_text('{"text": "a"}\n{"text": '),
        lambda path: path.with_suffix(".parquet").write_bytes(b"PAR1 no more"),
        lambda path: path.with_suffix(".txt").write_bytes(b"caf\xe9"),
    ],
    ids=["a folder of something else", "broken jsonl", "broken parquet", "not UTF-8"],
)
def test_a_text_that_cannot_be_read_is_one_clear_line(make, tmp_path):
    make(tmp_path / "mine")
    (path,) = tmp_path.iterdir()
    with pytest.raises(InputError, match=f"--dataset_name {path}") as caught:
        load_documents(str(path), "train")
    assert "\n" not in str(caught.value)


def write_hub_copies(folder):
    for split in SPLITS:
        rows = [f"{split} {i}" for i in range(4)]
        wikitext = folder / f"Salesforce/wikitext/wikitext-2-raw-v1/{split}-00000-of-00001.parquet"
        ptb = folder / f"ptb-text-only/ptb_text_only/penn_treebank/{split}/0000.parquet"
        for path, column in ((wikitext, "text"), (ptb, "sentence")):
            path.parent.mkdir(parents=True, exist_ok=True)
            Dataset.from_dict({column: rows}).to_parquet(path)
    c4 = folder / "allenai/c4/en"
    c4.mkdir(parents=True)
    for name, prefix in (("c4-train.00000-of-01024", "train"), ("c4-validation.00000-of-00008", "held out")):
        with gzip.open(c4 / f"{name}.json.gz", "wt") as file:
            file.writelines(json.dumps({"text": f"{prefix} {i}", "url": "made up"}) + "\n" for i in range(100))


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


def test_a_model_that_needs_bos_gets_it_before_every_block(cache, tokenizer, tmp_path):
    text = write_text(tmp_path, "jsonl")
    plain = token_blocks(tokenizer, text, "train", 7)[:]["input_ids"]
    begun = token_blocks(tokenizer, text, "train", 8, bos=2)[:]["input_ids"]
    assert begun.shape[1] == 8 and (begun[:, 0] == 2).all()
    assert torch.equal(begun[:, 1:], plain)  # no token of the text is lost
    assert not torch.equal(token_blocks(tokenizer, text, "train", 8)[:]["input_ids"], begun)  # nor is the cache's taken


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


def test_blocks_are_the_stream_of_documents_cut(cache, tokenizer, tmp_path):
    path = write_text(tmp_path, "jsonl")
    blocks = token_blocks(tokenizer, path, "test", block_size=4)
    # Five documents "document i of one hundred" of 5 words, each with its end: 30 tokens, 7 blocks of 4, 2 left over
    words = " ".join(f"{document} [END]" for document in DOCUMENTS[95:]).split()
    assert len(blocks) == 7
    assert all(type(row) is torch.Tensor and row.dtype == torch.int64 for row in blocks[:]["input_ids"])
    assert blocks[:]["input_ids"].tolist() == torch.tensor([WORDS.index(w) for w in words[:28]]).view(7, 4).tolist()


def test_a_tokenizer_without_end_of_text_joins_directly(cache, tmp_path):
    blocks = token_blocks(make_tokenizer(None), write_text(tmp_path, "jsonl"), "test", block_size=25)
    assert len(blocks) == 1
    assert WORDS.index("[END]") not in blocks[0]["input_ids"].tolist()


def test_a_text_shorter_than_one_block_is_refused(cache, tokenizer, tmp_path):
    path = write_text(tmp_path, "jsonl")
    assert len(token_blocks(tokenizer, path, "test", block_size=30)) == 1
    for _ in range(2):  # cached or not
        with pytest.raises(InputError, match="test split is shorter than one block of 31 tokens; give a longer text"):
            token_blocks(tokenizer, path, "test", block_size=31)


def test_max_blocks_draws_by_seed_in_the_order_of_the_text(cache, tokenizer, tmp_path):
    path = write_text(tmp_path, "jsonl")
    every = token_blocks(tokenizer, path, "train", 6)[:]["input_ids"].tolist()  # a document each: all differ

    def draw(**values):
        return token_blocks(tokenizer, path, "train", 6, **values)[:]["input_ids"].tolist()

    drawn = draw(max_blocks=20, seed=3)
    assert drawn == draw(max_blocks=20, seed=3)
    assert drawn != draw(max_blocks=20, seed=4)
    places = [every.index(block) for block in drawn]
    assert len(set(places)) == 20 and places == sorted(places)
    assert places != list(range(20))
    assert draw(max_blocks=90) == draw(max_blocks=1000) == every


def counted(tokenizer, monkeypatch):
    """Counts the documents that the tokenizer is given."""
    seen = []
    original = type(tokenizer).__call__

    def call(self, texts, **options):
        seen.extend(texts)
        return original(self, texts, **options)

    monkeypatch.setattr(type(tokenizer), "__call__", call)
    monkeypatch.setattr(data, "_TOKENIZE_BATCH", 4)
    return seen


def test_of_a_large_text_documents_are_drawn_before_they_are_tokenised(cache, tokenizer, tmp_path, monkeypatch):
    path = write_text(tmp_path, "jsonl")
    seen = counted(tokenizer, monkeypatch)
    monkeypatch.setattr(data, "WHOLE_CHARACTERS", 1000)  # 90 documents of some 25 characters
    monkeypatch.setattr(data, "DRAWN_FROM", 8)

    def draw(seed):
        seen.clear()
        return token_blocks(tokenizer, path, "train", 12, max_blocks=10, seed=seed)[:]["input_ids"].tolist()

    drawn = draw(3)
    # 10 blocks of 12 tokens are 20 documents of 5 words and an end: five batches of four
    assert len(drawn) == 10 and len(seen) == len(set(seen)) == 20
    words = " ".join(f"{document} [END]" for document in seen).split()
    assert sum(drawn, []) == [WORDS.index(word) for word in words]
    assert draw(3) == drawn and seen == []  # cached
    assert draw(4) != drawn and len(seen) == 20
    assert seen != sorted(seen, key=DOCUMENTS.index)  # drawn from all of the text, not its beginning
    assert {DOCUMENTS.index(document) > 45 for document in seen} == {True, False}


def test_of_a_text_that_is_used_whole_blocks_are_drawn_as_ever(cache, tokenizer, tmp_path, monkeypatch):
    path = write_text(tmp_path, "jsonl")
    seen = counted(tokenizer, monkeypatch)
    drawn = token_blocks(tokenizer, path, "train", 12, max_blocks=10, seed=3)[:]["input_ids"].tolist()
    assert len(seen) == 90  # a small text
    every = token_blocks(tokenizer, path, "train", 12)[:]["input_ids"].tolist()
    assert drawn == [every[i] for i in sorted(np.random.default_rng(3).permutation(45)[:10])]
    monkeypatch.setattr(data, "WHOLE_CHARACTERS", 1000)  # a large one, of which more is asked for than can be drawn
    assert token_blocks(tokenizer, path, "train", 12, max_blocks=10, seed=3)[:]["input_ids"].tolist() == drawn


def test_of_c4_no_more_is_read_and_tokenised_than_is_asked_for(cache, tokenizer, tmp_path, monkeypatch):
    write_hub_copies(tmp_path)
    c4 = tmp_path / "allenai/c4/en/c4-train.00000-of-01024.json.gz"
    with gzip.open(c4, "wt") as file:
        file.writelines(json.dumps({"text": f"{DOCUMENTS[i % 100]} {i}"}) + "\n" for i in range(20_000))
    read = []
    original = sources._rows
    monkeypatch.setattr(sources, "_rows", lambda path: (read.append(row) or row for row in original(path)))
    seen = counted(tokenizer, monkeypatch)
    blocks = token_blocks(tokenizer, "c4", "train", 7, max_blocks=40, seed=1, data_dir=tmp_path)
    assert len(blocks) == 40
    assert len(seen) == 40  # documents of 7 tokens
    # 280 tokens, drawn from 32 characters for each: some 310 documents of 29 characters
    assert 280 * 32 / 31 < len(read) < 280 * 32 / 25
    assert all(int(document.split()[-1]) % 100 < 97 for document in seen)
    held_out = token_blocks(tokenizer, "c4", "validation", 7, max_blocks=4, seed=1, data_dir=tmp_path)
    assert len(held_out) == 4
    assert all(int(document.split()[-1]) % 100 >= 97 for document in seen[40:])
    read.clear()
    load_documents("c4", "train", tmp_path)  # control: all of it
    assert len(read) == 20_000


def test_a_damaged_copy_of_a_hub_file_is_one_clear_line(tmp_path):
    write_hub_copies(tmp_path)
    c4 = tmp_path / "allenai/c4/en/c4-train.00000-of-01024.json.gz"
    c4.write_bytes(c4.read_bytes()[:200])
    with pytest.raises(InputError, match="--dataset_name c4: cannot load allenai/c4") as caught:
        load_documents("c4", "train", tmp_path)
    assert "\n" not in str(caught.value)


def test_the_second_call_does_not_tokenise_again(cache, tokenizer, tmp_path, monkeypatch):
    path = write_text(tmp_path, "jsonl")
    first = token_blocks(tokenizer, path, "train", 6)[:]["input_ids"]

    def refuse(*args):
        raise AssertionError("tokenises again")

    monkeypatch.setattr(data, "_cut", refuse)
    assert torch.equal(token_blocks(tokenizer, path, "train", 6)[:]["input_ids"], first)
    for changed in ({"split": "test"}, {"block_size": 7}):  # control: what differs is not taken from the cache
        with pytest.raises(AssertionError, match="tokenises again"):
            token_blocks(tokenizer, path, **({"split": "train", "block_size": 6} | changed))


@pytest.mark.parametrize(
    "other",
    [make_tokenizer("[STOP]"), make_tokenizer(None), make_tokenizer("[END]", pre_tokenizers.CharDelimiterSplit("o"))],
    ids=["another end of text", "no end of text", "splits elsewhere"],
)
def test_tokenizers_of_the_same_vocabulary_do_not_share_cached_blocks(other, cache, tokenizer, tmp_path):
    assert other.get_vocab() == tokenizer.get_vocab()
    path = write_text(tmp_path, "jsonl")
    ours = token_blocks(tokenizer, path, "train", 6)[:]["input_ids"].tolist()
    assert token_blocks(other, path, "train", 6)[:]["input_ids"].tolist() != ours


def test_nothing_half_written_is_left_if_building_fails(cache, tokenizer, tmp_path, monkeypatch):
    path = write_text(tmp_path, "jsonl")
    original = data._cut

    def fail(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(data, "_cut", fail)
    with pytest.raises(KeyboardInterrupt):
        token_blocks(tokenizer, path, "train", 6)
    assert os.listdir(cache) == []
    monkeypatch.setattr(data, "_cut", original)
    assert len(token_blocks(tokenizer, path, "train", 6)) == 90
    assert [name.split("-")[0] for name in os.listdir(cache)] == ["blocks"]


def damage(folder, how):
    (arrow,) = folder.glob("*.arrow")
    if how == "cut":
        arrow.write_bytes(arrow.read_bytes()[:-300])
    elif how == "empty":
        arrow.write_bytes(b"")
    elif how == "gone":
        arrow.unlink()
    else:
        (folder / "state.json").write_text('{"_data_files": ')


@pytest.mark.parametrize("how", ["cut", "empty", "gone", "state"])
def test_a_damaged_cache_is_built_again(how, cache, tokenizer, tmp_path, monkeypatch):
    path = write_text(tmp_path, "jsonl")
    expected = token_blocks(tokenizer, path, "train", 6)[:]["input_ids"].tolist()
    (folder,) = cache.glob("blocks-*")
    damage(folder, how)
    assert token_blocks(tokenizer, path, "train", 6)[:]["input_ids"].tolist() == expected
    damage(folder, how)
    monkeypatch.setattr(sources.shutil, "rmtree", lambda *args, **options: None)  # a cache of somebody else's
    with pytest.raises(InputError, match="the text cache .*blocks-.* is damaged .* and cannot be removed; remove it"):
        token_blocks(tokenizer, path, "train", 6)


def test_two_processes_that_build_the_same_blocks_do_not_disturb_each_other(cache):
    def build(target):
        Dataset.from_dict({"input_ids": [[1]]}).save_to_disk(target)
        if not (cache / "blocks-0").exists():  # the other process is done first
            Dataset.from_dict({"input_ids": [[1]]}).save_to_disk(cache / "blocks-0")

    assert data._cached(cache / "blocks-0", build)["input_ids"][:] == [[1]]
    assert os.listdir(cache) == ["blocks-0"]


def test_the_cache_stands_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("TVAPRUNE_CACHE", str(tmp_path))
    assert data.cache_folder() == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("TVAPRUNE_CACHE", "")
    assert data.cache_folder() == tmp_path / "xdg" / "tvaprune"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert data.cache_folder() == tmp_path / ".cache" / "tvaprune"
    monkeypatch.delenv("TVAPRUNE_CACHE")
    assert data.cache_folder() == tmp_path / ".cache" / "tvaprune"


def test_a_cache_that_cannot_be_written_is_one_clear_line(monkeypatch, tokenizer, tmp_path):
    path = write_text(tmp_path, "jsonl")
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("TVAPRUNE_CACHE", str(tmp_path / "file"))
    with pytest.raises(InputError, match="the text cache .*file cannot be written .*; set TVAPRUNE_CACHE") as e:
        token_blocks(tokenizer, path, "train", 6)
    assert "\n" not in str(e.value)

    def full(target):
        raise OSError(28, "No space left on device")

    monkeypatch.setenv("TVAPRUNE_CACHE", str(tmp_path / "cache"))
    with pytest.raises(InputError, match="cannot be written .No space left on device."):
        data._cached(tmp_path / "cache" / "blocks-0", full)
    assert os.listdir(tmp_path / "cache") == []
    assert len(token_blocks(tokenizer, path, "train", 6)) == 90  # control


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
def test_a_text_that_is_no_string_is_named_by_its_row(value, kind, row, tmp_path):
    rows = [{"text": document} for document in DOCUMENTS[:40]]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    assert load_documents(str(path), "train") == DOCUMENTS[:36]  # control
    rows[row - 1] = {"text": value}
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    for split in SPLITS:
        with pytest.raises(InputError, match=f"'text' of row {row} is {kind}, needs a string") as caught:
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


def test_a_tokenizer_without_a_backend_is_known_by_its_files(cache, tmp_path):
    class Slow(PythonBackend):
        vocab_files_names = {"vocab_file": "words.txt"}

        def __init__(self, words=None, **options):
            self.words = words
            super().__init__(**options)

        @property
        def vocab_size(self):
            return len(self.words)

        def get_vocab(self):
            return {word: i for i, word in enumerate(self.words)}

        def _tokenize(self, text):
            return text.split()

        def _convert_token_to_id(self, token):
            return self.words.index(token)

        def _convert_id_to_token(self, index):
            return self.words[index]

        def save_vocabulary(self, save_directory, filename_prefix=None):
            path = os.path.join(save_directory, "words.txt")
            with open(path, "w") as file:
                file.write("\n".join(self.words))
            return (path,)

    path = write_text(tmp_path, "jsonl")
    slow, other = Slow(WORDS, eos_token="[END]"), Slow(WORDS[:3] + WORDS[:2:-1], eos_token="[END]")
    assert not hasattr(slow, "backend_tokenizer")
    expected = token_blocks(make_tokenizer("[END]"), path, "train", 6)[:]["input_ids"].tolist()
    assert token_blocks(slow, path, "train", 6)[:]["input_ids"].tolist() == expected
    assert token_blocks(slow, path, "train", 6)[:]["input_ids"].tolist() == expected
    assert token_blocks(other, path, "train", 6)[:]["input_ids"].tolist() != expected  # control
    assert len(os.listdir(cache)) == 3
