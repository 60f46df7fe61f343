"""The verbs as functions: the same way, checks and results as the command line; importing the front door is light."""

import re
import subprocess
import sys

import pytest
import yaml
from support import pages, tiny

import tvaprune
from tvaprune import (
    CompareSettings,
    DataSettings,
    DistillSettings,
    EvalSettings,
    FinetuneSettings,
    InputError,
    PruneSettings,
    Results,
    apply,
    compare,
    describe,
    export,
    finetune,
    load_pruned,
    prune,
)
from tvaprune.cli import run_verb
from tvaprune.library import words


@pytest.fixture(scope="module")
def source(make_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    return tiny.save_checkpoint(make_model("llama"), folder / "model"), tiny.write_text(folder / "text.txt", 3000)


@pytest.fixture(scope="module")
def text(source):
    return DataSettings(str(source[1]), block_size=16, ctx_length=16, max_train_samples=8, max_eval_samples=4)


@pytest.fixture(scope="module")
def pruned(source, text, tmp_path_factory):
    """The folder and the results of one call."""
    output = tmp_path_factory.mktemp("pruned") / "out"
    settings = PruneSettings(prune_method="magnitude", target_sparsity=[0.4], weight_update="fold", dim_multiple=4,
                             save_pruned=str(output / "model"))  # fmt: skip
    return output, prune(source[0], text, settings, EvalSettings(speed_batches=0), output_dir=output, use_cpu=True)


def test_the_lines_of_the_page_prune_save_and_load(source, tmp_path, monkeypatch, capsys):
    code = pages.code("prune(")
    assert len(code.strip().splitlines()) <= 12
    code = code.replace("256", "16").replace("1200", "16")  # before a path with such a number stands in it
    for shipped, own in (("mistral_saves_tva/mini_mistral", source[0]), ("python_docs", source[1])):
        assert shipped in code
        code = code.replace(shipped, str(own))
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code, names)
    assert isinstance(names["results"], Results)
    assert names["results"].widths.decoder_sparsity == pytest.approx(0.5, abs=0.1)
    assert str(names["results"].perplexity.pruned) in capsys.readouterr().out
    assert names["model"].config.model_type == "pruned_llama" or names["model"].num_parameters() > 0
    assert (tmp_path / "out").is_dir()


def test_a_call_gives_what_the_command_line_gives(pruned, source, text, tmp_path):
    output, found = pruned
    flags = ["--prune_method", "magnitude", "--target_sparsity", "0.4", "--weight_update", "fold", "--dim_multiple",
             "4", "--block_size", "16", "--ctx_length", "16", "--max_train_samples", "8", "--max_eval_samples", "4",
             "--speed_batches", "0", "--use_cpu"]  # fmt: skip
    given = ["--model_name_or_path", str(source[0]), "--dataset_name", str(source[1])]
    run_verb("prune", [*given, *flags, "--output_dir", str(tmp_path / "out")])
    (mask,) = (tmp_path / "out" / "best").glob("*.pkl")
    assert mask.name == found[0.4].mask.rsplit("/", 1)[-1]
    assert Results.read(tmp_path / "out").perplexity == found[0.4].perplexity
    assert Results.read(output) == found[0.4]
    recipe = yaml.safe_load((output / "recipe.yaml").read_text())
    assert recipe["verb"] == "prune" and recipe["prune_method"] == "magnitude" and recipe["block_size"] == 16


def test_a_mask_is_applied_described_tuned_and_exported(pruned, source, text, tmp_path):
    output, found = pruned
    mask, widths = found[0.4].mask, found[0.4].widths
    assert describe(mask, source[0]).adjusted == widths
    assert describe(mask, source[0], PruneSettings(dim_multiple=0)).adjusted != widths  # control
    data = DataSettings(str(source[1]), block_size=16, ctx_length=16, max_eval_samples=4)
    quiet, fold = EvalSettings(speed_batches=0), PruneSettings(weight_update="fold")
    again = apply(
        source[0], mask, data, quiet, PruneSettings(weight_update="fold"), output_dir=tmp_path / "a", use_cpu=True
    )
    assert again.perplexity == found[0.4].perplexity
    tuned = finetune(
        source[0], mask, text, quiet, FinetuneSettings(lora_r=2), fold,
        output_dir=tmp_path / "f", max_steps=1, per_device_train_batch_size=2, gradient_accumulation_steps=1,
        use_cpu=True,
    )  # fmt: skip
    assert tuned.finetune.steps == 1 and tuned.perplexity.pruned == pytest.approx(again.perplexity.pruned)
    assert load_pruned(tmp_path / "f" / "merged").num_parameters() == load_pruned(output / "model").num_parameters()
    assert export("vanilla", output / "model", tmp_path / "v") == tmp_path / "v"
    assert (tmp_path / "v" / "config.json").is_file()


