"""What holds for all verbs: a recipe repeats its run, results are of one run, a plan is applied as it is."""

import json

import pytest
import torch
from report.test_zero_shot_report import score
from safetensors.torch import load_file
from support import tiny
from support.folders import hub_results

from tvaprune.cli import run_command, run_verb
from tvaprune.files import foreign_files
from tvaprune.models.shape import shape_of
from tvaprune.plan.masks import Masks, load_masks, save_masks
from tvaprune.report.results import Results
from tvaprune.stages import apply

SMALL = ("--block_size", 16, "--ctx_length", 16, "--max_eval_samples", 6, "--speed_batches", 1, "--use_cpu")
TRAINED = ("--max_train_samples", 24, "--per_device_train_batch_size", 4, "--eval_steps", 2, "--refit_samples", 8)
TIMED = ("speed_up", "training_speed_up", "command")


@pytest.fixture(scope="module")
def source(make_model, make_masks, tmp_path_factory):
    """The flags of a tiny model and its text, and two masks."""
    folder = tmp_path_factory.mktemp("source")
    model = make_model("llama")
    tiny.save_checkpoint(model, folder / "model")
    for seed, name in enumerate(("mask_info_1.0.pkl", "mask_info_2.0.pkl")):
        save_masks(make_masks(shape_of(model.config), seed), folder / name)
    text = tiny.write_text(folder / "text.txt")
    flags = ("--model_name_or_path", folder / "model", "--dataset_name", text, *SMALL)
    return flags, folder / "mask_info_1.0.pkl", folder / "mask_info_2.0.pkl"


def do(verb, *flags):
    return run_verb(verb, [str(flag) for flag in flags])


def refused(capsys, verb, *flags):
    assert run_command(lambda: do(verb, *flags)) == 2
    return capsys.readouterr().err.splitlines()[-1]


def without_timings(folder):
    """What results.json holds, apart from what takes another time at each run and where the run's files lie."""
    content = tiny.read_json(folder / "results.json")
    mask = content.pop("mask").replace(str(folder), "")
    seconds = content.get("refit", {}).pop("seconds", None), content.get("finetune", {}).pop("seconds", None)
    assert seconds != (None, None)
    return {name: part for name, part in content.items() if name not in TIMED} | {"mask": mask}


def gates_of(folder):
    (path,) = (folder / "best").glob("*.pkl")
    masks = load_masks(path)
    return path.name, torch.cat([*masks.mu, *masks.log_variance])


def test_a_recipe_repeats_a_pruning_bit_for_bit(source, tmp_path):
    first, again, other = (tmp_path / name for name in ("first", "again", "other"))
    do("prune", *source[0], *TRAINED, "--target_sparsity", 0.4, "--dim_multiple", 4, "--output_dir", first)
    recipe = ("--config", first / "recipe.yaml")
    do("prune", *recipe, "--output_dir", again)
    assert without_timings(again) == without_timings(first)
    (name, gates), (name_again, gates_again) = gates_of(first), gates_of(again)
    assert name == name_again and torch.equal(gates, gates_again)
    assert (again / "plan.json").read_bytes() == (first / "plan.json").read_bytes()
    do("prune", *recipe, "--output_dir", other, "--seed", 7)
    assert gates_of(other)[0] != name and not torch.equal(gates_of(other)[1], gates)  # control
    assert without_timings(other)["perplexity"]["pruned"] != without_timings(first)["perplexity"]["pruned"]


def test_a_recipe_repeats_a_fine_tuning_bit_for_bit(source, tmp_path):
    flags = ("--lora_r", 2, "--learning_rate", 1e-2, "--gradient_accumulation_steps", 1, "--save_steps", 2)
    first, again, other = (tmp_path / name for name in ("first", "again", "other"))
    do("finetune", *source[0], *TRAINED, *flags, "--mask_loc", source[1], "--output_dir", first)
    recipe = ("--config", first / "recipe.yaml")
    do("finetune", *recipe, "--output_dir", again)
    do("finetune", *recipe, "--output_dir", other, "--seed", 7)
    weights, repeated, changed = (
        load_file(folder / "merged" / "model.safetensors") for folder in (first, again, other)
    )
    assert all(torch.equal(weights[name], repeated[name]) for name in weights)
    assert without_timings(again) == without_timings(first)
    assert any(not torch.equal(weights[name], changed[name]) for name in weights)  # control


