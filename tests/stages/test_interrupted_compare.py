"""A comparison that is interrupted within a cell goes on there: its mask and its cost are those of a whole run."""

import pytest
import torch
from support import tiny
from support.comparison import compare, small_grid

from tvaprune.choose.scores import bonsai
from tvaprune.choose.trainer import GateTrainer
from tvaprune.files import write_json
from tvaprune.plan.masks import load_masks
from tvaprune.study import kept_gates
from tvaprune.study.kept_gates import KeptGates


@pytest.fixture(scope="module")
def flags(make_model, tmp_path_factory):
    return small_grid(make_model, tmp_path_factory.mktemp("compare"))


def interrupt(*_):
    raise KeyboardInterrupt


def same_masks(method, *outputs):
    masks = [load_masks(output / "tiny" / "masks" / f"{method}-0.3-0.pkl") for output in outputs]
    return all(torch.equal(*pair) for pair in zip(*(mask.log_alpha for mask in masks), strict=True))


def test_an_interrupted_bonsai_goes_on_and_its_seconds_are_those_of_both_runs(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TVAPRUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(bonsai, "SUB_MODELS_PER_ROUND", 4)
    fewer = ["--methods", "bonsai", "--weight_updates", "none", "--sparsities", 0.3]
    with monkeypatch.context() as patch:
        rounds = iter([bonsai.coefficients] * 2)
        patch.setattr(bonsai, "coefficients", lambda *args: next(rounds, interrupt)(*args))
        assert compare([*flags, *fewer], tmp_path / "out") == 130
    (left,) = (tmp_path / "cache").glob("scores-*")
    torch.save(torch.load(left) | {"seconds": 1000.0}, left)
    assert compare([*flags, *fewer], tmp_path / "out") == 0
    assert "note: Bonsai goes on after 2 rounds" in capsys.readouterr().out and not left.exists()
    assert 1000 < tiny.read_json(tmp_path / "out" / "tiny" / "masks" / "bonsai-0.3-0.json")["seconds"] < 1100
    assert compare([*flags, *fewer], tmp_path / "whole") == 0  # control: all in one run
    assert same_masks("bonsai", tmp_path / "out", tmp_path / "whole")


@pytest.mark.parametrize(("changed", "goes_on"), [((), True), (("--train_samples", 12), False)])
def test_interrupted_gates_go_on_as_they_began(changed, goes_on, flags, tmp_path, monkeypatch, capsys):
    flags = [*flags, "--methods", "vib", "--weight_updates", "none", "--sparsities", 0.3, "--save_steps", 1]
    out, steps, losses = tmp_path / "out", [], GateTrainer.compute_loss

    def loss(trainer, *args, **options):
        steps.append(trainer.state.global_step)
        return interrupt() if len(steps) == 3 else losses(trainer, *args, **options)

    monkeypatch.setattr(GateTrainer, "compute_loss", loss)
    assert compare(flags, out) == 130 and steps == [0, 1, 2]
    assert "interrupted; the same command goes on where it was" in capsys.readouterr().err
    (told,) = (out / "tiny" / "gates").glob("*/checkpoint-2/comparison.json")
    content = tiny.read_json(told)
    assert 0 < content["seconds"] < 100
    write_json(content | {"seconds": 1000.0}, told)
    flags = [*flags, *changed]
    assert compare(flags, out) == 0
    said = capsys.readouterr().out
    assert ("note: gate training goes on from" in said) == goes_on
    assert ("checkpoint-2 is of other settings, or does not say of which: gate training begins anew" in said) != goes_on
    assert steps[3:] == [2, 3] if goes_on else [0, 1, 2]
    seconds = tiny.read_json(out / "tiny" / "masks" / "vib-0.3-0.json")["seconds"]
    assert 1000 < seconds < 1100 if goes_on else 0 < seconds < 100
    assert not list(out.rglob("checkpoint-*"))
    if goes_on:
        assert compare(flags, tmp_path / "whole") == 0  # control: all in one run
        assert same_masks("vib", out, tmp_path / "whole")


@pytest.mark.parametrize("damage", ["", "{}", "[1]"])
def test_a_checkpoint_that_does_not_say_whose_it_is_is_not_gone_on_from(damage, tmp_path, monkeypatch):
    monkeypatch.setattr(kept_gates, "last_checkpoint", lambda folder: folder / "checkpoint-2")
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-2" / "comparison.json").write_text(damage)
    kept = KeptGates(tmp_path, {"seed": 0})
    assert kept.checkpoint is None and kept.seconds == 0
