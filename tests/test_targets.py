"""A target of parameters, memory or operations: the sparsity that it asks for, what is reached, and what cannot be."""

import pytest
import torch
from support import tiny
from transformers import LlamaConfig

from tvaprune import targets
from tvaprune.errors import InputError
from tvaprune.flags.arguments import OF_CELLS, parse_comparison
from tvaprune.flags.conditions import parse
from tvaprune.flags.ranges import BYTES, NUMBERS, amount
from tvaprune.measure.work import forward_flops, narrower
from tvaprune.models.parameters import model_parameters
from tvaprune.models.shape import shape_of
from tvaprune.models.units import PerUnit
from tvaprune.plan.keep_plan import KeepPlan
from tvaprune.targets import reached, settle_target

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
        "params": model_parameters(smaller),
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
    assert model_parameters(shape) == layers + rest
    _, args = settled(folder, "--target_params", "3M")
    assert args.prune.target_sparsity == [0.5726]  # (6,482,000 - 3,000,000) / 6,081,600 = 0.57255, rounded up
    _, exact = settled(folder, "--target_params", 3_106_712)  # 0.555, which floats miss by little
    assert exact.prune.target_sparsity == [0.555]
    assert settled(folder, "--target_speedup", 2, "--ctx_length", 32)[0].window == 32
    _, turned = settled(folder, "--target_params", "3M", "--rotate", "on")
    assert turned.prune.target_sparsity == args.prune.target_sparsity  # nothing to untie


def test_weights_of_no_known_precision_are_counted_in_float32(fine, tmp_path):
    config = LlamaConfig.from_pretrained(fine[0])
    config.dtype = None
    config.save_pretrained(tmp_path)
    (_, plain), (_, halves) = (settled(folder, "--target_memory", "12MB") for folder in (tmp_path, fine[0]))
    assert plain.prune.target_sparsity == [0.5726] != halves.prune.target_sparsity  # of 3M parameters, and of 6M


def test_a_head_that_turning_unties_counts_beside_the_embedding(fine, tmp_path):
    config = LlamaConfig.from_pretrained(fine[0], tie_word_embeddings=True)
    config.save_pretrained(tmp_path)
    shares = [settled(tmp_path, "--target_params", "3M", "--rotate", kind)[1] for kind in ("on", "off")]
    # Another 500 * 400 have to go where both are stored: (6,482,000 - 3,000,000) / 6,081,600, or 200,000 less.
    assert [args.prune.target_sparsity for args in shares] == [[0.5726], [0.5397]]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--target_params 3M", "reached 3,442,000 parameters"),  # 2 * (320,000 + 1,200,000 + 800) + 400,400
        ("--target_memory 6MB", "reached 6.9MB of weights"),  # 2 bytes each
        # Of a token 2 * 6,280,000 in linears, 4 * 400 * 64 in either layer's attention, both halved but for the head
        ("--target_speedup 2.5", "reached 1.94 times as few operations"),
    ],
)
def test_what_a_plan_of_half_the_heads_and_channels_reaches(fine, flags, said):
    folder, shape = fine
    half = PerUnit(torch.arange(400), (torch.arange(100),) * 2, (torch.arange(1000),) * 2)
    plan = KeepPlan(half, half.map(lambda units: torch.ones(len(units))), shape, 1)
    target, args = settled(folder, *flags.split())
    assert reached(target, plan) == f"{flags}: {said}"
    line = targets.settled(args, target)
    assert line.startswith(f"{flags}: --target_sparsity 0.") and ("not timed" in line) == ("speedup" in flags)


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
        ("--target_params 400401", "cannot be reached"),  # nor by less than a whole layer in ten thousand
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
        with pytest.raises(InputError, match="a comparison has --sparsities for it; give that"):
            parse_comparison([flag])
    parse_comparison(["--sparsities", "0.5"])  # control


@pytest.mark.parametrize(("name", "own"), OF_CELLS.items())
def test_what_a_comparison_says_itself_goes_to_no_cell_as_a_flag(name, own):
    with pytest.raises(InputError, match=f"--{name}: a comparison has --{own} for it; give that"):
        parse_comparison([f"--{name}=1"])
