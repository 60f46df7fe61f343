"""One row per family: the equalities between the stock, the gated, the masked and the sliced model."""

import copy
from dataclasses import replace

import pytest
import torch
from support.families import CLOSE, CUTS, MORE_ROWS, ROWS, generate, logits, make_plan, sliced
from support.other_families import OTHER_ROWS
from transformers import AutoModelForCausalLM

from tvaprune.choose.gated_model import GatedModel
from tvaprune.cut.slice import apply_plan
from tvaprune.models.families import FAMILIES, family_of
from tvaprune.models.shape import shape_of
from tvaprune.models.units import PerUnit
from tvaprune.plan.keep_plan import plan_from_masks

pytestmark = pytest.mark.usefixtures("other_families")


@pytest.fixture(params=(ROWS | MORE_ROWS | OTHER_ROWS).values(), ids=ROWS | MORE_ROWS | OTHER_ROWS)
def model(request, make_model):
    model_type, values = request.param
    return make_model(model_type, **values)


@pytest.fixture(params=CUTS.values(), ids=CUTS)
def plan(request, model, make_masks):
    dim_multiple, empty_layer, min_heads = request.param
    return make_plan(model, make_masks, dim_multiple, empty_layer, min_heads)


def num_hooks(model):
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


def test_every_family_has_a_row():
    assert {model_type for model_type, _ in (ROWS | MORE_ROWS | OTHER_ROWS).values()} == set(FAMILIES)


def test_gates_at_identity_give_the_stock_logits(model, input_ids):
    stock = logits(model, input_ids)
    gated = GatedModel(model)
    with gated.using(PerUnit.full(gated.shape, 1.0)):
        torch.testing.assert_close(logits(gated, input_ids), stock, **CLOSE)
    uneven = PerUnit.full(gated.shape, 1.0).map(lambda v: torch.linspace(0.5, 1.5, len(v)))  # norms divide a factor out
    with gated.using(uneven):
        assert not torch.allclose(logits(gated, input_ids), stock, atol=0.05)


def test_gates_switched_off_give_the_stock_logits_bitwise(model, input_ids):
    stock = logits(model, input_ids)
    gated = GatedModel(model)
    with gated.off():
        assert torch.equal(logits(gated, input_ids), stock)
    assert not torch.equal(logits(gated, input_ids), stock)  # sampled again


def test_masked_and_sliced_models_agree(model, plan, input_ids):
    gated = GatedModel(copy.deepcopy(model))
    with gated.applying(plan):
        masked = logits(gated, input_ids)
    torch.testing.assert_close(logits(sliced(model, plan), input_ids), masked, **CLOSE)
    assert (masked - logits(model, input_ids)).abs().mean() > 0.1  # the cut is felt
    assert (masked - logits(apply_plan(copy.deepcopy(model), plan), input_ids)).abs().max() > 0.01  # so is the fold


def test_norms_may_go_on_dividing_by_the_dense_width(model, make_masks, input_ids):
    """The cut writes the quotient of the widths into their gains: whatever the epsilon, and where they centre."""
    kept_width = make_plan(model, make_masks)
    plan = replace(kept_width, keeps_norm_width=True)
    gated = GatedModel(copy.deepcopy(model))
    with gated.applying(plan):
        masked = logits(gated, input_ids)
    torch.testing.assert_close(logits(sliced(model, plan), input_ids), masked, **CLOSE)
    with gated.applying(kept_width):  # control
        assert (logits(gated, input_ids) - masked).abs().max() > 0.01


def test_gates_that_keep_the_norm_width_pass_it_on(model, input_ids):
    """Drawn with next to no noise they compute what the cut does that their masks ask for."""
    gated = GatedModel(copy.deepcopy(model), -30.0, keeps_norm_width=True)
    with torch.no_grad():
        gated.mu[:8], gated.log_variance[:8] = 0.0, -10.0  # hidden dims of which the noise alone is left
    plan = plan_from_masks(gated.masks(), gated.shape)
    assert plan.hidden_size == gated.shape.hidden_size - 8 and plan.keeps_norm_width
    narrow = logits(sliced(model, plan), input_ids)
    apart = (logits(gated, input_ids) - narrow).abs().mean()
    gated.keeps_norm_width = False  # control
    assert apart < 0.5 * (logits(gated, input_ids) - narrow).abs().mean()


def test_a_kept_unit_may_have_a_mean_of_exactly_zero(model, make_masks, input_ids):
    """It still counts among the dims that a norm averages over, and a tied head reads no infinity."""
    plan = make_plan(model, make_masks)
    scale = plan.scale.map(lambda means: means.index_fill(0, torch.arange(min(2, len(means))), 0.0))
    plan = replace(plan, scale=scale)
    gated = GatedModel(copy.deepcopy(model))
    with gated.applying(plan):
        masked = logits(gated, input_ids)
    narrow = logits(sliced(model, plan), input_ids)
    assert narrow.isfinite().all()
    torch.testing.assert_close(narrow, masked, **CLOSE)
    with gated.using(plan.full_scale()):  # control: taken for dims that went
        assert (logits(gated, input_ids) - narrow).abs().max() > 0.01


