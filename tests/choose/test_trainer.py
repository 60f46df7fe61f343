"""The training of the gates: its steps, its masks, its checkpoints."""

import shutil

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from support.gating import settings
from transformers import TrainerCallback
from transformers.integrations.integration_utils import rewrite_logs

from tvaprune.choose.gated_model import GatedModel
from tvaprune.choose.objective import PruningObjective
from tvaprune.choose.trainer import BAND, GateTrainer
from tvaprune.errors import InputError
from tvaprune.flags.arguments import RunArguments
from tvaprune.plan.exact_cut import calibrate
from tvaprune.plan.keep_plan import plan_from_masks
from tvaprune.plan.masks import best_mask, load_masks
from tvaprune.plan.widths import WidthRules


def blocks(count=64, length=12):
    ids = torch.randint(0, 47, (count, length), generator=torch.Generator().manual_seed(3))
    return Dataset.from_dict({"input_ids": ids.tolist()}).with_format("torch")


def trainer_of(model, folder, start=-2.0, **options):
    torch.manual_seed(0)
    args = RunArguments(
        output_dir=str(folder), max_steps=8, eval_steps=4, logging_steps=1, learning_rate=1.0, disable_tqdm=True,
        use_cpu=True, per_device_train_batch_size=4, save_total_limit=4, **({"save_steps": 4} | options),
    )  # fmt: skip
    return GateTrainer(GatedModel(model, start), settings(), args, blocks(), blocks(8), {"model": "tiny"})


def train(model, folder, resume=None, callbacks=(), **options):
    trainer = trainer_of(model, folder, **options)
    for callback in callbacks:
        trainer.add_callback(callback)
    trainer.train(resume_from_checkpoint=resume)
    trainer.score_mask()
    trainer.gated.detach_gates()
    return trainer


@pytest.mark.parametrize(
    ("step", "sparsity", "scored"),
    [
        (1, 0.3, False),
        (2, 0.3, True),
        (2, 0.3 - 1.1 * BAND, False),
        (2, 0.3 + 1.1 * BAND, False),
        (2, 0.3 - 0.9 * BAND, True),
        (2, float("nan"), False),
    ],
)
def test_a_mask_is_scored_once_the_target_has_risen_and_the_gates_are_near_it(
    step, sparsity, scored, make_model, tmp_path, monkeypatch
):
    """The target of 0.3 rises over 2 steps."""
    args = RunArguments(output_dir=str(tmp_path), max_steps=8, use_cpu=True, disable_tqdm=True)
    trainer = GateTrainer(
        GatedModel(make_model("llama"), -2.0), settings(), args, blocks(), blocks(8), {"model": "tiny"}
    )
    seen = []
    monkeypatch.setattr(trainer, "score_mask", lambda: seen.append(step) or {})
    monkeypatch.setattr("tvaprune.choose.trainer.expected_sparsity", lambda *args: torch.tensor(sparsity))
    trainer.state.global_step, trainer.state.max_steps = step, 8
    trainer.evaluate()
    assert bool(seen) == scored


