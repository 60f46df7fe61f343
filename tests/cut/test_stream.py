"""Out of core is in memory: the same folder, byte for byte, whatever the family, and in half the memory."""

import errno
import inspect
import itertools
import json
import os
import shutil
import signal
from dataclasses import replace
from functools import partialmethod
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from huggingface_hub.constants import HF_HUB_CACHE
from safetensors.torch import load_file, save_file
from support import tiny
from support.families import MORE_ROWS, ROWS, make_plan
from support.folders import edit_config
from support.in_process import half_written, run
from support.meter import MemoryMeter
from support.other_families import OTHER_ROWS
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks import room
from tvaprune.checkpoint import weights
from tvaprune.cut import stream
from tvaprune.cut.reconstruct import reconstruct_layers
from tvaprune.cut.refit import refit_layers
from tvaprune.cut.room import disk_needed, memory_needed
from tvaprune.cut.slice import narrow_shell
from tvaprune.measure.cost import (
    DENSE_PERPLEXITY,
    PRUNED_PERPLEXITY,
    RECONSTRUCT,
    RECONSTRUCT_CHOICE,
    REFIT,
    REFIT_CHOICE,
)
from tvaprune.models import layers, load, shards
from tvaprune.models.pruned import bare_model
from tvaprune.models.rotate import Rotation
from tvaprune.models.shape import shape_of
from tvaprune.phases import Phases
from tvaprune.plan.edits import Edit, edits_of
from tvaprune.plan.keep_plan import KeepPlan
from tvaprune.plan.masks import save_masks
from tvaprune.plan.rotation import save_rotation

pytestmark = pytest.mark.usefixtures("other_families")

WINDOWS = ("--block_size", 16, "--ctx_length", 16, "--max_eval_samples", 6, "--use_cpu")
STREAM = ("--stream", "True")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return tiny.write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture
def dense(make_model, make_masks, tmp_path):
    """A checkpoint with a mask, a plan of it beside it."""
    model = make_model("llama", num_key_value_heads=4)
    save_masks(make_masks(shape_of(model.config)), tmp_path / "mask_info_1.0.pkl")
    make_plan(model, make_masks, empty_layer=0).save(tmp_path / "plan.json")
    return tiny.save_checkpoint(model, tmp_path / "dense")


def flags_of(dense, text, output):
    plan = ("--plan", dense.parent / "plan.json", "--dataset_name", text)
    folders = ("--output_dir", output / "at", "--save_pruned", output / "pruned")
    return ("--model_name_or_path", dense, *plan, *folders, *WINDOWS)


def apply(*flags):
    """Runs apply; where weights are refitted, on few blocks."""
    few = () if {"none", "fold"} & set(flags) else ("--refit_samples", 12)
    return run("apply", *flags, *few)


def files_in(folder):
    """The bytes of every file; of the card without the command that was given."""
    content = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    card = content["README.md"].splitlines()
    return content | {"README.md": b"\n".join(line for line in card if not line.startswith(b"- command"))}


def applied(dense, text, output, *flags):
    """Runs apply and returns the files that it saved and its results, without what differs by itself."""
    ended = apply(*flags_of(dense, text, output), *flags)
    assert ended.code == 0, ended.err + ended.trace
    results = output / "at" / "results.json"
    results = tiny.read_json(results) if results.exists() else {}  # nothing was measured
    results.get("refit", {}).pop("seconds", None)
    results.pop("command", None)
    assert half_written(output) == []
    return files_in(output / "pruned"), results


def both(dense, text, output, *flags):
    """The same in memory and out of core."""
    memory = applied(dense, text, output / "memory", "--speed_batches", 0, *flags)
    return memory, applied(dense, text, output, *STREAM, *flags)


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


# what differs in the files of a checkpoint -> what is told


def edited(dense, edit):
    content = load_file(dense / "model.safetensors")
    edit(content)
    save_file(content, dense / "model.safetensors", metadata={"format": "pt"})


def nan(content):
    content["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")


def as_pickles(dense):
    torch.save(load_file(dense / "model.safetensors"), dense / "pytorch_model.bin")
    (dense / "model.safetensors").unlink()


def with_index_outside(dense):
    (dense / "model.safetensors").rename(dense.parent / "model.safetensors")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "../model.safetensors"}}
    (dense / "model.safetensors.index.json").write_text(json.dumps(index))


