"""The closed-form update: against numpy, at its limits, and on every kind of model."""

import copy
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from support.families import MORE_ROWS, ROWS, make_plan, sliced
from support.other_families import OTHER_ROWS
from support.updates import CALIBRATION, HELD_OUT, divergence, refit, weights_differ

from tvaprune.cut.refit import _Refit
from tvaprune.cut.ridge import Moments, Outputs, Ridge, augmented, fit_linear, nearest, with_one
from tvaprune.cut.slice import Cut
from tvaprune.cut.walk import Batch, Settled, importance
from tvaprune.models.families import family_of
from tvaprune.models.layers import Half, Layers


@pytest.fixture(params=(ROWS | MORE_ROWS | OTHER_ROWS).values(), ids=ROWS | MORE_ROWS | OTHER_ROWS)
def model(request, make_model, other_families):
    model_type, values = request.param
    return make_model(model_type, **values)


def test_the_solution_is_numpys_least_squares():
    generator = np.random.default_rng(0)
    inputs, outputs = generator.normal(size=(50, 4)), generator.normal(size=(50, 3))
    centre = generator.normal(size=(3, 4))
    lam = 0.1 * np.trace(inputs.T @ inputs) / 4
    # The minimum of |y - W xhat|^2 + lam |W - centre|^2 as one ordinary problem: sqrt(lam) I below the inputs.
    stacked = np.vstack([inputs, math.sqrt(lam) * np.eye(4)])
    expected = np.linalg.lstsq(stacked, np.vstack([outputs, math.sqrt(lam) * centre.T]), rcond=None)[0].T
    gram, cross = torch.tensor(inputs.T @ inputs), torch.tensor(outputs.T @ inputs)
    found = Ridge(gram, 0.1).solve(torch.tensor(centre), cross)
    torch.testing.assert_close(found, torch.tensor(expected))
    assert (found - Ridge(gram, 0.2).solve(torch.tensor(centre), cross)).abs().max() > 1e-3


def test_a_strength_without_end_and_inputs_of_zero_return_the_centre():
    centre, cross = torch.randn(3, 4, dtype=torch.float64), torch.ones(3, 4, dtype=torch.float64)
    full = torch.eye(4, dtype=torch.float64)
    assert torch.equal(Ridge(full, math.inf).solve(centre, cross), centre)
    assert torch.equal(Ridge(0 * full, 1e-4).solve(centre, 0 * cross), centre)
    assert not torch.allclose(Ridge(full, 1e-4).solve(centre, cross), centre)


def test_an_error_that_is_no_number_is_never_the_smallest():
    assert nearest([math.nan, 2.0, 1.0, math.inf]) == 2
    assert nearest([math.nan, math.inf]) == 0
    assert nearest([1.0, 1.0]) == 0


def test_a_dead_channel_stays_at_its_centre():
    inputs = torch.eye(4, dtype=torch.float64)
    inputs[2, 2] = 0.0
    centre, cross = torch.ones(1, 4, dtype=torch.float64), torch.full((1, 4), 3.0, dtype=torch.float64)
    cross[0, 2] = 0.0
    found = Ridge(inputs, 1e-6).solve(centre, cross)
    torch.testing.assert_close(found, torch.tensor([[3.0, 3.0, 1.0, 3.0]], dtype=torch.float64), atol=1e-5, rtol=0)


def test_moments_of_tokens_and_the_error_of_weights():
    inputs, targets, weight = torch.randn(2, 5, 4), torch.randn(2, 5, 3), torch.randn(3, 4).double()
    moments = Moments.zeros(4, 3, torch.device("cpu"))
    for row in range(2):  # in batches
        moments.add(inputs[row : row + 1], targets[row : row + 1])
    x, y = inputs.flatten(0, 1).double(), targets.flatten(0, 1).double()
    torch.testing.assert_close(moments.inputs, x.T @ x, rtol=1e-5, atol=1e-5)
    missed = (y - x @ weight.T).square().sum() - y.square().sum()
    assert moments.error(weight) == pytest.approx(float(missed), rel=1e-4)