def test_gates_are_minimised_multipliers_maximised_and_the_model_stays(make_model, tmp_path):
    model = make_model("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = train(model, tmp_path)
    groups = trainer.optimizer.param_groups
    assert [group["maximize"] for group in groups] == [False, True]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    history = [row for row in trainer.state.log_history if "lambda_1" in row]
    # Ascent on lambda_1 * (s - t): lambda_1 goes to the side of the gap. At step 0, s = t.
    assert history[1]["lambda_1"] * (history[1]["expected_sparsity"] - history[1]["target_sparsity"]) > 0


def test_gates_and_multipliers_have_rates_of_their_own(make_model, tmp_path):
    args = RunArguments(output_dir=str(tmp_path), max_steps=8, use_cpu=True, disable_tqdm=True)
    chosen = settings(vib_learning_rate=0.03, reg_learning_rate=0.07)
    trainer = GateTrainer(GatedModel(make_model("llama"), -2.0), chosen, args, blocks(), blocks(8), {"model": "tiny"})
    gates_group, multipliers = trainer.create_optimizer().param_groups
    assert (gates_group["lr"], gates_group["maximize"]) == (0.03, False)
    assert (multipliers["lr"], multipliers["maximize"]) == (0.07, True)
    assert len(multipliers["params"]) == 2


class Board(TrainerCallback):
    """What ``--report_to`` would show: the names and values that transformers' callbacks are given."""

    def __init__(self):
        self.shown = {}

    def on_log(self, args, state, control, logs=None, **unused):
        for name, value in rewrite_logs(logs).items():
            self.shown.setdefault(name, []).append((state.global_step, value))


def test_boards_are_given_sparsity_multipliers_and_the_masks_figures(make_model, tmp_path):
    """TensorBoard takes numbers alone, wandb and trackio what they are given, all under these names."""
    board = Board()
    trainer = train(make_model("llama"), tmp_path, callbacks=[board])
    each_step = ("task_loss", "expected_sparsity", "target_sparsity", "lambda_1", "lambda_2", "loss", "learning_rate")
    for name in each_step:
        assert [step for step, _ in board.shown[f"train/{name}"]] == list(range(1, 9))
    scored = ("perplexity", "sparsity", "hidden_size", "mean_num_key_value_heads", "mean_intermediate_size")
    assert {name for name in board.shown if name.startswith("eval/")} == {f"eval/{name}" for name in scored}
    assert all(isinstance(value, int | float) for shown in board.shown.values() for _, value in shown)
    plan = plan_from_masks(load_masks(trainer.best), trainer.gated.shape, settings().rules)  # settled: one choice
    last = {name: board.shown[f"eval/{name}"][-1][1] for name in scored}
    assert last["hidden_size"] == plan.hidden_size
    assert last["mean_num_key_value_heads"] == pytest.approx(sum(plan.num_key_value_heads) / 3)
    assert last["mean_intermediate_size"] == pytest.approx(sum(plan.intermediate_size) / 3)
    assert last["mean_intermediate_size"] < trainer.gated.shape.intermediate_size[0]  # control: some are gone


def test_only_the_gates_rate_decays(make_model, tmp_path):
    gates_rate, multipliers_rate = train(make_model("llama"), tmp_path).lr_scheduler.get_last_lr()
    assert (gates_rate, multipliers_rate) == (0.0, 0.1)


def test_only_the_gates_rate_warms_up(make_model, tmp_path):
    trainer, rates = trainer_of(make_model("llama"), tmp_path, warmup_steps=4), []
    trainer.create_optimizer()
    scheduler = trainer.create_scheduler(8)
    for _ in range(6):
        rates.append(scheduler.get_last_lr())
        trainer.optimizer.step()
        scheduler.step()
    assert [gates_rate for gates_rate, _ in rates] == pytest.approx([0, 0.025, 0.05, 0.075, 0.1, 0.075])
    assert {multipliers_rate for _, multipliers_rate in rates} == {0.1}


def test_a_better_mask_of_before_the_interruption_stays_the_best(make_model, tmp_path):
    first = train(make_model("llama"), tmp_path).best
    better = first.with_name("mask_info_1.0.pkl")
    for suffix in (".json", ".pkl"):
        first.with_suffix(suffix).rename(better.with_suffix(suffix))
    resumed = trainer_of(make_model("llama"), tmp_path)
    resumed._load_from_checkpoint(str(tmp_path / "checkpoint-4"))
    resumed.score_mask()
    assert resumed.best == better and list((tmp_path / "best").glob("*.pkl")) == [better]


def test_a_resumed_run_continues_bit_for_bit(make_model, tmp_path):
    whole = train(make_model("mistral"), tmp_path / "whole")
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", tmp_path / "parted" / "checkpoint-4")
    parted = train(make_model("mistral"), tmp_path / "parted", resume=str(tmp_path / "parted" / "checkpoint-4"))
    states = whole.model.state_dict(), parted.model.state_dict()
    assert list(states[0]) == list(states[1])
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    optimizers = [trainer.optimizer.state_dict()["state"] for trainer in (whole, parted)]
    for index, moments in optimizers[0].items():
        assert all(torch.equal(moments[key], optimizers[1][index][key]) for key in moments)
    last = [[row for row in trainer.state.log_history if "task_loss" in row][-1] for trainer in (whole, parted)]
    assert last[0]["task_loss"] == last[1]["task_loss"]
    fresh = train(make_model("mistral"), tmp_path / "fresh", seed=7).model.state_dict()  # negative control
    assert not torch.equal(states[0]["gated.mu"], fresh["gated.mu"])


def test_gates_settle_for_the_last_share_of_the_steps(make_model, tmp_path):
    trainer = train(make_model("llama"), tmp_path)
    history = [row for row in trainer.state.log_history if "expected_sparsity" in row]
    assert settings().num_settle_steps == 3  # a third of 8
    assert len({row["expected_sparsity"] for row in history[5:]}) == 1
    assert len({row["expected_sparsity"] for row in history[:5]}) == 5
    assert len({row["lambda_1"] for row in history[4:]}) <= 2  # the multipliers rest as well
    assert trainer.model.settled


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2}], ids=["", "accumulated"])
def test_a_run_interrupted_after_it_settled_goes_on_bit_for_bit(make_model, tmp_path, options):
    whole = train(make_model("llama"), tmp_path / "whole", save_steps=6, **options)  # settles at step 5
    shutil.copytree(tmp_path / "whole" / "checkpoint-6", tmp_path / "again" / "checkpoint-6")
    resumed = train(
        make_model("llama"),
        tmp_path / "again",
        resume=str(tmp_path / "again" / "checkpoint-6"),
        save_steps=6,
        **options,
    )
    state, again = whole.model.state_dict(), resumed.model.state_dict()
    assert state["settled"] and all(torch.equal(state[name], again[name]) for name in state)
    before = load_file(tmp_path / "whole" / "checkpoint-6" / "model.safetensors")
    assert any(not torch.equal(state[name], value) for name, value in before.items() if name.endswith(".mu"))  # control


