import math
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from torch import nn

from tvaprune.measure.perplexity import perplexity


class Scripted(nn.Module):
    """A model whose logits are a function of the tokens."""

    def __init__(self, logits_of):
        super().__init__()
        self.unused, self.logits_of, self.calls = nn.Parameter(torch.zeros(1)), logits_of, []

    def forward(self, input_ids, use_cache):
        self.calls.append((tuple(input_ids.shape), self.training, use_cache))
        return SimpleNamespace(logits=self.logits_of(input_ids))


def blocks_of(rows):
    return Dataset.from_dict({"input_ids": rows}).with_format("torch")


def uniform(input_ids):
    return torch.zeros(*input_ids.shape, 7)


def repeating(input_ids):
    """Logit log 3 for the same token again, 0 for the other one of two: probabilities 3/4 and 1/4."""
    return math.log(3) * nn.functional.one_hot(input_ids, 2).float()


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_a_uniform_model_is_as_perplexed_as_its_vocabulary_is_large(batch_size):
    blocks = blocks_of([[0, 1, 2, 3], [4, 5, 6, 0], [6, 6, 6, 6]])
    assert perplexity(Scripted(uniform), blocks, batch_size) == pytest.approx(7.0, rel=1e-5)


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_by_hand(batch_size):
    # Predictions: same, other | same, same | other, other: three of 3/4, three of 1/4
    blocks = blocks_of([[0, 0, 1], [1, 1, 1], [0, 1, 0]])
    expected = math.exp(-(3 * math.log(3 / 4) + 3 * math.log(1 / 4)) / 6)
    assert perplexity(Scripted(repeating), blocks, batch_size) == pytest.approx(expected, rel=1e-5)


def test_windows_stand_alone_and_their_first_token_is_context_only():
    # In one window of four, "0 0 1 1" is predicted same, other, same; in two of two, same and same: the step from 0
    # to 1 falls between them.
    whole = math.exp(-(2 * math.log(3 / 4) + math.log(1 / 4)) / 3)
    assert perplexity(Scripted(repeating), blocks_of([[0, 0, 1, 1]])) == pytest.approx(whole, rel=1e-5)
    assert perplexity(Scripted(repeating), blocks_of([[0, 0], [1, 1]])) == pytest.approx(4 / 3, rel=1e-5)


def test_batches_do_not_change_the_mean_over_tokens():
    rows = torch.randint(0, 2, (7, 5), generator=torch.Generator().manual_seed(0)).tolist()
    scores = [perplexity(Scripted(repeating), blocks_of(rows), size) for size in (1, 3, 7)]
    assert scores == pytest.approx([scores[0]] * 3, rel=1e-6)
    assert perplexity(Scripted(repeating), blocks_of(rows[:-1])) != pytest.approx(scores[0], rel=1e-4)


def test_the_model_is_in_evaluation_mode_meanwhile_and_keeps_no_cache():
    model = Scripted(uniform).train()
    perplexity(model, blocks_of([[0, 1, 2]] * 3), batch_size=2)
    assert model.calls == [((2, 3), False, False), ((1, 3), False, False)]
    assert model.training
    perplexity(model.eval(), blocks_of([[0, 1, 2]]))
    assert not model.training


def test_nan_stays_visible_and_a_collapsed_model_stays_finite():
    blocks = blocks_of([[0, 1, 2]])
    assert math.isnan(perplexity(Scripted(lambda ids: uniform(ids) * float("nan")), blocks))
    sure_and_wrong = perplexity(Scripted(lambda ids: 1e6 * nn.functional.one_hot(ids, 7).float()), blocks)
    assert 1e300 < sure_and_wrong < float("inf")


def test_a_real_model_agrees_with_its_own_loss(make_model, input_ids):
    model = make_model()
    with torch.no_grad():
        loss = model(input_ids=input_ids, labels=input_ids).loss
    assert perplexity(model, blocks_of(input_ids.tolist())) == pytest.approx(math.exp(loss), rel=1e-4)
