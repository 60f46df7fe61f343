"""The basis that gates train in: found from the streams, written beside the mask, taken along where it is applied."""

import copy
import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from support import tiny
from support.families import logits

from tvaprune.choose import rotation, tie
from tvaprune.choose.choose import in_basis
from tvaprune.choose.rotation import learn_rotation, moments_of, rows_of
from tvaprune.errors import InputError
from tvaprune.flags.arguments import Arguments
from tvaprune.models.rotate import Rotation, rotate
from tvaprune.plan.rotation import read_rotation
from tvaprune.run import Run

MEASURED = ("--block_size", 16, "--ctx_length", 16, "--max_eval_samples", 8, "--speed_batches", 0, "--use_cpu")
APPLIED = (*MEASURED, "--refit_samples", 8, "--do_eval")
FLAGS = (*MEASURED, "--max_train_samples", 16, "--dim_multiple", 4)
TRAINED = (*FLAGS, "--do_train", "--target_sparsity", 0.4, "--per_device_train_batch_size", 4, "--max_steps", 6,
           "--save_steps", 3, "--eval_steps", 3)  # fmt: skip
GATES = (*TRAINED, "--refit_samples", 8)


@pytest.fixture(scope="module")
def source(request, make_model, tmp_path_factory):
    """The flags of a model, untied unless a test asks otherwise, and a text."""
    folder, tied = tmp_path_factory.mktemp("source"), getattr(request, "param", False)
    model = tiny.save_checkpoint(make_model("llama", tie_word_embeddings=tied), folder / "model")
    return ("--model_name_or_path", model, "--dataset_name", tiny.write_text(folder / "text.txt"))


@pytest.fixture
def pruned(source, tmp_path, command):
    code, _, error = command(*source, *GATES, "--output_dir", tmp_path / "out")
    assert code == 0, error
    return tmp_path / "out"


def run_of(*flags):
    return Run.load(Arguments.parse([*map(str, flags)], "prune"))


def lost_by_cutting(model, keep, ids):
    """How far the logits move when all dims of the stream but the first go, whatever writes to it."""
    gate = (torch.arange(model.config.hidden_size) < keep).float()
    names = ["model.embed_tokens", *(n for n, _ in model.named_modules() if n.endswith(("o_proj", "down_proj")))]
    before = logits(model, ids)
    handles = [model.get_submodule(n).register_forward_hook(lambda m, a, output: output * gate) for n in names]
    after = logits(model, ids)
    for handle in handles:
        handle.remove()
    return float((after - before).square().mean())


