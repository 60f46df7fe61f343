"""Whole commands on a tiny checkpoint: a run knows whose it is, and takes nothing of the user's away."""

import errno
import json
import os
import re
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from support import tiny

import lora_ft_vib
from tvaprune.checkpoints import CheckpointedTrainer, last_checkpoint
from tvaprune.cli import main, run_command, run_verb
from tvaprune.files import MARK_NAME
from tvaprune.locks import lock_folder
from tvaprune.models.shape import shape_of
from tvaprune.outputs import BESIDE_RESULTS, OF_GATES, OF_TUNING, wrote
from tvaprune.plan.masks import load_masks, save_masks
from tvaprune.report import plots

RUN = (
    "--do_train", "--block_size", 16, "--ctx_length", 16, "--max_eval_samples", 8, "--max_train_samples", 24,
    "--per_device_train_batch_size", 4, "--speed_batches", 0, "--use_cpu", "--dim_multiple", 4,
    "--weight_update", "fold", "--disable_tqdm", True,
)  # fmt: skip
GATES_ALONE = ("--save_steps", 2, "--eval_steps", 2, "--logging_steps", 1)
TUNE = ("--gradient_accumulation_steps", 1, "--lora_r", 2, "--num_train_epochs", 1)
RESUME = ("--resume_from_checkpoint", "True")
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def models(make_model, make_masks, tmp_path_factory):
    """A model, another of the same shape, its mask, a text and another."""
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("model", "other")):
        tiny.save_checkpoint(make_model("llama", seed=seed), folder / name)
    save_masks(make_masks(shape_of(make_model("llama").config)), folder / "mask_info_1.0.pkl")
    words = tiny.write_text(folder / "text.txt").read_text()
    (folder / "other.txt").write_text(words[::-1])
    return folder


@pytest.fixture(scope="module")
def one_shot(models):
    return ("--model_name_or_path", models / "model", "--dataset_name", models / "text.txt", *RUN)


@pytest.fixture(scope="module")
def base(one_shot):
    return (*one_shot, *GATES_ALONE)


@pytest.fixture(scope="module")
def tune(base, models):
    return (*base, *TUNE, "--mask_loc", models / "mask_info_1.0.pkl")


def in_this_process(*flags):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["lora_ft_vib.py", *map(str, flags)])
        return run_command(lora_ft_vib.main)


@pytest.fixture(scope="module")
def gates(base, tmp_path_factory):
    """The output of one gate training."""
    output = tmp_path_factory.mktemp("gates") / "out"
    assert in_this_process(*base, "--output_dir", output) == 0
    return output


@pytest.fixture(scope="module")
def tuned(tune, tmp_path_factory):
    """The output of one fine-tuning."""
    output = tmp_path_factory.mktemp("tuned") / "out"
    assert in_this_process(*tune, "--output_dir", output) == 0
    return output


