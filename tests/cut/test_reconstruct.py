"""The reconstruction: nearer to the dense model than the refit, and the refit where it would not be."""

import copy
import math

import pytest
import torch
from support.families import MORE_ROWS, ROWS, make_plan, sliced
from support.other_families import OTHER_ROWS
from support.updates import CALIBRATION, HELD_OUT, divergence, reconstruct, refit, weights_differ, windows

import tvaprune.cut.reconstruct as module

TEXTS = CALIBRATION, HELD_OUT
KNOWN = CALIBRATION, CALIBRATION.select(range(8))  # a model of random weights has nothing to generalise


@pytest.fixture(params=(ROWS | MORE_ROWS | OTHER_ROWS).values(), ids=ROWS | MORE_ROWS | OTHER_ROWS)
def model(request, make_model, other_families):
    model_type, values = request.param
    return make_model(model_type, **values)


@pytest.fixture
def updated(make_masks):
    """Of a model: its plan, and the model refitted by it."""

    def make(model, empty_layer=None):
        plan = make_plan(model, make_masks, 1, empty_layer)
        narrow = sliced(model, plan)
        refit(model, narrow, plan, *TEXTS)
        return plan, narrow

    return make


def test_it_comes_nearer_to_the_dense_model_than_the_refit(model, updated):
    plan, refitted = updated(model)
    dense, narrow = copy.deepcopy(model), copy.deepcopy(refitted)
    report = reconstruct(model, narrow, plan, *KNOWN)
    assert weights_differ(model, dense) == 0.0
    assert sum(p.numel() for p in narrow.parameters()) == plan.num_parameters
    assert [p.requires_grad for p in narrow.parameters()] == [p.requires_grad for p in refitted.parameters()]
    assert len(report.errors) == 2  # three layers: one, then two
    assert all(after <= before for before, after in report.errors)
    assert any(after < before for before, after in report.errors)
    divergences = [divergence(one, model, KNOWN[1]) for one in (refitted, narrow)]
    assert divergences[0] == pytest.approx(report.divergences[0], rel=1e-4)
    assert divergences[1] == pytest.approx(min(report.divergences), rel=1e-4)
    assert divergences[1] <= divergences[0]


def test_with_text_enough_it_does_on_windows_that_it_never_saw(make_model, updated):
    model = make_model()
    plan, narrow = updated(model)
    report = reconstruct(model, narrow, plan, windows(192, seed=1), windows(16, seed=2))
    assert report.share == 1.0 and report.divergences[-1] < 0.97 * report.divergences[0]


@pytest.mark.parametrize("layer", [0, 2], ids=["the first", "the last"])
def test_a_layer_without_attention_is_passed(layer, make_model, updated):
    model = make_model()
    plan, narrow = updated(model, empty_layer=layer)
    report = reconstruct(model, narrow, plan, *KNOWN)
    assert all(map(math.isfinite, report.divergences)) and report.errors[-1][1] < report.errors[-1][0]


def test_with_nothing_pruned_nothing_changes(make_model, full_plan):
    model = make_model()
    same = copy.deepcopy(model)
    report = reconstruct(model, same, full_plan(model), *TEXTS)
    assert weights_differ(model, same) == 0.0
    assert {error for pair in report.errors for error in pair} == {0.0}


@pytest.mark.parametrize("rate", [1e3, math.nan])
def test_a_training_that_goes_astray_leaves_the_refit(rate, make_model, updated, monkeypatch):
    model = make_model()
    plan, refitted = updated(model)
    narrow = copy.deepcopy(refitted)
    monkeypatch.setattr(module, "RATES", (rate,))
    report = reconstruct(model, narrow, plan, *TEXTS)
    assert weights_differ(narrow, refitted) == 0.0
    assert all(before == after for before, after in report.errors)


def test_where_large_steps_lead_astray_small_ones_are_tried(make_model, updated, monkeypatch):
    model = make_model()
    plan, narrow = updated(model)
    monkeypatch.setattr(module, "RATES", (1e3, 0.003))
    report = reconstruct(model, narrow, plan, *KNOWN)
    assert all(after < before for before, after in report.errors)


def test_the_rate_is_relative_to_each_weight_and_falls_to_nothing_over_all_passes(make_model, make_masks, monkeypatch):
    model, begun, sizes = make_model(num_hidden_layers=2), [], []
    plan = make_plan(model, make_masks)
    begin = module._Trained.begin

    def watched(window, rate, steps):
        begin(window, rate, steps)
        begun.append((rate, window.optimizer.param_groups))
        sizes.append([float(weight.square().mean().sqrt()) for weight in window.weights])

    monkeypatch.setattr(module._Trained, "begin", watched)
    reconstruct(model, sliced(model, plan), plan, HELD_OUT, HELD_OUT.select(range(2)), batch_size=4)
    assert begun and {rate for rate, _ in begun} <= set(module.RATES)
    for (rate, groups), each in zip(begun, sizes, strict=True):
        assert [group["initial_lr"] for group in groups] == pytest.approx([rate * size for size in each])
        assert max(group["lr"] for group in groups) < 1e-6 * rate * max(each)


