"""LoRA and full fine-tuning on tiny models: the loss, what is saved, what goes on, what is refused."""

import errno
import gc
import json
import math
import os
import shutil
import weakref
from contextlib import suppress

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from tvaprune.checkpoints import last_checkpoint
from tvaprune.errors import InputError
from tvaprune.flags.arguments import FinetuneRunArguments
from tvaprune.identity import weights_digest
from tvaprune.losses import Predictions
from tvaprune.measure.perplexity import perplexity
from tvaprune.models.shape import shape_of
from tvaprune.plan.keep_plan import plan_from_masks
from tvaprune.recover.lora import (
    LoraSettings,
    add_lora,
    drop_replaced_head,
    load_adapter,
    merge,
    save_adapter,
    trainable,
)
from tvaprune.recover.teacher import CachedTeacher, HiddenTarget, LiveTeacher, cache_teacher
from tvaprune.recover.trainer import FinetuneTrainer, LossWeights

LORA = LoraSettings(r=3, alpha_ratio=4.0, dropout=0.0, train_lm_head=True)
IDENTITY = {"flags": {"lora_r": 3}, "contents": {"mask_loc": {"name": "m.pkl", "digest": "def"}}, "settings": {}}
EXACT = {"rtol": 0, "atol": 0}
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft asks


def blocks(count=16, length=12, seed=0):
    tokens = torch.randint(0, 47, (count, length), generator=torch.Generator().manual_seed(seed))
    return Dataset.from_dict({"input_ids": tokens.tolist()}).with_format("torch")


def logits(model, input_ids):
    with torch.no_grad():
        return model(input_ids=input_ids, use_cache=False).logits