def tree(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def copy(folder, target):
    return shutil.copytree(folder, target / "out")


def mask_of(output):
    (path,) = (output / "best").glob("mask_info_*.pkl")
    return path.name, [*load_masks(path).log_variance, *load_masks(path).mu]


def same_mask(first, second):
    (name, values), (other_name, others) = mask_of(first), mask_of(second)
    return name == other_name and all(torch.equal(a, b) for a, b in zip(values, others, strict=True))


OTHERS = [
    (("--model_name_or_path", "other"), r"--model_name_or_path \S*model \[\w{8}\], not \S*other \[\w{8}\]"),
    (("--dataset_name", "other.txt"), r"--dataset_name \S*text.txt \[\w{8}\], not \S*other.txt \[\w{8}\];"),
    (("--block_size", 12), "--block_size 16, not 12;"),
    (("--max_train_samples", 20), "--max_train_samples 24, not 20;"),
    (("--distill", False), "--distill True, not False;"),
    (("--seed", 3), "--seed 42, not 3;"),
    (("--eval_steps", 1), "--eval_steps 2, not 1.0;"),
    (("--dtype", "bfloat16"), "--dtype float32, not bfloat16;"),
]
OTHER_GATES = [
    (("--dim_multiple", 2), "--dim_multiple 4, not 2;"),
    (("--uniform", True), "--uniform False, not True;"),
    (("--vib_learning_rate", 0.05), "--vib_learning_rate 0.1, not 0.05;"),
    (("--lagrangian_warmup_epochs", 0.5), "--lagrangian_warmup_epochs 2 steps, not 3 steps;"),
    (("--beta", 4), "--beta 10.0, not 4.0;"),
]
OTHER_TUNING = [
    (("--learning_rate", 1e-3), "--learning_rate 0.0001, not 0.001;"),
    (("--lora_dropout", 0.5), "--lora_dropout 0.05, not 0.5;"),
    (("--distill_ce_loss_alpha", 1), "--distill_ce_loss_alpha 0.01, not 1.0;"),
    (("--num_train_epochs", 2), "--num_train_epochs 1.0, not 2.0;"),
]


def refused_elsewhere(command, flags, other, words, output, models, tmp_path):
    """Goes on from a finished run's checkpoint with a flag that differs, and looks at the refusal and the folder."""
    output = copy(output, tmp_path)
    before = tree(output)
    name, value = other
    value = models / value if str(value).startswith("other") else value
    code, _, error = command(*flags, name, value, "--output_dir", output, *RESUME)
    line = tiny.refusal(code, error)
    assert re.search(f"is the checkpoint of a run with {words}", line), line
    after = tree(output)
    assert {path: after.get(path) for path in before} == before


@pytest.mark.parametrize(("other", "words"), OTHERS + OTHER_GATES)
def test_gates_go_on_only_as_they_began(other, words, gates, base, models, tmp_path, command):
    refused_elsewhere(command, base, other, words, gates, models, tmp_path)


@pytest.mark.parametrize(("other", "words"), OTHERS + OTHER_TUNING)
def test_a_fine_tuning_goes_on_only_as_it_began(other, words, tuned, tune, models, tmp_path, command):
    refused_elsewhere(command, tune, other, words, tuned, models, tmp_path)


def test_a_model_and_a_text_are_known_by_what_they_hold_and_not_by_their_path(gates, base, models, tmp_path, command):
    """And what changes no result may differ."""
    output = copy(gates, tmp_path)
    moved = shutil.copytree(models / "model", tmp_path / "moved"), shutil.copy(models / "text.txt", tmp_path / "t.txt")
    flags = ("--model_name_or_path", moved[0], "--dataset_name", moved[1], "--save_steps", 3, "--logging_steps", 2)
    code, _, error = command(*base, *flags, "--output_dir", output, *RESUME)
    assert code == 0, error
    assert same_mask(gates, output)


@pytest.mark.parametrize("asked", ["True", "checkpoint-2"])
def test_one_shot_scores_leave_a_gate_training_alone(asked, gates, one_shot, tmp_path, command):
    output = copy(gates, tmp_path)
    asked = asked if asked == "True" else output / asked
    flags = ("--prune_method", "flap", "--output_dir", output, "--resume_from_checkpoint", asked)
    code, _, error = command(*one_shot, *flags)
    assert "--resume_from_checkpoint would do nothing without --prune_method vib" in tiny.refusal(code, error)
    assert tree(output) == tree(gates)


@pytest.mark.parametrize("method", ["vib", "random"])
def test_a_better_mask_of_an_earlier_run_is_no_rival_and_goes(method, gates, base, one_shot, tmp_path, command):
    """Not even one that says that it is of this run."""
    output = copy(gates, tmp_path)
    (mask,) = (output / "best").glob("*.pkl")
    for suffix in (".pkl", ".json"):
        mask.with_suffix(suffix).rename(output / "best" / f"mask_info_0.5{suffix}")
    flags = ("--prune_method", method, "--overwrite_output_dir")
    code, _, error = command(*(base if method == "vib" else one_shot), *flags, "--output_dir", output)
    assert code == 0, error
    masks = [path.name for path in (output / "best").glob("mask_info_*")]
    assert len(masks) == 2 and "mask_info_0.5.pkl" not in masks
    assert same_mask(gates, output) == (method == "vib")


def test_a_best_folder_behind_a_link_is_not_touched(gates, base, tmp_path, command):
    output = copy(gates, tmp_path)
    (output / "best").rename(tmp_path / "archive")
    (output / "best").symlink_to(tmp_path / "archive")
    before = tree(tmp_path / "archive")
    code, _, error = command(*base, "--output_dir", output, "--overwrite_output_dir")
    assert "its best is a symbolic link" in tiny.refusal(code, error)
    assert tree(tmp_path / "archive") == before


def test_a_mask_that_cannot_be_removed_ends_the_run(gates, base, tmp_path, command, monkeypatch):
    output = copy(gates, tmp_path)
    (output / "best" / "mask_info_0.5.pkl").mkdir()
    code, _, error = command(*base, "--output_dir", output, "--overwrite_output_dir")
    assert "mask_info_0.5.pkl: an earlier mask cannot be removed" in tiny.refusal(code, error)


@pytest.mark.parametrize(
    ("kind", "flag"),
    [
        ("gates", ("--report_to", "comet_ml")),
        ("tuned", ("--report_to", "comet_ml")),
        ("tuned", ("--optim", "adamw_bnb_8bit")),
    ],
)
def test_an_earlier_result_stays_where_the_new_run_cannot_begin(kind, flag, request, tmp_path, command):
    flags = request.getfixturevalue("base" if kind == "gates" else "tune")
    output = copy(request.getfixturevalue(kind), tmp_path)
    before = tree(output)
    code, _, error = command(*flags, *flag, "--output_dir", output, "--overwrite_output_dir")
    tiny.refusal(code, error)
    assert tree(output) == before


@pytest.mark.parametrize("kind", ["base", "tune"])
def test_somebodys_trainer_folder_keeps_its_checkpoints(kind, request, tmp_path, command):
    output = tmp_path / "out"
    (output / "checkpoint-500").mkdir(parents=True)
    (output / "checkpoint-500" / "trainer_state.json").write_text("{}")
    flags = (*request.getfixturevalue(kind), "--output_dir", output, "--overwrite_output_dir")
    code, _, error = command(*flags)
    assert f"checkpoint-500 is not of this tool (no {MARK_NAME} in it); move it away" in tiny.refusal(code, error)
    assert [path.name for path in output.rglob("*")] == ["checkpoint-500", "trainer_state.json"]


ONE_SHOT = ("--prune_method", "magnitude")


@pytest.mark.parametrize(
    ("earlier", "later", "flags", "left"),
    [
        ("gates", "tune", (), OF_TUNING),
        ("gates", "tune", ("--mask_loc", "best"), (*OF_GATES, *OF_TUNING)),  # of the mask that it begins with
        ("gates", "one_shot", ONE_SHOT, ()),
        ("gates", "one_shot", (*ONE_SHOT, "--target_sparsity", 0.3, 0.5), ()),
        ("tuned", "one_shot", ONE_SHOT, ()),
        ("tuned", "base", (), OF_GATES),
        ("tuned", "base", ("--target_sparsity", 0.3, 0.5), OF_GATES),
    ],
)
def test_overwriting_leaves_no_curve_of_another_run(earlier, later, flags, left, request, tmp_path, command):
    output = copy(request.getfixturevalue(earlier), tmp_path)
    masks = sorted((output / "best").glob("mask_info_*.pkl"))
    if "best" in flags:
        flags = ("--mask_loc", masks[0])
    given = ("--output_dir", output, "--overwrite_output_dir", *flags)
    code, _, error = command(*request.getfixturevalue(later), *given)
    assert code == 0, error
    assert {name for name in (*OF_GATES, *OF_TUNING) if (output / name).exists()} == set(left)
    assert later != "tune" or sorted((output / "best").glob("mask_info_*.pkl")) == masks  # hours of work


@pytest.mark.parametrize("name", ["pruned", "merged", "adapter"])
def test_somebodys_folder_of_a_name_that_we_use_stays(name, tune, tmp_path, command):
    output = tmp_path / "out"
    (output / name).mkdir(parents=True)
    (output / name / "config.json").write_text("{}")
    code, _, error = command(*tune, "--output_dir", output, "--overwrite_output_dir")
    assert "holds config.json, which this tool did not write" in tiny.refusal(code, error)
    assert (output / name / "config.json").read_text() == "{}"


@pytest.mark.parametrize("kind", ["base", "tune"])
@pytest.mark.parametrize(
    ("saved", "words"),
    [
        ("models/model", "is --model_name_or_path"),
        ("models", "holds --model_name_or_path"),
        ("models/model/pruned", "is within --model_name_or_path"),
        ("out", "is --output_dir .*, or holds it"),
    ],
)
def test_save_pruned_is_a_folder_of_its_own(saved, words, kind, models, request, tmp_path, command):
    copied = shutil.copytree(models, tmp_path / "models")
    flags = (*request.getfixturevalue(kind), "--model_name_or_path", copied / "model", "--overwrite_output_dir")
    code, _, error = command(*flags, "--output_dir", tmp_path / "out", "--save_pruned", tmp_path / saved)
    assert re.search(f"--save_pruned .*: {words}", tiny.refusal(code, error))
    assert not (tmp_path / "out").exists() and tree(copied) == tree(models)


def test_a_fine_tuning_does_not_replace_the_model_that_it_is_of(models, one_shot, tmp_path, command):
    """Pruned in steps, the second begins with what the first merged."""
    (tmp_path / "out").mkdir()
    source = shutil.copytree(models / "model", tmp_path / "out" / "merged")
    before = tree(source)
    flags = (*one_shot, *GATES_ALONE, *TUNE, "--mask_loc", models / "mask_info_1.0.pkl", "--overwrite_output_dir")
    code, _, error = command(*flags, "--model_name_or_path", source, "--output_dir", tmp_path / "out")
    assert "merged: is --model_name_or_path" in tiny.refusal(code, error)
    assert tree(source) == before


@pytest.mark.parametrize(
    ("kind", "flags", "places"),
    [
        ("base", ("--output_dir", "{}/model", "--save_loc", "{}/results"), ("model",)),
        ("base", ("--output_dir", "{}", "--save_loc", "{}/results"), ("best",)),
        ("base", ("--output_dir", "{}/out", "--save_loc", "{}/model"), ("model",)),
        ("base", ("--output_dir", "{}", "--target_sparsity", 0.3, 0.5), ("sparsity_0.3", "sparsity_0.5")),
        ("apply", ("--output_dir", "{}/out", "--save_loc", "{}/model"), ("model",)),
        ("tune", ("--output_dir", "{}/out", "--save_loc", "{}/model"), ("model",)),
    ],
)
def test_nothing_is_written_into_the_model_s_own_folder(kind, flags, places, models, request, tmp_path, command):
    mask = ("--do_eval", "--mask_loc", models / "mask_info_1.0.pkl")
    run = (*request.getfixturevalue("one_shot")[:4], *mask) if kind == "apply" else request.getfixturevalue(kind)
    for place in places:
        source = shutil.copytree(models / "model", tmp_path / place)
        before = tree(tmp_path)
        given = (str(flag).format(tmp_path) for flag in flags)
        code, _, error = command(*run, "--model_name_or_path", source, *given, "--overwrite_output_dir")
        assert f"{place}: is the model of --model_name_or_path {source}" in tiny.refusal(code, error)
        assert tree(tmp_path) == before


@pytest.mark.parametrize("kind", ["gates", "tuned"])
def test_a_training_that_is_at_its_end_goes_no_further(kind, models, one_shot, tmp_path, command):
    """As where the disk was full at the cut: four of six steps of an epoch, at a rate that does not fall."""
    tuning = ("--gradient_accumulation_steps", 1, "--lora_r", 2, "--mask_loc", models / "mask_info_1.0.pkl")
    flags = (*one_shot, *GATES_ALONE, *(tuning if kind == "tuned" else ()), "--lr_scheduler_type", "constant",
             "--max_steps", 4, "--output_dir", tmp_path / "out")  # fmt: skip
    assert command(*flags)[0] == 0
    name = "merged/model.safetensors" if kind == "tuned" else "best"
    path = tmp_path / "out" / name
    before = tree(path) if path.is_dir() else path.read_bytes()
    assert last_checkpoint(tmp_path / "out").name == "checkpoint-4"
    code, _, error = command(*flags, *RESUME)
    assert code == 0, error
    assert last_checkpoint(tmp_path / "out").name == "checkpoint-4"
    assert before == (tree(path) if path.is_dir() else path.read_bytes())
    assert "resume_from_checkpoint" not in (tmp_path / "out" / "recipe.yaml").read_text()  # so it repeats the run


@pytest.mark.parametrize("kind", ["gates", "tuned"])
@pytest.mark.parametrize(
    "lost", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "identity.json"]
)
def test_half_a_checkpoint_is_refused_by_name_and_an_older_whole_one_taken(
    kind, lost, request, tmp_path, capsys, command
):
    output = copy(request.getfixturevalue(kind), tmp_path)
    flags = request.getfixturevalue("base" if kind == "gates" else "tune")
    whole, half = sorted(output.glob("checkpoint-*"))[-2:]
    assert last_checkpoint(output) == half  # control
    (half / lost).unlink()
    assert last_checkpoint(output) == whole
    assert f"note: {half} is half a checkpoint (no {lost}) and does not count" in capsys.readouterr().out
    code, _, error = command(*flags, "--output_dir", output, "--resume_from_checkpoint", half)
    assert f"--resume_from_checkpoint {half}: holds no {lost}; give a whole checkpoint" in tiny.refusal(code, error)


