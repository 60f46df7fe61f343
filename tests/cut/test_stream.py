"""Out of core is in memory: the same folder, byte for byte, whatever the family, and in half the memory."""

from contextlib import nullcontext
from dataclasses import replace
from functools import partialmethod

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from support import tiny
from support.families import MORE_ROWS, ROWS, make_plan
from support.meter import MemoryMeter
from support.other_families import OTHER_ROWS
from support.streaming import STREAM, applied, apply, both, flags_of, save_dense
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks import room
from tvaprune import losses
from tvaprune.checkpoint import weights
from tvaprune.cut import reconstruct
from tvaprune.cut.reconstruct import reconstruct_layers
from tvaprune.cut.refit import refit_layers
from tvaprune.cut.room import disk_needed, memory_needed
from tvaprune.cut.slice import Cut, narrow_shell
from tvaprune.models import layers, load, shards
from tvaprune.models.pruned import bare_model
from tvaprune.models.rotate import Rotation
from tvaprune.phases import (
    DENSE_PERPLEXITY,
    PRUNED_PERPLEXITY,
    RECONSTRUCT,
    RECONSTRUCT_CHOICE,
    REFIT,
    REFIT_CHOICE,
    Phases,
)
from tvaprune.plan.edits import Edit
from tvaprune.plan.rotation import save_rotation

pytestmark = pytest.mark.usefixtures("other_families")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return tiny.write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture
def dense(make_model, make_masks, tmp_path):
    return save_dense(make_model, make_masks, tmp_path)


# What the walk itself must know of.
FACTORS = ("gemma3_text tied", "granite, tied", "phi3, partial rope", "olmo3", "cohere2, with biases")


@pytest.mark.parametrize("row", [*ROWS, *OTHER_ROWS, *FACTORS])
def test_a_refitted_folder_and_its_results_are_those_of_the_model_in_memory(
    row, make_model, make_masks, text, tmp_path
):
    model_type, values = (ROWS | MORE_ROWS | OTHER_ROWS)[row]
    model = make_model(model_type, **values)
    make_plan(model, make_masks, empty_layer=0).save(tmp_path / "plan.json")
    (files, results), streamed = both(tiny.save_checkpoint(model, tmp_path / "dense"), text, tmp_path)
    assert {"model.safetensors", "config.json", "README.md", "tokenizer.json"} <= files.keys()
    assert results["refit"]["share"] > 0 and results["perplexity"]["pruned"] > 1
    assert streamed == (files, results)


@pytest.mark.parametrize("update", ["none", "fold"])
def test_without_a_text_the_folder_is_the_same_too(update, dense, text, tmp_path, monkeypatch):
    flags = ("--weight_update", update, "--do_eval", "False", "--dataset_name", tmp_path / "no text")
    (files, _), (streamed, _) = both(dense, text, tmp_path, *flags)
    assert streamed == files
    monkeypatch.setattr(Edit, "folds", False)  # control: it sees a mean that is left out
    again, _ = applied(dense, text, tmp_path, *STREAM, "--overwrite_output_dir", *flags)
    assert (again["model.safetensors"] == files["model.safetensors"]) == (update == "none")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_reconstructed_folder_is_the_same_too(dtype, dense, text, tmp_path, monkeypatch):
    tiny.save_checkpoint(AutoModelForCausalLM.from_pretrained(dense, dtype=dtype), dense)
    told = []
    monkeypatch.setattr(Phases, "at", lambda phases, part, share: told.append((part, share)) or "")
    memory, streamed = both(dense, text, tmp_path, "--weight_update", "reconstruct")
    assert streamed == memory
    parts = [DENSE_PERPLEXITY, REFIT, REFIT_CHOICE, RECONSTRUCT, RECONSTRUCT_CHOICE, PRUNED_PERPLEXITY]
    assert [part for part, share in told if share == 1] == 2 * parts  # the command hears of every bar of both
    refitted, _ = applied(dense, text, tmp_path, *STREAM, "--overwrite_output_dir")
    assert refitted["model.safetensors"] != memory[0]["model.safetensors"]  # control