def test_a_linear_is_fitted_some_rows_at_a_time_by_the_errors_of_all_of_them(monkeypatch):
    """As a head is, whose rows are many: kept ones of a dense linear, with their bias."""

    def fitted(rows, kept):
        generator = torch.Generator().manual_seed(2)
        dense, narrow = torch.nn.Linear(4, 7), torch.nn.Linear(3, len(kept))
        with torch.no_grad():
            for parameter in dense.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
            narrow.weight.copy_(dense.weight[kept, :3])
            narrow.bias.copy_(dense.bias[kept])
            moments = [Moments.zeros(4, 5, torch.device("cpu")) for _ in range(2)]
            for each in moments:
                values = torch.randn(12, 4, generator=generator)
                seen = values[:, :3] + 0.5 * torch.randn(12, 3, generator=generator)
                each.add(with_one(seen, narrow), with_one(values, dense))
            monkeypatch.setattr("tvaprune.cut.ridge.ROWS", rows)
            ridges = [Ridge(moments[0].inputs, strength) for strength in (math.inf, 1.0, 0.1)]
            strength = fit_linear(narrow, ridges, *moments, Outputs(dense, torch.tensor(kept)))
        return strength, augmented(narrow, slice(None)).detach()

    strength, whole = fitted(8192, [0, 2, 3, 5, 6])
    assert strength == 1.0 and fitted(8192, [6])[0] == math.inf  # control: the last row alone stays
    again, parts = fitted(2, [0, 2, 3, 5, 6])
    assert again == strength
    torch.testing.assert_close(parts, whole)


def test_with_nothing_pruned_it_returns_the_dense_weights(model, full_plan):
    same = copy.deepcopy(model)
    refit(model, same, full_plan(model), CALIBRATION, HELD_OUT)
    centres = family_of(model.config).norm_centres  # what has no mean says nothing of one direction of its reader
    assert weights_differ(model, same) < (1e-3 if centres else 3e-4)  # a gain's target is a difference of two streams


def test_what_the_fold_gets_right_the_refit_leaves(make_model, full_plan):
    """One factor for all hidden dims: the norms divide it out, so the fold is exact, and so is each layer's target."""
    model = make_model("llama")
    plan = full_plan(model)
    plan = replace(plan, scale=replace(plan.scale, hidden=1.5 * plan.scale.hidden))
    folded = sliced(model, plan)
    same = copy.deepcopy(folded)
    refit(model, same, plan, CALIBRATION, HELD_OUT, shares=(1.0,))  # all the way: no fold to fall back to
    assert weights_differ(folded, same) < 1e-3


def test_infinite_strength_is_the_fold(model, make_masks, input_ids):
    plan = make_plan(model, make_masks)
    folded = sliced(model, plan)
    same = copy.deepcopy(folded)
    report = refit(model, same, plan, CALIBRATION, HELD_OUT, strengths=(math.inf,))
    assert weights_differ(folded, same) == 0.0
    refit(model, same, plan, CALIBRATION, HELD_OUT)
    assert weights_differ(folded, same) > 1e-3  # control
    assert set(report.strengths.values()) == {None}


@pytest.mark.parametrize("empty_layer", [None, 0], ids=["", "no attention in layer 0"])
def test_it_comes_nearer_to_the_dense_model_than_the_fold(model, make_masks, empty_layer):
    plan = make_plan(model, make_masks, 1, empty_layer)
    folded = sliced(model, plan)
    refitted, dense = copy.deepcopy(folded), copy.deepcopy(model)
    report = refit(model, refitted, plan, CALIBRATION, HELD_OUT)
    assert weights_differ(model, dense) == 0.0
    assert [name for name, _ in refitted.named_parameters()] == [name for name, _ in folded.named_parameters()]
    assert sum(p.numel() for p in refitted.parameters()) == plan.num_parameters
    divergences = [divergence(narrow, model) for narrow in (folded, refitted)]
    assert divergences[0] == pytest.approx(report.divergences[0], rel=1e-4)
    assert divergences[1] == pytest.approx(min(report.divergences), rel=1e-4)
    assert divergences[1] < 0.9 * divergences[0]