def test_a_run_that_ended_before_its_first_checkpoint_begins_anew(gates, base, tmp_path, command):
    output = tmp_path / "out"
    shutil.copytree(gates / "best", output / "best")
    (output / "checkpoint-2").mkdir()
    (output / "checkpoint-2" / MARK_NAME).write_text("{}")
    code, out, error = command(*base, "--output_dir", output, *RESUME)
    assert code == 0, error
    assert "there is no checkpoint in" in out and same_mask(gates, output)


@pytest.mark.parametrize(
    ("verb", "flags"),
    [("finetune", TUNE), ("prune", GATES_ALONE), ("prune", ("--prune_method", "magnitude"))],
)
def test_what_the_user_is_told_at_a_full_disk_begins_anew(verb, flags, tune, one_shot, tmp_path, capsys, monkeypatch):
    """Where it was full before the first checkpoint, and, of scores, at the end."""
    run = tune[: -2 - len(TUNE)] if verb == "finetune" else one_shot
    run = (*(word for word in run if word != "--do_train"), *flags, *(tune[-2:] if verb == "finetune" else ()))

    def ended(*more):
        monkeypatch.setattr(sys, "argv", ["tvaprune", verb, *map(str, (*run, "--output_dir", tmp_path / "out", *more))])
        return main(), capsys.readouterr().err

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(plots, "save_figure", full)
        code, error = ended()
    assert code == 2 and "there is no room on the disk" in error and any((tmp_path / "out").iterdir())
    assert "is not empty" in ended()[1]
    (advice,) = re.findall(r"--\w+_\w+ True|--overwrite_output_dir", error)
    code, error = ended(*advice.split())
    assert code == 0, error


