"""A GGUF file's tokenizer: what was written, read back independently, and what llama.cpp could not read."""

import copy
import inspect
import json
import random
from contextlib import nullcontext
from functools import partial
from itertools import pairwise
from types import SimpleNamespace

import pytest
from support.exports import fields_of, saved
from support.folders import tokenizer
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from tvaprune.checkpoint.folder import load_pruned
from tvaprune.checkpoint.tokenizer import TOKENIZER_CONFIG
from tvaprune.errors import InputError
from tvaprune.export import gguf_tokenizer
from tvaprune.export.gguf_tokenizer import SPLITS, tokenizer_fields
from tvaprune.files import read_json, write_json
from tvaprune.stages.export import export

gguf = pytest.importorskip("gguf")


@pytest.fixture
def make_folder(make_model, make_masks, tmp_path):
    return partial(saved, make_model, make_masks, tmp_path / "pruned")


TEXT = [
    "keeps or drops what it carries, 1234 times; the gate's unit",
    "naïve café über alles",
    "  two  spaces\n\nlines",
]


def byte_level(split=None, **options):
    words = Tokenizer(models.BPE())
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None, **options)
    words.pre_tokenizer = last
    if split is not None:
        words.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(split), "isolated"), last])
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    words.train_from_iterator(TEXT, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>")


def sentencepiece():
    """A BPE with byte fallback and a prefix space, as Llama-2's and Mistral's fast tokenizers are."""
    words = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    words.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    words.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    specials = ["<unk>", "<s>", "</s>"]
    alphabet = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=specials + alphabet)
    words.train_from_iterator(TEXT, trainer)
    content = json.loads(words.to_str())
    made = dict.fromkeys("".join(pair) for pair in content["model"]["merges"])
    vocabulary = content["model"]["vocab"]
    splits = [(token[:i], token[i:]) for token in made for i in range(1, len(token))]  # as conversion from the original
    content["model"]["merges"] = [pair for pair in splits if all(part in vocabulary for part in pair)]
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] in specials]
    words = Tokenizer.from_str(json.dumps(content))
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize(("split", "name"), [(None, "gpt-2"), *SPLITS.items()])
def test_a_byte_level_tokenizer_is_written_whole(split, name, make_folder, tmp_path):
    words = byte_level(split)
    _, folder = make_folder(words=words, vocab_size=310)  # ten rows more than tokens
    export("gguf", folder, tmp_path / "model.gguf", "f32", verify=False)
    fields = fields_of(tmp_path / "model.gguf")
    assert (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]) == ("gpt2", name)
    tokens = fields["tokenizer.ggml.tokens"]
    assert tokens[: len(words)] == words.convert_ids_to_tokens(list(range(len(words))))
    assert len(tokens) == len(set(tokens)) == 310
    types = fields["tokenizer.ggml.token_type"]
    assert types[:3] == [3, 3, 1] and types[len(words) :] == [5] * (310 - len(words))
    assert (fields["tokenizer.ggml.bos_token_id"], fields["tokenizer.ggml.eos_token_id"]) == (0, 1)
    assert fields["tokenizer.ggml.add_bos_token"] is False
    assert apply_merges(fields["tokenizer.ggml.merges"], list("keeps")) == words.tokenize("keeps")


@pytest.mark.parametrize(("token", "adds"), [("<s>", True), (None, False)])
def test_a_token_that_a_tokenizer_does_not_have_is_none_that_it_adds(token, adds):
    single = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    content = {"post_processor": {"type": "TemplateProcessing", "single": single}}
    assert gguf_tokenizer._is_added({"bos_token": token}, content, "bos") is adds