BROKEN = {
    "NaN": (lambda dense: edited(dense, nan), "model.layers.1.mlp.up_proj.weight holds NaN or infinity"),
    "a missing weight": (
        lambda dense: edited(dense, lambda content: content.pop("model.norm.weight")),
        "1 of the model's tensors are missing, such as 'model.norm.weight'",
    ),
    "an unknown one": (
        lambda dense: edited(dense, lambda content: content.update(more=torch.ones(2))),
        "1 of the file's are unknown to it, such as 'more'",
    ),
    "another size": (
        lambda dense: edited(dense, lambda content: content.update({"model.norm.weight": torch.ones(2)})),
        "'model.norm.weight' is (2,) in the file and (36,) by config.json",
    ),
    "numbers that are no weights": (
        lambda dense: edited(dense, lambda c: c.update({"model.norm.weight": torch.ones(36, dtype=torch.int8)})),
        "'model.norm.weight' holds I8 numbers, its weights are quantised",
    ),
    "quantised": (
        lambda dense: edit_config(dense, quantization_config={"quant_method": "gptq"}),
        "its weights are quantised",
    ),
    "a file cut in half": (
        lambda dense: os.truncate(dense / "model.safetensors", 5000),
        "model.safetensors is no whole safetensors file",
    ),
    "pickles": (as_pickles, "has no model.safetensors and no model.safetensors.index.json, and --stream True reads"),
    "an index that leads out": (with_index_outside, "names '../model.safetensors', which is no file of this folder"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_checkpoint_is_refused_before_any_work(kind, dense, text, tmp_path):
    breaks, told = BROKEN[kind]
    breaks(dense)
    ended = apply(*flags_of(dense, text, tmp_path), *STREAM, "--weight_update", "fold")
    assert (ended.code, ended.fault) == (2, ""), ended
    assert told in ended.err
    assert not (tmp_path / "pruned").exists() and half_written(tmp_path) == []


def test_what_a_model_ties_may_be_there_twice(make_model, make_masks, text, tmp_path):
    model = make_model("llama", tie_word_embeddings=True)
    make_plan(model, make_masks).save(tmp_path / "plan.json")
    dense = tiny.save_checkpoint(model, tmp_path / "dense")
    (files, _), _ = both(dense, text, tmp_path / "once", "--weight_update", "fold")
    embedding = load_file(dense / "model.safetensors")["model.embed_tokens.weight"]

    def twice(content, head):
        content["lm_head.weight"] = head.clone()

    edited(dense, lambda content: twice(content, embedding))
    (same, _), (streamed, _) = both(dense, text, tmp_path / "twice", "--weight_update", "fold")
    assert streamed == same == files
    edited(dense, lambda content: twice(content, embedding.flip(0)))  # then the config lies, and it is untied
    untied = tmp_path / "untied"
    plan = KeepPlan.load(tmp_path / "plan.json")
    make_plan(make_model("llama"), make_masks).save(tmp_path / "plan.json")
    assert plan.shape.tie_word_embeddings
    ended = apply(*flags_of(dense, text, untied), *STREAM, "--weight_update", "fold")
    assert (ended.code, ended.fault) == (2, "") and "tie_word_embeddings" in ended.err


def test_a_gguf_file_is_refused(dense, text, tmp_path, monkeypatch):
    monkeypatch.setattr(load, "gguf_file", lambda path, named: None if inspect.stack()[1].function == "load_config"
                        else dense / "model.gguf")  # fmt: skip
    ended = apply(*flags_of(dense, text, tmp_path), *STREAM)
    assert (ended.code, ended.fault) == (2, "") and "--stream True reads safetensors alone" in ended.err


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--do_zero_eval",), "zero-shot scores need the model in memory"),
        (("--refit_offload", "True"), "--refit_offload would do nothing beside --stream True"),
        (("--speed_batches", 3), "--speed_batches would do nothing beside --stream True"),
    ],
)
def test_what_needs_a_model_in_memory_is_refused(flags, told, dense, text, tmp_path):
    ended = apply(*flags_of(dense, text, tmp_path), *STREAM, *flags)
    assert (ended.code, ended.fault) == (2, "") and told in ended.err
    assert not (tmp_path / "at").exists()  # nothing was begun
    ended = run("prune", "--model_name_or_path", dense, *STREAM)
    assert "--stream acts in apply, not in prune" in ended.err


@pytest.mark.parametrize(
    ("left_out", "told"),
    [("--plan", "without --mask_loc or --plan"), ("--save_pruned", "without --save_pruned FOLDER or --do_eval True")],
)
def test_a_stream_without_a_use_is_refused_before_any_folder(left_out, told, dense, text, tmp_path):
    flags = [*flags_of(dense, text, tmp_path), *STREAM, "--do_eval", "False"]
    place = flags.index(left_out)
    ended = apply(*flags[:place], *flags[place + 2 :])
    assert (ended.code, ended.fault) == (2, "") and f"--stream would do nothing {told}" in ended.err
    assert not (tmp_path / "at").exists()


def test_a_hub_id_is_read_from_the_hubs_cache(dense, text, tmp_path, monkeypatch):
    """Shards and their index, as the hub's client keeps them: links of a snapshot to blobs."""
    model = AutoModelForCausalLM.from_pretrained(dense)
    wanted, _ = applied(dense, text, tmp_path / "folder", *STREAM, "--weight_update", "fold")
    (dense / "model.safetensors").unlink()
    model.save_pretrained(dense, max_shard_size="30KB")
    home = Path(HF_HUB_CACHE) / "models--somebody--tiny"
    snapshot, blobs = home / "snapshots" / ("0" * 40), home / "blobs"
    for folder in (snapshot, blobs, home / "refs"):
        folder.mkdir(parents=True)
    (home / "refs" / "main").write_text("0" * 40)
    for number, file in enumerate(sorted(dense.iterdir())):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(blobs / str(number))
    dense.rmdir()
    flags = ("--model_name_or_path", "somebody/tiny", *flags_of(dense, text, tmp_path)[2:])
    ended = apply(*flags, *STREAM, "--weight_update", "fold")
    assert ended.code == 0, ended.err + ended.trace
    weights = "model.safetensors"
    assert (tmp_path / "pruned" / weights).read_bytes() == wanted[weights]
    min(snapshot.glob("model-*.safetensors")).unlink()
    ended = apply(*flags, *STREAM, "--weight_update", "fold", "--overwrite_output_dir")
    assert (ended.code, ended.fault) == (2, "") and "somebody/tiny: cannot be loaded" in ended.err
    shutil.rmtree(home)


