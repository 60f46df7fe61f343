"""A fine-tuning that goes on from a checkpoint, and whose weights stay at the end."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.families import MORE_ROWS
from support.tuning import IDENTITY, trainers

from tvaprune.checkpoints import last_checkpoint
from tvaprune.errors import InputError
from tvaprune.identity import weights_digest
from tvaprune.measure.perplexity import perplexity
from tvaprune.recover.lora import LoraSettings
from tvaprune.recover.training import kept_step

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft asks
EACH_STEP = {
    "eval_steps": 1,
    "save_steps": 1,
    "save_total_limit": None,
    "gradient_accumulation_steps": 1,
    "max_steps": 4,
}


@pytest.fixture
def trainer(make_model, tmp_path):
    return trainers(make_model, tmp_path)


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


@pytest.mark.parametrize("row", [name for name, (_, values) in MORE_ROWS.items() if "num_local_experts" in values])
def test_experts_that_are_trained_go_on_bit_for_bit_and_the_best_are_kept(row, make_model, tmp_path, monkeypatch):
    """Saved by a checkpoint's names they would not be found, and stay those of the last step."""
    model_type, values = MORE_ROWS[row]
    trainer = trainers(lambda seed: make_model(model_type, seed=seed, **values), tmp_path)
    whole, steps = trainer(settings=None, **EACH_STEP), []

    def measured(model, *unused):
        steps.append({name: value.clone() for name, value in model.state_dict().items()})
        return (9.0, 5.0, 6.0, 7.0)[len(steps) - 1]

    monkeypatch.setattr("tvaprune.recover.trainer.perplexity", measured)
    whole.train()
    assert all(torch.equal(value, steps[1][name]) for name, value in whole.model.state_dict().items())
    last = {name: value for name, value in steps[3].items() if "experts" in name}
    assert not any(torch.equal(steps[1][name], value) for name, value in last.items())  # control
    again = trainer(settings=None, **EACH_STEP | {"load_best_model_at_end": False, "eval_strategy": "no"})
    again.train(resume_from_checkpoint=str(tmp_path / "out-0" / "checkpoint-2"))
    assert all(torch.equal(value, steps[3][name]) for name, value in again.model.state_dict().items())


def test_a_checkpoint_that_lacks_trained_weights_is_refused(make_model, tmp_path):
    run = trainers(make_model, tmp_path)(settings=None, **EACH_STEP)
    run.train()
    path = tmp_path / "out-0" / "checkpoint-2" / "model.safetensors"
    state = load_file(path)
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, path, {"format": "pt"})
    with pytest.raises(InputError, match="has no weights of model.layers.1.mlp.up_proj.weight"):
        run.train(resume_from_checkpoint=str(path.parent))


@pytest.mark.parametrize(("step", "steps"), [(4, 4), (3, 4)])
def test_a_run_that_stopped_early_is_gone_on_with_no_further(step, steps, trainer, tmp_path, monkeypatch):
    flags = EACH_STEP | {"max_steps": 8, "patience": 2}
    values = 9.0, 5.0, 6.0, 7.0, 4.0, 3.0, 2.0, 1.0
    whole = trainer(**flags)
    measured_as(monkeypatch, whole, *values)
    whole.train()
    again = trainer(**flags | {"output_dir": str(tmp_path / "out-0")})
    measured_as(monkeypatch, again, *values)
    again.train(resume_from_checkpoint=str(tmp_path / "out-0" / f"checkpoint-{step}"))
    assert again.state.global_step == whole.state.global_step == steps
    assert torch.equal(weights_of(again), weights_of(whole)) and kept_step(again) == 2


def test_the_best_checkpoint_is_kept_and_training_stops_early(trainer):
    run = trainer(learning_rate=0.3, num_train_epochs=20, eval_steps=1, save_steps=1, patience=3)
    run.train()
    scores = [row["eval_perplexity"] for row in run.state.log_history if "eval_perplexity" in row]
    assert len(scores) == run.state.global_step < 80
    assert len(scores) - 1 - scores.index(min(scores)) == 3
    found = perplexity(run.model, run.eval_dataset, 8)
    assert found == pytest.approx(min(scores)) and found < scores[-1]


def measured_as(monkeypatch, run, *values):
    """Lets a run find these validation perplexities, one after each step."""
    monkeypatch.setattr("tvaprune.recover.trainer.perplexity", lambda *_: values[run.state.global_step - 1])


def weights_of(run):
    return torch.cat([p.detach().flatten() for p in run.model.parameters() if p.requires_grad])


def test_the_best_weights_stay_where_the_run_was_moved(trainer, tmp_path, monkeypatch):
    whole = trainer(**EACH_STEP)
    measured_as(monkeypatch, whole, 9.0, 5.0, 6.0, 7.0)
    whole.train()
    moved = shutil.move(tmp_path / "out-0", tmp_path / "moved")
    again = trainer(**EACH_STEP | {"output_dir": str(moved)})
    again.train(resume_from_checkpoint=f"{moved}/checkpoint-4")
    assert torch.equal(weights_of(again), weights_of(whole)) and kept_step(again) == 2
    last = trainer(**EACH_STEP | {"output_dir": str(moved), "load_best_model_at_end": False})
    last.train(resume_from_checkpoint=f"{moved}/checkpoint-4")
    assert not torch.equal(weights_of(last), weights_of(whole))  # control: the last weights are others


@pytest.mark.parametrize(
    ("flags", "values", "step"),
    [
        ({"save_steps": 2}, (9.0, 8.0, 5.0, 7.0), 2),  # the best was not saved
        ({"load_best_model_at_end": False}, (9.0, 5.0, 6.0, 7.0), 4),
        ({}, (9.0, 8.0, 5.0, 7.0), 3),
    ],
)
def test_the_step_that_is_told_is_that_of_the_weights(flags, values, step, trainer, tmp_path, monkeypatch):
    run = trainer(**EACH_STEP | flags)
    measured_as(monkeypatch, run, *values)
    run.train()
    assert kept_step(run) == step
    run._load_from_checkpoint(str(tmp_path / "out-0" / f"checkpoint-{step}"), run.model)
    kept = weights_of(run)
    again = trainer(**EACH_STEP | flags)
    measured_as(monkeypatch, again, *values)
    again.train()
    assert torch.equal(weights_of(again), kept)


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
