"""Whole commands on a tiny checkpoint: what they write, what they print, and what they refuse."""

import math
import pickle
import re
import shutil
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import tiny
from support.folders import edit_config
from support.in_process import run
from transformers import AutoConfig, GPT2Config, GPT2LMHeadModel

from tvaprune.choose.choose import _is_interrupted
from tvaprune.choose.settings import gate_settings
from tvaprune.flags.arguments import Arguments
from tvaprune.models.shape import shape_of
from tvaprune.models.units import PerUnit
from tvaprune.plan.keep_plan import KeepPlan
from tvaprune.plan.masks import load_masks, save_masks
from tvaprune.plan.widths import WidthRules


@pytest.fixture(scope="module")
def pruned(checkpoint, text, tmp_path_factory):
    """The output of one gate training, as a subprocess."""
    output = tmp_path_factory.mktemp("run") / "out"
    flags = ("--max_train_samples", 32, "--per_device_train_batch_size", 4, "--save_steps", 4, "--target_sparsity", 0.4,
             "--logging_steps", 2)  # fmt: skip
    result = tiny.run(
        "tva_prune.py",
        "--model_name_or_path",
        checkpoint,
        "--dataset_name",
        text,
        "--output_dir",
        output,
        *tiny.SHORT,
        *flags,
    )
    assert result.returncode == 0, result.stderr
    return output, result


def test_pruning_writes_exactly_these_files(pruned):
    output, _ = pruned
    files = sorted(str(path.relative_to(output)) for path in output.rglob("*") if path.is_file())
    (mask,) = (output / "best").glob("mask_info_*.pkl")
    own = [name for name in files if not name.startswith("checkpoint-")]
    rotation = f"rotation_{tiny.read_json(output / 'plan.json')['rotation']}.safetensors"
    assert own == sorted(
        [f"best/{mask.name}", f"best/{mask.stem}.json", f"best/{rotation}", rotation, "generations.json", "plan.json",
         "recipe.yaml", "report.html", "results.json", "training.png", "training_log.json", "widths.png"]
    )  # fmt: skip
    assert {name.split("/")[0] for name in files if name.startswith("checkpoint-")} == {"checkpoint-4", "checkpoint-8"}


def test_pruning_prints_what_it_did(pruned):
    output, result = pruned
    wanted = ("perplexity", "dense ->", "(target 0.4)", "kept KV heads", "speed-up", "mask_info_", "training.png",
              f"{output / 'report.html'}\n", "phase 1 of 3: dense model", "phase 2 of 3: choice of units",
              "phase 3 of 3: cut at 0.4")  # fmt: skip
    for words in wanted:
        assert words in result.stdout
    assert "sparsity 0." in result.stderr and "lambda" in result.stderr  # the progress bar
    assert re.search(r"phase 2 of 3, .* left:.* 8/8 ", result.stderr)
    assert re.search(r"phase 3 of 3: cut at 0.4, .* left\n", result.stdout)
    assert re.search(r" ± [\d.]+ dense -> [\d.]+ ± [\d.]+ pruned \(gap in log perplexity .* ± ", result.stdout)
    results = tiny.read_json(output / "results.json")
    assert results["widths"]["decoder_sparsity"] == pytest.approx(0.4, abs=0.02)
    assert results["parameters"]["pruned"] < results["parameters"]["dense"]
    assert {"seed", "versions", "hardware", "command", "protocol", "sparsity_definition"} <= set(results)
    record = tiny.read_json(next((output / "best").glob("*.json")))
    assert {"model", "dataset_name", "target_sparsity", "decoder_sparsity", "seed", "versions", "settings"} <= set(
        record
    )