def test_a_checkpoint_holds_the_gates_and_not_the_model(make_model, tmp_path):
    train(make_model("llama"), tmp_path)
    weights = (tmp_path / "checkpoint-4" / "model.safetensors").stat().st_size
    assert weights < 4 * sum(p.numel() for p in make_model("llama").parameters()) / 4


def test_a_checkpoint_of_another_model_is_refused(make_model, tmp_path):
    train(make_model("llama"), tmp_path / "a")
    other = make_model("llama", hidden_size=40)
    with pytest.raises(InputError, match="gates of another model"):
        train(other, tmp_path / "b", resume=str(tmp_path / "a" / "checkpoint-4"))


def test_reentrant_checkpointing_is_refused(make_model, tmp_path):
    options = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}}
    with pytest.raises(InputError, match="use_reentrant is true, gates need false"):
        train(make_model("llama"), tmp_path, **options)


def test_the_best_mask_is_kept_alone_and_cuts_exactly_at_zero(make_model, tmp_path):
    model = make_model("llama")
    trainer = train(model, tmp_path)
    (mask,) = (tmp_path / "best").glob("*.pkl")
    assert sorted(path.suffix for path in (tmp_path / "best").iterdir()) == [".json", ".pkl"]
    assert mask == best_mask(tmp_path / "best")
    plan = plan_from_masks(load_masks(mask), trainer.gated.shape, WidthRules(4))
    assert plan.sparsity == pytest.approx(0.3, abs=0.02)  # a multiple of 4 in a width of 36 is coarse


def test_a_loss_that_is_not_finite_ends_the_run(make_model, tmp_path):
    model = make_model("llama")
    with torch.no_grad():
        model.lm_head.weight[0] = float("nan")
    with pytest.raises(InputError, match="the loss is nan at step 0; use --dtype"):
        train(model, tmp_path)


