import math
from statistics import stdev
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from support.families import MORE_ROWS, ROWS
from support.other_families import OTHER_ROWS
from torch import nn

from tvaprune.choose.gated_model import GatedModel
from tvaprune.measure.figures import with_error
from tvaprune.measure.perplexity import TextLoss, perplexity, text_loss, windows_per_pass
from tvaprune.recover.lora import LoraSettings, add_lora


class Head(nn.Module):
    """Counts the positions that it is asked for."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def forward(self, states):
        self.asked.append(tuple(states.shape[:2]))
        return states


class Scripted(nn.Module):
    """A model whose logits are a function of the tokens."""

    def __init__(self, logits_of):
        super().__init__()
        self.unused, self.logits_of, self.calls, self.head = nn.Parameter(torch.zeros(1)), logits_of, [], Head()
        self.config = SimpleNamespace(model_type="llama")

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, use_cache):
        self.calls.append((tuple(input_ids.shape), self.training, use_cache))
        return SimpleNamespace(logits=self.head(self.logits_of(input_ids)))


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


@pytest.mark.parametrize("chunk", [2, 2048])
@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_the_error_is_of_the_mean_over_windows(batch_size, chunk, monkeypatch):
    monkeypatch.setattr("tvaprune.measure.perplexity.EVALUATED_TOKENS", chunk)
    same, other = -math.log(3 / 4), -math.log(1 / 4)
    found = text_loss(Scripted(repeating), blocks_of([[0, 0, 1], [1, 1, 1], [0, 1, 0]]), batch_size)
    windows = [(same + other) / 2, same, other]
    assert found.windows.tolist() == pytest.approx(windows, rel=1e-6) and found.windows.dtype == torch.float64
    assert found.mean == pytest.approx(sum(windows) / 3, rel=1e-6)
    assert found.stderr == pytest.approx(stdev(windows) / math.sqrt(3), rel=1e-6)  # of so few none is alike
    assert found.perplexity_stderr == pytest.approx(found.perplexity * found.stderr)


def test_windows_of_one_document_count_for_less_than_as_many_documents():
    documents = torch.randn(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    alike, apart = (
        documents.repeat_interleave(4),
        documents.repeat(4)[torch.randperm(200, generator=torch.Generator().manual_seed(1))],
    )
    true = stdev(documents.tolist()) / math.sqrt(50)
    plain = stdev(alike.tolist()) / math.sqrt(200)  # half of it, as if all were drawn by themselves
    found = TextLoss(0.0, alike).stderr
    assert found > 1.5 * plain and found == pytest.approx(true, rel=0.3)
    assert TextLoss(0.0, apart).stderr == pytest.approx(plain, rel=0.3)  # control
    assert TextLoss(0.0, torch.ones(5, dtype=torch.float64)).stderr == 0.0


def test_neighbours_count_the_less_the_farther_they_are():
    windows = torch.tensor([0.0, 0, 0, 0, 1, 1, 1, 1] * 2, dtype=torch.float64)
    # Of 16 two lags: squares of a half add up to 4, products with the next to 12/4 - 3/4, with the one past it to 8/4
    # - 6/4; their weights are 2/3 and 1/3, and each counts twice.
    expected = math.sqrt((4 + 2 * (2 / 3 * 2.25 + 1 / 3 * 0.5)) / 15 / 16)
    assert TextLoss(0.5, windows).stderr == pytest.approx(expected, rel=1e-9)


def test_a_gap_is_paired_by_window():
    easy = torch.tensor([1.0, 2.0, 4.0, 5.0], dtype=torch.float64)
    dense, pruned, mixed = (TextLoss(float(each.mean()), each) for each in (easy, easy + 0.5, easy.flip(0) + 0.5))
    assert pruned.gap_stderr(dense) == 0 < dense.stderr  # every window lost as much
    assert mixed.gap_stderr(dense) == pytest.approx(2 * dense.stderr)  # control: the same figures, of other windows
    assert TextLoss(1.0, easy[:1]).stderr is None
    broken = TextLoss(math.nan, torch.full_like(easy, math.nan))
    assert math.isnan(broken.stderr) and math.isnan(broken.gap_stderr(dense))  # of no number no error is 0


def test_a_bar_says_what_the_command_says_of_the_share_that_is_done(capsys):
    told = []
    blocks = blocks_of([[0, 1, 2]] * 4)
    text_loss(Scripted(uniform), blocks, 1, "dense", lambda share: told.append(share) or "phase 1 of 2")
    assert told == [0.25, 0.5, 0.75, 1.0]
    assert "dense" in capsys.readouterr().err
    text_loss(Scripted(uniform), blocks, 1, None, lambda share: told.clear())
    assert told  # control: without a bar nobody asks


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


def whole(model, rows, batch_size):
    """The perplexity from all logits at once."""
    total = 0.0
    for ids in torch.tensor(rows).split(batch_size):
        with torch.inference_mode():
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        total += float(nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"))
    return math.exp(total / (len(rows) * (len(rows[0]) - 1)))


@pytest.mark.usefixtures("other_families")
@pytest.mark.parametrize(
    ("model_type", "values"), (ROWS | MORE_ROWS | OTHER_ROWS).values(), ids=ROWS | MORE_ROWS | OTHER_ROWS
)
def test_it_is_the_models_own_loss_to_the_bit_where_a_batch_is_a_chunk(model_type, values, make_model, monkeypatch):
    model = make_model(model_type, **values)
    rows = torch.randint(0, 47, (5, 13), generator=torch.Generator().manual_seed(0)).tolist()
    expected = whole(model, rows, 2)
    assert perplexity(model, blocks_of(rows), 2) == expected
    for chunk in (1, 7, 25):
        monkeypatch.setattr("tvaprune.measure.perplexity.EVALUATED_TOKENS", chunk)
        assert perplexity(model, blocks_of(rows), 2) == pytest.approx(expected, rel=1e-6)


def test_gates_and_lora_are_part_of_the_model(make_model, make_masks):
    rows = torch.randint(0, 47, (3, 13), generator=torch.Generator().manual_seed(0)).tolist()
    lora = add_lora(make_model(), LoraSettings(2, 1.0, 0.0, train_lm_head=True))
    with torch.no_grad():
        for parameter in lora.parameters():
            parameter.add_(0.01)
    gated = GatedModel(make_model())
    with gated.using(make_masks(gated.shape).mu):
        values = {model: (perplexity(model, blocks_of(rows), 2), whole(model, rows, 2)) for model in (lora, gated)}
    dense = perplexity(make_model(), blocks_of(rows), 2)
    for found, expected in values.values():
        assert found == expected
        assert found != pytest.approx(dense, rel=1e-3)  # control


def test_the_head_sees_a_chunk_at_a_time_and_the_layers_no_more_than_a_pass(monkeypatch):
    monkeypatch.setattr("tvaprune.measure.perplexity.EVALUATED_TOKENS", 6)
    monkeypatch.setattr("tvaprune.measure.perplexity.FORWARD_TOKENS", 16)
    rows = torch.randint(0, 2, (4, 8), generator=torch.Generator().manual_seed(0)).tolist()
    model = Scripted(repeating)
    perplexity(model, blocks_of(rows))
    assert [shape for shape, _, _ in model.calls] == [(2, 8), (2, 8)]  # 16 tokens
    chunks = [(2, 3), (2, 3), (2, 2)]  # of 8 positions the last predicts nothing, but its chunk has it
    once = [(2, 1), (2, 1)]  # the pass asks for its last position; the first of all compares it
    assert model.head.asked == [*once, *chunks, once[0], *chunks]
    assert windows_per_pass(blocks_of([[0] * 17])) == 1  # a window is never cut
    assert windows_per_pass(blocks_of([[0]])) == 8
    assert windows_per_pass(blocks_of([[0] * 17]), 3) == 3  # control: as asked


@pytest.mark.parametrize(
    ("value", "error", "told"),
    [(22.456, 0.964, "22.46 ± 0.96"), (31579.857, None, "31579.86"), (1.234e300, 5.6e299, "1.23e+300 ± 5.6e+299")],
)
def test_a_collapsed_models_perplexity_is_told_in_a_few_digits(value, error, told):
    assert with_error(value, error, digits=2) == told