def test_evaluating_the_mask_repeats_its_perplexity(pruned, checkpoint, text, tmp_path):
    output, _ = pruned
    (mask,) = (output / "best").glob("*.pkl")
    flags = ("--do_eval", "--overwrite_output_dir", "--save_loc", tmp_path / "results", "--output_dir", tmp_path / "o")
    result = tiny.run(
        "lora_ft_vib.py",
        "--model_name_or_path",
        checkpoint,
        "--dataset_name",
        text,
        "--mask_loc",
        mask,
        *flags,
        *tiny.SHORT,
    )
    assert result.returncode == 0, result.stderr
    again = tiny.read_json(tmp_path / "results" / "results.json")["perplexity"]
    first = tiny.read_json(output / "results.json")["perplexity"]
    errors, earlier = again.pop("stderr"), first.pop("stderr")
    near = partial(pytest.approx, rel=1e-5)  # one process may have another number of threads than the other
    assert again == near(first) and errors == near(earlier)
    assert 0 < errors["gap"] < errors["pruned"]
    assert abs(math.log(first["pruned"] / first["dense"])) > 1e-4  # negative control: pruning changes the score
    plan = KeepPlan.load(tmp_path / "results" / "plan.json")
    assert plan.num_parameters == tiny.read_json(output / "results.json")["parameters"]["pruned"]


def test_an_interrupted_run_goes_on_to_the_same_mask(pruned, checkpoint, text, tmp_path, command):
    """A run from its middle checkpoint ends as the whole run did."""
    output, _ = pruned
    shutil.copytree(output / "checkpoint-4", tmp_path / "out" / "checkpoint-4")
    flags = ("--max_train_samples", 32, "--per_device_train_batch_size", 4, "--save_steps", 4, "--target_sparsity", 0.4)
    code, _, error = command(
        "--do_train", "--model_name_or_path", checkpoint, "--dataset_name", text, "--output_dir", tmp_path / "out",
        *tiny.SHORT, *flags, "--resume_from_checkpoint", "True",
    )  # fmt: skip
    assert code == 0, error
    (first,), (again,) = (list((folder / "best").glob("*.pkl")) for folder in (output, tmp_path / "out"))
    assert first.name == again.name
    pairs = zip(load_masks(first).log_variance, load_masks(again).log_variance, strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("options", [("--refit_offload", "True"), ()])
def test_the_update_is_the_users_choice(pruned, checkpoint, text, tmp_path, command, options):
    (mask,) = (pruned[0] / "best").glob("*.pkl")
    base = ("--model_name_or_path", checkpoint, "--mask_loc", mask, "--dataset_name", text, "--output_dir", tmp_path)
    values = {}
    for level in ("none", "fold", "refit"):
        flags = ("--do_eval", "--weight_update", level, "--save_loc", tmp_path / level)
        flags += options if level == "refit" else ()
        code, _, error = command(*base, *tiny.SHORT, *flags)
        assert code == 0, error
        values[level] = tiny.read_json(tmp_path / level / "results.json")
    assert len({result["perplexity"]["pruned"] for result in values.values()}) == 3
    assert len({result["perplexity"]["dense"] for result in values.values()}) == 1
    report = values["refit"]["refit"]
    assert report["divergences"][report["shares"].index(report["share"])] == min(report["divergences"])
    assert "refit" not in values["fold"]


@pytest.mark.parametrize("biases", [True, False])
def test_flap_folds_its_bias_where_the_architecture_has_one(biases, make_model, text, tmp_path, command):
    model = tiny.save_checkpoint(make_model("llama", attention_bias=biases, mlp_bias=biases), tmp_path / "model")
    scores = []
    for update in ("fold", "none"):
        code, _, error = command(
            "--do_train", "--model_name_or_path", model, "--dataset_name", text, "--output_dir", tmp_path / update,
            *tiny.SHORT, "--prune_method", "flap", "--max_train_samples", 8, "--weight_update", update,
        )  # fmt: skip
        assert code == 0, error
        scores.append(tiny.read_json(tmp_path / update / "results.json")["perplexity"]["pruned"])
    assert (scores[0] == scores[1]) == (not biases)  # with factors of 1 there is nothing else to fold


class Evil:
    def __reduce__(self):
        return (print, ("executed",))


def masks_that_cannot_be_used(folder, good):
    """Yields (file, words of the refusal)."""
    truncated, foreign, evil, other = (folder / f"{name}.pkl" for name in ("truncated", "foreign", "evil", "other"))
    truncated.write_bytes(good.read_bytes()[:500])
    foreign.write_bytes(pickle.dumps({"weights": [1, 2]}))
    evil.write_bytes(pickle.dumps(Evil()))
    masks = load_masks(good)
    wide = masks.mu.map(lambda values: torch.cat([values, values]))
    save_masks(type(masks)(mu=wide, log_variance=PerUnit(*(wide.hidden, wide.attn, wide.inter))), other)
    yield folder / "missing.pkl", "there is no such file"
    yield truncated, "not a readable mask file"
    yield foreign, "is no gate of a mask file"
    yield evil, "asks to run 'builtins.print'"
    yield other, "give the mask of this model"


def test_masks_that_cannot_be_used_are_refused_in_one_line(pruned, checkpoint, text, tmp_path, command):
    (good,) = (pruned[0] / "best").glob("*.pkl")
    for mask, words in masks_that_cannot_be_used(tmp_path, good):
        code, out, error = command(
            "--do_eval", "--model_name_or_path", checkpoint, "--dataset_name", text, "--mask_loc", mask, *tiny.SHORT,
            "--output_dir", tmp_path / "out",
        )  # fmt: skip
        assert words in tiny.refusal(code, error)
        assert "executed" not in out
        assert not (tmp_path / "out" / "results.json").exists()


def empty(folder):
    folder.mkdir(parents=True)
    return folder


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--target_sparsity", 1.5), "--target_sparsity is 1.5"),
        (("--target_sparsity", 0), "give a number between 0 and 1"),
        (("--model_name_or_path", "nowhere"), "--model_name_or_path nowhere: cannot be loaded"),
        (("--dataset_name", "nowhere.txt"), "neither a file or folder nor one of"),
        (("--prune_method", "best"), "invalid choice: 'best'"),
        (("--no_such_flag", 1), "no_such_flag"),
        (("--dim_multiple", -8), "--dim_multiple is -8"),
        (("--settle_share", 1), "--settle_share is 1.0"),
        (("--beta", "nan"), "--beta is nan"),
        (("--refit_samples", 0), "--refit_samples is 0"),
        (("--vib_learning_rate", -0.1), "--vib_learning_rate is -0.1"),
        (("--resume_from_checkpoint", "True"), "no checkpoint there"),
        (("--output_dir", "/proc/none"), "cannot be written"),
    ],
)
def test_bad_flags_are_refused_in_one_line(flags, words, checkpoint, text, tmp_path, command):
    base = {"--model_name_or_path": checkpoint, "--dataset_name": text, "--output_dir": tmp_path / "out"}
    base |= {flags[0]: flags[1]}
    code, _, error = command("--do_train", *tiny.SHORT, *(item for pair in base.items() for item in pair))
    assert words in tiny.refusal(code, error)
    assert not (tmp_path / "out" / "best").exists()


