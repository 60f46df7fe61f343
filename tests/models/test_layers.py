"""A model in memory as the walks over its layers hold it: where its weights are, and which they are."""

import pytest
import torch
from torch import nn

from tvaprune.models import layers
from tvaprune.models.layers import Half, Layers

NAME = "model.layers.0.mlp.down_proj"
CPU, CARD = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def model(make_model):
    return make_model().requires_grad_(False)


@pytest.fixture
def changed(model):
    """Layers of which one linear became 1 everywhere, and what it was."""
    held, before = Layers(model), model.get_submodule(NAME).weight.clone()
    with held.changing(NAME):
        model.get_submodule(NAME).weight.fill_(1.0)
    return held, before


def test_a_weight_is_at_each_share_of_its_way_and_at_its_end_after_that(model, changed):
    held, before = changed
    weight = model.get_submodule(NAME).weight
    found = [weight.clone() for _ in held.at((0.0, 0.5), NAME)]
    assert torch.equal(found[0], before)
    torch.testing.assert_close(found[1], (before + 1) / 2)
    assert (weight == 1).all()


def test_a_settled_model_keeps_no_older_weights(model, changed):
    held, before = changed
    held.settle(0.0)
    assert torch.equal(model.get_submodule(NAME).weight, before)
    model.get_submodule(NAME).weight.fill_(2.0)
    held.settle(1.0)  # there is no way left
    assert (model.get_submodule(NAME).weight == 2).all()


def test_weights_that_can_be_had_again_are_not_copied(model, monkeypatch):
    monkeypatch.setattr(layers, "_copied", lambda weights: pytest.fail("copied"))
    held, before = Layers(model, before=lambda name: torch.zeros(36, 52)), model.get_submodule(NAME).weight.clone()
    with held.changing(NAME):
        pass
    found = [model.get_submodule(NAME).weight.clone() for _ in held.at((0.5,), NAME)]
    torch.testing.assert_close(found, [before / 2])


@pytest.fixture
def moves(monkeypatch):
    """Which modules went where; nothing moves."""
    found = []
    monkeypatch.setattr(nn.Module, "to", lambda module, place: found.append((module, torch.device(place))))
    return found


def test_a_module_goes_home_even_where_the_work_with_it_fails(model, moves):
    with pytest.raises(KeyError), Layers(model, CARD).holding(NAME):
        raise KeyError
    assert moves == [(model.get_submodule(NAME), place) for place in (CARD, CPU)]


@pytest.mark.parametrize("is_used_up", [False, True])
def test_what_is_done_leaves_the_memory_only_of_a_model_that_is_used_up(is_used_up, model, moves):
    Layers(model, is_used_up=is_used_up).done(NAME)
    assert [place for _, place in moves] == [torch.device("meta")] * is_used_up


def test_states_wait_where_the_model_is_and_not_where_it_computes(model):
    states = Layers(model.bfloat16(), torch.device("meta")).room_of(torch.zeros(2, 5), 7)
    assert (states.shape, states.dtype, states.device) == ((1, 2, 5, 7), torch.bfloat16, CPU)


def test_a_half_adds_its_output_times_its_factor_to_the_stream():
    states = torch.randn(1, 2, 3, 4)
    half = Half(nn.Identity(), lambda hidden: (2 * hidden, None), {}, factor=0.25)
    torch.testing.assert_close(half(states), 1.5 * states)