def test_a_folder_of_other_files_is_no_interrupted_run(base, tmp_path, command):
    output = tmp_path / "out"
    output.mkdir()
    (output / "mine.txt").touch()
    code, _, error = command(*base, "--output_dir", output, *RESUME)
    assert "no checkpoint there" in tiny.refusal(code, error)


@pytest.mark.parametrize("kind", ["gates", "tuned"])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_in_a_training_ends_it_and_it_goes_on_bit_for_bit(kind, number, code, request, tmp_path, command):
    flags = (*request.getfixturevalue("base" if kind == "gates" else "tune"), "--output_dir", tmp_path / "out")
    save, saved = CheckpointedTrainer._save_checkpoint, []

    def save_and_signal(self, *args):
        os.kill(os.getpid(), number)  # while a checkpoint is written: it is written to its end
        save(self, *args)
        saved.append(self.state.global_step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CheckpointedTrainer, "_save_checkpoint", save_and_signal)
        found, _, error = command(*flags)
    assert found == code and "interrupted; --resume_from_checkpoint True goes on" in error
    assert saved == [2] and last_checkpoint(tmp_path / "out").name == "checkpoint-2"
    assert not list((tmp_path / "out").rglob(".tvaprune-*"))
    found, _, error = command(*flags, *RESUME)
    assert found == 0, error
    whole = request.getfixturevalue(kind)
    if kind == "gates":
        assert same_mask(whole, tmp_path / "out")
    else:
        weights = [folder / "merged" / "model.safetensors" for folder in (whole, tmp_path / "out")]
        assert weights[0].read_bytes() == weights[1].read_bytes()