@pytest.fixture
def trainer(make_model, tmp_path):
    """Returns a function: a trainer of a student towards a teacher, both tiny; the first writes to out-0."""
    outputs = []

    def make(teacher="live", settings=LORA, data=None, weights=None, patience=None, dtype=torch.float32, **args):
        base = make_model(seed=1).to(dtype)
        torch.manual_seed(0)
        student = base.requires_grad_(True) if settings is None else add_lora(base, settings)
        model = make_model(seed=2)
        found = LiveTeacher(model, 2.0) if teacher == "live" else teacher
        outputs.append(tmp_path / f"out-{len(outputs)}")
        defaults = {"output_dir": str(outputs[-1]), "use_cpu": True, "disable_tqdm": True, "learning_rate": 1e-2}
        defaults |= {"num_train_epochs": 1, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
        return FinetuneTrainer(
            student, FinetuneRunArguments(**(defaults | args)), data or blocks(), blocks(6, seed=9), found,
            weights or LossWeights(kl=0.5), IDENTITY, patience,
        )  # fmt: skip

    return make


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


def losses_by_hand(student, teacher, input_ids, labels, temperature=2.0):
    """Cross-entropy and KL token by token: position i predicts label i + 1, those of -100 do not count."""
    own, other = logits(student, input_ids), logits(teacher, input_ids)
    ce, kl = [], []
    for row in range(len(input_ids)):
        for i in range(input_ids.shape[1] - 1):
            if labels[row, i + 1] == -100:
                continue
            ce.append(-own[row, i].log_softmax(-1)[labels[row, i + 1]])
            p, q = (x[row, i].div(temperature).log_softmax(-1) for x in (other, own))
            kl.append(temperature**2 * (p.exp() * (p - q)).sum())
    return float(torch.stack(ce).mean()), float(torch.stack(kl).mean())


def test_the_loss_of_a_batch_by_hand(trainer, make_model, input_ids):
    run = trainer(weights=LossWeights(kl=0.3))
    labels = input_ids.clone()
    labels[0, 4:7] = -100
    ce, kl = losses_by_hand(make_model(seed=1), make_model(seed=2), input_ids, labels)
    found = run.compute_loss(run.model, {"input_ids": input_ids, "labels": labels}).item()
    assert found == pytest.approx(ce + 0.3 * kl, rel=1e-5)
    assert kl > 0.1 and found != pytest.approx(ce, rel=1e-2)
    everything = run.compute_loss(run.model, {"input_ids": input_ids}).item()
    assert everything != pytest.approx(found, rel=1e-3)  # control: the ignored labels would have mattered


def test_the_temperature_is_used(trainer, make_model, input_ids):
    cold, warm = (trainer(teacher=LiveTeacher(make_model(seed=2), t)) for t in (1.0, 4.0))
    first, second = (run.compute_loss(run.model, {"input_ids": input_ids}).item() for run in (cold, warm))
    assert abs(first - second) > 1e-2


def test_the_hidden_term_by_hand(trainer, make_model, input_ids):
    target = HiddenTarget(torch.arange(36), (torch.ones(36),) * 3)
    teacher = LiveTeacher(make_model(seed=2), 1.0, target)
    run = trainer(teacher=teacher, weights=LossWeights(kl=0.0, hidden=0.7))
    with torch.no_grad():
        own, other = (
            make_model(seed=seed)(input_ids=input_ids, output_hidden_states=True).hidden_states for seed in (1, 2)
        )
    angle = torch.stack(
        [1 - functional.cosine_similarity(a, b, dim=-1).mean() for a, b in zip(own[1:], other[1:], strict=True)]
    ).mean()
    assert len(own) == 4  # embedding and three layers
    ce, _ = losses_by_hand(make_model(seed=1), make_model(seed=2), input_ids, input_ids)
    assert run.compute_loss(run.model, {"input_ids": input_ids}).item() == pytest.approx(
        ce + 0.7 * float(angle), rel=1e-5
    )


@pytest.mark.parametrize("weight_update", ["none", "fold", "refit"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_perfect_student_pays_nothing_for_its_hidden_states(make_model, make_masks, input_ids, weight_update, tied):
    """Its stream is the teacher's on the kept dims, times the means where these are folded in."""
    model = make_model("llama", seed=2, tie_word_embeddings=tied)
    plan = plan_from_masks(make_masks(shape_of(model.config)), shape_of(model.config))
    mu = plan.scale.hidden
    with torch.no_grad():
        states = model(input_ids=input_ids, output_hidden_states=True).hidden_states
    kept = [state.index_select(-1, plan.kept.hidden) for state in states]
    # A tied model's final norm divides by the means again, so that the embeddings can be the head.
    student = [
        state if weight_update == "none" or (tied and state is kept[-1]) else state * mu for state in kept
    ]  # fmt: skip
    predicted = Predictions(model(input_ids=input_ids).logits.detach())
    batch = {"input_ids": input_ids, "labels": input_ids}

    def paid(target):
        return float(LiveTeacher(model, 1.0, target).terms(predicted, tuple(student), batch)["hidden"])

    assert paid(HiddenTarget.of(plan, weight_update)) == pytest.approx(0.0, abs=1e-6)
    other = HiddenTarget.of(plan, "fold" if weight_update == "none" else "none")  # control: with the means, without
    assert paid(other) > 1e-3


def test_the_first_step_logs_the_terms_over_all_accumulated_batches(trainer, make_model):
    data = blocks(4)
    run = trainer(data=data)  # one step of two batches of two
    run.train()
    logged = next(row for row in run.state.log_history if "ce" in row)
    ids = data[:]["input_ids"]
    ce, kl = losses_by_hand(make_model(seed=1), make_model(seed=2), ids, ids)
    assert (logged["ce"], logged["kl"]) == (pytest.approx(ce, rel=1e-4), pytest.approx(kl, rel=1e-4))
    assert logged["loss"] == pytest.approx(ce + 0.5 * kl, rel=1e-4)


def test_accumulation_is_the_larger_batch(trainer):
    once = trainer(per_device_train_batch_size=4, gradient_accumulation_steps=1, max_grad_norm=0.0)
    twice = trainer(per_device_train_batch_size=2, gradient_accumulation_steps=2, max_grad_norm=0.0)
    once.train(), twice.train()
    first, second = (torch.cat([p.flatten() for p in run.model.parameters()]) for run in (once, twice))
    torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-3)


def test_the_teacher_stays_as_it_was(trainer, make_model):
    model = make_model(seed=2).train()
    before = weights_digest(model)
    run = trainer(teacher=LiveTeacher(model, 1.0))
    student = weights_digest(run.model)
    run.train()
    assert weights_digest(model) == before and not model.training
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())
    assert weights_digest(run.model) != student  # control


def test_without_a_teacher_the_loss_is_the_cross_entropy(trainer, make_model, input_ids):
    run = trainer(teacher=None)
    ce, _ = losses_by_hand(make_model(seed=1), make_model(seed=2), input_ids, input_ids)
    assert run.compute_loss(run.model, {"input_ids": input_ids}).item() == pytest.approx(ce, rel=1e-5)


def test_a_cached_teacher_with_the_whole_vocabulary_trains_as_the_live_one(trainer, make_model, tmp_path):
    data, model = blocks(), make_model(seed=2)
    live = trainer(data=data)
    live.train()
    runs = {}
    for k in (47, 2):
        folder = cache_teacher(tmp_path / "cache", model, data, k, 2.0, batch_size=3)
        runs[k] = trainer(teacher=CachedTeacher(folder, 2.0), data=data)
        runs[k].train()

    def kls(run):
        return [row["kl"] for row in run.state.log_history if "kl" in row]

    assert kls(runs[47]) == pytest.approx(kls(live), rel=1e-3)
    assert all(few < full for few, full in zip(kls(runs[2])[:1], kls(live), strict=False))


def test_a_cache_is_found_again_and_never_taken_for_another(make_model, tmp_path):
    model, data = make_model(), blocks()
    first = cache_teacher(tmp_path, model, data, 4, 1.0)
    stamp = (first / "tokens.npy").stat().st_mtime_ns
    assert cache_teacher(tmp_path, model, data, 4, 1.0) == first
    assert (first / "tokens.npy").stat().st_mtime_ns == stamp
    others = [
        cache_teacher(tmp_path, make_model(seed=5), data, 4, 1.0),
        cache_teacher(tmp_path, model, blocks(seed=3), 4, 1.0),
        cache_teacher(tmp_path, model, data, 5, 1.0),
        cache_teacher(tmp_path, model, data, 4, 2.0),
    ]
    assert len({first, *others}) == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in {first, *others})


