"""What is refused by flags, a config and folders alone."""

import pytest
from support import tiny

from tvaprune.flags.conditions import parse
from tvaprune.refusals import check_not_model, check_save, check_widths


@pytest.fixture
def source(make_model, tmp_path):
    make_model().config.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def flags(source, *given):
    mask = ("--mask_loc", __file__, "--use_cpu", "True")
    return parse("apply", ["--model_name_or_path", str(source), *mask, *map(str, given)])


@pytest.mark.parametrize(("flag", "other"), [("output_dir", "save_loc"), ("save_loc", "output_dir")])
def test_a_checkpoint_is_saved_in_no_folder_that_holds_another_of_the_run(flag, other, source, tmp_path):
    places = (f"--{flag}", tmp_path / "all" / "own", f"--{other}", tmp_path / "other")
    with tiny.refused(f"--save_pruned {tmp_path}/all: is --{flag} {tmp_path}/all/own, or holds it"):
        check_save(flags(source, *places, "--save_pruned", tmp_path / "all"))
    check_save(flags(source, *places, "--save_pruned", tmp_path / "pruned"))  # control


def test_a_checkpoints_folder_that_is_in_use_is_replaced_only_where_that_was_asked_for(source, tmp_path):
    (tmp_path / "pruned").mkdir()
    (tmp_path / "pruned" / "config.json").write_text("{}")
    given = ("--output_dir", tmp_path / "out", "--save_pruned", tmp_path / "pruned")
    with tiny.refused("pruned: is not empty; replace it with --overwrite_output_dir"):
        check_save(flags(source, *given))
    with tiny.refused("pruned: holds config.json, which this tool did not write"):  # control: it was asked for
        check_save(flags(source, *given, "--overwrite_output_dir", "True"))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("--dim_multiple", 64), "--dim_multiple 64: no width of the model is as large, the widest is 52"),
        (("--tensor_parallel", 3), "--tensor_parallel is 3: the model's num_key_value_heads, 2, is no multiple of it"),
    ],
)
def test_widths_that_no_plan_of_the_model_has_are_refused_by_its_config(given, words, source):
    check_widths(flags(source, "--dim_multiple", 4, "--tensor_parallel", 2))  # control
    with tiny.refused(words):
        check_widths(flags(source, *given))


def test_the_folder_of_a_fetched_model_is_the_models_by_its_name_too(tmp_path, monkeypatch):
    monkeypatch.setattr("tvaprune.refusals.located", lambda model: tmp_path / model)
    with tiny.refused("is the model of --model_name_or_path smollm2; give a folder apart from it"):
        check_not_model("save_loc", tmp_path / "smollm2", "model_name_or_path", "smollm2")
