"""A target of parameters, memory or operations: the sparsity that it asks for, what is reached, and what cannot be."""

import shutil

import pytest
import yaml
from support import tiny
from support.in_process import run
from transformers import LlamaConfig

from tvaprune import PruneSettings, estimate
from tvaprune.errors import InputError
from tvaprune.flags.arguments import parse_comparison
from tvaprune.flags.conditions import parse
from tvaprune.flags.ranges import BYTES, NUMBERS, amount
from tvaprune.measure.work import forward_flops, narrower
from tvaprune.models.parameters import dense_parameters
from tvaprune.models.shape import shape_of
from tvaprune.plan.keep_plan import KeepPlan
from tvaprune.targets import settle_target

WINDOW = 64


@pytest.fixture(scope="module")
def fine(tmp_path_factory):
    """A config whose layers lose any share nearly exactly: 200 KV heads, 2,000 channels; stored in bfloat16."""
    folder = tmp_path_factory.mktemp("fine")
    sizes = {"hidden_size": 400, "intermediate_size": 2000, "num_hidden_layers": 2, "num_attention_heads": 200}
    LlamaConfig(**sizes, head_dim=2, vocab_size=500, max_position_embeddings=WINDOW, dtype="bfloat16").save_pretrained(
        folder
    )
    return folder, shape_of(LlamaConfig(**sizes, head_dim=2, vocab_size=500))


def settled(folder, *flags):
    args = parse("prune", ["--model_name_or_path", str(folder), *map(str, flags)])
    return settle_target(args), args


def left_of(shape, sparsity):
    smaller = narrower(shape, sparsity)
    return {
        "params": dense_parameters(smaller),
        "speedup": forward_flops(shape, WINDOW, WINDOW) / forward_flops(smaller, WINDOW, WINDOW),
    }


@pytest.mark.parametrize(
    ("flags", "kind", "wanted"),
    [
        (("--target_params", "3.2M"), "params", 3.2e6),
        (("--target_params", "3200k"), "params", 3.2e6),
        (("--target_memory", "6.4MB"), "params", 3.2e6),  # 2 bytes each
        (("--target_memory", "12.8MB", "--dtype", "float32"), "params", 3.2e6),
        (("--target_speedup", "1.5"), "speedup", 1.5),
        (("--target_speedup", "3"), "speedup", 3.0),
    ],
)
def test_a_target_is_the_sparsity_at_which_all_layers_alike_reach_it(fine, flags, kind, wanted):
    folder, shape = fine
    target, args = settled(folder, *flags)
    (sparsity,) = args.prune.target_sparsity
    assert left_of(shape, sparsity)[kind] == pytest.approx(wanted, rel=5e-3)
    assert left_of(shape, sparsity - 0.02)[kind] != pytest.approx(wanted, rel=5e-3)  # control: another share does not
    assert args.recipe["target_sparsity"] == sparsity and target.name not in args.recipe


def test_the_share_by_hand(fine):
    folder, shape = fine
    # A layer: 4 * 400 * 400 of attention, 3 * 400 * 2000 of the MLP, 2 * 400 of norms; then two embeddings, a norm.
    layers, rest = 2 * (640_000 + 2_400_000 + 800), 2 * 500 * 400 + 400
    assert dense_parameters(shape) == layers + rest
    _, args = settled(folder, "--target_params", "3M")
    assert args.prune.target_sparsity == [0.5726]  # (6,482,000 - 3,000,000) / 6,081,600 = 0.57255, rounded up
    _, turned = settled(folder, "--target_params", "3M", "--rotate", "on")
    assert turned.prune.target_sparsity == args.prune.target_sparsity  # nothing to untie


def test_without_a_target_nothing_changes(fine):
    found, args = settled(fine[0], "--target_sparsity", "0.2", "0.5")
    assert found is None and args.prune.target_sparsity == [0.2, 0.5] and args.recipe["target_sparsity"] == [0.2, 0.5]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            "--target_params 7M",
            "has 6,482,000 parameters, without its layers 400,400 parameters; give a number",
        ),
        ("--target_params 0.4M", "--target_params 0.4M: cannot be reached by cutting the decoder layers"),
        ("--target_params 6482000", "cannot be reached"),
        ("--target_memory 1TB", "has 13.0MB of weights, without its layers 0.8MB"),
        ("--target_speedup 40", "without its layers 3[0-9.]+ times as few"),
        ("--target_params 1e3", "is 1e3: give an amount above 0 with its unit, such as 100M"),
        ("--target_params=-5M", "give an amount"),
        ("--target_params nan", "give an amount"),
        ("--target_memory 6", "such as 6GB or 5.5GiB"),
        ("--target_memory 0GB", "give an amount above 0"),
        ("--target_speedup 1", "give a number above 1, such as 1.5"),
        ("--target_params 3M --target_sparsity 0.5", "--target_sparsity and --target_params: each says how much goes"),
        ("--target_memory 6MB --target_speedup 2", "--target_memory and --target_speedup: .* give one of them"),
    ],
)
def test_what_cannot_be_reached_or_read_is_refused_in_one_line(fine, flags, words):
    with tiny.refused(words):
        settled(fine[0], *flags.split())