def test_an_interrupted_cache_leaves_nothing(make_model, tmp_path):
    model = make_model()
    calls = []
    model.register_forward_pre_hook(lambda *_: calls.append(1) if len(calls) < 1 else stop())

    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache_teacher(tmp_path / "cache", model, blocks(), 4, 1.0, batch_size=4)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_cache_that_the_disk_has_no_room_for_is_refused_before_it_is_written(make_model, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(InputError, match="--teacher_cache .*: cannot be written .*No space left on device"):
        cache_teacher(tmp_path / "cache", make_model(), blocks(), 4, 1.0)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_cache_that_cannot_be_used_is_refused(make_model, tmp_path):
    folder = cache_teacher(tmp_path, make_model(), blocks(), 4, 1.0)
    (folder / "tokens.npy").write_bytes((folder / "tokens.npy").read_bytes()[:200])
    with pytest.raises(InputError, match="is damaged .*; remove it"):
        CachedTeacher(folder, 1.0)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be written"):
        cache_teacher(tmp_path / "file", make_model(), blocks(), 4, 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", [LoraSettings(3, 4.0, 0.2, True), None], ids=["lora", "full"])
def test_a_run_goes_on_bit_for_bit(settings, dtype, trainer, tmp_path):
    whole = trainer(settings=settings, dtype=dtype, save_steps=2, eval_steps=1, save_total_limit=9)
    whole.train()
    checkpoint = tmp_path / "out-0" / "checkpoint-2"
    again = trainer(settings=settings, dtype=dtype, save_steps=2, eval_steps=1, output_dir=str(tmp_path / "again"))
    fresh = weights_digest(again.model)
    again.train(resume_from_checkpoint=str(checkpoint))
    assert weights_digest(again.model) == weights_digest(whole.model) != fresh
    assert again.state.global_step == whole.state.global_step == 4


def test_the_best_checkpoint_is_kept_and_training_stops_early(trainer):
    run = trainer(learning_rate=0.3, num_train_epochs=20, eval_steps=1, save_steps=1, patience=3)
    run.train()
    scores = [row["eval_perplexity"] for row in run.state.log_history if "eval_perplexity" in row]
    assert len(scores) == run.state.global_step < 80
    assert len(scores) - 1 - scores.index(min(scores)) == 3
    found = perplexity(run.model, run.eval_dataset, 8)
    assert found == pytest.approx(min(scores)) and found < scores[-1]


def test_gradient_checkpointing_gives_the_same_weights(trainer):
    plain, saving = trainer(), trainer(activation_checkpointing=True)
    plain.train(), saving.train()
    first, second = (torch.cat([p.flatten() for p in run.model.parameters()]) for run in (plain, saving))
    torch.testing.assert_close(first, second, **CLOSE)


def test_a_step_leaves_nothing_behind_that_only_a_collection_would_free(trainer):
    """Activations that are computed again, under dropout and beside a teacher, hang in no cycle."""

    class Alive(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.storages = []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            output = function(*args, **(kwargs or {}))
            for tensor in output if isinstance(output, tuple | list) else [output]:
                if isinstance(tensor, torch.Tensor):
                    self.storages.append(weakref.ref(tensor.untyped_storage()))
            return output

        def count(self):
            return len({id(storage) for ref in self.storages if (storage := ref()) is not None})

    run = trainer(settings=LoraSettings(3, 4.0, 0.2, True))
    run.model.train().activation_checkpointing_enable()
    ids = blocks()[:4]["input_ids"]
    gc.collect()
    gc.disable()
    try:
        with Alive() as alive:
            run.compute_loss(run.model, {"input_ids": ids}).backward()
            run._sums.clear()
            run.model.zero_grad()
            left = alive.count()
            gc.collect()
            assert alive.count() == left
            held = run.compute_loss(run.model, {"input_ids": ids})  # control: a graph that is still there is seen
            assert alive.count() > left + 10
            assert held.requires_grad
    finally:
        gc.enable()


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


def test_bf16_trains(trainer):
    run = trainer(bf16=True)
    run.train()
    assert math.isfinite(run.state.log_history[0]["loss"])
    assert all(p.dtype == torch.float32 for p in run.model.parameters())


def test_a_loss_that_is_no_number_ends_in_one_line(trainer):
    run = trainer()
    with torch.no_grad():
        for parameter in run.model.parameters():
            if parameter.requires_grad:  # all: some processors' kernels skip a factor of zeros, as LoRA's second is
                parameter.fill_(float("nan"))
    with pytest.raises(InputError, match="the loss is nan at step 0; lower --learning_rate"):
        run.train()
    with pytest.raises(InputError, match="the validation perplexity is nan"):
        run.evaluate()


def test_a_checkpoint_says_what_it_belongs_to_and_half_a_one_does_not_count(trainer, tmp_path):
    run = trainer(eval_steps=1, save_steps=1, save_total_limit=9)
    run.train()
    output = tmp_path / "out-0"
    assert last_checkpoint(output).name == "checkpoint-4"
    assert json.loads((output / "checkpoint-4" / "identity.json").read_text()) == IDENTITY
    (output / "checkpoint-4" / "identity.json").unlink()  # written last
    assert last_checkpoint(output).name == "checkpoint-3"
    shutil.rmtree(output)
    assert last_checkpoint(output) is None
