"""What llama.cpp's architectures leave out, by the config alone."""

import pytest
from support import tiny
from support.folders import LLAMA3_ROPE
from transformers import AutoConfig

from tvaprune.models.formats import gguf_architecture

SIZES = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 4, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 9, "tie_word_embeddings": True,
         "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
UNTIED, WIDER = {"tie_word_embeddings": False}, {"head_dim": 12}
NO_WINDOW = {"sliding_window": None, "layer_types": ["full_attention"] * 4}


@pytest.mark.parametrize(
    ("model_type", "values", "lacking", "words"),
    [
        ("gemma2", {}, UNTIED, "has no head but the embedding"),
        ("cohere2", {}, UNTIED, "has no head but the embedding"),
        ("cohere2", {}, WIDER, "here 48 and 32"),
        ("olmo3", {}, {"num_attention_heads": 8}, "here 64 and 32"),
        ("exaone4", NO_WINDOW | {"rope_parameters": LLAMA3_ROPE}, WIDER, "here 48 and 32"),
    ],
)
def test_what_a_graph_leaves_out_is_known_of_each(model_type, values, lacking, words):
    gguf_architecture(AutoConfig.for_model(model_type, **SIZES | values))  # control
    with tiny.refused(words):
        gguf_architecture(AutoConfig.for_model(model_type, **SIZES | values | lacking))
