import json
import math
from dataclasses import replace

import pytest
import torch

from tvaprune.errors import InputError
from tvaprune.models.parameters import decoder_sparsity
from tvaprune.models.shape import ModelShape
from tvaprune.models.units import PerUnit
from tvaprune.plan.exact_cut import TOLERANCE, calibrate
from tvaprune.plan.keep_plan import KeepPlan, describe_widths, plan_from_masks
from tvaprune.plan.masks import Masks
from tvaprune.plan.widths import WidthRules, adjust_width, default_dim_multiple

MHA = ModelShape.uniform(48, 3, 4, 4, 12, 100, 50)
GQA = ModelShape.uniform(64, 4, 8, 2, 8, 160, 50)
ODD = ModelShape.uniform(45, 2, 6, 3, 8, 77, 50)
SHAPES = pytest.mark.parametrize("shape", [MHA, GQA, ODD], ids=["MHA", "GQA", "odd"])


@pytest.mark.parametrize(
    ("width", "full", "multiple", "adjusted"),
    [
        # floor((n + T / 2) / T) * T
        (100, 512, 128, 128),  # floor(164 / 128) = 1
        (191, 512, 128, 128),  # floor(255 / 128) = 1
        (192, 512, 128, 256),  # floor(256 / 128) = 2: halves go up
        (3171, 4096, 128, 3200),  # floor(3235 / 128) = 25
        (63, 512, 128, 128),  # would be 0: never below one T
        (0, 512, 128, 128),
        (511, 512, 128, 512),
        (75, 77, 8, 72),  # floor(79 / 8) = 9
        (77, 77, 8, 77),  # floor(81 / 8) = 10: never above the full width
        (3, 5, 8, 5),  # both at once
        (37, 64, 1, 37),  # T = 1 is off
        (0, 64, 1, 1),
        (5, 64, 3, 6),  # an odd T: floor(6.5 / 3) = 2
        (4, 64, 3, 3),  # floor(5.5 / 3) = 1
    ],
)
def test_adjust_width_by_hand(width, full, multiple, adjusted):
    assert adjust_width(width, full, multiple) == adjusted


@pytest.mark.parametrize(("hidden_size", "multiple"), [(511, 8), (512, 32), (1023, 32), (1024, 128), (4096, 128)])
def test_default_multiple(hidden_size, multiple):
    assert default_dim_multiple(hidden_size) == multiple


@SHAPES
def test_without_adjustment_exactly_the_units_below_zero_are_kept(shape, make_masks):
    masks = make_masks(shape)
    plan = plan_from_masks(masks, shape)
    for score, mu, kept, scale in zip(masks.log_alpha, masks.mu, plan.kept, plan.scale, strict=True):
        assert torch.equal(kept, torch.nonzero(score < 0).flatten())
        assert torch.equal(scale, mu[score < 0])


@SHAPES
@pytest.mark.parametrize("dim_multiple", [1, 8, 16])
def test_the_kept_are_the_best_in_ascending_order_and_none_is_zeroed(shape, dim_multiple, make_masks):
    """Trap 4: a sort index as the threshold, the last kept unit times 0, indices left in score order."""
    masks = make_masks(shape)
    plan = plan_from_masks(masks, shape, WidthRules(dim_multiple))
    for score, mu, kept, scale, full in zip(
        masks.log_alpha, masks.mu, plan.kept, plan.scale, plan.full_scale(), strict=True
    ):
        assert (kept.diff() > 0).all()
        left_out = torch.ones(len(score), dtype=torch.bool).index_fill(0, kept, False)
        if left_out.any() and len(kept):
            assert score[kept].max() <= score[left_out].min()
        assert torch.equal(scale, mu[kept])
        assert torch.equal(full[kept], mu[kept])
        assert int((full != 0).sum()) == len(kept)
    widths = [len(kept) for kept in (plan.kept.hidden, *plan.kept.inter)]
    below = [int((score < 0).sum()) for score in (masks.log_alpha.hidden, *masks.log_alpha.inter)]
    full_widths = [shape.hidden_size, *shape.intermediate_size]
    assert widths == [adjust_width(n, f, dim_multiple) for n, f in zip(below, full_widths, strict=True)]
    assert (widths == below) == (dim_multiple == 1)