def test_what_tensorboard_wrote_before_the_first_checkpoint_is_no_stranger_s(tmp_path):
    (tmp_path / "runs").mkdir()
    assert _is_interrupted(tmp_path)
    (tmp_path / "mine").mkdir()
    assert not _is_interrupted(tmp_path)  # control


def test_a_model_is_measured_as_it_is(pruned, checkpoint, text, tmp_path):
    """Of a dense model what the run that cut it says; of a cut one likewise."""
    (mask,) = (pruned[0] / "best").glob("*.pkl")
    base = ("--dataset_name", text, "--block_size", 16, "--ctx_length", 16, "--max_eval_samples", 8, "--use_cpu")
    cut = ("apply", "--model_name_or_path", checkpoint, *base, "--mask_loc", mask, "--speed_batches", 0,
           "--save_pruned", tmp_path / "cut", "--output_dir", tmp_path / "applied")  # fmt: skip
    assert run(*cut).code == 0
    told = tiny.read_json(tmp_path / "applied" / "results.json")["perplexity"]
    for model, name in ((checkpoint, "dense"), (tmp_path / "cut", "pruned")):
        ended = run("apply", "--model_name_or_path", model, *base, "--output_dir", tmp_path / name)
        found = tiny.read_json(tmp_path / name / "results.json")
        assert found["model_perplexity"]["value"] == pytest.approx(told[name]) and "perplexity" not in found
        assert found["model_perplexity"]["stderr"] == pytest.approx(told["stderr"][name])
        assert ended.code == 0 and f"windows of 16)  {told[name]:.2f} ± " in ended.out and str(model) in ended.out
        assert "of the model as it is" in (tmp_path / name / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            ("--do_eval", "False"),
            "nothing to do: give --mask_loc FILE or --plan FILE, --do_eval True or --do_zero_eval",
        ),
        (("--save_pruned", "S"), "--save_pruned would do nothing without --mask_loc"),
    ],
)
def test_nothing_to_apply_is_said(flags, words, checkpoint, tmp_path):
    ended = run("apply", "--model_name_or_path", checkpoint, "--output_dir", tmp_path / "out", "--use_cpu", *flags)
    assert ended.code == 2 and words in ended.err and not (tmp_path / "out").exists()


