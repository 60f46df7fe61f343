"""Blocks of tokens: what they hold, which are drawn, and how they are kept."""

import gzip
import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from datasets import Dataset
from support.texts import DOCUMENTS, write_hub_copies, write_text
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, PythonBackend

from tvaprune.errors import InputError
from tvaprune.text import blocks as data
from tvaprune.text import sources
from tvaprune.text.blocks import spread, token_blocks
from tvaprune.text.sources import load_documents

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


@pytest.mark.parametrize("bos", [0, 2])
def test_a_model_that_needs_bos_gets_it_before_every_block(bos, cache, tokenizer, tmp_path):
    text = write_text(tmp_path, "jsonl")
    plain = token_blocks(tokenizer, text, "train", 7)[:]["input_ids"]
    begun = token_blocks(tokenizer, text, "train", 8, bos=bos)[:]["input_ids"]
    assert begun.shape[1] == 8 and (begun[:, 0] == bos).all()
    assert torch.equal(begun[:, 1:], plain)  # no token of the text is lost
    for other in (None, 1):  # nor are the cache's taken
        assert not torch.equal(token_blocks(tokenizer, text, "train", 8, bos=other)[:]["input_ids"], begun)


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


def test_an_end_of_text_whose_id_is_0_ends_documents(cache, tmp_path):
    blocks = token_blocks(make_tokenizer("[UNK]"), write_text(tmp_path, "jsonl"), "test", block_size=6)
    assert WORDS.index("[UNK]") == 0 and (blocks[:]["input_ids"][:, -1] == 0).all()  # of five words each


def test_a_text_shorter_than_one_block_is_refused(cache, tokenizer, tmp_path):
    path = write_text(tmp_path, "jsonl")
    assert len(token_blocks(tokenizer, path, "test", block_size=30)) == 1
    for _ in range(2):  # cached or not
        with pytest.raises(InputError, match="test split is shorter than one block of 31 tokens; give a longer text"):
            token_blocks(tokenizer, path, "test", block_size=31)
    with pytest.raises(InputError, match="a smaller --ctx_length"):
        token_blocks(tokenizer, path, "test", block_size=31, flag="ctx_length")


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


def test_blocks_that_are_spread_come_from_all_over_a_text_its_ends_among_them():
    blocks = Dataset.from_dict({"place": list(range(9))})
    assert [spread(blocks, count)["place"][:] for count in (1, 3, 20)] == [[0], [0, 4, 8], list(range(9))]


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
    assert len(token_blocks(tokenizer, path, "train", 12, max_blocks=14, seed=3)) == 14  # of which ten would be too few
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


def test_of_one_large_document_blocks_are_drawn_from_all_of_it(cache, tokenizer, tmp_path, monkeypatch):
    path = write_text(tmp_path, "txt")
    every = token_blocks(tokenizer, path, "train", 12)[:]["input_ids"].tolist()
    monkeypatch.setattr(data, "WHOLE_CHARACTERS", 1000)
    monkeypatch.setattr(data, "DRAWN_FROM", 8)
    drawn = token_blocks(tokenizer, path, "train", 12, max_blocks=10, seed=3)[:]["input_ids"].tolist()
    assert len(load_documents(path, "train")) == 1 and max(map(every.index, drawn)) > len(every) / 2


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


def test_a_tokenizer_of_the_same_rules_that_ends_texts_otherwise_does_not_take_its_blocks(cache, tokenizer, tmp_path):
    path = write_text(tmp_path, "jsonl")
    first = token_blocks(tokenizer, path, "test", 4)[:]["input_ids"]
    rules = data._rules(tokenizer)
    tokenizer.eos_token = "one"  # as a model's and its chat model's, of one tokenizer.json
    assert data._rules(tokenizer) == rules
    second = token_blocks(tokenizer, path, "test", 4)[:]["input_ids"]
    end, other = map(WORDS.index, ("[END]", "one"))
    assert end in first and end not in second and torch.equal(torch.where(first == end, other, first), second)


def test_texts_of_the_same_characters_in_other_documents_do_not_share_cached_blocks():
    assert data._digest([], ["one two ", "three"]) != data._digest([], ["one ", "two three"])


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

    assert data.cached(cache / "blocks-0", build)["input_ids"][:] == [[1]]
    assert os.listdir(cache) == ["blocks-0"]


def test_what_another_process_makes_already_is_waited_for(cache, capsys):
    begun, rest, made = threading.Event(), threading.Event(), []

    def build(target):
        made.append(target)
        begun.set()
        assert rest.wait(60)
        Dataset.from_dict({"input_ids": [[1]]}).save_to_disk(target)

    with ThreadPoolExecutor() as pool:  # a lock is of an open file: threads stand for processes
        first = pool.submit(data.cached, cache / "blocks-0", build)
        assert begun.wait(60)
        second = pool.submit(data.cached, cache / "blocks-0", build)
        other = pool.submit(data.cached, cache / "blocks-1", build)  # control: of another name, nobody waits
        end, said = time.monotonic() + 60, ""
        while time.monotonic() < end and (len(made) < 2 or not said):
            said += capsys.readouterr().out
            time.sleep(0.01)
        rest.set()
        assert all(found.result()["input_ids"][:] == [[1]] for found in (first, second, other))
    assert len(made) == 2 and said == f"note: another process makes {cache / 'blocks-0'}; waiting for it\n"
    assert sorted(os.listdir(cache)) == ["blocks-0", "blocks-1"]


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
        data.cached(tmp_path / "cache" / "blocks-0", full)
    assert os.listdir(tmp_path / "cache") == []
    assert len(token_blocks(tokenizer, path, "train", 6)) == 90  # control


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