def test_gates_that_would_keep_no_hidden_dim_give_finite_logits(model, input_ids):
    gated = GatedModel(model)
    gated.log_variance.data.fill_(3.0)  # log_alpha above 0 everywhere
    assert (gated.masks().log_alpha.hidden > 0).all()
    assert logits(gated, input_ids).isfinite().all()
    gated._kept_hidden = lambda: gated.masks().log_alpha.hidden < 0  # control: an average over nothing
    assert logits(gated, input_ids).isnan().any()


def test_sizes_of_the_sliced_model_are_those_of_the_plan(model, plan, request):
    num_dense, narrow = sum(p.numel() for p in model.parameters()), sliced(model, plan)
    assert sum(p.numel() for p in narrow.parameters()) == plan.num_parameters < num_dense
    assert shape_of(narrow.config).num_key_value_heads == tuple(len(heads) for heads in plan.padded.attn)
    lost = [
        dense > 0 and kept == 0
        for dense, kept in zip(plan.shape.num_key_value_heads, plan.num_key_value_heads, strict=True)
    ]
    assert any(lost) == ("no attention" in request.node.callspec.id)


def test_slicing_by_a_plan_that_keeps_all_changes_nothing(model, full_plan, input_ids):
    stock, shape = logits(model, input_ids), shape_of(model.config)
    narrow = sliced(model, full_plan(model))
    if family_of(model.config).norm_offset:  # (1 + w) - 1 is not always w
        torch.testing.assert_close(logits(narrow, input_ids), stock, **CLOSE)
    else:
        assert torch.equal(logits(narrow, input_ids), stock)
    assert shape_of(narrow.config) == shape


def test_detaching_leaves_the_stock_model_untouched(model, input_ids):
    stock, before = logits(model, input_ids), copy.deepcopy(model.state_dict())
    gated = GatedModel(model)
    assert num_hooks(model) > 0
    logits(gated, input_ids)
    assert any("forward" in vars(module) for module in model.modules())  # the norms'
    assert gated.detach_gates() is model
    assert num_hooks(model) == 0
    assert not any("forward" in vars(module) for module in model.modules())
    assert torch.equal(logits(model, input_ids), stock)
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_state_dict_of_a_gated_model_holds_the_gates_alone(model):
    gated = GatedModel(model)
    assert {name.split(".")[0] for name in gated.state_dict()} == {"mu", "log_variance"}
    assert [name for name, p in gated.named_parameters() if p.requires_grad] == list(gated.state_dict())


def test_gates_are_drawn_for_each_token(make_model):
    gated = GatedModel(make_model(), initial_log_variance=0.0)
    same_tokens = torch.full((2, 5), 7)
    with torch.no_grad():
        outputs = gated(input_ids=same_tokens, output_hidden_states=True).hidden_states[0].flatten(0, 1)
    assert len(outputs.unique(dim=0)) == 10
    with gated.off(), torch.no_grad():
        outputs = gated(input_ids=same_tokens, output_hidden_states=True).hidden_states[0].flatten(0, 1)
    assert len(outputs.unique(dim=0)) == 1


def test_gates_are_drawn_for_each_window_where_asked(make_model):
    gated = GatedModel(make_model(), initial_log_variance=0.0, noise="sequence")
    with torch.no_grad():
        outputs = gated(input_ids=torch.full((2, 5), 7), output_hidden_states=True).hidden_states[0]
    assert [len(window.unique(dim=0)) for window in outputs] == [1, 1]
    assert not torch.equal(outputs[0], outputs[1])