def test_a_plan_is_applied_as_it_is(pruned, source, text, tmp_path):
    output, found = pruned
    data = DataSettings(str(source[1]), block_size=16, ctx_length=16, max_eval_samples=4)
    plan = str(output / "plan.json")
    settings = PruneSettings(plan=plan, weight_update="fold", save_pruned=str(tmp_path / "model"))
    by_plan = apply(
        source[0], None, settings, data, EvalSettings(speed_batches=0), output_dir=tmp_path / "o", use_cpu=True
    )
    assert by_plan.perplexity == found[0.4].perplexity and by_plan.mask is None
    assert by_plan.plan == plan
    first, again = ((folder / "model" / "model.safetensors").read_bytes() for folder in (output, tmp_path))
    assert first == again


def test_a_comparison_returns_its_folder(source, tmp_path, monkeypatch):
    other = tiny.write_text(tmp_path / "other.txt", 1500)
    settings = CompareSettings(
        models=[str(source[0])], dataset=str(source[1]), other_texts=[str(other)], methods=["magnitude"],
        weight_updates=["fold"], sparsities=[0.3], seeds=[0], output=str(tmp_path / "out"), block_size=16,
        calibration_samples=4, max_eval_samples=4, zero_eval_sparsities=[],
    )  # fmt: skip
    assert compare(settings, PruneSettings(dim_multiple=4), use_cpu=True) == tmp_path / "out"
    assert (tmp_path / "out" / "compare.md").is_file()
    cell = tiny.read_json(tmp_path / "out" / "model" / "cells" / "magnitude-fold-0.3-0.json")
    assert cell["flags"] == ["--dim_multiple=4", "--use_cpu=True"]


def test_settings_are_words_and_defaults_are_not_given():
    data = DataSettings("a b", block_size=8)
    assert words("m", (data, DistillSettings()), {"seed": 3}) == [
        "--model_name_or_path=m", "--dataset_name=a b", "--block_size=8", "--seed=3"
    ]  # fmt: skip
    assert words(None, (PruneSettings(target_sparsity=[0.2, 0.5], initial_log_variance=-1e-5),), {}) == [
        "--target_sparsity", "0.2", "0.5", "--initial_log_variance=-1e-05"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: prune("m", FinetuneSettings(lora_r=4)), "--lora_r acts in finetune, not in prune"),
        (lambda: prune("m", DataSettings(), DataSettings()), "DataSettings was given twice"),
        (lambda: prune("m", learning_rate=0.1), "--learning_rate acts in finetune"),
        (lambda: apply("m", "nowhere.pkl"), "--mask_loc nowhere.pkl: there is no such file"),
        (lambda: finetune("m", None, use_cpu=True), "finetune needs --mask_loc or --plan"),
        (lambda: PruneSettings(target_sparsity=[1.5]), "--target_sparsity is 1.5"),
        (lambda: DataSettings(block_size=float("nan")), "--block_size is nan"),
        (lambda: prune("m", seed=-1), "--seed is -1"),
    ],
)  # fmt: skip
def test_a_call_is_refused_as_a_command_line_is(call, said):
    with pytest.raises(InputError, match=re.escape(said)):
        call()


def test_a_verb_stays_a_verb_whatever_is_imported():
    code = ("import tvaprune.export.verify, tvaprune.describe; from tvaprune import export, describe; "
            "print(callable(export), callable(describe), tvaprune.export.verify.__name__)")  # fmt: skip
    shown = subprocess.run([sys.executable, "-c", code], cwd=tiny.ROOT, capture_output=True, text=True)
    assert shown.stdout == "True True tvaprune.export.verify\n", shown.stderr


def test_the_front_door_is_light_and_whole():
    code = (
        "import sys, tvaprune; from tvaprune import PruneSettings; print({'torch', 'transformers'} & set(sys.modules))"
    )
    shown = subprocess.run([sys.executable, "-c", code], cwd=tiny.ROOT, capture_output=True, text=True)
    assert shown.stdout == "set()\n", shown.stderr
    assert all(callable(getattr(tvaprune, name)) for name in tvaprune.__all__ if name != "__version__")
    with pytest.raises(AttributeError, match="no attribute 'train'"):
        _ = tvaprune.train
