"""What a tokenizer has behind a model's embedding: what of it may go, and what stays."""

import pytest
from support.folders import tokenizer
from transformers import ByT5Tokenizer

from tvaprune.models.vocabulary import strays, without_strays

BEHIND = "<image>"


def test_what_stands_for_no_text_goes_alone():
    given = tokenizer()
    given.add_special_tokens({"additional_special_tokens": ["w3", BEHIND]})
    given.padding_side = "left"
    assert strays(given, 47) == [BEHIND] and strays(given, 48) == []
    left = without_strays(given, 47)
    assert left.all_special_tokens == [token for token in given.all_special_tokens if token != BEHIND]
    assert "w3" in left.all_special_tokens and (len(left), left.padding_side) == (47, "left")


@pytest.mark.parametrize("role", ["bos_token", "eos_token", "unk_token", "pad_token"])
def test_what_comes_up_in_any_text_is_no_stray(role):
    given = tokenizer()
    given.add_special_tokens({role: BEHIND})
    assert strays(given, 47) == []


def test_words_and_what_no_library_can_take_out_are_none():
    assert strays(tokenizer(), 46) == []
    assert strays(ByT5Tokenizer(), 300) == []  # is slow: its places for gaps are 259 and more