def test_a_layer_may_lose_all_heads_unless_told_otherwise(make_masks):
    masks = make_masks(GQA)
    bad = tuple(torch.tensor([6.0, 5.0]) for _ in masks.mu.attn)
    masks = Masks(
        mu=replace(masks.mu, attn=tuple(map(torch.ones_like, bad))), log_variance=replace(masks.log_variance, attn=bad)
    )
    assert plan_from_masks(masks, GQA).num_key_value_heads == (0, 0, 0, 0)
    plan = plan_from_masks(masks, GQA, WidthRules(min_key_value_heads=1))
    assert [kept.tolist() for kept in plan.kept.attn] == [[1]] * 4  # the better one


def test_gates_with_gradients_make_a_plan(make_masks):
    masks = make_masks(GQA)
    trained = Masks(*(v.map(torch.nn.Parameter) for v in (masks.mu, masks.log_variance)))
    plan = plan_from_masks(trained, GQA)
    assert not any(scale.requires_grad for scale in plan.scale)


def test_sparsity_and_widths_of_a_plan(make_masks):
    plan = plan_from_masks(make_masks(GQA), GQA, WidthRules(8))
    assert plan.sparsity == decoder_sparsity(plan.hidden_size, plan.num_key_value_heads, plan.intermediate_size, GQA)
    assert 0.2 < plan.sparsity < 0.95
    assert describe_widths(plan) == {
        "hidden_size": plan.hidden_size,
        "num_key_value_heads": [len(kept) for kept in plan.kept.attn],
        "intermediate_size": [len(kept) for kept in plan.kept.inter],
        "decoder_sparsity": plan.sparsity,
        "num_parameters": plan.num_parameters,
        "dim_multiple": 8,
    }


def best_possible_miss(masks, shape, target, dim_multiple, min_heads):
    """Tries every hidden width with every cut of the other units."""
    scores = masks.log_alpha
    cuts = torch.cat([*scores.attn, *scores.inter, torch.tensor([-1e9, 1e9])]).sort().values.unique()
    cuts = ((cuts[1:].double() + cuts[:-1].double()) / 2).tolist()
    widths = {adjust_width(n, shape.hidden_size, dim_multiple) for n in range(shape.hidden_size + 1)}
    best = 1.0
    for cut in cuts:
        heads = [max(int((s < cut).sum()), min_heads) for s in scores.attn]
        channels = [adjust_width(int((s < cut).sum()), len(s), dim_multiple) for s in scores.inter]
        best = min(best, *(abs(decoder_sparsity(w, heads, channels, shape) - target) for w in widths))
    return best


@SHAPES
@pytest.mark.parametrize("dim_multiple", [1, 8, 16])
@pytest.mark.parametrize("target", [0.2, 0.5, 0.7])
@pytest.mark.parametrize(("seed", "min_heads"), [(0, 0), (1, 1)])
def test_calibration_reaches_the_target_wherever_it_is_possible(
    shape, dim_multiple, target, seed, min_heads, make_masks
):
    masks = make_masks(shape, seed)
    uncalibrated = plan_from_masks(masks, shape, WidthRules(dim_multiple, min_heads))
    plan = plan_from_masks(
        calibrate(masks, shape, target, WidthRules(dim_multiple, min_heads)), shape, WidthRules(dim_multiple, min_heads)
    )
    possible = best_possible_miss(masks, shape, target, dim_multiple, min_heads)
    assert abs(plan.sparsity - target) <= max(TOLERANCE, possible + 1e-9)
    assert abs(plan.sparsity - target) <= abs(uncalibrated.sparsity - target) or possible <= TOLERANCE
    assert possible <= TOLERANCE or dim_multiple > 1  # without adjustment it always is


