"""The comparison: the whole command on a tiny model."""

import json
import math
import re
import shutil
from dataclasses import fields
from statistics import stdev
from types import SimpleNamespace

import pytest
import torch
from support import tiny
from support.comparison import compare, small_grid

from tvaprune.files import prepare_folder
from tvaprune.flags.arguments import IN_NO_CELL, OF_CELLS, Arguments, parse_comparison
from tvaprune.flags.settings import CompareSettings
from tvaprune.flags.verbs import VERBS
from tvaprune.locks import holding_folders
from tvaprune.models.rotate import Rotation
from tvaprune.outputs import OF_A_COMPARISON, wrote
from tvaprune.run import Run
from tvaprune.study import cells
from tvaprune.study.cells import Measurement
from tvaprune.study.grid import Cell, Grid, as_given


@pytest.fixture(scope="module")
def flags(make_model, tmp_path_factory):
    return small_grid(make_model, tmp_path_factory.mktemp("compare"))


@pytest.fixture(scope="module")
def compared(flags, tmp_path_factory):
    output = tmp_path_factory.mktemp("compared") / "out"
    result = tiny.run("-m tvaprune compare", *flags, "--output", output)
    assert result.returncode == 0, result.stderr
    return output, result


def files_of(output):
    return sorted(str(path.relative_to(output)) for path in output.rglob("*") if path.is_file())


def names(methods=("magnitude", "vib")):
    return [f"{method}-{sparsity}-0" for method in methods for sparsity in (0.3, 0.5)]


def test_it_writes_exactly_these_files(compared):
    output, result = compared
    own = [name for name in files_of(output) if "/gates/" not in name]
    cells = [f"{m}-{u}-{s}-0.json" for m in ("magnitude", "vib") for u in ("fold", "none", "refit") for s in (0.3, 0.5)]
    masks = [f"{name}.{kind}" for name in names() for kind in ("json", "pkl")]
    turned = {tiny.read_json(path)["rotation"] for path in (output / "tiny" / "masks").glob("vib-*.json")}
    masks += [f"rotation_{digest}.safetensors" for digest in turned]
    assert len(turned) == 1 and own == sorted(
        ["compare.json", "compare.md", "compare.png", "report.html", "tiny/dense.json"]
        + [f"tiny/cells/{name}" for name in cells]
        + [f"tiny/masks/{name}" for name in masks]
    )
    assert sorted(path.name for path in (output / "tiny" / "gates").iterdir()) == names(["vib"])
    assert "tiny magnitude fold 0.5 seed 0: " in result.stdout  # a line for each cell
    assert (output / "compare.md").read_text() in result.stdout


@pytest.mark.parametrize("name", OF_A_COMPARISON)
def test_a_users_file_of_a_comparisons_name_stays(name, compared, flags, tmp_path, command):
    assert wrote(compared[0] / name)  # control: one of ours is replaced
    (tmp_path / name).write_text("mine")
    code, _, error = command(flags, tmp_path)
    assert code == 2 and f"holds {name}, which this tool did not write; move it away" in error
    assert files_of(tmp_path) == [name] and (tmp_path / name).read_text() == "mine"


