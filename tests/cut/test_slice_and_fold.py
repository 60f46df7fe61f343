import copy
import weakref
from dataclasses import replace

import pytest
import torch
from support.meter import MemoryMeter
from transformers import DynamicCache

from tvaprune.cut.fold import fold
from tvaprune.cut.slice import apply_plan, lent
from tvaprune.identity import weights_digest
from tvaprune.models.parameters import decoder_sparsity, model_parameters
from tvaprune.models.shape import shape_of
from tvaprune.models.units import head_features


def halved(plan, layers=None):
    """Keeps every second unit; ``layers``: KV heads of each layer, from the end."""
    kept = plan.kept.map(lambda v: v[1::2])
    if layers is not None:
        kept = replace(kept, attn=tuple(v[len(v) - n :] for v, n in zip(plan.kept.attn, layers, strict=True)))
    return replace(plan, kept=kept, scale=kept.map(lambda v: torch.linspace(0.5, 1.5, len(v))))


@pytest.mark.parametrize("values", [{}, {"tie_word_embeddings": True}], ids=["untied", "tied"])
def test_slicing_and_folding_hold_at_most_one_weight_beyond_the_dense_model(values, make_model, full_plan):
    def peak_beyond_dense(keep_references):
        model = make_model(num_hidden_layers=4, hidden_size=64, intermediate_size=96, vocab_size=80, **values)
        held = list(model.parameters()) if keep_references else []
        sizes = [p.nbytes for p in model.parameters()]
        plan = halved(full_plan(model))
        with MemoryMeter(model) as meter:
            narrow = fold(apply_plan(model, plan), plan)
        assert sum(p.nbytes for p in narrow.parameters()) < 0.6 * sum(sizes)
        return (meter.peak - sum(sizes)) / max(sizes), len(held)

    beyond, _ = peak_beyond_dense(keep_references=False)
    assert 0 < beyond <= 1
    assert peak_beyond_dense(keep_references=True)[0] > 2  # control: a second model would be seen


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("values", [{}, {"tie_word_embeddings": True}], ids=["untied", "tied"])
def test_a_model_is_lent_to_the_knife_without_a_copy(values, whole, make_model, full_plan):
    model = make_model(num_hidden_layers=4, hidden_size=64, intermediate_size=96, vocab_size=80, **values)
    plan = full_plan(model) if whole else halved(full_plan(model))
    before, size = weights_digest(model), sum(p.nbytes for p in model.parameters())
    with MemoryMeter(model) as meter:
        narrow = fold(apply_plan(lent(model), plan), plan)
    kept = sum(p.nbytes for p in narrow.parameters())
    assert meter.peak - size <= kept + 2 * max(p.nbytes for p in model.parameters())  # one at a time, and the indices
    with torch.no_grad():
        for parameter in narrow.parameters():
            parameter.fill_(float("nan"))
    assert weights_digest(model) == before  # nothing is shared
    apply_plan(model, plan)  # control: not lent, it is used up
    assert not list(model.parameters())


def test_weights_go_to_another_device_one_by_one(make_model, full_plan):
    model = make_model(num_hidden_layers=4, hidden_size=64, intermediate_size=96, vocab_size=80)
    plan, size = halved(full_plan(model)), sum(p.nbytes for p in model.parameters())
    with MemoryMeter(model) as meter:
        narrow = apply_plan(lent(model), plan, torch.device("meta"))
    assert {tensor.device.type for tensor in (*narrow.parameters(), *narrow.buffers())} == {"meta"}
    assert meter.peak - size < 0.1 * size and model.device.type == "cpu"


def test_dense_parameters_are_released(make_model, full_plan):
    model = make_model()
    dense = [weakref.ref(p) for p in model.parameters()]
    apply_plan(model, halved(full_plan(model)))
    assert not any(ref() is not None for ref in dense)


def test_config_follows_where_all_layers_agree(make_model, full_plan):
    model = make_model()  # hidden 36, 2 KV heads, groups of 2, head_dim 6, 52 channels
    config = apply_plan(model, halved(full_plan(model))).config
    assert (config.hidden_size, config.intermediate_size) == (18, 26)
    assert (config.num_key_value_heads, config.num_attention_heads, config.head_dim) == (1, 2, 6)


def test_config_tells_what_layers_disagree_on_and_every_module_knows_its_own_size(make_model, full_plan):
    model = make_model()
    plan = halved(full_plan(model), layers=(2, 0, 1))
    plan = replace(
        plan,
        kept=replace(plan.kept, inter=tuple(v[: 20 + i] for i, v in enumerate(plan.kept.inter))),
        scale=replace(plan.scale, inter=tuple(v[: 20 + i] for i, v in enumerate(plan.scale.inter))),
    )
    model = apply_plan(model, plan)
    shape = shape_of(model.config)
    assert (shape.hidden_size, shape.group_size, shape.head_dim) == (18, 2, 6)
    assert shape.num_key_value_heads == (2, 1, 1)  # a stand-in of zeros where layer 1 lost all
    assert shape.intermediate_size == (20, 21, 22)
    assert [layer.mlp.intermediate_size for layer in model.model.layers] == [20, 21, 22]
    assert model.model.embed_tokens.embedding_dim == model.lm_head.in_features == 18
    for linear in (module for module in model.modules() if isinstance(module, torch.nn.Linear)):
        assert (linear.out_features, linear.in_features) == tuple(linear.weight.shape)


@pytest.mark.parametrize("num_heads", [0, 1], ids=["no layer has attention", "one KV head"])
def test_config_never_says_zero_heads(num_heads, make_model, full_plan):
    model = make_model()
    model = apply_plan(model, halved(full_plan(model), layers=(num_heads,) * 3))
    assert (model.config.num_key_value_heads, model.config.num_attention_heads) == (1, 2)