def test_every_gate_gets_a_gradient(model, input_ids):
    gated = GatedModel(model)
    gated(input_ids=input_ids, labels=input_ids).loss.backward()
    assert all(gate.grad.isfinite().all() for gate in (gated.mu, gated.log_variance))
    dead = 0.2 if getattr(model.config, "hidden_act", None) == "relu2" else 0.0  # channels that no token wakes
    assert all((gate.grad == 0).float().mean() <= dead for gate in (gated.mu, gated.log_variance))
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("row", [row for row, (_, values) in ROWS.items() if "MHA" not in row])
def test_a_gate_belongs_to_the_query_heads_that_share_its_kv_head(row, make_model, full_plan, input_ids):
    """Trap 1: gate j on heads j, j + n_kv, j + 2 n_kv ... learns one grouping, the slicing cuts another."""
    model = make_model(ROWS[row][0], **ROWS[row][1])
    plan = full_plan(model)
    shape = plan.shape
    attn = tuple(torch.linspace(0.5, 1.5, heads) for heads in shape.num_key_value_heads)
    kept = tuple(torch.arange(1, len(heads)) for heads in attn)  # KV head 0 goes everywhere
    plan = replace(
        plan,
        kept=replace(plan.kept, attn=kept),
        scale=replace(plan.scale, attn=tuple(a[k] for a, k in zip(attn, kept, strict=True))),
    )
    narrow = logits(sliced(model, plan), input_ids)

    def masked(over_heads):
        hooked = copy.deepcopy(model)
        for layer, scale in zip(hooked.model.layers, plan.full_scale().attn, strict=True):
            factors = over_heads(scale).repeat_interleave(shape.head_dim)
            layer.self_attn.o_proj.register_forward_pre_hook(lambda module, args, factors=factors: (args[0] * factors,))
        return logits(hooked, input_ids)

    torch.testing.assert_close(masked(lambda gate: gate.repeat_interleave(shape.group_size)), narrow, **CLOSE)
    assert (masked(lambda gate: gate.repeat(shape.group_size)) - narrow).abs().mean() > 0.02


@pytest.mark.parametrize("row", [row for row, (_, values) in ROWS.items() if values.get("tie_word_embeddings")])
def test_folding_keeps_tied_embeddings_tied(row, make_model, make_masks, input_ids):
    model = make_model(ROWS[row][0], **ROWS[row][1])
    plan = make_plan(model, make_masks)
    narrow = sliced(model, plan)
    assert narrow.lm_head.weight is narrow.model.embed_tokens.weight
    folded = logits(narrow, input_ids)
    narrow.model.norm.weight.data *= plan.scale.hidden  # control: the factor reaches the lm_head
    assert (logits(narrow, input_ids) - folded).abs().mean() > 0.02


def test_a_uniformly_sliced_model_is_saved_and_loaded_by_transformers_alone(model, full_plan, input_ids, tmp_path):
    plan = full_plan(model)
    if len(set(plan.shape.num_key_value_heads)) > 1:
        pytest.skip("a layer has no attention: never uniform")
    generator = torch.Generator().manual_seed(2)
    kv_heads = max(1, plan.shape.num_key_value_heads[0] - 1)
    num_heads = kv_heads * plan.shape.group_size
    hidden_size = plan.shape.hidden_size * 3 // 4 // num_heads * num_heads  # Llama's config wants a multiple

    def narrow_to(width):
        return lambda v: torch.randperm(len(v), generator=generator)[:width].sort().values

    kept = PerUnit(
        hidden=narrow_to(hidden_size)(plan.kept.hidden),
        attn=tuple(map(narrow_to(kv_heads), plan.kept.attn)),
        inter=tuple(map(narrow_to(33), plan.kept.inter)),
    )
    scale = kept.map(lambda v: 1 + 0.3 * torch.rand(len(v), generator=generator))
    narrow = sliced(model, replace(plan, kept=kept, scale=scale))
    narrow.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(loaded, input_ids), logits(narrow, input_ids))
    assert loaded.config.hidden_size == len(kept.hidden) < model.config.hidden_size
    assert shape_of(loaded.config).group_size == plan.shape.group_size


@pytest.mark.parametrize("empty_layer", [None, 0, 2])
def test_generation_with_a_cache_equals_generation_without(model, make_masks, empty_layer, input_ids):
    narrow = sliced(model, make_plan(model, make_masks, empty_layer=empty_layer))
    mask = torch.ones_like(input_ids)
    mask[0, :8] = 0  # left padding
    tokens, scores = generate(narrow, input_ids, mask, use_cache=True)
    assert tokens.shape == (2, 7)
    recomputed_tokens, recomputed_scores = generate(narrow, input_ids, mask, use_cache=False)
    assert torch.equal(tokens, recomputed_tokens)
    torch.testing.assert_close(scores, recomputed_scores, **CLOSE)
    alone_tokens, alone_scores = generate(narrow, input_ids[:1, 8:], mask[:1, 8:], use_cache=True)
    assert torch.equal(tokens[:1], alone_tokens)  # padding is not seen
    torch.testing.assert_close(scores[:1], alone_scores, **CLOSE)
    _, scores_of_padding = generate(narrow, input_ids, torch.ones_like(mask), use_cache=True)
    assert (scores_of_padding[0, 0] - scores[0, 0]).abs().max() > 0.005  # control: read as text, it would be


def test_family_of_names_the_supported_families(make_model):
    assert family_of(make_model("qwen3").config) is FAMILIES["qwen3"]
    config = copy.deepcopy(make_model().config)
    config.model_type = "gpt2"
    with pytest.raises(ValueError, match="'gpt2', which has no row in .*: supported are llama, mistral, qwen2, qwen3"):
        family_of(config)