def test_the_last_dims_of_the_learned_basis_carry_least(source):
    """A stream that lives in half of its dims, turned at random: the basis finds them again."""
    run = run_of(*source, *FLAGS, "--output_dir", "unused")
    size = run.shape.hidden_size
    with torch.no_grad():
        for name, parameter in run.model.named_parameters():
            if name.endswith(("embed_tokens.weight", "o_proj.weight", "down_proj.weight")):
                values = parameter if "embed" in name else parameter.T
                values[:, size // 2 :] *= 1e-3
    hidden = Rotation(torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(3))).Q)
    rotate(run.model, hidden)
    ids = run.selection_blocks()[:4]["input_ids"]
    lost = lost_by_cutting(copy.deepcopy(run.model), size // 2, ids)  # control: in the basis as it came
    learned = learn_rotation(run)
    assert all(parameter.requires_grad for parameter in run.model.parameters())
    assert lost_by_cutting(rotate(run.model, learned), size // 2, ids) < 1e-3 * lost


@pytest.mark.parametrize("place", [0, 1])
def test_moments_that_are_no_numbers_end_in_one_line(place, source, monkeypatch):
    run = run_of(*source, *FLAGS, "--output_dir", "unused")
    moments = [torch.eye(8, dtype=torch.float64) for _ in range(2)]
    monkeypatch.setattr(rotation, "moments_of", lambda run: moments)
    assert learn_rotation(run).matrix.shape == (8, 8)  # control
    moments[place].fill_(float("nan"))
    with pytest.raises(InputError, match="the streams' moments are no numbers"):
        learn_rotation(run)


@pytest.mark.parametrize(("flags", "told"), [((), True), (("--rotate", "off"), False)])
def test_a_sharded_run_says_that_it_is_not_turned(flags, told, source, capsys):
    run = run_of(*source, *FLAGS, *flags, "--output_dir", "unused")
    sharded = replace(run, args=replace(run.args, source=replace(run.args.source, shard=True)))
    assert in_basis(sharded) is sharded
    assert ("note: --rotate auto turns nothing beside --shard True" in capsys.readouterr().out) == told


@pytest.mark.parametrize("source", [False, True], indirect=True, ids=["untied", "tied"])
def test_masks_and_plans_take_the_rotation_along(pruned, source, tmp_path, command):
    (mask,) = (pruned / "best").glob("*.pkl")
    record, plan = tiny.read_json(mask.with_suffix(".json")), tiny.read_json(pruned / "plan.json")
    results = tiny.read_json(pruned / "results.json")
    assert len(record["rotation"]) == 16 and record["rotation"] == plan["rotation"] == results["rotation"]
    for flag, path in (("--mask_loc", mask), ("--plan", pruned / "plan.json")):
        out = tmp_path / flag[2:]
        code, _, error = command(*source, *APPLIED, flag, path, "--output_dir", out)
        assert code == 0, error
        found = tiny.read_json(out / "results.json")
        assert found["perplexity"]["pruned"] == pytest.approx(results["perplexity"]["pruned"], rel=1e-6)
        assert found["rotation"] == record["rotation"]
    (file,) = (pruned / "best").glob("rotation_*")
    file.unlink()
    code, _, error = command(*source, *APPLIED, "--mask_loc", mask, "--output_dir", tmp_path / "lost")
    assert f"{file.name} is not beside it" in tiny.refusal(code, error)
    mask.with_suffix(".json").write_text(json.dumps(record | {"rotation": None}))  # control: another mask
    code, _, error = command(*source, *APPLIED, "--mask_loc", mask, "--output_dir", tmp_path / "without")
    assert code == 0, error
    other = tiny.read_json(tmp_path / "without" / "results.json")["perplexity"]
    assert abs(other["pruned"] - results["perplexity"]["pruned"]) > 1e-3
    assert other["dense"] == pytest.approx(results["perplexity"]["dense"], rel=1e-4)


def test_the_basis_is_the_same_whatever_the_batch(source, monkeypatch):
    run = run_of(*source, *FLAGS, "--output_dir", "unused")
    found = []
    for batch in (8, 3, 1):
        monkeypatch.setattr("tvaprune.choose.rotation.rotation_batch", lambda args, batch=batch: batch)
        found.append(moments_of(run))
    for carried, needed in found[1:]:
        torch.testing.assert_close(carried, found[0][0], rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(needed, found[0][1], rtol=1e-4, atol=1e-4)
    run.args.training.seed += 1  # control: other tokens are drawn
    assert not torch.allclose(moments_of(run)[1], found[0][1], rtol=1e-4, atol=1e-4)


def test_moments_are_those_of_a_stream_without_gains(source, monkeypatch):
    """The same where the readers took the norms' gains; and what several processes find is added up."""
    run, added = run_of(*source, *FLAGS, "--output_dir", "unused"), []
    monkeypatch.setattr("tvaprune.choose.rotation.ranks.add_up", lambda *tensors: added.extend(tensors))
    moments = moments_of(run)
    assert all(map(torch.equal, added, moments)) and len(added) == 2
    gain = run.model.model.norm.weight.detach()
    assert (gain - 1).abs().max() > 0.3  # control
    rotate(run.model, Rotation(torch.eye(36)))
    for found, expected in zip(moments_of(run), moments, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


def test_a_kept_tie_turns_what_is_no_axis_by_the_stretched_streams_moments(monkeypatch):
    carried, needed = (torch.randn(8, 8, generator=torch.Generator().manual_seed(seed)).double() for seed in (0, 1))
    carried, needed = carried @ carried.T, needed @ needed.T
    stretch, axes = torch.linspace(0.2, 2.0, 8).double(), torch.arange(8) % 4 == 0
    monkeypatch.setattr(rotation, "kept_tie", lambda *args: (stretch, axes))
    monkeypatch.setattr(rotation, "rows_of", lambda *args: None)
    run = SimpleNamespace(args=Arguments.parse(["--model_name_or_path", "x"], "prune"), model=None,
                          shape=SimpleNamespace(tie_word_embeddings=True))  # fmt: skip
    found = rotation._rotation(run, carried, needed)
    matrix = found.matrix.double()
    assert torch.equal(matrix[axes], torch.eye(8).double()[:2]) and torch.equal(found.stretch, stretch.float())
    turn, by = matrix[~axes][:, 2:], stretch[~axes].outer(stretch[~axes])
    values, vectors = torch.linalg.eigh(carried[~axes][:, ~axes] * by)
    root = vectors * values.sqrt() @ vectors.T
    counts = turn.T @ root @ (needed[~axes][:, ~axes] / by) @ root @ turn
    torch.testing.assert_close(counts, counts.diagonal().diag(), rtol=0, atol=1e-4 * float(counts.max()))
    assert bool((counts.diagonal().diff() < 0).all())


def test_the_basis_is_of_the_whole_text_however_many_blocks_gates_train_on(source):
    run = run_of(*source, "--block_size", 4, "--max_train_samples", 300, "--output_dir", "unused")
    blocks = run.train_blocks(128)[:]["input_ids"]
    rows = rows_of(run, 128)
    assert len(blocks) == 300 and len(rows) == 128
    places = [int((blocks == row).all(-1).nonzero()[0]) for row in rows]
    assert torch.equal(rows[0], blocks[0]) and torch.equal(rows[-1], blocks[-1])
    assert sum(place >= 128 for place in places) > 64  # the first 128 would be of the first part alone
    assert torch.equal(rows_of(run, 300), blocks) and torch.equal(rows_of(run, 1000), blocks)  # controls


def test_an_interrupted_training_goes_on_in_the_basis_that_it_began_in(pruned, source, command, monkeypatch):
    whole = {path.name: path.read_bytes() for path in (pruned / "best").glob("*.pkl")}
    (file,) = (pruned / "best").glob("rotation_*")
    shutil.rmtree(pruned / "checkpoint-6")
    with monkeypatch.context() as patch:
        patch.delattr("tvaprune.choose.choose.learn_rotation")  # it is read, not found anew
        code, _, error = command(*source, *GATES, "--resume_from_checkpoint", True, "--output_dir", pruned)
    assert code == 0, error
    assert {path.name: path.read_bytes() for path in (pruned / "best").glob("*.pkl")} == whole
    shutil.rmtree(pruned / "checkpoint-6")
    code, _, error = command(
        *source, *GATES, "--rotate", "off", "--resume_from_checkpoint", True, "--output_dir", pruned
    )
    assert "--rotate" in tiny.refusal(code, error) and file.is_file()


@pytest.mark.parametrize(("cost", "turns"), [(0.0, False), (1e9, True)])
@pytest.mark.parametrize("source", [True], indirect=True, ids=["tied"])
def test_a_tie_that_costs_too_much_leaves_the_basis_as_it_came(cost, turns, source, monkeypatch, tmp_path, command):
    monkeypatch.setattr(tie, "COST", cost)
    code, output, error = command(*source, *TRAINED, "--weight_update", "fold", "--output_dir", tmp_path)
    assert code == 0, error
    assert ("note: --rotate auto turns nothing" in output) is not turns
    assert ("rotation" in tiny.read_json(tmp_path / "results.json")) is turns
    assert bool([*(tmp_path / "best").glob("rotation_*")]) is turns


@pytest.mark.parametrize("source", [True], indirect=True, ids=["tied"])
def test_what_is_turned_and_tied_is_tuned_on(pruned, source, tmp_path, command):
    """Its teacher is the dense model in the same basis: at the start the student is what was measured."""
    tuned = (*MEASURED, "--do_train", "--plan", pruned / "plan.json", "--refit_samples", 8, "--max_train_samples", 8,
             "--max_steps", 1, "--learning_rate", 1e-9, "--lora_r", 2, "--output_dir", tmp_path / "tuned")  # fmt: skip
    code, _, error = command(*source, *tuned)
    assert code == 0, error
    found, before = (tiny.read_json(path / "results.json")["perplexity"] for path in (tmp_path / "tuned", pruned))
    assert found["finetuned"] == pytest.approx(before["pruned"], rel=1e-4)
    assert abs(before["pruned"] - before["dense"]) > 1e-2  # control
    assert tiny.read_json(tmp_path / "tuned" / "merged" / "config.json")["tie_word_embeddings"]


@pytest.mark.parametrize(
    ("tied", "words", "turns"),
    [(False, (), True), (True, (), True), (True, ("--rotate", "on"), True), (False, ("--rotate", "off"), False),
     (False, ("--prune_method", "magnitude"), False), (False, ("--prune_method", "magnitude", "--rotate", "on"), True)],
)  # fmt: skip
def test_auto_turns_for_gates_and_keeps_a_tie(tied, words, turns, make_model, source, tmp_path, command):
    model = tiny.save_checkpoint(make_model("llama", tie_word_embeddings=tied), tmp_path / "model")
    gates = "--prune_method" not in words
    flags = (*TRAINED, *words) if gates else (*FLAGS, "--do_train", "--target_sparsity", 0.4, *words)
    code, _, error = command("--model_name_or_path", model, *source[2:], *flags, "--weight_update", "fold",
                             "--output_dir", tmp_path / "out", "--save_pruned", tmp_path / "pruned")  # fmt: skip
    assert code == 0, error
    results = tiny.read_json(tmp_path / "out" / "results.json")
    assert ("rotation" in results) is turns
    config = tiny.read_json(tmp_path / "pruned" / "config.json")
    assert config["tie_word_embeddings"] is (tied and "on" not in words)
    assert results["parameters"]["dense"] == make_model("llama", tie_word_embeddings=tied).num_parameters()
    (mask,) = (tmp_path / "out" / "best").glob("*.pkl")
    record = tiny.read_json(mask.with_suffix(".json"))
    found = read_rotation(mask, record["rotation"], 36)
    assert (found is not None) is turns