@pytest.mark.parametrize("target", [0.0, 0.99])
def test_an_impossible_target_gets_the_nearest(target, make_masks):
    masks = make_masks(GQA)
    plan = plan_from_masks(calibrate(masks, GQA, target, WidthRules(16, 1)), GQA, WidthRules(16, 1))
    # The least: one T of hidden dims and of channels, one KV head; the most: everything
    fewest, most = decoder_sparsity(64, [2] * 4, [160] * 4, GQA), decoder_sparsity(16, [1] * 4, [16] * 4, GQA)
    assert plan.sparsity == (fewest if target == 0.0 else most)
    assert target == 0.0 or most < target - TOLERANCE


def test_calibration_shifts_log_variances_and_nothing_else(make_masks):
    masks = make_masks(GQA)
    shifted = calibrate(masks, GQA, 0.5, WidthRules(16))
    assert all(torch.equal(a, b) for a, b in zip(shifted.mu, masks.mu, strict=True))
    shifts = [new - old for new, old in zip(shifted.log_variance, masks.log_variance, strict=True)]
    assert all(torch.allclose(shift, shift[0].expand_as(shift), atol=1e-5) for shift in shifts)  # keeps the order
    of_others = torch.cat(shifts[1:])
    torch.testing.assert_close(of_others, of_others[0].expand_as(of_others), atol=1e-5, rtol=0)  # one cut for them all


def test_without_adjustment_one_cut_serves_all_units(make_masks):
    masks = make_masks(GQA)
    shifted = calibrate(masks, GQA, 0.5)
    shifts = torch.cat([new - old for new, old in zip(shifted.log_variance, masks.log_variance, strict=True)])
    torch.testing.assert_close(shifts, shifts[0].expand_as(shifts), atol=1e-5, rtol=0)


def test_calibration_of_scores_with_many_ties(make_masks):
    """Scores in steps of 1/4 and means of one: whole groups of units go at once, no finer target exists."""
    masks = make_masks(MHA)
    tied = Masks(PerUnit.full(MHA, 1.0), masks.log_variance.map(lambda v: (v * 4).round() / 4))
    for target in (0.3, 0.5, 0.7):
        plan = plan_from_masks(calibrate(tied, MHA, target, WidthRules(8)), MHA, WidthRules(8))
        assert abs(plan.sparsity - target) <= max(TOLERANCE, best_possible_miss(tied, MHA, target, 8, 0) + 1e-9)


@pytest.mark.parametrize("dim_multiple", [1, 8])
def test_plan_as_json_round_trips(dim_multiple, make_masks, tmp_path):
    shape = replace(ODD, tie_word_embeddings=True, qkv_bias=True)
    masks = replace(make_masks(shape), keeps_norm_width=dim_multiple > 1)
    plan = replace(plan_from_masks(masks, shape, WidthRules(dim_multiple)), prune_method="flap")
    plan.save(tmp_path / "plan.json")
    loaded = KeepPlan.load(tmp_path / "plan.json")
    assert loaded.prune_method == "flap"
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
    assert (loaded.shape, loaded.dim_multiple) == (plan.shape, plan.dim_multiple)
    assert loaded.keeps_norm_width == plan.keeps_norm_width == masks.keeps_norm_width
    for mine, theirs in ((plan.kept, loaded.kept), (plan.scale, loaded.scale)):
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(mine, theirs, strict=True))
    assert json.loads((tmp_path / "plan.json").read_text())["sparsity"] == plan.sparsity
    assert loaded.digest == plan.digest
    others = replace(plan, scale=plan.scale.map(torch.neg)), replace(plan, kept=plan.kept.map(lambda kept: kept + 1))
    assert len({plan.digest, *(other.digest for other in others)}) == 3


