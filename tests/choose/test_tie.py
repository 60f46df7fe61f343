"""A tie under a rotation: the fewest dims stay axes that keep the predictions, or nothing is turned."""

import pytest
import torch
from support.families import logits

from tvaprune.choose import tie
from tvaprune.choose.tie import kept_tie, stretched
from tvaprune.losses import distillation_loss


@pytest.fixture
def tied(make_model):
    """A tied model whose final gain is the same for all dims but two, one of them below 0."""
    model = make_model("llama", tie_word_embeddings=True)
    with torch.no_grad():
        model.model.norm.weight.fill_(1.5)
        model.model.norm.weight[3], model.model.norm.weight[7] = 6.0, -1.0
    return model


def test_what_is_not_above_zero_or_carries_much_stays_an_axis():
    gain, energy = torch.tensor([2.0, 2.2, -1.0, 4.0, 1.8, 2.0]).double(), torch.tensor([1, 30, 1, 2, 1, 1]).double()
    none, axes = stretched(gain, energy, 0)
    assert axes.nonzero().flatten().tolist() == [2] and none[2] == 1
    rest = ~axes
    shared = gain[rest] / none[rest].square()
    assert torch.allclose(shared, shared[0]) and bool((none > 0).all())
    assert float((none.square() * energy)[rest].sum()) == pytest.approx(float(energy[rest].sum()))
    _, axes = stretched(gain, energy, 2)
    assert axes.nonzero().flatten().tolist() == [1, 2]  # 10% of 30 is more than twice 2, after the one below 0


def test_the_fewest_axes_are_taken_that_keep_the_predictions(tied, input_ids, capsys, monkeypatch):
    energy = torch.ones(tied.config.hidden_size)
    stretch, axes = kept_tie(tied, energy, input_ids)
    assert axes.nonzero().flatten().tolist() == [3, 7] and "2 of 36 hidden dims stay axes" in capsys.readouterr().out
    torch.testing.assert_close(stretch, torch.ones_like(stretch))  # the others are alike
    monkeypatch.setattr(tie, "COST", 1e9)  # control: a cost that anything keeps
    assert kept_tie(tied, energy, input_ids)[1].nonzero().flatten().tolist() == [7]


def test_a_tie_that_costs_too_much_is_not_kept(tied, input_ids, capsys, monkeypatch):
    with torch.no_grad():
        tied.model.norm.weight.copy_(torch.linspace(0.1, 9, tied.config.hidden_size))
    monkeypatch.setattr(tie, "COST", 0.0)
    assert kept_tie(tied, torch.ones(tied.config.hidden_size), input_ids) is None
    assert "note: --rotate auto turns nothing" in capsys.readouterr().out


@pytest.mark.parametrize(("dtype", "kept"), [(torch.float32, False), (torch.bfloat16, True)])
def test_what_16_bits_round_is_no_cost_of_the_tie(dtype, kept, tied, monkeypatch):
    monkeypatch.setattr(tie, "tried", lambda *args: iter([(torch.ones(36), torch.zeros(36) > 0, 2e-3)]))
    assert (kept_tie(tied.to(dtype), torch.ones(36), None) is not None) == kept


def test_the_cost_is_the_divergence_of_the_stretched_norms(tied, input_ids):
    stretch = torch.linspace(0.5, 2, tied.config.hidden_size).double()
    with tie._stretched_norms(tied, stretch):
        changed = logits(tied, input_ids)
    with torch.no_grad():
        cost = tie._cost(tied, stretch, input_ids.split(1))
        nothing = tie._cost(tied, torch.ones_like(stretch), input_ids.split(1))
    assert cost == pytest.approx(float(distillation_loss(changed, logits(tied, input_ids))), rel=1e-4) and cost > 1e-3
    assert nothing == 0  # control
