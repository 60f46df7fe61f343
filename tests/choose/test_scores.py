import pytest
import torch
from support.scored import BLOCKS, EVEN, make_constant
from torch.nn import functional

from tvaprune.choose.scores import SCORES, score_masks
from tvaprune.choose.scores.calibration import Calibration
from tvaprune.choose.scores.flap import compensate_bias
from tvaprune.choose.scores.ranking import heads_kept, layerwise, per_unit, ranked
from tvaprune.choose.scores.taylor import group_importance, protected_layers
from tvaprune.cut.slice import apply_plan
from tvaprune.models.shape import shape_of
from tvaprune.models.units import PerUnit, head_features
from tvaprune.plan.exact_cut import calibrate
from tvaprune.plan.keep_plan import KeepPlan, plan_from_masks
from tvaprune.plan.masks import Masks

IDS = BLOCKS[:]["input_ids"]


@pytest.fixture(autouse=True)
def few_sub_models(monkeypatch):
    monkeypatch.setattr("tvaprune.choose.scores.bonsai.SUB_MODELS_PER_ROUND", 4)
    monkeypatch.setattr("tvaprune.choose.scores.bonsai.TOKENS_PER_SUB_MODEL", 24)


@pytest.mark.parametrize("method", SCORES)
@pytest.mark.parametrize("target", [0.2, 0.5])
def test_every_score_reaches_the_exact_target_and_keeps_all_hidden_dims(make_model, method, target):
    model = make_model("mistral", num_attention_heads=8, num_key_value_heads=8, intermediate_size=96)
    shape = shape_of(model.config)
    plan = plan_from_masks(calibrate(score_masks(model, method, BLOCKS, target), shape, target), shape)
    assert plan.sparsity == pytest.approx(target, abs=0.009)  # half a head: 864 of 52,056 parameters
    assert plan.hidden_size == shape.hidden_size
    assert all(bool((scale == 1.0).all()) for scale in plan.scale)


@pytest.mark.parametrize("method", sorted(set(SCORES) - {"random", "bonsai"}))
def test_a_unit_that_writes_nothing_is_the_first_to_go(make_model, method):
    model = make_model("mistral")
    layer = model.model.layers[1]
    before = score_masks(model, "flap", BLOCKS).log_alpha
    assert before.inter[1].min() < max(before.inter[0].max(), before.inter[2].max())  # control
    with torch.no_grad():
        layer.mlp.down_proj.weight[:, 5] = 0.0
        layer.self_attn.o_proj.weight[:, 12:24] = 0.0  # KV head 1: query heads 2 and 3 of 6 features each
    scores = score_masks(model, method, BLOCKS).log_alpha
    assert int(scores.inter[1].argmax()) == 5
    assert int(scores.attn[1].argmax()) == 1


def test_the_scores_order_units_differently(make_model):
    model = make_model("llama")
    orders = {m: score_masks(model, m, BLOCKS).log_alpha.inter[0].argsort().tolist() for m in SCORES}
    assert orders.pop("taylor_global") == orders["taylor"]  # the same within a layer
    assert len(set(map(tuple, orders.values()))) == len(SCORES) - 1


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.log_variance, other.log_variance, strict=True))


@pytest.mark.parametrize("method", SCORES)
def test_a_seed_gives_the_same_scores_and_leaves_the_model_as_it_was(make_model, method):
    model = make_model("qwen3")
    trainable = [parameter.requires_grad for parameter in model.parameters()]
    with torch.no_grad():
        logits = model(IDS).logits
    first = score_masks(model, method, BLOCKS, seed=3)
    assert same(first, score_masks(model, method, BLOCKS, seed=3))
    assert same(first, score_masks(model, method, BLOCKS, seed=4)) == (method not in ("random", "bonsai"))
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, logits)
    assert [parameter.requires_grad for parameter in model.parameters()] == trainable
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("method", ["random", "magnitude", "wanda_sp"])
def test_layers_take_turns_so_that_the_same_share_goes_everywhere(make_model, method):
    scores = score_masks(make_model("llama"), method, BLOCKS).log_alpha.inter
    cuts = [[int((score < cut).sum()) for score in scores] for cut in torch.cat(scores).sort().values]
    assert all(max(widths) - min(widths) <= 1 for widths in cuts)
    assert cuts[1:3] == [[1, 0, 0], [1, 1, 0]]  # of those that stay: the last layer's go first
    assert len({sum(widths) for widths in cuts}) == len(cuts)  # every number of channels can be had