def test_gradient_checkpointing_changes_nothing(make_model, tmp_path):
    plain = train(make_model("llama"), tmp_path / "plain").model.state_dict()
    recomputed = train(make_model("llama"), tmp_path / "recomputed", activation_checkpointing=True).model.state_dict()
    for name, value in plain.items():
        torch.testing.assert_close(value, recomputed[name])


def test_a_short_last_batch_of_a_step_weighs_as_its_rows(make_model, tmp_path, monkeypatch):
    """Of blocks that cost 1 and one that costs 4, alone in its batch, a step of three costs 2."""
    costs = {2: 1.0, 1: 4.0}
    monkeypatch.setattr(PruningObjective, "forward", lambda self, input_ids, **_: {
        "loss": self.gated.mu.sum() * 0 + costs[len(input_ids)], "task_loss": torch.tensor(0.0),
        "expected_sparsity": torch.tensor(0.3),
    })  # fmt: skip
    args = RunArguments(output_dir=str(tmp_path), max_steps=1, use_cpu=True, disable_tqdm=True, eval_strategy="no",
                        per_device_train_batch_size=2, gradient_accumulation_steps=2, logging_steps=1)  # fmt: skip
    trainer = GateTrainer(
        GatedModel(make_model("llama"), -2.0), settings(), args, blocks(3), blocks(8), {"model": "tiny"}
    )
    trainer.train()
    assert next(row["loss"] for row in trainer.state.log_history if "loss" in row) == pytest.approx(2.0)


def test_accumulated_batches_give_the_same_sparsity_schedule(make_model, tmp_path):
    trainer = train(make_model("llama"), tmp_path, gradient_accumulation_steps=2)
    targets = [row["target_sparsity"] for row in trainer.state.log_history if "target_sparsity" in row]
    assert targets[-1] == pytest.approx(0.3)
    assert targets == sorted(targets) or targets == sorted(targets, reverse=True)


def test_half_precision_weights_train_full_precision_gates(make_model, tmp_path):
    trainer = train(make_model("mistral").bfloat16(), tmp_path)
    masks = trainer.gated.masks()
    assert all(values.dtype == torch.float32 and bool(values.isfinite().all()) for values in masks.log_variance)
    assert best_mask(tmp_path / "best") is not None


@pytest.mark.parametrize(("made", "sparsity"), [(False, "0.000"), (True, None)])
def test_a_choice_that_the_gates_have_not_made_is_told(made, sparsity, make_model, tmp_path, capsys):
    trainer = trainer_of(make_model("llama"), tmp_path, start=-9.0)
    gated, rules = trainer.gated, trainer.settings.rules
    if made:
        kept = plan_from_masks(calibrate(gated.masks(), gated.shape, 0.3, rules), gated.shape, rules).full_kept()
        gated.log_variance.data = kept.map(lambda keep: torch.where(keep, -9.0, 9.0)).flat()
    trainer.state.max_steps = trainer.state.global_step = 8
    trainer._settle()
    said = capsys.readouterr().out
    assert "the choice is made" not in said if made else f"expected sparsity of {sparsity}, the target is 0.3" in said
    gated.detach_gates()


def test_the_last_mask_is_scored_once(make_model, tmp_path, monkeypatch):
    scored = []
    whole = GateTrainer.score_mask
    monkeypatch.setattr(GateTrainer, "score_mask", lambda self: scored.append(self.state.global_step) or whole(self))
    for eval_steps, expected in ((4, [8]), (6, [6, 8])):  # settled after step 5
        args = RunArguments(
            output_dir=str(tmp_path / str(eval_steps)), max_steps=8, eval_steps=eval_steps, use_cpu=True,
            disable_tqdm=True, per_device_train_batch_size=4,
        )  # fmt: skip
        trainer = GateTrainer(GatedModel(make_model("llama"), -2.0), settings(), args, blocks(), blocks(8), {})
        trainer.train()
        trainer.score_last_mask()
        trainer.gated.detach_gates()
        assert scored[-len(expected) :] == expected and scored.count(8) == 1
        scored.clear()