def test_a_cell_holds_what_repeats_it_and_what_was_measured(compared, flags):
    output, _ = compared
    dense, windows = (tiny.read_json(output / "tiny" / "dense.json")[name] for name in ("perplexity", "window_losses"))
    for path in (output / "tiny" / "cells").iterdir():
        cell = tiny.read_json(path)
        assert abs(cell["sparsity"] - cell["target_sparsity"]) < 0.05
        (text,) = cell["other_texts"]
        assert {name: value["dense"] for name, value in cell["perplexity"].items()} == dense
        assert all(value["pruned"] != value["dense"] for value in cell["perplexity"].values())
        for name, value in cell["perplexity"].items():
            error = value["stderr"]
            assert error["dense"] == pytest.approx(value["dense"] * stdev(windows[name]) / math.sqrt(6))
            apart = math.hypot(*(error[which] / value[which] for which in ("dense", "pruned")))
            assert error["gap"] > 0 and error["gap"] != pytest.approx(apart, rel=1e-4)  # it is paired by window
        assert set(cell["windows"].values()) == {6}
        assert cell["block_size"] == 16 and cell["calibration_samples"] == 8 and cell["split"] == "test"
        assert cell["flags"] == ["--dim_multiple", "4", "--use_cpu"]
        assert min(*cell["seconds"].values(), *cell["peak_memory"].values()) > 0
        assert {"hardware", "versions", "command", "widths", "method", "weight_update", "seed"} <= set(cell)
        assert cell["zero_shot"] is None
    updates = ("none", "fold", "refit")
    vib = [tiny.read_json(output / "tiny" / "cells" / f"vib-{u}-0.5-0.json")["perplexity"][text] for u in updates]
    assert len({value["pruned"] for value in vib}) == 3  # the update is applied
    magnitude = [tiny.read_json(output / "tiny" / "cells" / f"magnitude-{u}-0.5-0.json") for u in ("none", "fold")]
    assert magnitude[0]["perplexity"] == magnitude[1]["perplexity"]  # control: the means of a score are one


def test_models_that_a_refit_left_on_the_cpu_compute_where_the_run_does(make_model):
    """The unpruned one, and its copy in the basis of a mask: the meta device stands for the GPU."""
    args = SimpleNamespace(training=SimpleNamespace(device=torch.device("meta")), source=SimpleNamespace(shard=False))
    measurement, rotation = Measurement.__new__(Measurement), Rotation(torch.eye(36))
    measurement.grid = SimpleNamespace(arguments=lambda cell, choosing: args)
    measurement.base = Run(args, make_model(), None)
    measurement._last = Run(args, make_model(), None, rotation=rotation)
    run = measurement._run(Cell("vib", "refit", 0.5, 0))
    turned = measurement._turned(run, rotation)
    assert run.model is measurement.base.model and run.model.device.type == "meta"
    assert turned.model is measurement._last.model is not run.model and turned.model.device.type == "meta"


def test_masks_that_were_learned_before_serve_in_place_of_gates(compared, flags, tmp_path, command):
    output, _ = compared
    given = tmp_path / "given"  # as a run of prune leaves them: the file, its rotation, its record
    shutil.copytree(output / "tiny" / "masks", given)
    for sparsity in (0.3, 0.5):
        record = tiny.read_json(given / f"vib-{sparsity}-0.json")
        kept = {"target_sparsity": sparsity, "rotation": record["rotation"]}
        kept |= {"train_blocks": 1200, "block_size": 256, "step": 600} if sparsity == 0.5 else {}
        (given / f"vib-{sparsity}-0.json").write_text(json.dumps(kept))
    masks = ["--masks", *(given / f"vib-{sparsity}-0.pkl" for sparsity in (0.5, 0.3))]
    code, out, error = command([*flags, *masks, "--methods", "vib", "--weight_updates", "fold"], tmp_path / "out")
    assert code == 0, error
    assert not any("masks/" in name or "gates/" in name for name in files_of(tmp_path / "out"))
    for sparsity in (0.3, 0.5):
        name = f"tiny/cells/vib-fold-{sparsity}-0.json"
        before, cell = tiny.read_json(output / name), tiny.read_json(tmp_path / "out" / name)
        assert cell["perplexity"] == before["perplexity"] and cell["widths"] == before["widths"]
        assert cell["seconds"]["choosing"] is None and before["seconds"]["choosing"] > 0
        assert cell["mask"] == f"vib-{sparsity}-0.pkl"
    told = "the gates of vib-0.3-0.pkl on what nobody recorded, the gates of vib-0.5-0.pkl on 1200 blocks of 256 tokens"
    assert f": {told} as they were after 600 steps, scores and refits on 8 blocks. " in out
    assert "gates on 16 blocks" not in out and "gates on 16 blocks" in (output / "compare.md").read_text()
    assert "| 0.5 | vib |" in out and " | - | " in out.split("| 0.5 | vib |")[1].split("\n")[0]
    line = refusal(command, [*flags, *masks[:2]], tmp_path / "other")
    assert "--sparsities asks for 0.3 too: give a mask of each" in line
    for change, words in (
        (["--models", flags[1], "elsewhere"], "--models has 2"),
        (["--methods", "magnitude"], "--masks: are vib's, of one model; --methods is magnitude"),
        ([*masks, masks[-1]], "are both of target_sparsity 0.3: give one"),
        (["--masks", tmp_path / "none.pkl"], f"--masks {tmp_path / 'none.pkl'}: there is no such file"),
        (
            ["--models", tiny.ROOT / "mistral_saves_tva" / "mini_mistral"],
            "give the mask of this model",
        ),
    ):
        assert words in refusal(command, [*map(str, flags), *masks, *change], tmp_path / "other")
    assert not (tmp_path / "other" / "tiny").exists()


