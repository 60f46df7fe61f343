"""From hidden states to logits: the model's own logits, whatever its family does after the head."""

import pytest
import torch
from support.families import MORE_ROWS, ROWS
from support.other_families import OTHER_ROWS
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, GraniteConfig

from tvaprune.models import families
from tvaprune.models.families import ModelFamily
from tvaprune.models.logits import predictions
from tvaprune.recover.lora import LoraSettings, add_lora

SIZES = {"vocab_size": 47, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
         "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0}  # fmt: skip
# What stock families do after the head, and the row that says so.
AFTER = {
    "gemma2": (Gemma2Config(**SIZES, final_logit_softcapping=0.5), {"logit_cap": "final_logit_softcapping"}),
    "granite": (GraniteConfig(**SIZES, logits_scaling=8.0), {"logit_divisor": "logits_scaling"}),
    "cohere": (CohereConfig(**SIZES, logit_scale=0.25), {"logit_multiplier": "logit_scale"}),
}


def built(config):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def checked(model, ids):
    """Returns whether the head is called by the losses; that the logits are the model's own is asserted."""
    with torch.no_grad():
        found, output = predictions(model, input_ids=ids, use_cache=False)
        expected = model(input_ids=ids, use_cache=False).logits
        assert torch.equal(found.head(found.states), expected)
        for start in range(3):
            torch.testing.assert_close(found.logits(start, start + 2), expected[:, start : start + 2])
    return output.logits.shape[1] == 1


@pytest.mark.usefixtures("other_families")
@pytest.mark.parametrize(
    ("model_type", "values"), (ROWS | MORE_ROWS | OTHER_ROWS).values(), ids=ROWS | MORE_ROWS | OTHER_ROWS
)
def test_every_family_gives_its_own_logits(model_type, values, make_model, input_ids):
    model = make_model(model_type, **values)
    assert checked(model, input_ids)


@pytest.mark.parametrize("model_type", AFTER)
def test_what_follows_the_head_is_in_the_row(model_type, input_ids, monkeypatch):
    config, row = AFTER[model_type]
    monkeypatch.setitem(families.FAMILIES, model_type, ModelFamily(beta=10.0, **row))
    assert checked(built(config), input_ids)


@pytest.mark.parametrize("model_type", AFTER)
def test_a_row_that_does_not_know_it_costs_memory_and_no_logit(model_type, input_ids, monkeypatch):
    model = built((AFTER)[model_type][0])
    monkeypatch.delitem(families.FAMILIES, model_type, raising=False)
    assert not checked(model, input_ids)  # no row
    monkeypatch.setitem(families.FAMILIES, model_type, ModelFamily(beta=10.0))
    assert not checked(model, input_ids)
    assert not checked(model, input_ids.flip(1))  # and at every later call


def test_lora_and_its_trained_head_are_part_of_the_model(make_model, input_ids):
    for trained in (False, True):
        tuned = add_lora(make_model(), LoraSettings(2, 1.0, 0.0, train_lm_head=trained)).eval()
        with torch.no_grad():
            for parameter in tuned.parameters():
                parameter.add_(0.01)
        assert checked(tuned, input_ids)


def test_nothing_stays_on_the_model(make_model, input_ids):
    model = make_model()
    predictions(model, input_ids=input_ids)
    with pytest.raises(ValueError):
        predictions(model)
    assert not model.lm_head._forward_pre_hooks