def test_a_folder_in_use_is_not_touched(checkpoint, text, tmp_path, command):
    output = empty(tmp_path / "out")
    (output / "mine.txt").write_text("mine")
    base = ("--model_name_or_path", checkpoint, "--dataset_name", text, "--output_dir", output)
    code, _, error = command("--do_train", *tiny.SHORT, *base)
    assert "is not empty" in tiny.refusal(code, error)
    assert [path.name for path in output.iterdir()] == ["mine.txt"]


def test_a_run_goes_on_only_with_the_target_that_it_began_with(pruned, checkpoint, text, tmp_path, command):
    shutil.copytree(pruned[0], tmp_path / "out")
    base = ("--model_name_or_path", checkpoint, "--dataset_name", text, "--output_dir", tmp_path / "out")
    flags = ("--max_train_samples", 32, "--per_device_train_batch_size", 4, "--target_sparsity", 0.3)
    code, _, error = command("--do_train", *base, *tiny.SHORT, *flags, "--resume_from_checkpoint", "True")
    words = "is the checkpoint of a run with --target_sparsity 0.4, not 0.3; give the flags that it was made with"
    assert words in tiny.refusal(code, error)


def test_results_of_a_training_do_not_replace_others_unasked(pruned, checkpoint, text, tmp_path, command):
    base = ("--model_name_or_path", checkpoint, "--dataset_name", text, "--output_dir", tmp_path / "out")
    code, _, error = command("--do_train", *base, *tiny.SHORT, "--save_loc", pruned[0])
    assert "holds results.json; --overwrite_output_dir replaces it" in tiny.refusal(code, error)


def test_results_are_not_overwritten_unasked(pruned, checkpoint, text, command):
    output, _ = pruned
    (mask,) = (output / "best").glob("*.pkl")
    before = (output / "results.json").read_bytes()
    code, _, error = command("--do_eval", "--mask_loc", mask, "--model_name_or_path", checkpoint, "--save_loc", output)
    assert code == 2 and "--overwrite_output_dir replaces it" in error
    assert (output / "results.json").read_bytes() == before


def test_models_that_cannot_be_pruned_are_refused(checkpoint, text, tmp_path, command):
    unsupported, no_weights = tmp_path / "gpt2", tmp_path / "no_weights"
    shutil.copytree(checkpoint, unsupported)
    shutil.copytree(checkpoint, no_weights)
    (no_weights / "model.safetensors").unlink()
    (unsupported / "model.safetensors").unlink()
    GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=47)).save_pretrained(unsupported)
    for model, words in (
        (unsupported, "the model's type is 'gpt2', which has no row"),
        (no_weights, "cannot be loaded"),
    ):
        base = ("--model_name_or_path", model, "--dataset_name", text, "--output_dir", tmp_path / "out")
        code, _, error = command("--do_train", *tiny.SHORT, *base)
        assert words in tiny.refusal(code, error)


def test_nothing_to_do_is_said(checkpoint, command):
    code, _, error = command("--model_name_or_path", checkpoint)
    assert code == 2 and "nothing to do: give --do_eval, --do_zero_eval" in error