def test_units():
    assert amount("target_params", "1.5B", NUMBERS) == 1.5e9 and amount("target_params", "7", NUMBERS) == 7
    assert amount("target_memory", "5.5 GiB", BYTES) == 5.5 * 2**30 != amount("target_memory", "5.5GB", BYTES) == 5.5e9


def test_a_comparison_has_its_own_sparsities():
    for flag in ("--target_params=3M", "--target_sparsity=0.5"):
        with pytest.raises(InputError, match="--sparsities says what is cut here"):
            parse_comparison([flag])
    parse_comparison(["--sparsities", "0.5"])  # control


def test_an_estimate_takes_a_target(fine):
    folder, shape = fine
    found = estimate(folder, "prune", PruneSettings(target_params="3M"), use_cpu=True)
    assert found.work.pruned == narrower(shape, 0.5726)
    assert found.target == "--target_params 3M: --target_sparsity 0.5726 (all hidden dims counted)"
    assert estimate(folder, "prune", use_cpu=True).target == ""  # control


@pytest.fixture(scope="module")
def work(make_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("targets")
    model = make_model("llama")
    tiny.save_checkpoint(model, folder / "model")
    text = tiny.write_text(folder / "text.txt")
    flags = ("--model_name_or_path", folder / "model", "--dataset_name", text, "--block_size", 16, "--ctx_length", 16,
             "--max_eval_samples", 4, "--speed_batches", 0, "--use_cpu", "--dim_multiple", 0, "--weight_update", "fold",
             "--max_train_samples", 16)  # fmt: skip
    return flags, dense_parameters(shape_of(model.config))


def test_a_run_says_what_it_made_of_a_target_and_what_it_reached_and_its_recipe_repeats_it(work, tmp_path):
    flags, dense = work
    once = ("--prune_method", "magnitude")
    asked = run("prune", *flags, *once, "--target_params", "18k", "--output_dir", tmp_path / "first")
    assert asked.code == 0, asked.fault
    results = tiny.read_json(tmp_path / "first" / "results.json")
    kept = KeepPlan.load(tmp_path / "first" / "plan.json")
    assert f"--target_params 18k: --target_sparsity {results['target_sparsity']} (all hidden dims counted)" in asked.out
    assert f"--target_params 18k: reached {kept.num_parameters:,} parameters" in asked.out
    assert kept.num_parameters == pytest.approx(18_000, rel=0.05) and dense > 20_000
    recipe = yaml.safe_load((tmp_path / "first" / "recipe.yaml").read_text())
    assert recipe["target_sparsity"] == results["target_sparsity"] and "target_params" not in recipe
    again = run("prune", "--config", tmp_path / "first" / "recipe.yaml", "--output_dir", tmp_path / "again")
    assert again.code == 0, again.fault
    assert tiny.read_json(tmp_path / "again" / "plan.json") == tiny.read_json(tmp_path / "first" / "plan.json")
    assert "reached" not in again.out
    won = run("prune", "--config", tmp_path / "first" / "recipe.yaml", "--output_dir", tmp_path / "won",
              "--target_params", "21k")  # fmt: skip
    assert won.code == 0 and "--target_params 21k: reached" in won.out  # the command line wins
    other = run("prune", *flags, *once, "--target_params", "21k", "--output_dir", tmp_path / "other")
    assert other.code == 0 and KeepPlan.load(tmp_path / "other" / "plan.json").num_parameters > kept.num_parameters


def test_a_run_goes_on_to_the_same_target_only(work, tmp_path):
    flags, _ = work
    gates = ("--max_steps", 4, "--save_steps", 2, "--eval_steps", 2, "--per_device_train_batch_size", 4,
             "--rotate", "off", "--output_dir", tmp_path / "out")  # fmt: skip
    first = run("prune", *flags, *gates, "--target_params", "18k")
    assert first.code == 0, first.fault
    shutil.rmtree(tmp_path / "out" / "checkpoint-4")
    other = run("prune", *flags, *gates, "--target_params", "19k", "--resume_from_checkpoint", "True")
    assert other.code == 2 and "--target_sparsity" in other.err and "give the flags that it was made with" in other.err
    same = run("prune", *flags, *gates, "--target_params", "18k", "--resume_from_checkpoint", "True")
    assert same.code == 0, same.fault