def test_weights_are_those_of_the_kept_units_in_order(make_model, full_plan):
    dense = make_model(attention_bias=True)
    plan = halved(full_plan(dense))  # KV head 1 of 2: query heads 2 and 3 of 4, features 12 ... 23 of 24
    narrow = apply_plan(copy.deepcopy(dense), plan)
    hidden, inter = plan.kept.hidden, plan.kept.inter[0]
    old, new = dense.model.layers[0], narrow.model.layers[0]
    assert torch.equal(new.self_attn.q_proj.weight, old.self_attn.q_proj.weight[12:24][:, hidden])
    assert torch.equal(new.self_attn.q_proj.bias, old.self_attn.q_proj.bias[12:24])
    assert torch.equal(new.self_attn.k_proj.weight, old.self_attn.k_proj.weight[6:12][:, hidden])
    assert torch.equal(new.self_attn.v_proj.bias, old.self_attn.v_proj.bias[6:12])
    assert torch.equal(new.self_attn.o_proj.weight, old.self_attn.o_proj.weight[hidden][:, 12:24])
    assert torch.equal(new.self_attn.o_proj.bias, old.self_attn.o_proj.bias[hidden])
    assert torch.equal(new.mlp.down_proj.weight, old.mlp.down_proj.weight[hidden][:, inter])
    assert torch.equal(new.input_layernorm.weight, old.input_layernorm.weight[hidden])
    assert torch.equal(narrow.lm_head.weight, dense.lm_head.weight[:, hidden])


def test_folding_multiplies_each_factor_in_once(make_model, full_plan):
    dense = make_model()
    plan = halved(full_plan(dense))
    narrow = apply_plan(copy.deepcopy(dense), plan)
    folded = fold(copy.deepcopy(narrow), plan)
    hidden, attn, inter = plan.scale.hidden, plan.scale.attn[0], plan.scale.inter[0]
    old, new = narrow.model.layers[0], folded.model.layers[0]
    torch.testing.assert_close(folded.model.embed_tokens.weight, narrow.model.embed_tokens.weight * hidden)
    expected = old.self_attn.o_proj.weight * hidden[:, None] * attn.repeat_interleave(12)
    torch.testing.assert_close(new.self_attn.o_proj.weight, expected)
    torch.testing.assert_close(new.mlp.down_proj.weight, old.mlp.down_proj.weight * hidden[:, None] * inter)
    touched = ("embed_tokens.weight", "o_proj.weight", "down_proj.weight")
    rest = [name for name, _ in narrow.named_parameters() if not name.endswith(touched)]
    assert all(torch.equal(folded.get_parameter(name), narrow.get_parameter(name)) for name in rest)


@pytest.mark.parametrize("bias", [False, True])
def test_a_stand_in_returns_zeros_or_the_bias_scaled(bias, make_model, full_plan):
    dense = make_model(attention_bias=bias)
    plan = halved(full_plan(dense), layers=(0, 1, 1))
    narrow = fold(apply_plan(copy.deepcopy(dense), plan), plan)
    hidden = torch.randn(2, 3, 18)
    places = narrow.model.rotary_emb(hidden, torch.arange(3).unsqueeze(0))
    output, _ = narrow.model.layers[0].self_attn(hidden, position_embeddings=places, attention_mask=None)
    expected = torch.zeros(18)
    if bias:
        expected = dense.model.layers[0].self_attn.o_proj.bias[plan.kept.hidden] * plan.scale.hidden
    torch.testing.assert_close(output, expected.expand(2, 3, 18))
    assert output.abs().max() > 0.01 or not bias
    shape = shape_of(dense.config)
    stored = replace(shape, hidden_size=18, num_key_value_heads=(1, 1, 1), intermediate_size=(26,) * 3)
    assert plan.num_parameters == model_parameters(stored)  # the stand-in is told
    assert plan.sparsity == decoder_sparsity(18, [0, 1, 1], [26] * 3, shape)  # but what is lost counts as gone


def test_a_stand_in_tells_the_cache_how_many_tokens_passed(make_model, full_plan, input_ids):
    model = make_model()
    plan = halved(full_plan(model), layers=(0, 1, 0))
    model = apply_plan(model, plan)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=input_ids, past_key_values=cache)
        assert [cache.get_seq_length(i) for i in range(3)] == [11, 11, 11]
        model(input_ids=input_ids[:, :1], past_key_values=cache)
    assert [cache.get_seq_length(i) for i in range(3)] == [12, 12, 12]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_slicing_and_folding_keep_the_dtype(dtype, make_model, full_plan):
    model = make_model(tie_word_embeddings=True).to(dtype)
    plan = halved(full_plan(model))
    narrow = fold(apply_plan(model, plan), plan)
    assert {p.dtype for p in narrow.parameters()} == {dtype} == {narrow.dtype}


@pytest.mark.parametrize("requires_grad", [False, True])
def test_slicing_keeps_what_requires_gradients(requires_grad, make_model, full_plan):
    model = make_model().requires_grad_(requires_grad)
    narrow = apply_plan(model, halved(full_plan(model)))
    assert {p.requires_grad for p in narrow.parameters()} == {requires_grad}


def test_a_sliced_model_trains(make_model, full_plan, input_ids):
    model = make_model()
    plan = halved(full_plan(model), layers=(0, 2, 1))
    model = fold(apply_plan(model, plan), plan)
    model(input_ids=input_ids, labels=input_ids).loss.backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None]


def test_head_features():
    assert head_features(torch.tensor([0, 2]), 3).tolist() == [0, 1, 2, 6, 7, 8]
    assert head_features(torch.tensor([], dtype=torch.int64), 3).tolist() == []