def test_special_tokens_are_told_with_what_they_are_for(make_folder):
    words = byte_level()
    words.add_special_tokens({"pad_token": "<pad>", "unk_token": "<none>"})
    words.add_tokens(["<tool>"])  # which a user types
    words.chat_template = "{{ messages }}"
    _, folder = make_folder(words=words, vocab_size=len(words))
    config, place = load_pruned(folder).config, words.convert_tokens_to_ids
    fields = tokenizer_fields(folder, config)
    assert {name: fields[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos", "unknown", "padding")} == {
        "bos": 0, "eos": 1, "unknown": place("<none>"), "padding": place("<pad>"),
    }  # fmt: skip
    types = fields["tokenizer.ggml.token_type"]
    assert (types[place("<pad>")], types[place("<tool>")], types[0], types[2]) == (3, 4, 3, 1)
    assert fields["tokenizer.chat_template"] == "{{ messages }}"
    (folder / "chat_template.jinja").unlink()
    settings = read_json(folder / TOKENIZER_CONFIG) | {"chat_template": "{{ of_old }}"}
    del settings["pad_token"]
    write_json(settings, folder / TOKENIZER_CONFIG)
    config.pad_token_id = 7
    fields = tokenizer_fields(folder, config)
    assert fields["tokenizer.chat_template"] == "{{ of_old }}" and fields["tokenizer.ggml.padding_token_id"] == 7


def test_a_file_says_that_a_token_is_added_where_transformers_adds_it(tmp_path):
    words = byte_level()
    words.save_pretrained(tmp_path)
    settings = read_json(tmp_path / TOKENIZER_CONFIG) | {"add_bos_token": True, "add_eos_token": True}
    write_json(settings, tmp_path / TOKENIZER_CONFIG)
    content, config = read_json(tmp_path / "tokenizer.json"), SimpleNamespace(vocab_size=len(words))
    text, last = {"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "</s>", "type_id": 0}}
    ends = {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}}
    template = {"type": "TemplateProcessing", "single": [text, last], "pair": [text, text], "special_tokens": ends}
    both = {"type": "Sequence", "processors": [{"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True,
                                                "use_regex": True}, template]}  # fmt: skip
    for processor, adds in ((None, False), (template, True), (both, True)):
        write_json(content | {"post_processor": processor}, tmp_path / "tokenizer.json")
        fields, found = tokenizer_fields(tmp_path, config), AutoTokenizer.from_pretrained(tmp_path)("gate").input_ids
        assert fields["tokenizer.ggml.add_bos_token"] is (found[0] == 0) is False
        assert fields["tokenizer.ggml.add_eos_token"] is (found[-1] == 1) is adds


def apply_merges(merges, pieces):
    """Byte-pair encoding by its definition: the pair of lowest rank first."""
    ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(merges)}
    while True:
        pairs = [(ranks.get(pair, len(ranks)), place) for place, pair in enumerate(pairwise(pieces))]
        rank, place = min(pairs, default=(len(ranks), 0))
        if rank == len(ranks):
            return pieces
        pieces = [*pieces[:place], pieces[place] + pieces[place + 1], *pieces[place + 2 :]]


def join_by_score(scores, pieces):
    """SentencePiece as llama.cpp does it: the neighbours whose union scores highest first, the leftmost of equals."""
    while True:
        unions = [(-scores[a + b], place) for place, (a, b) in enumerate(pairwise(pieces)) if a + b in scores]
        if not unions:
            return pieces
        _, place = min(unions)
        pieces = [*pieces[:place], pieces[place] + pieces[place + 1], *pieces[place + 2 :]]


