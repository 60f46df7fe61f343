"""``--dim_multiple auto``: what is timed, what is taken, and where the number goes."""

import pytest
import torch
import yaml
from support import tiny

from tvaprune import describe
from tvaprune.cli import run_command, run_verb
from tvaprune.errors import InputError
from tvaprune.flags.settings import PruneSettings
from tvaprune.measure.linears import relative_times
from tvaprune.models.shape import ModelShape
from tvaprune.plan import multiples
from tvaprune.plan.multiples import CANDIDATES, choose, fastest_multiple, linears_at

SHAPE = ModelShape.uniform(4096, 32, 32, 8, 128, 14336, 32000)
CPU = torch.device("cpu")


@pytest.mark.parametrize("multiple", CANDIDATES)
def test_what_is_timed_has_the_multiple_and_about_the_target(multiple):
    sizes = linears_at(SHAPE, 0.5, multiple)
    widths = {outputs for inputs, outputs in sizes if outputs > 4096}
    assert widths and all(width % multiple == 0 for width in widths)
    assert sizes[0][0] % multiple == 0
    dense = linears_at(SHAPE, 0.0, 1)
    assert sum(a * b for a, b in sizes) / sum(a * b for a, b in dense) == pytest.approx(0.5, abs=0.1)
    assert multiple > 1 or any(width % 2 for width in widths)  # control: off, they are odd


def test_a_coarser_multiple_must_be_worth_it():
    assert choose({1: 1.0, 8: 0.9, 64: 0.89, 128: 0.89}) == 8
    assert choose({1: 1.0, 8: 0.9, 64: 0.8, 128: 0.79}) == 64
    assert choose({1: 1.0, 8: 1.1}) == 1


def test_times_are_by_parameter_and_relative():
    sizes = {1: [(64, 64)], 8: [(512, 512)]}
    times = relative_times(sizes, 16, CPU, torch.float32)
    assert times[1] == 1.0 and 0 < times[8] < 1  # one call of 64 x 64 is mostly the call
    number, line = fastest_multiple(ModelShape.uniform(64, 2, 4, 2, 16, 128, 50), 0.5, CPU, torch.float32)
    assert number in CANDIDATES and line.startswith("--dim_multiple auto: ")  # which is the quickest is the machine's


@pytest.mark.parametrize(("times", "best", "told"), [({1: 1.0, 8: 1.07}, 1, "0 ("), ({1: 1.0, 8: 0.5}, 8, "8 (")])
def test_no_multiple_is_told_as_0(times, best, told, monkeypatch):
    monkeypatch.setattr(multiples, "relative_times", lambda *arguments: times)
    number, line = fastest_multiple(ModelShape.uniform(64, 2, 4, 2, 16, 128, 50), 0.5, CPU, torch.float32)
    assert number == best and line.startswith(f"--dim_multiple auto: {told}")


def test_a_miniature_has_few_choices(monkeypatch):
    seen = {}
    monkeypatch.setattr(multiples, "relative_times", lambda choices, *rest: seen.update(choices) or {1: 1.0, 8: 0.5})
    best, line = fastest_multiple(ModelShape.uniform(36, 2, 4, 2, 16, 52, 50), 0.5, CPU, torch.float32)
    assert set(seen) == {1, 8} and best == 8 and line.startswith("--dim_multiple auto: 8 (")


def test_the_number_goes_into_the_record_the_recipe_and_the_plan(make_model, tmp_path, monkeypatch, capsys):
    times = {1: 1.0, 8: 0.5}
    monkeypatch.setattr(multiples, "relative_times", lambda *arguments: dict(times))
    tiny.save_checkpoint(make_model("llama"), tmp_path / "model")
    text = tiny.write_text(tmp_path / "text.txt")
    sizes = (
        "--block_size 16 --ctx_length 16 --max_eval_samples 4 --max_train_samples 12 --per_device_train_batch_size 4"
    )
    steps = "--eval_steps 2 --save_steps 1 --speed_batches 0 --use_cpu --weight_update fold --dim_multiple auto"
    flags = ["--model_name_or_path", tmp_path / "model", "--dataset_name", text, *sizes.split(), *steps.split()]
    flags, out = [str(flag) for flag in flags], tmp_path / "out"
    run_verb("prune", [*flags, "--output_dir", str(out)])
    assert "--dim_multiple auto: 8 (" in capsys.readouterr().out
    (record,) = (out / "best").glob("mask_info_*.json")
    assert tiny.read_json(record)["rules"]["dim_multiple"] == 8
    assert tiny.read_json(out / "plan.json")["dim_multiple"] == 8
    assert yaml.safe_load((out / "recipe.yaml").read_text())["dim_multiple"] == 8
    times[8] = 2.0  # now another would be taken
    run_verb("prune", [*flags, "--output_dir", str(out), "--resume_from_checkpoint", "True"])
    assert tiny.read_json(out / "plan.json")["dim_multiple"] == 8
    run_verb("prune", [*flags, "--output_dir", str(tmp_path / "new")])  # control
    assert tiny.read_json(tmp_path / "new" / "plan.json")["dim_multiple"] == 1


def test_other_words_are_refused(capsys):
    with pytest.raises(InputError, match="--dim_multiple is many: give a whole number of 0 or more, or auto"):
        PruneSettings(dim_multiple="many")
    assert PruneSettings(dim_multiple="64").dim_multiple == 64
    with pytest.raises(InputError, match="--dim_multiple auto: is measured"):
        describe("mask.pkl", "model", PruneSettings(dim_multiple="auto"))
    with pytest.raises(InputError, match="one number must serve all cells"):
        run_verb("compare", ["--dim_multiple", "auto"])
    assert run_command(lambda: run_verb("prune", ["--model_name_or_path", "m", "--dim_multiple", "-8"])) == 2
    assert "--dim_multiple is -8" in capsys.readouterr().err