def test_of_an_overwritten_run_nothing_remains(source, tmp_path, capsys):
    flags = ("--do_eval", "True", *source[0], "--mask_loc", source[1], "--weight_update", "fold")
    do("apply", *flags, "--output_dir", tmp_path)
    assert Results.read(tmp_path).speed_up is not None
    assert "--overwrite_output_dir replaces it" in refused(capsys, "apply", *flags, "--output_dir", tmp_path)
    returned = do("apply", *flags, "--output_dir", tmp_path, "--overwrite_output_dir", "--speed_batches", 0)
    assert Results.read(tmp_path) == returned and returned.speed_up is None
    (tmp_path / "results.json").write_text("{")
    again = do("apply", *flags, "--output_dir", tmp_path, "--overwrite_output_dir", "--speed_batches", 0)
    assert Results.read(tmp_path).perplexity == again.perplexity == returned.perplexity


@pytest.fixture
def scoring(monkeypatch):
    """Replaces the harness; returns the list of task names that the next evaluation scores."""
    names = []

    class Tasks:
        def run(self, models, tokenizer, on_score):
            for name in names:
                for model in models:
                    on_score(name, model, score([1.0, 0.0], data_set="acme/asked"))
            return {}

    monkeypatch.setattr(apply, "zero_shot_tasks", lambda args: Tasks() if args.evaluation.do_zero_eval else None)
    return names


def test_a_new_measurement_of_a_whole_model_is_told_with_its_own_run(source, scoring, tmp_path):
    model, text = source[0][:2], source[0][2:4]
    assert (model[0], text[0]) == ("--model_name_or_path", "--dataset_name")
    scoring[:] = ["a"]
    first = do("apply", *model, "--do_zero_eval", "True", "--output_dir", tmp_path)
    scoring[:] = ["b"]
    flags = (*source[0], "--do_zero_eval", "True", "--do_eval", "True", "--seed", 7, "--output_dir", tmp_path)
    do("apply", *flags)
    found = Results.read(tmp_path)
    assert found.model_perplexity is not None and sorted(found.zero_shot.tasks) == ["a", "b"]
    assert (
        (found.seed, found.dataset_name) == (7, str(text[1])) and first.seed != 7 and first.dataset_name != str(text[1])
    )
    scoring[:] = ["c"]  # control: what is not measured anew stays as it was told
    do("apply", *model, "--do_zero_eval", "True", "--output_dir", tmp_path)
    again = Results.read(tmp_path)
    assert again.seed == 7 and again.model_perplexity == found.model_perplexity
    assert sorted(again.zero_shot.tasks) == ["a", "b", "c"]


def test_zero_shot_scores_of_the_same_model_and_mask_join(source, scoring, tmp_path, capsys):
    flags = (*source[0], "--weight_update", "fold", "--output_dir", tmp_path, "--mask_loc")
    measured = do("apply", "--do_eval", "True", *flags, source[1])
    scoring[:] = ["a"]
    do("apply", "--do_zero_eval", "True", *flags, source[1])
    found = Results.read(tmp_path)
    assert found.perplexity == measured.perplexity and found.speed_up == measured.speed_up  # what was there stays
    assert list(found.zero_shot.tasks) == ["a"] and found.zero_shot.run is not None
    scoring[:] = ["b"]
    both = ("--do_eval", "True", "--do_zero_eval", "True", "--speed_batches", 0)
    do("apply", *flags, source[1], *both, "--save_pruned", tmp_path / "saved")
    assert [(told.task_id, told.value) for told in hub_results(tmp_path / "saved")] == [("a", 0.5), ("b", 0.5)]
    assert foreign_files(tmp_path / "saved") == []
    found = Results.read(tmp_path)
    assert sorted(found.zero_shot.tasks) == ["a", "b"] and found.speed_up is None
    before = (tmp_path / "results.json").read_bytes()
    line = refused(capsys, "apply", *flags, source[2], *both)
    assert "its results.json is of another units and widths; give another" in line
    assert (tmp_path / "results.json").read_bytes() == before
    do("apply", *flags, source[2], *both, "--overwrite_output_dir")
    assert list(Results.read(tmp_path).zero_shot.tasks) == ["b"]


def test_a_multiple_that_no_width_reaches_is_refused(source, tmp_path, capsys):
    flags = (*source[0], "--dim_multiple", 10_000, "--output_dir", tmp_path / "out")
    for verb, more in (("prune", ()), ("apply", ("--mask_loc", source[1])), ("finetune", ("--mask_loc", source[1]))):
        line = refused(capsys, verb, *flags, *more)
        assert "--dim_multiple 10000: no width of the model is as large, the widest is 52; give less" in line
    assert list(tmp_path.rglob("*.json")) == []