def test_a_sentencepiece_tokenizer_is_written_with_scores_that_merge_the_same(make_folder, tmp_path):
    words = sentencepiece()
    _, folder = make_folder(words=words, vocab_size=len(words))
    export("gguf", folder, tmp_path / "model.gguf", "f32", verify=False)
    fields = fields_of(tmp_path / "model.gguf")
    assert (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.add_space_prefix"]) == ("llama", True)
    types = fields["tokenizer.ggml.token_type"]
    assert types[:4] == [2, 3, 3, 6] and types[3:259] == [6] * 256 and set(types[259:]) == {1}
    scores = dict(zip(fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.scores"], strict=True))
    choose = random.Random(0)
    texts = [*TEXT, *("".join(choose.choices("".join(TEXT), k=30)) for _ in range(50))]
    expected = [words.tokenize(text) for text in texts]
    pieces = [list("▁" + text.replace(" ", "▁")) for text in texts]
    assert [join_by_score(scores, row) for row in pieces] == expected
    backwards = {token: -score for token, score in scores.items()}
    assert [join_by_score(backwards, row) for row in pieces] != expected  # control


def test_merges_that_are_not_sentencepiece_s_are_refused(make_folder, tmp_path):
    words = sentencepiece()
    _, folder = make_folder(words=words, vocab_size=len(words))
    content = json.loads((folder / "tokenizer.json").read_text())
    token = next("".join(pair) for pair in content["model"]["merges"] if len("".join(pair)) > 2)
    kept = [pair for pair in content["model"]["merges"] if "".join(pair) != token]
    content["model"]["merges"] = [*kept, [token[0], token[1:]]]
    content["model"]["vocab"] |= {token[1:]: 0, token[:-1]: 0}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="joins other pieces than SentencePiece does"):
        export("gguf", folder, tmp_path / "model.gguf", "f32", verify=False)


def test_tokens_beyond_the_embedding_are_refused(make_folder):
    words = byte_level()
    _, folder = make_folder(words=words, vocab_size=len(words))
    config = load_pruned(folder).config
    assert len(tokenizer_fields(folder, config)["tokenizer.ggml.tokens"]) == len(words)  # control: as many as rows
    words.add_tokens(["one more"])
    words.save_pretrained(folder)
    with pytest.raises(InputError, match=f"'one more' in tokenizer.json is token {config.vocab_size}, the model has"):
        tokenizer_fields(folder, config)


def test_a_tokenizer_that_llama_cpp_cannot_name_is_refused(make_folder, tmp_path):
    _, folder = make_folder(words=byte_level(r"\p{N}+|\p{L}+"), vocab_size=300)
    with pytest.raises(InputError, match="llama.cpp has no name for this tokenizer's way to split text"):
        export("gguf", folder, tmp_path / "model.gguf", "f32", verify=False)
    assert [path.name for path in tmp_path.iterdir()] == ["pruned"]
    tokenizer().save_pretrained(folder)
    with pytest.raises(InputError, match="a tokenizer of type WordLevel is not supported"):
        tokenizer_fields(folder, load_pruned(folder).config)


def test_the_patterns_that_have_a_name_are_those_of_the_models():
    llama3 = inspect.signature(TikTokenConverter).parameters["pattern"].default
    assert SPLITS == {llama3: "llama-bpe", PRETOKENIZE_REGEX: "qwen2"}


@pytest.mark.parametrize(
    ("first", "option", "plain", "name"),
    [
        ({"type": "Digits", "individual_digits": True}, "individual_digits", True, "smollm"),
        (
            {"type": "Split", "pattern": {"Regex": PRETOKENIZE_REGEX}, "behavior": "Isolated"},
            "behavior",
            False,
            "qwen2",
        ),
    ],
)
def test_what_splits_otherwise_than_its_kind_has_no_name(first, option, plain, name):
    steps = [first, {"type": "ByteLevel", "use_regex": plain, "add_prefix_space": False}]
    assert gguf_tokenizer._split_name({"type": "Sequence", "pretokenizers": steps}) == name
    with pytest.raises(InputError, match="llama.cpp has no name for this tokenizer's way to split text"):
        gguf_tokenizer._split_name({"type": "Sequence", "pretokenizers": [first | {option: None}, steps[1]]})


@pytest.mark.parametrize(("scheme", "prefix"), [("first", True), ("always", True), ("never", False)])
def test_a_space_before_the_text_may_be_of_the_split(scheme, prefix):
    content = {"normalizer": None, "pre_tokenizer": {"type": "Metaspace", "prepend_scheme": scheme}}
    assert gguf_tokenizer._sentencepiece(content)["tokenizer.ggml.add_space_prefix"] is prefix


def test_what_changes_a_text_before_it_is_split_is_refused(make_folder):
    _, folder = make_folder(words=byte_level(), vocab_size=340)
    content, config = json.loads((folder / "tokenizer.json").read_text()), load_pruned(folder).config
    for step, taken in (("NFC", True), ("Lowercase", False)):
        for normalizer in ({"type": step}, {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": step}]}):
            (folder / "tokenizer.json").write_text(json.dumps(content | {"normalizer": normalizer}))
            with nullcontext() if taken else pytest.raises(InputError, match="changes a text by 'Lowercase' before it"):
                tokenizer_fields(folder, config)
    sentencepiece().save_pretrained(folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    tokenizer_fields(folder, config)  # control
    content["normalizer"]["normalizers"][1]["content"] = "_"
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="changes a text by 'Replace' before it"):
        tokenizer_fields(folder, config)


def test_a_split_that_is_followed_by_another_has_no_name(make_folder):
    _, folder = make_folder(words=byte_level(next(iter(SPLITS))), vocab_size=310)
    content, config = json.loads((folder / "tokenizer.json").read_text()), load_pruned(folder).config
    tokenizer_fields(folder, config)  # control
    for option in ("use_regex", "add_prefix_space"):
        other = copy.deepcopy(content)
        other["pre_tokenizer"]["pretokenizers"][-1][option] = True
        (folder / "tokenizer.json").write_text(json.dumps(other))
        with pytest.raises(InputError, match="llama.cpp has no name for this tokenizer's way to split text"):
            tokenizer_fields(folder, config)


def test_a_tokenizer_in_other_files_is_refused_and_none_is_told(make_folder, capsys):
    _, folder = make_folder(words=byte_level(), vocab_size=310)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(InputError, match="is not in a tokenizer.json"):
        tokenizer_fields(folder, None)
    (folder / "tokenizer_config.json").unlink()
    assert tokenizer_fields(folder, None) == {"tokenizer.ggml.model": "no_vocab"}
    assert "has no tokenizer: the GGUF file will take tokens, and no text" in capsys.readouterr().out
