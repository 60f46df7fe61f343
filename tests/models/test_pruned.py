"""The config and class of a model at given widths."""

from dataclasses import replace

import pytest
from transformers import LlamaConfig, MixtralConfig

from tvaprune.models.pruned import config_of_widths, empty_model, with_kernel
from tvaprune.models.shape import shape_of

SIZES = {"hidden_size": 12, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 9}


@pytest.mark.parametrize(
    ("biases", "model_type"),
    [({}, "mistral"), ({"attention_bias": True}, "pruned_llama"), ({"mlp_bias": True}, "pruned_llama")],
)
def test_a_llama_of_an_odd_width_is_a_mistral_where_it_has_no_biases(biases, model_type):
    config = LlamaConfig(**SIZES, **biases)
    assert config_of_widths(config, replace(shape_of(config), hidden_size=11)).model_type == model_type


@pytest.mark.parametrize("trains", [False, True])
def test_a_model_without_weights_generates_and_trains_as_the_one_that_it_is_like(trains, make_model):
    like = make_model().train(trains)
    like.generation_config.max_length = 77
    empty = empty_model(like.config, like)
    assert (empty.generation_config.max_length, empty.training) == (77, trains)


@pytest.mark.parametrize(("hidden", "channels", "kernel"), [(16, 8, None), (12, 8, "eager"), (16, 12, "eager")])
def test_experts_whose_rows_are_of_no_whole_16_bytes_have_no_kernel(hidden, channels, kernel):
    sizes = SIZES | {"hidden_size": hidden, "intermediate_size": channels, "num_key_value_heads": 2}
    assert getattr(with_kernel(MixtralConfig(**sizes)), "experts_implementation", None) == kernel
