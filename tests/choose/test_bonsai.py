"""Bonsai: its regression, and what its rounds remove."""

import pytest
import torch
from datasets import Dataset
from support.scored import BLOCKS, EVEN, make_constant

from tvaprune.choose.choose import _kept_as
from tvaprune.choose.scores import SCORES, score_masks
from tvaprune.choose.scores.bonsai import RIDGES, _Rounds, bonsai_scores, coefficients
from tvaprune.choose.scores.calibration import Calibration, InputSums
from tvaprune.flags.conditions import parse
from tvaprune.models.shape import shape_of
from tvaprune.plan.exact_cut import calibrate
from tvaprune.plan.keep_plan import plan_from_masks
from tvaprune.run import Run


@pytest.fixture(autouse=True)
def few_sub_models(monkeypatch):
    monkeypatch.setattr("tvaprune.choose.scores.bonsai.SUB_MODELS_PER_ROUND", 32)
    monkeypatch.setattr("tvaprune.choose.scores.bonsai.TOKENS_PER_SUB_MODEL", 24)


@pytest.fixture
def one_token(make_model):
    """A model of one layer with 40 channels, and a text that repeats token 5."""
    model = make_model("llama", num_hidden_layers=1, intermediate_size=40, mlp_bias=True)
    return model, Dataset.from_dict({"input_ids": torch.full((4, 12), 5).tolist()}).with_format("torch")


def test_bonsais_regression_finds_the_coefficients_and_survives_more_units_than_sub_models():
    draw = torch.Generator().manual_seed(0)
    present = torch.randint(0, 2, (64, 4), generator=draw).double()
    worth = torch.tensor([3.0, 0.0, -1.0, 0.5]).double()
    torch.testing.assert_close(coefficients(present, present @ worth - 7.0), worth, rtol=0.02, atol=0.02)
    wide = torch.randint(0, 2, (32, 200), generator=draw).double()
    assert int(coefficients(wide, 5 * wide[:, 17]).argmax()) == 17


def test_bonsais_ridge_is_the_one_that_predicts_best_what_is_left_out():
    """Each sub-model in its turn, the means taken without it."""

    def ridge(present, utility, strength):
        x, y = present - present.mean(0), utility - utility.mean()
        return torch.linalg.solve(x.T @ x + strength * torch.eye(x.shape[1]).double(), x.T @ y)

    def missed(present, utility, strength, out):
        rest = torch.arange(len(utility)) != out
        worth = ridge(present[rest], utility[rest], strength)
        return utility[out] - utility[rest].mean() - (present[out] - present[rest].mean(0)) @ worth

    chosen = set()
    for seed in range(8):
        draw = torch.Generator().manual_seed(seed)
        present = torch.randint(0, 2, (7, 4), generator=draw).double()
        utility = present @ torch.randn(4, generator=draw).double() + 0.3 * torch.randn(7, generator=draw).double()
        centred = present - present.mean(0)
        strengths = [share * float(torch.linalg.eigvalsh(centred @ centred.T).mean()) for share in RIDGES]
        errors = [sum(missed(present, utility, each, out) ** 2 for out in range(7)) for each in strengths]
        best = errors.index(min(errors))
        expected = ridge(present, utility, strengths[best])
        torch.testing.assert_close(coefficients(present, utility), expected, rtol=1e-6, atol=1e-9)
        chosen.add(best)
    assert len(chosen) > 2  # control


def test_bonsai_tells_the_only_heads_of_several_layers_apart(make_model, monkeypatch):
    """Of three or four KV heads one is looked at: dropped by a coin in each layer, so that no two columns are alike."""
    drawn = []

    def regress(present, utility):
        drawn.append(present)
        return coefficients(present, utility)

    monkeypatch.setattr("tvaprune.choose.scores.bonsai.coefficients", regress)
    model = make_model("llama", num_hidden_layers=5, **EVEN)
    bonsai_scores(Calibration(model, BLOCKS, 0.05, 0, 4))
    heads = drawn[0][:, :5]
    assert heads.shape == (32, 5) and torch.linalg.matrix_rank(heads - heads.mean(0)) == 5
    assert torch.equal(heads[0::2] + heads[1::2], torch.ones(16, 5))  # each sub-model's complement follows it