def test_a_second_run_into_a_folder_is_refused(gates, base, tmp_path, command):
    output = copy(gates, tmp_path)
    with lock_folder("output_dir", output):
        code, _, error = command(*base, "--output_dir", output, "--overwrite_output_dir")
    assert f"is in use by process {os.getpid()} on" in tiny.refusal(code, error)
    assert tree(output) == tree(gates)


def test_a_mask_or_a_plan_of_other_weights_is_told(gates, models, tmp_path, command):
    (mask,) = (gates / "best").glob("*.pkl")
    for flag, file, what in (("--mask_loc", mask, "mask"), ("--plan", gates / "plan.json", "plan")):
        for name, notes in (("model", 0), ("other", 1)):
            code, out, error = command(
                flag, file, "--model_name_or_path", models / name, "--save_pruned", tmp_path / what / name,
                "--weight_update", "fold", "--use_cpu",
            )  # fmt: skip
            assert code == 0, error
            assert out.count(f"note: the {what} was made of") == notes


def test_results_of_an_earlier_measurement_go_with_overwriting(gates, base, tmp_path, command):
    output = copy(gates, tmp_path)
    results = tiny.read_json(output / "results.json")
    (output / "results.json").write_text(json.dumps(results | {"speed_up": {"per_batch": 3.0}}))
    code, _, error = command(*base, "--output_dir", output, "--overwrite_output_dir")
    assert code == 0, error
    assert "speed_up" not in tiny.read_json(output / "results.json")


