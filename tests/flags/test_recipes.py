import pytest
import yaml
from support import tiny

from tvaprune.cli import run_verb
from tvaprune.errors import InputError
from tvaprune.flags.arguments import Arguments
from tvaprune.flags.recipes import PRESETS, expand, recipe_of
from tvaprune.flags.verbs import from_home
from tvaprune.stages.estimate import estimate

FLAGS = ["--target_sparsity", "0.2", "0.5", "--uniform", "--dataset_name", "a b", "--run_name", "007", "--seed=3"]


def write(tmp_path, content):
    path = tmp_path / "recipe.yaml"
    path.write_text(content, encoding="utf-8")
    return str(path)


def test_a_recipe_gives_back_the_flags_that_it_was_made_of(tmp_path):
    recipe = recipe_of("prune", FLAGS)
    path = write(tmp_path, yaml.safe_dump(recipe, sort_keys=False))
    assert recipe == {
        "verb": "prune", "target_sparsity": [0.2, 0.5], "uniform": True, "dataset_name": "a b", "run_name": "007",
        "seed": 3,
    }  # fmt: skip
    again = expand("prune", ["--config", path])
    assert again == ["--target_sparsity", "0.2", "0.5", "--uniform", "True", "--dataset_name", "a b",
                     "--run_name", "007", "--seed", "3"]  # fmt: skip
    assert recipe_of("prune", again) == recipe


@pytest.mark.parametrize("name", ["[vib] half", "@scratch", "a: b: c", "*x", "!x", "2026-02-30", "{", "- a"])
def test_a_name_may_hold_what_yaml_has_a_meaning_for(name, tmp_path):
    path = write(tmp_path, yaml.safe_dump(recipe_of("prune", ["--run_name", name])))
    assert expand("prune", ["--config", path]) == ["--run_name", name]


def test_a_flag_said_no_to_is_the_flag_at_false(tmp_path):
    recipe = recipe_of("finetune", ["--no_distill", "--seed", "3"])
    assert recipe == {"verb": "finetune", "distill": False, "seed": 3}
    again = expand("finetune", ["--config", write(tmp_path, yaml.safe_dump(recipe))])
    assert not Arguments.parse([*again, "--model_name_or_path", "m"], "finetune").distill.distill
    assert Arguments.parse(["--model_name_or_path", "m"], "finetune").distill.distill  # control


def test_the_command_line_wins_over_the_recipe(tmp_path):
    path = write(tmp_path, "seed: 1\nblock_size: 8\n")
    flags = expand("prune", ["--seed", "2", f"--config={path}"])
    assert recipe_of("prune", flags) == {"verb": "prune", "block_size": 8, "seed": 2}


def test_the_users_home_is_meant_where_no_shell_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    path = write(tmp_path, "save_pruned: ~/model\ndata_dir: some~/where\n")
    assert expand("prune", ["--config", path]) == ["--save_pruned", f"{tmp_path}/model", "--data_dir", "some~/where"]
    given = ["--output_dir=~/out", "--dataset_name", "c4,~/mine.txt", "--run_name", "~", "--data_dir=a~/b"]
    assert from_home(given) == [f"--output_dir={tmp_path}/out", "--dataset_name", f"c4,{tmp_path}/mine.txt", *given[3:]]
    with pytest.raises(InputError, match=f"--plan {tmp_path}/no.json: there is no such file"):
        run_verb("apply", ["--plan=~/no.json"])


def test_words_that_yaml_takes_for_truth_values_are_words(tmp_path):
    path = write(tmp_path, "rotate: off\neval_strategy: no\nuniform: yes\n")
    flags = expand("prune", ["--config", path])
    assert flags == ["--rotate", "off", "--eval_strategy", "no", "--uniform", "yes"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("dim_multipel: 8", "'dim_multipel' is no flag of prune; perhaps dim_multiple"),
        ("verb: finetune\nlora_r: 8", "is a recipe of another verb than prune"),
        ("seed: {a: 1}", "seed needs a plain value"),
        ("seed:", "seed needs a plain value"),
        ("- seed", "needs lines of `flag: value`"),
        ("seed: [1", "is not YAML"),
        ("seed: 1\nblock_size: 64\nseed: 2", "seed is there twice"),
    ],
)
def test_a_recipe_that_cannot_be_used_is_refused_in_one_line(content, words, tmp_path):
    with tiny.refused(words):
        expand("prune", ["--config", write(tmp_path, content)])


def test_a_recipe_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(InputError, match="there is no such file"):
        expand("prune", ["--config", str(tmp_path / "none.yaml")])
    with pytest.raises(InputError, match="there is no such file"):
        expand("prune", ["--config"])
    with pytest.raises(InputError, match="is a folder; give a recipe.yaml"):
        expand("prune", ["--config", str(tmp_path)])


def test_a_preset_is_a_recipe_that_is_there(tmp_path):
    flags = recipe_of("prune", expand("prune", ["--preset", "paper", "--settle_share", "0.1"]))
    assert flags["rotate"] == "off" and flags["weight_update"] == "fold" and flags["distill"] is False
    assert flags["settle_share"] == 0.1  # the command line wins
    assert "rotate" not in recipe_of("prune", expand("prune", ["--settle_share", "0.1"]))  # control
    for words in (["--preset=nothing"], ["--preset"]):
        with pytest.raises(InputError, match="there is none of this name; give paper"):
            expand("prune", words)
    with pytest.raises(InputError, match="of another verb than apply"):
        expand("apply", ["--preset", "paper"])


def test_every_preset_parses():
    for name in PRESETS:
        assert Arguments.parse(
            [*expand("prune", ["--preset", name]), "--model_name_or_path", "m", "--output_dir", "o"], "prune"
        )


@pytest.mark.parametrize(
    ("recipe", "flags", "words"),
    [
        ({"lora_r": -1}, (), "--config {}: --lora_r is -1: give a number above 0"),
        ({"lora_r": "many"}, (), "--config {}: argument --lora_r/--lora-r: invalid int value"),
        ({"full_ft": True, "lora_r": 4}, (), "--config {}: --lora_r would do nothing beside --full_ft True"),
        ({"model_name_or_path": "nowhere"}, ("--mask_loc", __file__), "--config {}: --model_name_or_path nowhere:"),
        ({"seed": 3}, ("--lora_r", "-1"), "--lora_r is -1: give"),
        ({"lora_r": -2}, ("--lora-r", "-1"), "--lora_r is -1: give"),  # the command line wins
    ],
)
@pytest.mark.parametrize("verb", ["finetune", "estimate"])
def test_what_is_refused_of_a_recipe_names_its_file(verb, recipe, flags, words, tmp_path):
    path = write(tmp_path, yaml.safe_dump({"model_name_or_path": str(tmp_path)} | recipe))
    given = ["--config", path, *flags, "--use_cpu"]
    with pytest.raises(InputError) as caught:
        run_verb("finetune", given) if verb == "finetune" else estimate("finetune", given)
    assert str(caught.value).startswith(words.format(path))