@pytest.mark.parametrize("tied", [False, True])
def test_layers_and_the_final_norm_are_trained_and_the_head_stays(tied, make_model, make_masks):
    model = make_model(num_hidden_layers=2, tie_word_embeddings=tied)
    plan = make_plan(model, make_masks)
    before, narrow = sliced(model, plan), sliced(model, plan)
    reconstruct(model, narrow, plan, HELD_OUT, HELD_OUT.select(range(2)), batch_size=4, shares=(1.0,))
    pairs = zip(narrow.named_parameters(), before.parameters(), strict=True)
    stays = {name for (name, weight), other in pairs if torch.equal(weight, other)}
    assert stays == {"model.embed_tokens.weight", "lm_head.weight"} - ({"lm_head.weight"} if tied else set())


def test_where_predictions_come_no_nearer_the_refit_stays(make_model, updated):
    model = make_model()
    plan, refitted = updated(model)
    narrow = copy.deepcopy(refitted)
    assert reconstruct(model, narrow, plan, *TEXTS, shares=(0.0,)).share == 0.0
    assert weights_differ(narrow, refitted) == 0.0
    reconstruct(model, narrow, plan, *TEXTS)
    assert weights_differ(narrow, refitted) > 1e-4  # control


@pytest.mark.parametrize("batch_size", [8, 3])  # of the 8 held-out windows: one batch, or a smaller last one
def test_the_last_window_is_judged_by_the_held_out_predictions(batch_size, make_model, updated, monkeypatch):
    """By the very distance that chooses the share: from the dense predictions, a mean over the held-out tokens."""
    model = make_model()
    plan, narrow = updated(model)
    before = divergence(narrow, model, HELD_OUT)
    assert before != pytest.approx(divergence(narrow, model, CALIBRATION), rel=1e-2)  # controls
    assert before != pytest.approx(divergence(model, narrow, HELD_OUT), rel=1e-3)
    monkeypatch.setattr(module, "RATES", ())
    errors = reconstruct(model, narrow, plan, *TEXTS, batch_size=batch_size).errors
    assert errors[-1] == (pytest.approx(before, rel=1e-4),) * 2


def test_a_massive_token_is_not_all_that_is_trained_on(make_model, updated, monkeypatch):
    model = make_model()
    model.get_input_embeddings().weight.data[3] *= 1000
    plan, refitted = updated(model)
    monkeypatch.setattr(module, "RATES", ())
    told = reconstruct(model, copy.deepcopy(refitted), plan, *TEXTS).errors[0][0]
    assert 0 < told < 2  # relative to the stream
    monkeypatch.setattr(module, "importance", lambda states: torch.ones(states.shape[:-1]))
    plain = reconstruct(model, copy.deepcopy(refitted), plan, *TEXTS).errors[0][0]
    assert plain > 10 * told  # control


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_stay_so_and_small_steps_count(dtype, make_model, updated, monkeypatch):
    model = make_model().to(dtype)
    plan, refitted = updated(model)
    monkeypatch.setattr(module, "RATES", (1e-3,))  # whose steps are below the spacing of bfloat16
    narrow = copy.deepcopy(refitted)
    report = reconstruct(model, narrow, plan, *TEXTS)
    assert {parameter.dtype for parameter in narrow.parameters()} == {dtype}
    assert report.errors[0][1] < report.errors[0][0]


def test_it_repeats_bit_for_bit_and_the_seed_orders_the_steps(make_model, updated):
    model = make_model()
    plan, refitted = updated(model)
    first, second, third = (copy.deepcopy(refitted) for _ in range(3))
    for narrow, seed in ((first, 0), (second, 0), (third, 1)):
        reconstruct(model, narrow, plan, *TEXTS, batch_size=4, seed=seed)
    assert weights_differ(first, second) == 0.0
    assert weights_differ(first, third) > 0.0


def test_dense_layers_leave_the_memory_behind_the_walk(make_model, updated):
    model = make_model()
    plan, kept = updated(model)
    used = copy.deepcopy(kept)
    reconstruct(model, kept, plan, *TEXTS)
    assert model.model.layers[0].mlp.up_proj.weight.device.type == "cpu"  # control
    reconstruct(model, used, plan, *TEXTS, is_used_up=True)
    assert weights_differ(kept, used) == 0
    assert {weight.device.type for weight in model.model.layers.parameters() if weight.dim() > 1} == {"meta"}