def test_a_plan_whose_layer_lost_all_heads_round_trips(make_masks, tmp_path):
    masks = make_masks(GQA)
    attn = tuple(v.abs() + 5 for v in masks.log_variance.attn)
    plan = plan_from_masks(replace(masks, log_variance=replace(masks.log_variance, attn=attn)), GQA)
    plan.save(tmp_path / "plan.json")
    assert KeepPlan.load(tmp_path / "plan.json").num_key_value_heads == (0, 0, 0, 0)


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    "breaks",
    [
        lambda path: path.unlink(),
        lambda path: path.write_text(path.read_text()[:-20]),
        lambda path: path.write_text("[]"),
        lambda path: path.write_text("null"),
        lambda path: path.write_bytes(b"\x80\x04\xff"),
        lambda path: edit(path, lambda content: content.pop("attn")),
        lambda path: edit(path, lambda content: content["shape"].pop("head_dim")),
        lambda path: edit(path, lambda content: content["inter"][0].update(kept="all")),
        lambda path: edit(path, lambda content: content["inter"].pop()),  # a layer is missing
        lambda path: edit(path, lambda content: content["hidden"]["scale"].pop()),  # an index without its factor
        lambda path: edit(path, lambda content: content["hidden"]["kept"].__setitem__(-1, 48)),  # out of 0 ... 47
        lambda path: edit(path, lambda content: content["hidden"]["kept"].reverse()),
        lambda path: edit(path, lambda content: content["hidden"]["kept"].__setitem__(1, content["hidden"]["kept"][0])),
        lambda path: edit(path, lambda content: content.update(keeps_norm_width=47)),
        lambda path: edit(path, lambda content: content.update(prune_method=3)),
        lambda path: path.write_text("[" * 100_000),
        lambda path: edit(path, lambda content: content.update(shape=[48])),
        lambda path: edit(path, lambda content: content["hidden"]["kept"].__setitem__(0, 0.5)),
        lambda path: edit(path, lambda content: content["hidden"]["kept"].__setitem__(-1, 10**300)),
        lambda path: edit(path, lambda content: content["hidden"].update(kept=[[0]], scale=[[1.0]])),
        lambda path: edit(path, lambda content: content["hidden"].update(kept=[], scale=[])),
        lambda path: edit(path, lambda content: content["hidden"]["scale"].__setitem__(0, math.inf)),
        lambda path: edit(path, lambda content: content.update(dim_multiple="eight")),
    ],
    ids=[
        "missing",
        "truncated",
        "list",
        "null",
        "binary",
        "no attn",
        "no head_dim",
        "text",
        "layer missing",
        "factor missing",
        "out of range",
        "descending",
        "twice",
        "norms of some width",
        "a method without a name",
        "nested too deep",
        "sizes without names",
        "half an index",
        "an endless index",
        "rows of indices",
        "no hidden dims",
        "an infinite factor",
        "a multiple in words",
    ],
)
def test_a_broken_plan_is_refused(breaks, make_masks, tmp_path):
    path = tmp_path / "plan.json"
    plan_from_masks(make_masks(MHA), MHA).save(path)
    KeepPlan.load(path)
    breaks(path)
    with pytest.raises(InputError, match=r"plan.json: not a keep plan \(.*\); give the plan.json of a run"):
        KeepPlan.load(path)


def test_a_plan_of_an_untied_model_is_of_a_tied_one_where_a_rotation_untied_it(make_masks):
    plan, tied = plan_from_masks(make_masks(MHA), MHA), replace(MHA, tie_word_embeddings=True)
    assert not MHA.tie_word_embeddings
    plan.check_fits(MHA, "--plan x")
    replace(plan, rotation="0" * 16).check_fits(tied, "--plan x")
    with pytest.raises(InputError, match="tie_word_embeddings False for True"):
        plan.check_fits(tied, "--plan x")