@pytest.mark.parametrize(
    ("target", "last", "expected"),
    [
        # 5 layers alike lose 0.5 * 10,304 / 10,240 = 0.503 of their units: 2.01 of 4 heads go
        (0.5, [], [2, 2, 2, 2, 2]),
        # 4 of 5 layers lose 0.629, 2.52 of 4 heads: two go
        (0.5, [0], [4, 2, 2, 2, 2]),
        # 0.77: 3.08 go
        (0.61, [0], [4, 1, 1, 1, 1]),
        # 0.59: 2.36 go
        (0.47, [0], [4, 2, 2, 2, 2]),
        # 4 layers lose all of theirs, 0.8 * 10,240; the first 0.56 of its own: 2.25 of 4 go
        (0.907, [0], [2, 0, 0, 0, 0]),
        (0.05, [], [4, 4, 4, 4, 4]),
    ],
)
def test_heads_are_rounded_once_for_all_layers(make_model, target, last, expected):
    shape = shape_of(make_model("llama", num_hidden_layers=5, **EVEN).config)
    assert heads_kept(shape, target, last) == expected
    generator = torch.Generator().manual_seed(0)
    attn, inter = ([torch.rand(n, generator=generator) for _ in range(5)] for n in (4, 64))
    scores = layerwise(shape, target, attn, inter, last)
    ones = PerUnit.full(shape, 1.0)
    plan = plan_from_masks(calibrate(Masks(ones, scores.map(lambda score: -score.float())), shape, target), shape)
    assert list(plan.num_key_value_heads) == expected
    assert plan.sparsity == pytest.approx(target, abs=48 / 51_520 + 1e-6)  # half a channel: the channels meet it
    best = [values.argsort(descending=True)[:kept].sort().values for values, kept in zip(attn, expected, strict=True)]
    assert all(torch.equal(kept, wanted) for kept, wanted in zip(plan.kept.attn, best, strict=True))


def test_channels_must_be_able_to_make_up_for_the_heads(make_model):
    """One KV head of more parameters than all channels: the nearest number of heads would leave the target unmet."""
    sizes = EVEN | {"num_key_value_heads": 1, "num_attention_heads": 8, "intermediate_size": 24}
    shape = shape_of(make_model("llama", num_hidden_layers=5, **sizes).config)
    # The head and its 8 query heads 18 * 8 * 32 = 4,608 parameters, the channels 2,304, norms 64: to lose 0.4 * 6,976 =
    # 2,790 of 6,912, without the head, is more than the channels have, though 0.4 of a head is rounded down to none.
    assert heads_kept(shape, 0.4) == [0] * 5
    assert heads_kept(shape, 0.3) == [1] * 5  # control: 2,093 of the channels' 2,304


def test_heads_rounded_layer_by_layer_would_not_be_even(make_model):
    """Negative control: the same ranks under one threshold, as the channels have it."""
    shape = shape_of(make_model("llama", num_hidden_layers=5, **EVEN).config)
    generator = torch.Generator().manual_seed(0)
    attn, inter = ([torch.rand(n, generator=generator) for _ in range(5)] for n in (4, 64))
    ranks = [[ranked(score, layer, 5) for layer, score in enumerate(kind)] for kind in (attn, inter)]
    for kind in ranks:
        kind[0] += 1.0  # the first layer comes last
    masks = Masks(PerUnit.full(shape, 1.0), per_unit(shape, *ranks).map(lambda score: -score.float()))
    plan = plan_from_masks(calibrate(masks, shape, 0.5), shape)
    assert len(set(plan.num_key_value_heads[1:])) == 2


def inputs_of(linear, model):
    """Returns what comes into a linear layer on the calibration text, shape (tokens, features)."""
    seen = []
    handle = linear.register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        model(IDS)
    handle.remove()
    return seen[0]