def test_the_gain_past_an_attention_is_refitted_too(make_model, make_masks, monkeypatch):
    """The writer aims at what the norm past it reads: without the gain nothing repairs the stream."""
    model = make_model("gemma3_text", num_key_value_heads=1)
    plan = make_plan(model, make_masks)
    narrow, without = sliced(model, plan), sliced(model, plan)
    with_gains = refit(model, narrow, plan, CALIBRATION, HELD_OUT)
    assert math.isfinite(with_gains.strengths["layer 1 post_attention_layernorm"])
    monkeypatch.setattr("tvaprune.cut.refit._Refit._fit_gain", lambda *args: math.inf)  # control
    assert min(with_gains.divergences) < 0.97 * min(refit(model, without, plan, CALIBRATION, HELD_OUT).divergences)


@pytest.mark.parametrize(("held_out", "strength", "gain"), [(2.5, 0.0, 2.5), (1.1, math.inf, 1.0)])
def test_a_gain_is_fitted_by_what_tokens_count_and_chosen_on_held_out_ones(held_out, strength, gain):
    """Of two tokens the larger counts a quarter: it lacks 3 times what the norm gives, the other twice."""
    norm = torch.nn.LayerNorm(1, bias=False)
    norm.forward = lambda values: values * norm.weight
    fit = torch.tensor([[[[1.0], [2.0]]]])
    batches = [Batch(torch.zeros(1, 2), fit, fit, held) for held in (False, True)]

    def lacking(batch):
        return batch.pruned[0] * (held_out if batch.held_out else torch.tensor([[2.0], [3.0]])), batch.pruned[0]

    walk = SimpleNamespace(
        dense=SimpleNamespace(family=SimpleNamespace(norm_offset=0.0)), device=torch.device("cpu"), batches=batches,
        strengths=(math.inf, 1.0, 0.0), _lacking=lacking,
    )  # fmt: skip
    with torch.no_grad():
        half = Half(torch.nn.Identity(), torch.nn.Identity(), {}, post_norm=norm)
        assert _Refit._fit_gain(walk, half) == strength
    assert float(norm.weight.detach()) == pytest.approx(gain)


def test_every_linear_misses_its_calibration_target_by_less_than_the_fold(make_model, make_masks, monkeypatch):
    """Judged by the calibration windows themselves, no strength is worse than infinity."""
    import tvaprune.cut.refit as module

    model, seen = make_model("llama", attention_bias=True, mlp_bias=True), []
    plan = make_plan(model, make_masks)
    original = module.fit_linear

    def watched(linear, ridges, fit, held, *outputs):
        before = augmented(linear, slice(None))
        result = original(linear, ridges, fit, fit, *outputs)
        project = outputs[0] if outputs else torch.Tensor.__getitem__
        own = Moments(fit.inputs, project(fit.cross, slice(None)))
        seen.append((own.error(augmented(linear, slice(None))), own.error(before)))
        return result

    monkeypatch.setattr(module, "fit_linear", watched)
    refit(model, sliced(model, plan), plan, CALIBRATION, HELD_OUT, strengths=(1e-3,))
    assert len(seen) == 3 * 7 + 1
    assert all(after < before for after, before in seen)


def test_biases_are_refitted_and_none_is_added(make_model, make_masks):
    model = make_model("llama", attention_bias=True, mlp_bias=True)
    plan = make_plan(model, make_masks)
    folded = sliced(model, plan)
    refitted = copy.deepcopy(folded)
    refit(model, refitted, plan, CALIBRATION, HELD_OUT)
    layers = zip(folded.model.layers, refitted.model.layers, strict=True)
    assert all((a.mlp.down_proj.bias - b.mlp.down_proj.bias).abs().max() > 1e-4 for a, b in layers)
    plain = make_model("llama")
    narrow = sliced(plain, make_plan(plain, make_masks))
    refit(plain, narrow, make_plan(plain, make_masks), CALIBRATION, HELD_OUT)
    assert not [name for name, _ in narrow.named_parameters() if name.endswith("bias")]