def killed_at(number, *flags):
    """Runs apply in a fork that is killed when it reads that weight."""
    pid = os.fork()
    if pid == 0:
        left = itertools.count(number, -1)
        read = shards.Shards.weight
        shards.Shards.weight = lambda *args: os.kill(os.getpid(), signal.SIGKILL) if next(left) == 0 else read(*args)
        os._exit(apply(*flags).code)
    _, status = os.waitpid(pid, 0)
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def test_a_kill_leaves_what_was_there_and_the_next_run_clears_up(dense, text, tmp_path, monkeypatch):
    flags = (*flags_of(dense, text, tmp_path), *STREAM, "--overwrite_output_dir", "--do_eval", "False")
    older = applied(dense, text, tmp_path, *STREAM, "--do_eval", "False", "--weight_update", "fold")[0]
    reads = []
    monkeypatch.setattr(shards.Shards, "weight", _counting(shards.Shards.weight, reads))
    newer = applied(dense, text, tmp_path / "other", *STREAM, "--do_eval", "False")[0]
    monkeypatch.undo()
    assert newer["model.safetensors"] != older["model.safetensors"]
    seen = set()
    for number in (0, len(reads) // 3, len(reads) * 2 // 3, len(reads) - 1):
        assert killed_at(number, *flags)
        assert files_in(tmp_path / "pruned") == older
        left = [path for path in tmp_path.iterdir() if path.name.startswith(".tvaprune-part-")]
        seen |= {path.name.rpartition("-")[2] for path in left}
    assert seen == {"pruned.scratch", "pruned"}  # in the walk, and in the writing
    assert apply(*flags).code == 0
    assert files_in(tmp_path / "pruned") == newer
    assert [path for path in tmp_path.iterdir() if path.name.startswith(".tvaprune-")] == []
    assert not killed_at(10**6, *flags)  # control


def _counting(function, calls):
    def counted(*args):
        calls.append(args[1:])
        return function(*args)

    return counted


def test_an_interrupted_run_leaves_nothing(dense, text, tmp_path, monkeypatch):
    monkeypatch.setattr(layers.Streamed, "settle", lambda *args: os.kill(os.getpid(), signal.SIGINT))
    ended = apply(*flags_of(dense, text, tmp_path), *STREAM)
    assert ended.code == 130
    assert not (tmp_path / "pruned").exists()
    assert [path for path in tmp_path.iterdir() if path.name.startswith(".tvaprune-")] == []


def test_a_disk_that_is_too_small_is_told_before_the_walk(dense, text, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10_000))
    ended = apply(*flags_of(dense, text, tmp_path), *STREAM)
    assert (ended.code, ended.fault) == (2, "") and "put --save_pruned on a larger disk" in ended.err
    assert not (tmp_path / "pruned").exists()


def test_a_disk_that_holds_a_refit_alone_is_told_before_a_reconstruction(dense, text, tmp_path, monkeypatch):
    free = []
    monkeypatch.setattr("tvaprune.run.CHOICE_SAMPLES", 4)  # else the shares of a refit are more than weights this small
    monkeypatch.setattr(stream, "disk_needed", lambda *args: free.append(disk_needed(*args[:4])) or disk_needed(*args))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free[-1]))
    flags = (*flags_of(dense, text, tmp_path), *STREAM, "--do_eval", "False")
    ended = apply(*flags, "--weight_update", "reconstruct")
    assert (ended.code, ended.fault) == (2, "") and "weights of the reconstruct need" in ended.err
    assert apply(*flags).code == 0  # control


def test_a_full_disk_is_one_line(dense, text, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    ended = apply(*flags_of(dense, text, tmp_path), *STREAM)
    assert (ended.code, ended.fault) == (2, "") and "there is no room on the" in ended.err
    assert not (tmp_path / "pruned").exists()


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
        cut = stream._Cut(dense, narrow, edits_of(plan, dense.family), folds=True)
        pruned = layers.Streamed(narrow, cut, torch.device("cpu"), tmp_path)
        with MemoryMeter(shell) as meter:
            update(dense, pruned, plan, blocks, blocks.select(range(2)), 2, shares=(0.0, 1.0))
        return meter.peak, memory_needed(plan, 4, 32, update is reconstruct_layers)

    (few, wanted), (many, same) = peak(layers_held), peak(layers_held + 2)
    assert 0.7 * wanted < few <= wanted
    assert many < 1.3 * few and same < 1.3 * wanted


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