def times(folder):
    return {name: (folder / name).stat().st_mtime_ns for name in files_of(folder)}


@pytest.fixture
def command(capsys):
    """Returns a function that runs the command in this process: flags, output -> (exit code, stdout, stderr)."""

    def run(flags, output):
        code = compare(flags, output)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_an_interrupted_comparison_goes_on_and_a_finished_one_computes_nothing(compared, flags, command):
    output, _ = compared
    lost = output / "tiny" / "cells" / "magnitude-fold-0.5-0.json"
    before, content = times(output / "tiny"), tiny.read_json(lost)
    lost.unlink()
    code, out, error = command(flags, output)
    assert code == 0, error
    assert out.count("seed 0: ") == 1
    after = times(output / "tiny")
    assert [name for name in after if after[name] != before[name]] == ["cells/magnitude-fold-0.5-0.json"]
    assert tiny.read_json(lost)["perplexity"] == content["perplexity"]
    code, out, error = command(flags, output)
    assert code == 0 and "seed 0: " not in out
    assert times(output / "tiny") == after


def test_cells_of_before_there_were_errors_are_read_as_they_are(compared, flags, command, tmp_path):
    output = shutil.copytree(compared[0], tmp_path / "out")
    for path in (output / "tiny" / "cells").iterdir():
        cell = tiny.read_json(path)
        for value in cell["perplexity"].values():
            del value["stderr"]
        path.write_text(json.dumps(cell))
    dense, missing = output / "tiny" / "dense.json", output / "tiny" / "cells" / "magnitude-fold-0.5-0.json"
    before = tiny.read_json(dense)
    dense.write_text(json.dumps({name: value for name, value in before.items() if name != "window_losses"}))
    code, out, error = command(flags, output)
    assert code == 0 and " ± " not in out and "±: " not in out, error
    missing.unlink()  # of a cell that is measured now something is known, for which the dense model is measured anew
    code, out, error = command(flags, output)
    assert code == 0, error
    assert out.count("seed 0: ") == 1 and tiny.read_json(dense)["window_losses"] == before["window_losses"]
    row = next(line for line in out.splitlines() if line.startswith("| 0.5 | magnitude"))
    assert row.count(" ± ") == 2 and "±: the standard error over the windows" in out  # on both texts, its update alone
    assert re.search(r"Dense perplexity: first\.txt \d+\.\d\d ± ", out)
    page = (output / "report.html").read_text()
    assert page.count(" ± ") == 2 + 2 + 2 and "±: the standard error over the windows" in page  # dense, cell, its dots


def refusal(command, flags, output):
    code, _, error = command(flags, output)
    assert code == 2
    (line,) = (line for line in error.splitlines() if line.startswith("tvaprune: "))
    return line


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"model": ', "not a file of this comparison (JSONDecodeError); remove it, or give another --output"),
        ("[1, 2]", "not a file of this comparison (TypeError)"),
        ('{"model": "another"}', "not a file of this comparison (KeyError)"),
    ],
)
def test_a_broken_cell_is_refused_in_one_line(text, words, flags, tmp_path, command):
    path = tmp_path / "tiny" / "cells" / "vib-none-0.3-0.json"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    line = refusal(command, flags, tmp_path)
    assert f"{path}: " in line and words in line
    assert path.read_text() == text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("--max_eval_samples", 5), "made with --max_eval_samples 6; give the same flags, or another --output"),
        (("--other_texts", "python_docs"), "made with --other_texts "),
        (("--dim_multiple", 8), "made with --dim_multiple 4 --use_cpu; give the same flags"),
    ],
)
def test_cells_of_other_settings_are_refused(change, words, compared, flags, command):
    assert words in refusal(command, [*flags, *change], compared[0])


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("other_texts", ["a", "b"], "--other_texts a b"),
        ("model", "a", "--models a"),
        ("mask", "mask_info_1.pkl", "--masks mask_info_1.pkl"),
        ("flags", [], "no flags of prune"),
        ("zero_eval_limit", None, "no --zero_eval_limit"),
        ("trained_to", 0.5, "0.5 the largest of --sparsities"),
    ],
)
def test_a_files_setting_is_told_as_its_flag(name, value, words):
    assert as_given(name, value) == words