def test_scores_of_another_choice_of_units_do_not_join(source, scoring, tmp_path, capsys):
    """Of the same file and widths: it was written anew meanwhile."""
    masks = load_masks(source[1])
    mask = tmp_path / "mask_info_1.0.pkl"
    save_masks(masks, mask)
    flags = (
        *source[0],
        "--weight_update",
        "fold",
        "--mask_loc",
        mask,
        "--save_loc",
        tmp_path,
        "--do_zero_eval",
        "True",
    )
    scoring[:] = ["a"]
    before = do("apply", *flags)
    save_masks(Masks(masks.mu, masks.log_variance), mask)  # control: the same again
    scoring[:] = ["b"]
    assert sorted(do("apply", *flags).zero_shot.tasks) == ["a", "b"]
    save_masks(Masks(*(values.map(lambda one: one.flip(0)) for values in (masks.mu, masks.log_variance))), mask)
    assert "its results.json is of another units; give another" in refused(capsys, "apply", *flags)
    after = do("apply", *flags, "--overwrite_output_dir")
    assert after.widths == before.widths and sorted(after.zero_shot.tasks) == ["b"]


def test_the_dense_model_is_scored_alone(source, scoring, tmp_path):
    scoring[:] = ["a"]
    found = do("apply", *source[0], "--do_zero_eval", "True", "--output_dir", tmp_path)
    assert found.zero_shot.tasks["a"].model is not None and found.widths is None
    assert Results.read(tmp_path) == found


def test_another_plan_gives_another_model_and_a_wrong_one_is_refused(source, make_model, tmp_path, capsys):
    flags = (*source[0], "--do_eval", "True", "--weight_update", "fold", "--speed_batches", 0)
    by_mask = [do("apply", *flags, "--mask_loc", mask, "--output_dir", tmp_path / str(i)) for i, mask in
               enumerate(source[1:])]  # fmt: skip
    for i, made in enumerate(by_mask):
        by_plan = do("apply", *flags, "--plan", tmp_path / str(i) / "plan.json", "--output_dir", tmp_path / f"plan{i}")
        assert by_plan.perplexity == made.perplexity and by_plan.widths == made.widths
        assert (tmp_path / f"plan{i}" / "plan.json").read_bytes() == (tmp_path / str(i) / "plan.json").read_bytes()
    assert by_mask[0].perplexity != by_mask[1].perplexity  # control
    wide = tiny.save_checkpoint(make_model("llama", intermediate_size=56), tmp_path / "wide")
    plan = ("--plan", tmp_path / "0" / "plan.json", "--output_dir", tmp_path / "o")
    line = refused(capsys, "apply", *flags, *plan, "--model_name_or_path", wide)
    assert "is of another model (intermediate_size 52 for 56); give the plan of this model" in line
    content = tiny.read_json(tmp_path / "0" / "plan.json") | {"rotation": "0" * 16}  # which is of that model too
    (tmp_path / "turned.json").write_text(json.dumps(content))
    line = refused(capsys, "apply", *flags, *plan, "--plan", tmp_path / "turned.json", "--model_name_or_path", wide)
    assert "turned.json: is of another model (intermediate_size 52 for 56)" in line
    deep = tiny.save_checkpoint(make_model("llama", num_hidden_layers=4), tmp_path / "deep")
    line = refused(capsys, "apply", *flags, *plan, "--model_name_or_path", deep)
    assert "is of another model (num_hidden_layers 3 for 4); give the plan of this model" in line
    (tmp_path / "no.json").write_text("{}")
    line = refused(capsys, "finetune", *source[0], "--plan", tmp_path / "no.json", "--output_dir", tmp_path / "o")
    assert "not a keep plan (no 'shape' in it); give the plan.json of a run" in line
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(("tokens", "told"), [(64, False), (65, True)])
def test_a_window_above_the_models_longest_is_told(tokens, told, source, tmp_path, capsys):
    flags = ("--mask_loc", source[1], "--weight_update", "fold", "--speed_batches", 0, "--ctx_length", tokens)
    do("apply", "--do_eval", "True", *source[0], *flags, "--output_dir", tmp_path)
    line = f"note: --ctx_length {tokens} is above the model's longest, 64 (max_position_embeddings)"
    assert (line in capsys.readouterr().out) is told


def test_fine_tuning_without_a_mask_is_refused(source, tmp_path, capsys):
    line = refused(capsys, "finetune", *source[0], "--output_dir", tmp_path / "o")
    assert "finetune needs --mask_loc or --plan" in line and not (tmp_path / "o").exists()