@pytest.mark.parametrize("name", BESIDE_RESULTS)
def test_a_users_file_by_the_name_of_one_of_ours_stays(name, gates, tuned, base, tune, models, tmp_path, command):
    own = gates / name if (gates / name).exists() else tuned / name
    assert wrote(own)  # control: one of ours is replaced
    place = tmp_path / "results"
    place.mkdir()
    (place / name).write_bytes(b'{"sketch": "of my own"}')
    apply = (
        "--do_eval", "--model_name_or_path", models / "model", "--dataset_name", models / "text.txt",
        "--mask_loc", next((gates / "best").glob("*.pkl")), "--weight_update", "fold", "--dim_multiple", 4,
        "--block_size", 16, "--ctx_length", 16, "--max_eval_samples", 8, "--speed_batches", 0, "--use_cpu",
    )  # fmt: skip
    for flags in (apply, tune, base, (*apply, "--overwrite_output_dir")):
        code, _, error = command(*flags, "--output_dir", tmp_path / "out", "--save_loc", place)
        words = f"holds {name}, which this tool did not write; move it away, or give another folder"
        assert words in tiny.refusal(code, error)
        assert tree(place) == {Path(name): b'{"sketch": "of my own"}'}


def test_a_users_page_is_no_page_of_ours(gates, tmp_path):
    output = copy(gates, tmp_path)
    assert run_command(lambda: run_verb("report", [str(output)])) == 0  # control: an older one of ours is replaced
    (output / "report.html").write_text("<h1>mine</h1>")
    assert run_command(lambda: run_verb("report", [str(output)])) == 2
    assert (output / "report.html").read_text() == "<h1>mine</h1>"
