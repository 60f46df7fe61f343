"""From hidden states to logits: the model's own logits, whatever its family does after the head."""

import pytest
import torch
from support.families import MORE_ROWS, ROWS
from support.other_families import OTHER_ROWS
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, GraniteConfig

from tvaprune.losses import cross_entropy, distillation_loss
from tvaprune.models import families
from tvaprune.models.families import ModelFamily
from tvaprune.models.logits import _summing, predictions
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
    calls = []
    model.register_forward_hook(lambda *_: calls.append("called"))
    assert not checked(model, input_ids.flip(1))  # and at every later call
    assert len(calls) == 2  # once for the predictions


def test_lora_and_its_trained_head_are_part_of_the_model(make_model, input_ids):
    for trained in (False, True):
        tuned = add_lora(make_model(), LoraSettings(2, 1.0, 0.0, train_lm_head=trained)).eval()
        with torch.no_grad():
            for parameter in tuned.parameters():
                parameter.add_(0.01)
        assert checked(tuned, input_ids)


class Products(TorchDispatchMode):
    """The width of every product that is taken block by block, each with a matrix of its own."""

    def __init__(self):
        super().__init__()
        self.batched = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "bmm" in str(function):
            self.batched.append(args[1].shape[-1])
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("row", ["llama GQA", "qwen3 tied", "gemma3_text tied"])
def test_a_frozen_head_is_not_taken_once_for_every_block(row, make_model, input_ids, monkeypatch):
    monkeypatch.setattr("tvaprune.losses.CHUNK_TOKENS", 6)  # chunks of positions are views
    model_type, values = (ROWS | MORE_ROWS)[row]
    model = make_model(model_type, **values).requires_grad_(False)
    vocabulary = model.config.vocab_size
    with Products() as products:
        student, teacher = (predictions(model, input_ids=input_ids, use_cache=False)[0] for _ in range(2))
        student.states.requires_grad_()
        (cross_entropy(student, input_ids) + distillation_loss(student, teacher)).backward()
        with torch.no_grad():
            cross_entropy(student, input_ids)
    assert vocabulary not in products.batched
    with Products() as products:
        model.lm_head(student.states[:, -1:])  # control
    assert vocabulary in products.batched


@pytest.mark.parametrize("train_lm_head", [True, None])
def test_a_trained_head_adds_up_the_gradients_of_all_chunks_and_losses_in_one_place(
    train_lm_head, make_model, input_ids, monkeypatch
):
    monkeypatch.setattr("tvaprune.losses.CHUNK_TOKENS", 6)
    model = make_model().requires_grad_(True)
    if train_lm_head:
        model = add_lora(model, LoraSettings(2, 1.0, 0.0, train_lm_head))
    other = torch.randn(*input_ids.shape, model.config.vocab_size)

    def gradients():
        model.zero_grad()
        for _ in range(2):  # those of an earlier pass are added to
            found, _ = predictions(model, input_ids=input_ids, use_cache=False)
            (cross_entropy(found, input_ids) + distillation_loss(found, other)).backward()
        return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}

    found = gradients()
    monkeypatch.setattr("tvaprune.models.logits._summing", lambda head: head)
    expected = gradients()
    assert found.keys() == expected.keys() and any("lm_head" in name for name in found)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-6)


def test_a_frozen_head_and_one_under_autocast_are_called_as_they_are(make_model, monkeypatch):
    head = make_model().get_output_embeddings()
    assert _summing(head) is not head  # control
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert _summing(head) is head
    with torch.no_grad():
        assert _summing(head) is head
    with monkeypatch.context() as patch:  # on a GPU
        patch.setattr(torch, "is_autocast_enabled", lambda kind: kind == "cuda")
        assert _summing(head) is head
    half = make_model().to(torch.bfloat16)
    tuned = add_lora(half, LoraSettings(2, 1.0, 0.0, train_lm_head=True)).get_output_embeddings()
    trained = _summing(tuned)  # beside LoRA it is float32, whatever the model's precision
    assert trained is not tuned and trained(torch.ones(2, 36, dtype=half.dtype)).dtype == torch.float32
    assert _summing(head.requires_grad_(False)) is head


def test_nothing_stays_on_the_model(make_model, input_ids):
    model = make_model()
    predictions(model, input_ids=input_ids)
    with pytest.raises(ValueError):
        predictions(model)
    assert not model.lm_head._forward_pre_hooks