@pytest.mark.parametrize("left", ["cells/magnitude-none-0.3-0.json", "dense.json"])
def test_other_settings_than_those_of_an_earlier_run_are_refused_before_units_are_chosen(
    left, compared, flags, command, tmp_path
):
    """Their masks would stand in the way of the right settings."""
    (tmp_path / "tiny" / left).parent.mkdir(parents=True)
    shutil.copy(compared[0] / "tiny" / left, tmp_path / "tiny" / left)
    line = refusal(command, [*flags, "--methods", "random", "--max_eval_samples", 5], tmp_path)
    assert f"{left}: made with --max_eval_samples 6; give the same flags" in line
    assert files_of(tmp_path) == [f"tiny/{left}"]


def test_cells_of_a_text_that_was_written_anew_are_not_joined(compared, flags, command, tmp_path):
    output, second = tmp_path / "out", flags[flags.index("--other_texts") + 1]
    shutil.copytree(compared[0], output)
    before = second.read_text()
    more = (*flags, "--methods", "magnitude", "--weight_updates", "none", "--seeds", 0, 1, "--sparsities", 0.3)
    try:
        second.write_text(before.replace(before.split()[0], "other"))
        line = refusal(command, more, output)
        assert "magnitude-none-0.3-0.json: made when its texts held something else; give another --output" in line
    finally:
        second.write_text(before)
    assert command(more, output)[0] == 0  # control
    assert tiny.read_json(output / "tiny" / "cells" / "magnitude-none-0.3-1.json")["contents"]["texts"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("--weight_updates", "melt"), "invalid choice: 'melt'"),
        (("--no_such_flag", 1), "no_such_flag"),
        (("--models", "a/tiny", "b/tiny"), "two have the same name"),
        (("--models", "nowhere"), "--models nowhere: cannot be loaded"),
        (("--dataset", "nope.txt"), "--dataset nope.txt: neither a file or folder nor one of python_docs"),
        (("--other_texts", "nope.txt"), "--other_texts nope.txt: neither a file or folder nor one of"),
        (("--dataset", "python_docs", "--other_texts", "python_docs"), "is the --dataset too"),
        (("--sparsities", 1.5), "--sparsities is 1.5: give a number between 0 and 1"),
        (("--seeds", 0, 1, 0), "--seeds 0 1 0: one is given twice; give each once"),
        (("--methods", "flap", "flap"), "--methods flap flap: one is given twice"),
        (("--seeds", -1), "--seeds is -1: give a whole number from 0"),
        (("--methods", "melt"), "--methods melt: give some of vib"),
        (("--dim_multiple", 53), "--dim_multiple 53: no width of the model is as large, the widest is 52"),
        (("--lora_r", 4), "--lora_r acts in finetune, not in prune"),
        (("--save_pruned", "narrow"), "--save_pruned: does nothing in a comparison, which saves tables alone"),
        (("--protocol", "wikitext2-2048"), "--protocol: does nothing in a comparison"),
        (("--zero_eval_sparsities", 0.5, "--zero_eval_tasks", "tva_nme"), "tva_nme"),
    ],
)
def test_wrong_flags_are_refused_before_the_work_begins(change, words, flags, tmp_path, command):
    assert words in refusal(command, [*flags, *change], tmp_path)
    assert files_of(tmp_path) == []