def test_so_it_is_where_predictions_come_in_chunks(dense, text, tmp_path, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK_TOKENS", 6)
    memory, streamed = both(dense, text, tmp_path, "--weight_update", "reconstruct")
    assert streamed == memory
    real = reconstruct._wanting_gradients
    as_loaded = lambda wanted, weights: real(wanted, weights) if wanted else nullcontext()  # noqa: E731
    monkeypatch.setattr(reconstruct, "_wanting_gradients", as_loaded)  # control: in memory a head wants some
    again, _ = applied(dense, text, tmp_path, "--overwrite_output_dir", "--weight_update", "reconstruct")
    assert again["model.safetensors"] != memory[0]["model.safetensors"]


@pytest.mark.parametrize("flags", [STREAM, ()])
def test_what_is_reconstructed_is_loaded_to_be_trained(flags, dense, text, tmp_path, monkeypatch):
    asked = []

    def precision(dtype, device, stored, trains=False):
        asked.append(trains)
        return torch.float32

    monkeypatch.setattr(load, "precision", precision)
    for update in ("refit", "reconstruct"):
        more = ("--weight_update", update, "--do_eval", "False", "--overwrite_output_dir")
        assert apply(*flags_of(dense, text, tmp_path), *flags, *more).code == 0
    assert asked == [False, True]


@pytest.mark.parametrize("row", ["gemma3_text tied", "olmo3", "cohere2 tied"])
def test_so_it_is_of_tied_models_norms_after_the_blocks_and_parallel_ones(row, make_model, make_masks, text, tmp_path):
    model_type, values = (ROWS | MORE_ROWS | OTHER_ROWS)[row]
    model = make_model(model_type, **values)
    make_plan(model, make_masks, empty_layer=0).save(tmp_path / "plan.json")
    source = tiny.save_checkpoint(model, tmp_path / "dense")
    (files, results), streamed = both(source, text, tmp_path, "--weight_update", "reconstruct")
    assert streamed == (files, results)
    assert results["reconstruct"]["errors"] and results["reconstruct"]["divergences"][1] > 0


def test_a_walk_in_other_steps_ends_at_the_same_weights(dense, text, tmp_path, monkeypatch):
    """Rows read three numbers at a time, one share in each pass, few windows of a perplexity at a time."""
    monkeypatch.setattr(shards, "PART", 3)
    monkeypatch.setattr(layers.Streamed, "passes", 1)
    monkeypatch.setattr("tvaprune.measure.perplexity.STREAM_TOKENS", 32)
    memory, streamed = both(dense, text, tmp_path, "--per_device_eval_batch_size", 2)
    assert streamed == memory


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_checkpoint_in_half_precision_comes_out_so(dtype, dense, text, tmp_path):
    tiny.save_checkpoint(AutoModelForCausalLM.from_pretrained(dense, dtype=dtype), dense)
    memory, streamed = both(dense, text, tmp_path)
    assert streamed == memory
    assert {weight.dtype for weight in load_file(tmp_path / "pruned" / "model.safetensors").values()} == {dtype}


def test_shards_are_read_and_written_as_transformers_does(dense, text, tmp_path, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(dense)
    (dense / "model.safetensors").unlink()
    model.save_pretrained(dense, max_shard_size="20KB")
    assert len(list(dense.glob("model-*.safetensors"))) > 2
    monkeypatch.setattr(weights, "LARGEST", "5KB")
    save = PreTrainedModel.save_pretrained
    monkeypatch.setattr(PreTrainedModel, "save_pretrained", partialmethod(save, max_shard_size="5KB"))
    memory, streamed = both(dense, text, tmp_path, "--weight_update", "fold")
    assert streamed == memory
    assert len([name for name in streamed[0] if name.endswith(".safetensors")]) > 3


def test_a_pruned_folder_is_streamed_too(dense, text, make_masks, tmp_path):
    applied(dense, text, tmp_path / "first", "--weight_update", "fold")
    pruned = tmp_path / "first" / "pruned"
    model = AutoModelForCausalLM.from_pretrained(pruned)
    make_plan(model, make_masks).save(pruned.parent / "plan.json")
    memory, streamed = both(pruned, text, tmp_path / "second")
    assert streamed == memory


@pytest.mark.parametrize(
    ("row", "keeps"), [("llama tied, with biases", False), ("qwen3 untied", False), ("qwen3 tied", True)]
)
def test_a_plan_under_a_rotation_turns_what_is_fetched(row, keeps, make_model, make_masks, text, tmp_path):
    model = make_model(ROWS[row][0], **ROWS[row][1])
    dense = tiny.save_checkpoint(model, tmp_path / "dense")
    size = model.config.hidden_size
    values = torch.randn(size, size, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    rotation = Rotation(torch.linalg.qr(values).Q.float())
    if keeps:
        rotation = Rotation(rotation.matrix, model.model.norm.weight.detach().sqrt())
    plan = make_plan(model, make_masks)
    plan.save(tmp_path / "plan.json")
    straight, _ = applied(dense, text, tmp_path / "straight", *STREAM)
    save_rotation(rotation, tmp_path)
    shape = replace(plan.shape, tie_word_embeddings=keeps)
    replace(plan, shape=shape, rotation=rotation.digest).save(tmp_path / "plan.json")
    memory, streamed = both(dense, text, tmp_path)
    assert streamed == memory
    assert streamed[0]["model.safetensors"] != straight["model.safetensors"]  # control


@pytest.mark.parametrize(("update", "layers_held"), [(refit_layers, 1), (reconstruct_layers, 2)])
def test_the_memory_of_a_walk_is_that_of_the_arithmetic_whatever_the_number_of_layers(
    update, layers_held, make_model, make_masks, tmp_path
):
    def peak(num_layers):
        model = make_model("llama", num_hidden_layers=num_layers, hidden_size=96, intermediate_size=256)
        plan = make_plan(model, make_masks)
        stored = model.state_dict()
        generator = torch.Generator().manual_seed(3)
        blocks = Dataset.from_dict({"input_ids": torch.randint(0, 47, (4, 16), generator=generator).tolist()})
        blocks = blocks.with_format("torch")
        shell = bare_model(model.config, torch.float32, "sdpa", torch.device("cpu"))
        dense = layers.Streamed(shell, lambda name: stored[name].clone(), torch.device("cpu"), tmp_path)
        narrow = narrow_shell(shell, plan, torch.device("cpu"))
        cut = Cut(dense, narrow, plan)
        pruned = layers.Streamed(narrow, cut, torch.device("cpu"), tmp_path)
        with MemoryMeter(shell) as meter:
            update(dense, pruned, plan, blocks, blocks.select(range(2)), 2, shares=(0.0, 1.0))
        return meter.peak, memory_needed(plan, 4, 32, update is reconstruct_layers)

    (few, wanted), (many, same) = peak(layers_held), peak(layers_held + 2)
    assert 0.7 * wanted < few <= (1.1 if layers_held > 1 else 1.0) * wanted  # of windows so small gradients come early
    assert many < 1.3 * few and same < 1.3 * wanted


def test_disk_is_for_streams_of_both_widths_and_shares_of_the_held_out_text(make_model, make_masks):
    plan = make_plan(make_model(), make_masks)
    wide, narrow, weights = plan.shape.hidden_size, plan.hidden_size, plan.num_parameters
    assert narrow < wide
    for fitted, held_out in ((3000, 70), (3000, 7000)):  # the shares of a refit are less than the weights, and more
        streams = (fitted + held_out) * (wide + narrow)
        refitted, reconstructed = 5 * held_out * narrow + weights, 2 * held_out * narrow + 2 * weights
        assert disk_needed(plan, 2, fitted, held_out) == 2 * (streams + refitted)
        assert disk_needed(plan, 2, fitted, held_out, True) == 2 * (streams + max(refitted, reconstructed))
    assert 5 * 70 * narrow < 2 * 70 * narrow + weights and 5 * 7000 * narrow > 2 * 7000 * narrow + weights


def test_a_70b_is_refitted_on_a_card_of_24_gb():
    """Llama-3-70B at half its KV heads and channels, in bfloat16, 8 windows of 512 tokens at a time."""
    half = room.half_plan()
    assert half.sparsity == pytest.approx(0.5, abs=0.01)
    weights = 2 * half.shape.num_hidden_layers * 855_638_016
    assert memory_needed(half, 2, 8 * 512) < 24 * 2**30 < weights / 5
    wide = memory_needed(room.half_plan(28672), 2, 8 * 512)
    assert wide > 24 * 2**30  # control: a writer as wide as the dense one does not
    tokens = 128 * 512
    streams = 2 * 2 * tokens * 2 * 8192
    assert streams == pytest.approx(4.3e9, rel=0.01)
    assert disk_needed(half, 2, tokens, tokens) - 2 * half.num_parameters == streams + 5 * 2 * tokens * 8192
    assert memory_needed(half, 2, 8 * 512, reconstructs=True) > 24 * 2**30  # it trains two layers at a time
    assert disk_needed(half, 2, tokens, tokens, True) == 2 * 2 * half.num_parameters + streams + 2 * 2 * tokens * 8192
    parallel = replace(half, shape=replace(half.shape, is_parallel=True))  # a layer's input waits beside each stream
    assert disk_needed(parallel, 2, tokens, tokens) - 2 * half.num_parameters == 2 * (streams + 5 * 2 * tokens * 8192)
    more = memory_needed(parallel, 2, 8 * 512) - memory_needed(half, 2, 8 * 512)
    assert more == 2 * 8 * 512 * 2 * 8192
    page = " ".join((tiny.ROOT / "docs" / "scale.md").read_text(encoding="utf-8").split())
    assert room.line() in page and room.line(True) in page and room.line() != room.line(True)