def test_wanda_scores_a_layer_on_what_the_pruned_layers_before_it_give(make_model):
    model, model_cut = make_model("llama"), make_model("llama")
    scores = score_masks(model, "wanda_sp", BLOCKS, target=0.5).log_alpha
    first = model_cut.model.layers[0]
    with torch.no_grad():
        gone = scores.inter[0].argsort()[26:]  # half of 52
        first.mlp.down_proj.weight[:, gone] = 0.0
        first.self_attn.o_proj.weight[:, head_features(scores.attn[0].argsort()[1:], 12)] = 0.0

    def order(network):  # of layer 1, by hand
        down = network.model.layers[1].mlp.down_proj
        return (down.weight.abs() * inputs_of(down, network).norm(dim=0)).mean(0).argsort().tolist()

    assert scores.inter[1].argsort(descending=True).tolist() == order(model_cut)
    assert order(model) != order(model_cut)  # negative control: it matters


def test_flap_equals_the_formula_on_the_inputs_as_they_come(make_model):
    model = make_model("mistral")
    layer = model.model.layers[2]
    seen = {linear: inputs_of(linear, model) for linear in (layer.self_attn.o_proj, layer.mlp.down_proj)}
    scores = score_masks(model, "flap", BLOCKS).log_alpha

    def standardised(metric):
        return (metric - metric.mean()) / metric.std()

    def metric(linear):
        return seen[linear].var(0, correction=0) * linear.weight.detach().square().sum(0)

    inter = standardised(metric(layer.mlp.down_proj))
    attn = standardised(metric(layer.self_attn.o_proj).square())
    torch.testing.assert_close(-scores.inter[2], inter, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(-scores.attn[2], torch.stack([attn[:12].mean(), attn[12:].mean()]), rtol=1e-4, atol=1e-4)


def test_flap_ignores_a_constant_input_that_wanda_keeps(make_model):
    """The fluctuation of a constant is nil, however large its norm."""
    model = make_model("llama", mlp_bias=True)
    make_constant(model.model.layers[0].mlp, 3)
    assert int(score_masks(model, "flap", BLOCKS).log_alpha.inter[0].argmax()) == 3
    assert int(score_masks(model, "wanda_sp", BLOCKS).log_alpha.inter[0].argmin()) == 3


def test_flap_takes_a_layer_that_does_nothing_first(make_model):
    model = make_model()
    layer = model.model.layers[1]
    with torch.no_grad():
        layer.mlp.down_proj.weight.zero_()
        layer.self_attn.o_proj.weight.zero_()
    score = score_masks(model, "flap", BLOCKS).log_alpha
    for kind in (score.attn, score.inter):
        assert bool(kind[1].isfinite().all()) and kind[1].min() > max(kind[0].max(), kind[2].max())


def without(model, attn=(), inter=()):
    """Returns a plan that removes KV heads and MLP channels of layer 0."""
    shape = shape_of(model.config)

    def left(units, gone):
        return torch.tensor([unit for unit in range(units) if unit not in gone])

    kept = PerUnit.full(shape, 1.0).map(lambda units: torch.arange(len(units)))
    kept = PerUnit(
        kept.hidden,
        (left(shape.num_key_value_heads[0], attn), *kept.attn[1:]),
        (left(shape.intermediate_size[0], inter), *kept.inter[1:]),
    )
    return KeepPlan(kept, kept.map(lambda indices: torch.ones(len(indices))), shape, 1)


def test_flaps_bias_makes_up_for_a_constant_channel_exactly(make_model):
    dense, cut, bare = (make_model("llama", mlp_bias=True) for _ in range(3))
    for model in (dense, cut, bare):
        make_constant(model.model.layers[0].mlp, 3)
    plan = without(dense, inter=[3])
    cut, bare = apply_plan(compensate_bias(cut, plan, BLOCKS), plan), apply_plan(bare, plan)
    with torch.no_grad():
        expected = dense(IDS).logits
        torch.testing.assert_close(cut(IDS).logits, expected, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(bare(IDS).logits, expected, atol=0.1)  # negative control


def test_flaps_bias_equals_the_formula(make_model):
    model = make_model("llama", attention_bias=True, mlp_bias=True)
    attention = model.model.layers[0].self_attn
    means = inputs_of(attention.o_proj, model).mean(0)[12:]  # KV head 1: query heads 2 and 3 of 6 features each
    before, later = attention.o_proj.bias.clone(), model.model.layers[1].self_attn.o_proj.bias.clone()
    compensate_bias(model, without(model, attn=[1]), BLOCKS)
    torch.testing.assert_close(attention.o_proj.bias, before + attention.o_proj.weight[:, 12:] @ means)
    assert torch.equal(model.model.layers[1].self_attn.o_proj.bias, later)  # nothing goes there


def test_flaps_bias_makes_up_for_all_heads_of_a_layer_whose_stand_in_passes_nothing_on(make_model):
    model = make_model("llama", attention_bias=True)
    output = model.model.layers[0].self_attn.o_proj
    means, before = inputs_of(output, model).mean(0), output.bias.clone()
    compensate_bias(model, without(model, attn=[0, 1]), BLOCKS)
    torch.testing.assert_close(output.bias, before + output.weight @ means)


def test_flaps_bias_adds_nothing_where_the_architecture_has_none(make_model):
    model = make_model("qwen2")
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    compensate_bias(model, without(model, attn=[1], inter=[3]), BLOCKS)
    after = dict(model.named_parameters())
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)


def loss_of(model):
    with torch.no_grad():
        return functional.cross_entropy(model(IDS).logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())


def test_taylor_equals_finite_differences_over_a_channels_group(make_model):
    model = make_model("mistral").double()
    _, inter = group_importance(Calibration(model, BLOCKS, 0.5, 0, 3))  # batches of 3, 3 and 2
    mlp, step, expected = model.model.layers[1].mlp, 5e-3, 0.0  # norms are float32: no smaller step
    with torch.no_grad():
        for weights in (mlp.gate_proj.weight[7], mlp.up_proj.weight[7], mlp.down_proj.weight[:, 7]):
            for place in range(len(weights)):
                value = weights[place].clone()
                weights[place] = value + step
                above = loss_of(model)
                weights[place] = value - step
                expected += float((value * (above - loss_of(model)) / (2 * step)).abs())
                weights[place] = value
    assert float(inter[1][7]) == pytest.approx(expected, rel=2e-3)


def test_taylors_kv_head_takes_all_its_query_heads(make_model):
    model = make_model("qwen2")
    attn, _ = group_importance(Calibration(model, BLOCKS, 0.5, 0, 8))
    attention = model.model.layers[2].self_attn
    model(IDS, labels=IDS).loss.backward()

    def salience(linear):
        return (linear.weight.detach() * linear.weight.grad).abs()

    for head in range(2):
        keys, queries = slice(6 * head, 6 * head + 6), slice(12 * head, 12 * head + 12)
        parts = (salience(attention.k_proj)[keys], salience(attention.v_proj)[keys],
                 salience(attention.q_proj)[queries], salience(attention.o_proj)[:, queries])  # fmt: skip
        assert float(attn[2][head]) == pytest.approx(sum(float(part.sum()) for part in parts), rel=1e-4)


def test_taylor_prunes_the_first_and_last_layers_last(make_model):
    assert protected_layers(32) == [0, 1, 2, 3, 30, 31]  # as released
    assert protected_layers(6) == [0]
    model = make_model("llama", num_hidden_layers=8)
    scores = score_masks(model, "taylor", BLOCKS).log_alpha.inter
    first, others = scores[0], torch.cat(scores[1:])
    assert protected_layers(8) == [0] and float(first.max()) < float(others.min())


def test_taylor_global_compares_layers(make_model):
    model = make_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(1e-3)
    target, shape = 0.3, shape_of(model.config)
    plans = {
        m: plan_from_masks(calibrate(score_masks(model, m, BLOCKS), shape, target), shape)
        for m in ("taylor", "taylor_global")
    }
    assert plans["taylor_global"].intermediate_size[1] < 3 < min(plans["taylor"].intermediate_size)
