from dataclasses import replace

import pytest
import torch

from tvaprune.models.parameters import decoder_sparsity, layer_parameters, model_parameters
from tvaprune.models.shape import ModelShape, shape_of

SHAPE = ModelShape.uniform(
    hidden_size=10,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
    intermediate_size=20,
    vocab_size=7,
)


def test_one_layer_by_hand():
    # q and o: 2 * 10 * 16 = 320; k and v: 2 * 10 * 8 = 160; MLP: 3 * 10 * 20 = 600; norms: 20
    assert layer_parameters(10, 2, 20, SHAPE) == 1100
    # 5 hidden dims, 1 KV head, 8 channels: q and o 2 * 5 * 8; k and v 2 * 5 * 4; MLP 3 * 5 * 8; norms 10
    assert layer_parameters(5, 1, 8, SHAPE) == 80 + 40 + 120 + 10


def test_sparsity_by_hand():
    # kept: 250 in the first layer, without attention 120 + 10 in the second; of 2200
    assert decoder_sparsity(5, [1, 0], [8, 8], SHAPE) == pytest.approx(1 - 380 / 2200)


def test_nothing_gone_and_everything_gone():
    assert decoder_sparsity(10, [2, 2], [20, 20], SHAPE) == 0
    assert decoder_sparsity(0, [0, 0], [0, 0], SHAPE) == 1


def test_total_by_hand():
    narrow = replace(SHAPE, hidden_size=5, num_key_value_heads=(1, 0), intermediate_size=(8, 8))
    # embedding and lm_head 2 * 7 * 5, final norm 5, layers 380
    assert model_parameters(narrow) == 70 + 5 + 380
    assert model_parameters(replace(narrow, tie_word_embeddings=True)) == 35 + 5 + 380
    # biases: q 8, k 4, v 4, o 5 in the first layer, o 5 in the second; gate, up 8, down 5 in both
    biased = replace(narrow, qkv_bias=True, output_bias=True, mlp_bias=True)
    assert model_parameters(biased) == 455 + 16 + 5 + 5 + 2 * 21
    # q_norm and k_norm, 4 each, where there is attention
    assert model_parameters(replace(narrow, head_norm=True)) == 455 + 8


@pytest.mark.parametrize("seed", range(5))
def test_ints_and_tensors_agree(seed):
    generator = torch.Generator().manual_seed(seed)
    hidden, *rest = torch.randint(0, 21, (5,), generator=generator).tolist()
    kv_heads, channels = rest[:2], rest[2:]
    as_tensors = [torch.tensor(float(v)) for v in (hidden, *rest)]
    exact = decoder_sparsity(hidden, kv_heads, channels, SHAPE)
    expected = decoder_sparsity(as_tensors[0], as_tensors[1:3], as_tensors[3:], SHAPE)
    assert isinstance(expected, torch.Tensor)
    assert expected.item() == pytest.approx(exact, abs=1e-6)


def test_layers_of_unequal_number_are_refused():
    with pytest.raises(ValueError, match="zip"):
        decoder_sparsity(5, [1, 0], [8], SHAPE)


@pytest.mark.parametrize(
    ("model_type", "values"),
    [
        ("llama", {}),
        ("llama", {"num_key_value_heads": 4}),
        ("mistral", {"num_attention_heads": 6}),
    ],
)
def test_layers_of_models_without_biases_and_head_norms(model_type, values, make_model):
    model = make_model(model_type, **values)
    shape = shape_of(model.config)
    counted = layer_parameters(shape.hidden_size, shape.num_key_value_heads[0], shape.intermediate_size[0], shape)
    assert [sum(p.numel() for p in layer.parameters()) for layer in model.model.layers] == [counted] * 3


@pytest.mark.parametrize(
    ("model_type", "values", "not_counted"),
    [
        ("qwen2", {}, 24 + 2 * 12),  # q, k, v biases: (4 + 2 + 2) heads * 6
        ("qwen3", {}, 2 * 6),  # q_norm, k_norm
        ("llama", {"attention_bias": True, "mlp_bias": True}, 48 + 36 + 2 * 52 + 36),
    ],
)
def test_sparsity_leaves_biases_and_head_norms_out_and_the_total_counts_them(
    model_type, values, not_counted, make_model
):
    model = make_model(model_type, **values)
    shape = shape_of(model.config)
    widths = shape.hidden_size, shape.num_key_value_heads[0], shape.intermediate_size[0]
    in_layer = sum(p.numel() for p in model.model.layers[0].parameters())
    assert in_layer - layer_parameters(*widths, shape) == not_counted
    assert model_parameters(shape) == sum(p.numel() for p in model.parameters())
