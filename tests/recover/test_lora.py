"""LoRA on tiny models: what it trains, what is saved, loaded and merged, what is refused."""

import math
from contextlib import suppress

import pytest
import torch
from peft import PeftModel
from support.tuning import IDENTITY, LORA, logits, trainers

from tvaprune.errors import InputError
from tvaprune.identity import weights_digest
from tvaprune.recover.lora import (
    LoraSettings,
    add_lora,
    drop_replaced_head,
    load_adapter,
    merge,
    save_adapter,
    trainable,
)

EXACT = {"rtol": 0, "atol": 0}
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft asks


@pytest.fixture
def trainer(make_model, tmp_path):
    return trainers(make_model, tmp_path)


def test_lora_at_its_start_is_the_model(make_model, input_ids):
    tuned = add_lora(make_model(), LORA)
    assert torch.equal(logits(tuned, input_ids), logits(make_model(), input_ids))
    trained = {name for name, p in tuned.named_parameters() if p.requires_grad}
    assert {name.split(".lora_")[0].split(".")[-1] for name in trained if "lora_" in name} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
    }  # fmt: skip
    assert [name for name in trained if "lora_" not in name] == [
        "base_model.model.lm_head.modules_to_save.default.weight"
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_lm_head_of_a_half_precision_model_is_trained_in_float32(dtype, trainer, make_model, tmp_path, input_ids):
    """In bfloat16 an update of 1e-5 would be lost, in float16 AdamW divides by the square of a small gradient: zero."""
    run, control = (trainer(dtype=dtype, learning_rate=1e-5, lr_scheduler_type="constant") for _ in range(2))
    before = make_model(seed=1).lm_head.weight.detach().to(dtype)
    run.train()
    head = run.model.get_output_embeddings().modules_to_save["default"].weight.detach()
    assert head.dtype == torch.float32
    assert {p.dtype for p in run.model.parameters() if p.requires_grad} == {torch.float32}
    assert all(math.isfinite(row["loss"]) for row in run.state.log_history if "loss" in row)
    moved = (head - before).abs()
    assert 1e-5 < moved.max() < 1e-4 and moved.count_nonzero() > 0.9 * moved.numel()
    save_adapter(run.model, tmp_path / "adapter", IDENTITY)
    again = load_adapter(make_model(seed=1).to(dtype), tmp_path / "adapter", IDENTITY)
    merged = merge(run.model.eval())
    assert {tensor.dtype for tensor in merged.state_dict().values()} == {dtype}
    assert torch.equal(merged.lm_head.weight, head.to(dtype))
    plain = make_model(seed=1).to(dtype)
    plain.load_state_dict(merged.state_dict())
    torch.testing.assert_close(logits(merged, input_ids), logits(plain, input_ids), **EXACT)
    torch.testing.assert_close(logits(again, input_ids), logits(merged, input_ids), rtol=0, atol=0.1)
    control.model.get_output_embeddings().modules_to_save["default"].to(dtype)
    with suppress(InputError):  # the loss is no number
        control.train()
    lost = control.model.get_output_embeddings().modules_to_save["default"].weight.detach()
    assert (lost.isfinite() & (lost != before)).sum() < 0.5 * lost.numel()


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_lent_to_training_comes_back_as_it_was(tied, make_model):
    def poison(tuned):
        with torch.no_grad():
            for parameter in tuned.parameters():
                if parameter.requires_grad:
                    parameter.fill_(float("nan"))

    model = make_model(tie_word_embeddings=tied).to(torch.float16)
    before, head = weights_digest(model), model.lm_head
    with pytest.raises(KeyboardInterrupt), trainable(model, LORA) as tuned:
        poison(tuned)
        raise KeyboardInterrupt
    assert weights_digest(model) == before and model.lm_head is head
    assert (head.weight is model.model.embed_tokens.weight) is tied
    assert not any(parameter.requires_grad for parameter in model.parameters())
    tuned = add_lora(model, LORA)
    poison(tuned)
    tuned.unload()
    assert weights_digest(model) != before  # control: peft alone leaves the copy


def test_alpha_is_its_ratio_times_the_rank(make_model):
    tuned = add_lora(make_model(), LoraSettings(r=3, alpha_ratio=2.5, dropout=0.0, train_lm_head=False))
    assert tuned.base_model.model.model.layers[0].self_attn.q_proj.scaling == {"default": 2.5}


def test_an_adapter_is_saved_loaded_and_merged_to_the_same_logits(trainer, make_model, input_ids, tmp_path):
    run = trainer()
    run.train()
    tuned = run.model.eval()
    expected = logits(tuned, input_ids)
    assert not torch.allclose(expected, logits(make_model(seed=1), input_ids), atol=1e-2)  # it learned something
    save_adapter(tuned, tmp_path / "adapter", IDENTITY)
    again = load_adapter(make_model(seed=1), tmp_path / "adapter", IDENTITY)
    torch.testing.assert_close(logits(again, input_ids), expected, **EXACT)
    plain = PeftModel.from_pretrained(make_model(seed=1), str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(plain.eval(), input_ids), expected, **EXACT)
    torch.testing.assert_close(logits(merge(tuned), input_ids), expected, rtol=0, atol=1e-4)


def test_an_adapter_of_another_model_or_a_damaged_one_is_refused(make_model, tmp_path):
    save_adapter(add_lora(make_model(), LORA), tmp_path / "adapter", IDENTITY)
    with pytest.raises(InputError, match=r"is the adapter of a run with --lora_r 3, not 4; give the flags that it was"):
        load_adapter(make_model(), tmp_path / "adapter", IDENTITY | {"flags": {"lora_r": 4}})
    with pytest.raises(InputError, match="cannot be loaded .*; train it again"):
        load_adapter(make_model(hidden_size=40), tmp_path / "adapter", IDENTITY)
    with pytest.raises(InputError, match="is no adapter that this version wrote"):
        load_adapter(make_model(), tmp_path, IDENTITY)
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(InputError, match="cannot be loaded"):
        load_adapter(make_model(), tmp_path / "adapter", IDENTITY)


def test_the_head_that_a_trained_copy_replaces_goes_and_is_not_missed(trainer, make_model, input_ids, tmp_path):
    run = trainer()
    before = sum(p.nbytes for p in run.model.parameters())
    drop_replaced_head(run.model)
    assert before - sum(p.nbytes for p in run.model.parameters()) == make_model().lm_head.weight.nbytes
    run.train()
    save_adapter(run.model, tmp_path / "adapter", IDENTITY)
    again = load_adapter(make_model(seed=1), tmp_path / "adapter", IDENTITY)
    expected = logits(run.model.eval(), input_ids)
    torch.testing.assert_close(logits(again, input_ids), expected, **EXACT)
    torch.testing.assert_close(logits(merge(run.model), input_ids), expected, rtol=0, atol=1e-4)
    tied = add_lora(make_model(tie_word_embeddings=True), LORA)
    drop_replaced_head(tied)
    assert tied.get_input_embeddings().weight.numel() > 0
    without = add_lora(make_model(), LoraSettings(3, 4.0, 0.0, False))
    drop_replaced_head(without)
    assert without.get_output_embeddings().weight.numel() > 0