@pytest.mark.parametrize("output", ["a/tiny", "a"])
def test_nothing_is_written_into_the_model_s_own_folder(output, flags, tmp_path, command):
    model = shutil.copytree(flags[1], tmp_path / "a" / "tiny")
    before = files_of(tmp_path)
    line = refusal(command, ["--models", model, *flags[2:]], tmp_path / output)
    assert line.startswith(f"tvaprune: --output {tmp_path}/a/tiny: is the model of --models {model}")
    assert files_of(tmp_path) == before != []


def test_a_wrong_task_is_told_before_the_model_is_loaded(flags, tmp_path, command, monkeypatch):
    monkeypatch.setattr(cells.Run, "load", lambda *_, **__: pytest.fail("loaded"))
    tasks = ("--zero_eval_sparsities", 0.5, "--zero_eval_tasks", "tva_nme")
    assert "--zero_eval_tasks tva_nme: no such task" in refusal(command, [*flags, *tasks], tmp_path)


def test_a_model_that_is_not_there_ends_it_before_the_first_is_measured(flags, tmp_path, command):
    models = [flags[1], "nowhere"]
    line = refusal(command, ["--models", *models, *flags[2:]], tmp_path)
    assert line.startswith("tvaprune: --models nowhere: cannot be loaded")
    assert files_of(tmp_path) == []


def test_a_comparison_may_have_no_other_text(tmp_path):
    assert parse_comparison(["--other_texts", "--output", str(tmp_path)]).other_texts == []
    assert parse_comparison(["--output", str(tmp_path)]).other_texts == ["package_readmes"]  # control


def test_nothing_that_a_cell_is_can_be_said_to_all_cells_at_once(flags, tmp_path, monkeypatch):
    settings = parse_comparison([*map(str, flags), "--output", str(tmp_path)])
    grid = Grid(settings, settings.models[0])
    monkeypatch.setattr(Arguments, "parse", lambda flags, verb: flags)
    words = grid.arguments(Cell("vib", "fold", 0.3, 0))
    names = {word.removeprefix("--") for word in words[: len(words) - len(settings.flags)] if word.startswith("--")}
    own = {entry.name for entry in fields(settings)}
    assert names - own - set(OF_CELLS) == {"per_device_train_batch_size"}  # which users may change


@pytest.mark.parametrize("flag", IN_NO_CELL)
def test_what_does_nothing_in_a_cell_is_no_flag_of_its_own(flag):
    assert flag not in {entry.name for entry in fields(CompareSettings)} | set(OF_CELLS)
    assert flag in (*VERBS["prune"].first, *VERBS["prune"].expert, *VERBS["prune"].training)


def test_the_tasks_that_are_named_are_scored(flags, tmp_path, command, made_up_python_docs):
    named = ("--zero_eval_tasks", "tva_name", "--zero_eval_limit", 3, "--zero_eval_sparsities", 0.5)
    one = ("--methods", "magnitude", "--weight_updates", "fold", "--sparsities", 0.5, "--block_size", 64, *named)
    code, out, error = command([*flags, *one], tmp_path)
    assert code == 0, error
    (scored,) = (tiny.read_json(path)["zero_shot"] for path in (tmp_path / "tiny" / "cells").iterdir())
    assert [[*scored[of]["tasks"]] for of in ("dense", "pruned")] == [["tva_name"]] * 2
    assert scored["pruned"]["num_examples"] == 3 and "average accuracy of tva_name, 1 seed" in out


def test_a_task_without_its_data_ends_the_comparison_before_any_work(
    flags, tmp_path, command, monkeypatch, made_up_python_docs
):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    named = ("--zero_eval_tasks", "tva_name", "arc_easy", "--zero_eval_limit", 3, "--zero_eval_sparsities", 0.5)
    output = tmp_path / "out"
    line = refusal(command, [*flags, "--block_size", 64, *named, "--data_dir", tmp_path / "none"], output)
    assert "--zero_eval_tasks: arc_easy could not run" in line and not list(output.rglob("*.pkl"))


def test_two_comparisons_do_not_write_into_one_folder(flags, tmp_path, command):
    with holding_folders():
        prepare_folder("output", tmp_path, may_hold_files=True)
        assert "is in use by process" in refusal(command, flags, tmp_path)