def test_tied_embeddings_stay_tied_and_exact(make_model, make_masks):
    model = make_model("qwen2", tie_word_embeddings=True)
    plan = make_plan(model, make_masks)
    folded = sliced(model, plan)
    refitted = copy.deepcopy(folded)
    report = refit(model, refitted, plan, CALIBRATION, HELD_OUT)
    assert refitted.lm_head.weight is refitted.model.embed_tokens.weight
    assert torch.equal(refitted.model.embed_tokens.weight, folded.model.embed_tokens.weight)
    assert "lm_head" not in report.strengths and report.share > 0


@pytest.mark.parametrize(("model_type", "steps"), [("llama", 7), ("qwen2", 6)])  # three layers, and a head of its own
def test_its_bars_tell_how_much_is_done(model_type, steps, make_model, make_masks):
    model, told = make_model(model_type, tie_word_embeddings=model_type == "qwen2"), []
    plan = make_plan(model, make_masks)
    phases = SimpleNamespace(at=lambda part, share: told.append((part, round(share, 3))) or "")
    refit(model, sliced(model, plan), plan, CALIBRATION, HELD_OUT, shares=(0.0, 1.0), phases=phases)
    walked = [("refit", round(place / steps, 3)) for place in range(1, steps + 1)]
    # in memory every share is a pass of its own
    assert told == walked + [("choice after refit", round(place / 12, 3)) for place in range(1, 13)]


def test_it_is_deterministic_and_does_not_depend_on_the_batch(make_model, make_masks):
    model = make_model("mistral", sliding_window=4)
    plan = make_plan(model, make_masks)

    def refitted(batch_size):
        narrow = sliced(model, plan)
        refit(model, narrow, plan, CALIBRATION, HELD_OUT, batch_size)
        return narrow

    first = refitted(8)
    assert weights_differ(first, refitted(8)) == 0.0
    assert weights_differ(first, refitted(5)) < 1e-3
    assert weights_differ(first, sliced(model, plan)) > 0.01


def test_every_weight_of_the_fold_is_made_of_the_dense_ones_again(model, make_masks):
    """Of each family, a layer without heads among them."""
    plan = make_plan(model, make_masks, empty_layer=0)
    folded = sliced(model, plan)
    cut, unfolded = (Cut(Layers(model), folded, plan, folds=folds) for folds in (True, False))
    weights = dict(folded.named_parameters(remove_duplicate=False))
    assert all(torch.equal(cut(name), weight) for name, weight in weights.items())
    assert not all(torch.equal(unfolded(name), weight) for name, weight in weights.items())  # control


@pytest.mark.parametrize("tied", [False, True])
def test_half_of_the_way_from_a_fold_made_again_is_that_from_its_copy(tied, make_model, make_masks):
    model = make_model(tie_word_embeddings=tied)
    plan = make_plan(model, make_masks)
    of_copies, of_cuts = sliced(model, plan), sliced(model, plan)
    cut = Cut(Layers(model), of_cuts, plan)
    refit(model, of_copies, plan, CALIBRATION, HELD_OUT, shares=[0.5])
    refit(model, of_cuts, plan, CALIBRATION, HELD_OUT, shares=[0.5], before=cut)
    assert weights_differ(of_copies, of_cuts) == 0
    wrong = sliced(model, plan)
    refit(model, wrong, plan, CALIBRATION, HELD_OUT, shares=[0.5], before=Cut(Layers(model), wrong, plan, folds=False))
    assert weights_differ(of_copies, wrong) > 0.001  # control


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_stay_so(dtype, make_model, make_masks):
    model = make_model("llama").to(dtype)
    plan = make_plan(model, make_masks)
    narrow = sliced(model, plan)
    report = refit(model, narrow, plan, CALIBRATION, HELD_OUT)
    assert {parameter.dtype for parameter in narrow.parameters()} == {dtype}
    assert all(math.isfinite(value) for value in report.divergences)


def test_weights_that_overflow_fall_back_to_the_fold(make_model, make_masks, monkeypatch):
    import tvaprune.cut.refit as module

    model = make_model().half()
    plan = make_plan(model, make_masks)
    folded, narrow = sliced(model, plan), sliced(model, plan)
    original = module.fit_linear

    def overflowing(linear, *rest):
        strength = original(linear, *rest)
        linear.weight[0, 0] = math.inf
        return strength

    monkeypatch.setattr(module, "fit_linear", overflowing)
    report = refit(model, narrow, plan, CALIBRATION, HELD_OUT)
    assert report.share == 0.0 and not math.isfinite(report.divergences[-1])
    assert weights_differ(folded, narrow) == 0.0