def test_bonsai_keeps_a_planted_unit_against_its_prior(one_token, monkeypatch):
    """One channel speaks for the token; the prior is turned upside down, so that it looks the least of all."""
    model, blocks = one_token
    shape, layer = shape_of(model.config), model.model.layers[0]
    make_constant(layer.mlp, 11)
    with torch.no_grad():
        layer.mlp.down_proj.weight[:, 11] = 0.01 * model.lm_head.weight[5]
    wanda = InputSums.wanda
    monkeypatch.setattr(InputSums, "wanda", lambda entry: wanda(entry).max() - wanda(entry))
    plans = {m: plan_from_masks(calibrate(score_masks(model, m, blocks), shape, 0.5), shape) for m in SCORES}
    assert 11 in plans["bonsai"].kept.inter[0]
    assert 11 not in plans["wanda_sp"].kept.inter[0]  # negative control: the prior alone drops it


def test_bonsai_drops_first_what_writes_nothing(one_token):
    """Every channel speaks for the token, each a little louder than the one before; channel 9 says nothing."""
    model, blocks = one_token
    layer = model.model.layers[0]
    with torch.no_grad():
        for channel in range(40):
            make_constant(layer.mlp, channel)
            layer.mlp.down_proj.weight[:, channel] = (40 + channel) * 1e-5 * model.lm_head.weight[5]
        layer.mlp.down_proj.weight[:, 9] = 0.0
    assert int(bonsai_scores(Calibration(model, blocks, 0.2, 0, 4)).inter[0].argmin()) == 9


def test_a_round_of_bonsai_takes_its_share_from_the_lowest_prior_and_what_stays_goes_by_it(make_model, monkeypatch):
    """Prior and worth both rise with a channel's place, and no head is worth less than a channel."""
    monkeypatch.setattr("tvaprune.choose.scores.bonsai.SUB_MODELS_PER_ROUND", 2)
    monkeypatch.setattr(_Rounds, "_prior", lambda self: [m * torch.arange(1.0, len(m) + 1) for m in self.present])
    looked_at = []

    def worth(present, utility):
        looked_at.append(present.shape[1])
        return torch.cat([torch.tensor([1e3]), torch.arange(present.shape[1] - 1)])  # of one head, of the channels

    monkeypatch.setattr("tvaprune.choose.scores.bonsai.coefficients", worth)
    model = make_model("llama", num_hidden_layers=1, **EVEN)
    (scores,) = bonsai_scores(Calibration(model, BLOCKS, 0.1, 0, 4)).inter
    # Of 10,240 parameters a round takes 512, 5 channels of 96; a tenth of those that are left is looked at, rounded up.
    assert scores.floor()[:16].tolist() == [0] * 5 + [1] * 5 + [2] * 5 + [3]
    assert looked_at == [1 + 7, 1 + 6, 1 + 6] and bool((scores.diff() > 0).all())


def test_a_kept_round_serves_no_other_seed_text_model_or_pass_but_any_target(make_model, tmp_path):
    def kept(*flags, digest="one", text=BLOCKS):
        given = ["--model_name_or_path", str(tmp_path), "--prune_method", "bonsai", *flags]
        return _kept_as(Run(parse("prune", given), make_model(), None, digest), text)

    first = kept()
    assert first == kept() == kept("--target_sparsity", "0.7")
    passes = kept("--per_device_eval_batch_size", "1"), kept("--block_size", "16")
    others = kept("--seed", "1"), kept(digest="two"), kept(text=BLOCKS.select(range(4))), *passes
    assert len({first, *others}) == 6
