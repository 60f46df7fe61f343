import gzip
import json
from dataclasses import replace
from typing import get_args, get_type_hints

import pytest
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tvaprune.errors import InputError
from tvaprune.flags.arguments import Arguments
from tvaprune.text import protocols
from tvaprune.text.blocks import token_blocks
from tvaprune.text.protocols import OWN, PROTOCOLS, evaluation_text, protocol_windows, starts_with_bos

CHARACTERS = ["<s>", "</s>", "\n", " ", *"abcdefghijklmnopqrstuvwxyz=0123456789"]
BOS, END = 0, 1


def make_tokenizer(with_bos=True):
    """A token per character; like Llama's it puts BOS before a text by itself, or like Qwen's it does not."""
    letters = Tokenizer(models.WordLevel({c: i for i, c in enumerate(CHARACTERS)}, unk_token="</s>"))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    if with_bos:
        letters.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(tokenizer_object=letters, bos_token="<s>", eos_token="</s>")


def ids(text):
    return [CHARACTERS.index(c) for c in text]


@pytest.fixture
def copies(tmp_path, monkeypatch):
    """Local copies of the three test sets, a few characters each, and windows of four tokens."""
    monkeypatch.setenv("TVAPRUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(protocols, "PROTOCOLS", {n: replace(p, window=4) for n, p in PROTOCOLS.items()})
    wikitext = tmp_path / "Salesforce/wikitext/wikitext-2-raw-v1/test-00000-of-00001.parquet"
    ptb = tmp_path / "ptb-text-only/ptb_text_only/penn_treebank/test/0000.parquet"
    for path, column, rows in ((wikitext, "text", ["", "= a =\n", "bc"]), (ptb, "sentence", ["ab c", "d", "ef g"])):
        path.parent.mkdir(parents=True)
        Dataset.from_dict({column: rows}).to_parquet(path)
    c4 = tmp_path / "allenai/c4/en/c4-validation.00000-of-00008.json.gz"
    c4.parent.mkdir(parents=True)
    with gzip.open(c4, "wt") as file:
        file.writelines(json.dumps({"text": "x" if i < 1100 else "y"}) + "\n" for i in range(1200))
    return tmp_path


def stream(tokenizer, name, folder):
    return protocol_windows(tokenizer, name, folder)[:]["input_ids"].flatten().tolist()


def test_wikitext2_is_its_rows_joined_by_a_blank_line_after_one_bos(copies):
    # Rows "", "= a =\n", "bc", empty ones too: "\n\n= a =\n\n\nbc", 12 characters; with BOS 13 tokens, 3 windows of 4
    expected = [BOS, *ids("\n\n= a =\n\n\nb")]
    assert stream(make_tokenizer(), "wikitext2-2048", copies) == expected
    assert stream(make_tokenizer(with_bos=False), "wikitext2-2048", copies) == ids("\n\n= a =\n\n\nbc")
    own = token_blocks(make_tokenizer(), "wikitext2", "test", 4, data_dir=copies)[:]["input_ids"].flatten().tolist()
    assert own == [*ids("\n\n= a =\n\n\nbc")]  # control: no BOS; the end is the thirteenth token, of no whole window


def test_ptb_is_its_sentences_joined_by_a_space(copies):
    # "ab c d ef g": 11 characters, 12 tokens
    assert stream(make_tokenizer(), "ptb-4096", copies) == [BOS, *ids("ab c d ef g")]
    own = token_blocks(make_tokenizer(), "ptb", "test", 4, data_dir=copies)[:]["input_ids"].flatten().tolist()
    assert own == ids("ab c\n\nd\n\nef ")  # control: our own joining


def test_c4_is_1100_documents_of_which_256_windows_count(copies):
    # "x x x ... x": 1,100 letters and 1,099 spaces, 2,200 tokens with BOS: 550 windows of 4, 256 count
    tokens = stream(make_tokenizer(), "c4-2048", copies)
    assert tokens == [BOS, *ids("x " * 512)][: 256 * 4]
    assert PROTOCOLS["c4-2048"].num_windows == PROTOCOLS["c4-4096"].num_windows == 256


def test_no_document_of_c4_beyond_the_1100th_is_read(copies, monkeypatch):
    every = {n: replace(p, window=4, num_windows=None) for n, p in PROTOCOLS.items()}
    monkeypatch.setattr(protocols, "PROTOCOLS", every)
    assert stream(make_tokenizer(), "c4-2048", copies) == [BOS, *ids(" ".join("x" * 1100))]
    more = {n: replace(p, rows=1102) for n, p in every.items()}  # control
    monkeypatch.setattr(protocols, "PROTOCOLS", more)
    assert stream(make_tokenizer(), "c4-2048", copies)[-4:] == ids(" y y")


def test_a_copy_shorter_than_a_window_is_refused(copies, monkeypatch):
    monkeypatch.setattr(protocols, "PROTOCOLS", PROTOCOLS)
    with pytest.raises(InputError, match="--protocol ptb-2048: the text has 12 tokens, less than one window of 2048"):
        protocol_windows(make_tokenizer(), "ptb-2048", copies)
    with pytest.raises(InputError, match="--dataset_name c4: cannot load allenai/c4"):
        protocol_windows(make_tokenizer(), "c4-2048", copies / "elsewhere")


def test_the_flag_names_every_protocol():
    flag = get_type_hints(get_type_hints(Arguments)["data"])["protocol"]
    assert get_args(flag) == (OWN, *PROTOCOLS)
    assert all(name == f"{p.dataset_name}-{p.window}" for name, p in PROTOCOLS.items())


def test_whether_a_text_begins_with_bos_is_the_tokenizers():
    assert starts_with_bos(make_tokenizer()) and not starts_with_bos(make_tokenizer(with_bos=False))


def test_a_model_that_needs_bos_gets_it_before_every_window(copies):
    windows = protocol_windows(make_tokenizer(), "wikitext2-2048", copies, bos=BOS)
    # "\n\n= a =\n\n\nbc", 12 characters: 4 windows of BOS and 3
    letters = ids("\n\n= a =\n\n\nbc")
    assert windows[:]["input_ids"].tolist() == [[BOS, *letters[i : i + 3]] for i in range(0, 12, 3)]
    text = evaluation_text(make_tokenizer(), "wikitext2-2048", "wikitext2", "test", windows, BOS)
    assert text.bos and text.every_bos and "a BOS before each window" in text.line
    one = evaluation_text(make_tokenizer(), "wikitext2-2048", "wikitext2", "test", windows)
    assert not one.every_bos and "one BOS at the start" in one.line
