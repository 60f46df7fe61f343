"""LoRA and full fine-tuning on tiny models: the loss, the steps, what goes on."""

import gc
import math
import weakref
from types import SimpleNamespace

import pytest
import torch
from support.tuning import IDENTITY, blocks, logits, trainers
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback

from tvaprune.errors import InputError
from tvaprune.flags.arguments import Arguments
from tvaprune.identity import weights_digest
from tvaprune.losses import Predictions
from tvaprune.models.shape import shape_of
from tvaprune.phases import Phases
from tvaprune.plan.keep_plan import plan_from_masks
from tvaprune.recover.lora import LoraSettings
from tvaprune.recover.teacher import HiddenTarget, LiveTeacher
from tvaprune.recover.trainer import LossWeights
from tvaprune.recover.training import _teacher, train

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft asks


@pytest.fixture
def trainer(make_model, tmp_path):
    return trainers(make_model, tmp_path)


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


@pytest.mark.parametrize("weight_update", ["none", "refit"])
def test_a_run_compares_hidden_states_as_its_update_left_them(make_model, make_masks, weight_update):
    model = make_model("llama", tie_word_embeddings=False)
    plan = plan_from_masks(make_masks(shape_of(model.config)), shape_of(model.config))
    args = SimpleNamespace(
        distill=SimpleNamespace(distill=True, distill_temp=3.0), finetune=SimpleNamespace(distill_hidden_alpha=0.5),
        prune=SimpleNamespace(weight_update=weight_update),
    )  # fmt: skip
    run = SimpleNamespace(args=args, dense_model=lambda: model)
    job = SimpleNamespace(run=run, plan=plan, teacher_cache=None)
    teacher = _teacher(job)
    expected = torch.ones(plan.hidden_size) if weight_update == "none" else plan.scale.hidden
    assert teacher.temperature == 3.0 and teacher.model is model and torch.equal(teacher.hidden.kept, plan.kept.hidden)
    assert [torch.equal(factors, expected) for factors in teacher.hidden.factors] == [True] * 3
    args.finetune.distill_hidden_alpha = 0.0
    assert _teacher(job).hidden is None  # control


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


def test_a_short_last_batch_of_a_step_weighs_as_its_rows(trainer):
    """Three rows in one batch, or in two and one: one step of the same mean."""
    runs = [
        trainer(data=blocks(3), per_device_train_batch_size=size, gradient_accumulation_steps=4 - size, max_steps=1)
        for size in (3, 2)
    ]
    gradients = []
    for run in runs:
        run.add_callback(Noting(run, gradients))
        run.train()
    first, second = gradients
    assert first.abs().max() > 1e-2
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-6)
    assert runs[0].state.log_history[0]["loss"] == pytest.approx(runs[1].state.log_history[0]["loss"], rel=1e-4)


class Noting(TrainerCallback):
    """Notes the gradients of a step."""

    def __init__(self, run, found):
        self.run, self.found = run, found

    def on_pre_optimizer_step(self, *_, **__):
        self.found.append(torch.cat([p.grad.flatten() for p in self.run.model.parameters() if p.grad is not None]))


def test_whole_batches_are_left_as_they_are(trainer):
    run, loss = trainer(), torch.tensor(0.3)
    for rows in ([], [2], [2, 2], [3, 3, 3]):
        run._rows = rows
        assert run.of_step(loss, max(rows, default=2)) is loss  # bit for bit
    run._rows = [4, 4, 1]
    shares = [float(run.of_step(torch.tensor(1.0), rows)) for rows in run._rows]
    assert shares == pytest.approx([4 / 3, 4 / 3, 1 / 3])  # their mean is 1


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


@pytest.mark.parametrize("bf16", [True, False])
def test_bf16_multiplies_in_bfloat16_and_trains_weights_in_float32(bf16, trainer):
    run, computed = trainer(bf16=bf16), {}

    def note(who, module):
        def hook(_, given, out):
            computed.setdefault(who, out.dtype)  # of the first step: what is evaluated is not within

        module.register_forward_hook(hook)

    for who, model in (("student", run.model.get_base_model()), ("teacher", run.teacher.model)):
        note(who, model.model.layers[0].self_attn.o_proj)
        note(f"{who}'s head", model.lm_head)
    run.train()
    assert math.isfinite(run.state.log_history[0]["loss"])
    wanted = torch.bfloat16 if bf16 else torch.float32
    assert computed == dict.fromkeys(("student", "student's head", "teacher", "teacher's head"), wanted)
    assert all(p.dtype == torch.float32 for p in run.model.parameters())


def test_what_was_trained_in_bfloat16_is_measured_in_its_own_precision(make_model, tmp_path, input_ids):
    flags = ["--model_name_or_path", "x", "--output_dir", tmp_path, "--full_ft", True, "--bf16", True,
             "--distill", False, "--max_steps", 1, "--use_cpu", "--disable_tqdm", True]  # fmt: skip
    args, student = Arguments.parse([*map(str, flags)], "finetune"), make_model(seed=1).requires_grad_(True)
    run = SimpleNamespace(args=args, phases=Phases())
    texts = {"train_blocks": blocks(), "selection_blocks": blocks(2)}
    none = dict.fromkeys(("checkpoint", "teacher_cache", "lora"))
    job = SimpleNamespace(run=run, identity=IDENTITY, train_lm_head=True, **texts, **none)
    train(job, student)
    plain = make_model(seed=2)
    plain.load_state_dict(student.state_dict())
    assert torch.equal(logits(student.eval(), input_ids), logits(plain, input_ids))


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
