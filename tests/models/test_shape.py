"""Sizes that a config tells, and those that do not fit one another."""

import pytest
from support import tiny
from transformers import LlamaConfig, Qwen3MoeConfig

from tvaprune.models.shape import shape_of

SIZES = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 9}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 4, "moe_intermediate_size": 8}  # all of them is no mistake


def test_every_second_layer_is_one_of_experts():
    assert shape_of(Qwen3MoeConfig(**SIZES, **EXPERTS, decoder_sparse_step=2)).experts == (0, 4, 0, 4)
    assert shape_of(Qwen3MoeConfig(**SIZES, **EXPERTS, mlp_only_layers=[0])).experts == (0, 4, 4, 4)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"num_key_value_heads": 3}, "num_attention_heads is 4, no multiple of num_key_value_heads, 3; mend it"),
        ({"per_layer_config": {1: {"num_key_value_heads": 4}}}, r"have \[1, 2\] query heads per KV head, one number"),
    ],
)
def test_heads_that_do_not_fit_are_refused(values, words):
    with tiny.refused(words):
        shape_of(LlamaConfig(**SIZES | values))