def test_the_model_stops_where_its_predictions_are_nearest(make_model, make_masks):
    model = make_model()
    plan = make_plan(model, make_masks)
    folded, whole, half = (sliced(model, plan) for _ in range(3))
    refit(model, whole, plan, CALIBRATION, HELD_OUT, shares=(1.0,))
    report = refit(model, half, plan, CALIBRATION, HELD_OUT, shares=(0.5,))
    for a, b, c in zip(folded.parameters(), half.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(b, (a + c) / 2)
    assert report.divergences == pytest.approx([divergence(half, model)], rel=1e-4)


def test_models_in_training_mode_are_read_in_evaluation_mode(make_model, make_masks):
    model = make_model("llama", attention_dropout=0.5)
    plan = make_plan(model, make_masks)
    expected, narrow = sliced(model, plan), sliced(model, plan).train()
    refit(model, expected, plan, CALIBRATION, HELD_OUT)
    refit(model.train(), narrow, plan, CALIBRATION, HELD_OUT)
    assert weights_differ(expected, narrow) == 0.0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_dense_model_on_the_cpu_serves_a_pruned_one_on_the_gpu(make_model, make_masks):
    model = make_model("llama")
    plan = make_plan(model, make_masks)
    near, far = sliced(model, plan), sliced(model, plan).cuda()
    refit(model, near, plan, CALIBRATION, HELD_OUT)
    refit(model, far, plan, CALIBRATION, HELD_OUT)
    assert weights_differ(near, far.cpu()) < 1e-2


def test_what_an_error_counts_is_relative_to_the_state():
    states = torch.randn(2, 3, 8) * torch.tensor([1.0, 100.0, 1e-3]).view(1, 3, 1)
    missed = 0.1 * states
    counted = missed.square().sum(-1) * importance(states)
    assert counted == pytest.approx(torch.full((2, 3), 0.01), rel=1e-5)
    assert missed.square().sum(-1).std() > 1  # control
    assert importance(torch.zeros(1, 8)).isfinite().all()


def test_a_writers_fit_counts_a_token_the_less_the_larger_the_stream_past_it(make_model, full_plan, monkeypatch):
    """The first token of a trained model is a thousand times as large as the others, and would be all that counts."""
    import tvaprune.cut.refit as module

    model, traces = make_model(), {}
    model.get_input_embeddings().weight.data[7] *= 1000
    ids = CALIBRATION[:]["input_ids"].clone()
    ids[:, 0] = 7
    text = Dataset.from_dict({"input_ids": ids.tolist()}).with_format("torch")
    original = module.fit_linear

    def watched(linear, ridges, fit, *rest):
        traces.setdefault((linear.in_features, linear.out_features), float(fit.inputs.trace()))
        return original(linear, ridges, fit, *rest)

    monkeypatch.setattr(module, "fit_linear", watched)
    refit(model, copy.deepcopy(model), full_plan(model), text, HELD_OUT)
    down, read = model.model.layers[0].mlp.down_proj, []
    down.register_forward_pre_hook(lambda module, args: read.append(args[0]))
    with torch.no_grad():
        past = model(ids, output_hidden_states=True).hidden_states[1]
    inputs = read[0].square().sum(-1)
    assert past[:, 0].norm(dim=-1).min() > 100 * past[:, 1:].norm(dim=-1).median()
    measured = traces[down.in_features, down.out_features]
    assert measured == pytest.approx(float((inputs / past.square().sum(-1)).sum()), rel=1e-4)
    assert measured != pytest.approx(float(inputs.sum()), rel=0.1)  # control


@pytest.mark.parametrize(("share", "way"), [(0.0, "none"), (0.6, "0.6"), (1.0, "all")])
def test_how_far_a_model_went_is_told_in_words(share, way):
    assert Settled((0.0, 0.6, 1.0), (3.0, 2.0, 1.0), share).way == way