def test_no_flag_of_the_user_is_overwritten(tmp_path):
    flags = ("--num_train_epochs", 3, "--save_steps", 7, "--lagrangian_warmup_epochs", 0.3, "--vib_learning_rate", 0.02,
             "--gradient_accumulation_steps", 2, "--beta", 4, "--initial_log_variance", -7,
             "--output_dir", tmp_path)  # fmt: skip
    args = Arguments.parse([str(flag) for flag in flags], "prune")
    assert (args.training.num_train_epochs, args.training.save_steps) == (3, 7)
    settings = gate_settings(args.prune, args.distill, 100, 50, 10.0, WidthRules(8))
    assert (settings.vib_learning_rate, settings.beta, settings.initial_log_variance) == (0.02, 4, -7)
    assert settings.num_warmup_steps == 15


@pytest.mark.parametrize("script", [("--do_train",), ("--do_eval", "--mask_loc")], ids=["prune", "apply"])
def test_a_model_that_gives_no_number_ends_before_any_work(script, checkpoint, text, tmp_path, command, make_masks):
    model = shutil.copytree(checkpoint, tmp_path / "nan")
    tensors = load_file(model / "model.safetensors")
    tensors["lm_head.weight"][0] = 3e38
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    mask = tmp_path / "mask_info_1.0.pkl"
    save_masks(make_masks(shape_of(AutoConfig.from_pretrained(model))), mask)
    flags = [*script, mask] if "--mask_loc" in script else script
    code, _, error = command(
        *flags, "--model_name_or_path", model, "--dataset_name", text, "--block_size", 16, "--ctx_length", 16,
        "--max_eval_samples", 4, "--use_cpu", "--output_dir", tmp_path / "out",
    )  # fmt: skip
    assert "the unpruned model itself gives a perplexity of nan" in tiny.refusal(code, error)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("dtype", "is_named"), [("auto", True), ("auto", False), ("float32", True)])
def test_a_narrower_model_is_saved_in_the_checkpoints_precision(
    dtype, is_named, make_model, make_masks, tmp_path, command
):
    """A CPU computes in float32; what is measured is what is saved."""
    model = make_model("llama").to(torch.bfloat16)
    source = tiny.save_checkpoint(model, tmp_path / "model")
    if not is_named:
        edit_config(source, dtype=None)
    save_masks(make_masks(shape_of(model.config)), tmp_path / "mask_info_1.0.pkl")
    text = tiny.write_text(tmp_path / "text.txt")
    code, _, error = command(
        "--model_name_or_path", source, "--mask_loc", tmp_path / "mask_info_1.0.pkl", "--do_eval", "--dtype", dtype,
        "--dataset_name", text, "--block_size", 16, "--ctx_length", 16, "--max_eval_samples", 8, "--speed_batches", 0,
        "--weight_update", "fold", "--use_cpu", "--output_dir", tmp_path / "out", "--save_pruned", tmp_path / "pruned",
    )  # fmt: skip
    assert code == 0, error
    stored = {weight.dtype for weight in load_file(tmp_path / "pruned" / "model.safetensors").values()}
    assert stored == {torch.bfloat16 if dtype == "auto" else torch.float32}
    again, _, _ = command(
        "--model_name_or_path", tmp_path / "pruned", "--prune_method", "magnitude", "--do_train", "--target_sparsity",
        0.3, "--dataset_name", text, "--block_size", 16, "--ctx_length", 16, "--max_eval_samples", 8, "--speed_batches",
        0, "--weight_update", "fold", "--use_cpu", "--output_dir", tmp_path / "again",
    )  # fmt: skip
    assert again == 0
    pruned, dense = (tiny.read_json(tmp_path / name / "results.json")["perplexity"] for name in ("out", "again"))
    assert dense["dense"] == pytest.approx(pruned["pruned"], rel=1e-6)


@pytest.mark.parametrize("flags", [("--do_train", "--target_params", 1), ("--do_eval", "--mask_loc", __file__)])
def test_a_task_that_is_not_there_is_told_before_anything_else(flags, checkpoint, text, tmp_path, command):
    source = ("--model_name_or_path", checkpoint, "--dataset_name", text, "--output_dir", tmp_path / "out")
    other = tiny.refusal(*command(*source, *flags)[::2])
    tasks = ("--do_zero_eval", "True", "--zero_eval_tasks", "tva_nme")
    line = tiny.refusal(*command(*source, *flags, *tasks)[::2])
    assert "--zero_eval_tasks tva_nme: no such task" in line and "zero_eval" not in other
    assert not (tmp_path / "out").exists()
