"""Out of core is in memory: the same folder, byte for byte, whatever the family, and in half the memory."""

import json
import os
from functools import partialmethod

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import tiny
from support.families import ROWS, make_plan
from support.folders import edit_config
from support.in_process import half_written, run
from support.other_families import OTHER_ROWS
from transformers import AutoModelForCausalLM, PreTrainedModel

from tvaprune.checkpoint import weights
from tvaprune.models import layers, shards
from tvaprune.models.shape import shape_of
from tvaprune.plan.edits import Edit
from tvaprune.plan.keep_plan import KeepPlan
from tvaprune.plan.masks import save_masks

pytestmark = pytest.mark.usefixtures("other_families")

WINDOWS = ("--block_size", 16, "--ctx_length", 16, "--max_eval_samples", 6, "--refit_samples", 12, "--use_cpu")
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


def files_in(folder):
    """The bytes of every file; of the card without the command that was given."""
    content = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    card = content["README.md"].splitlines()
    return content | {"README.md": b"\n".join(line for line in card if not line.startswith(b"- command"))}


def applied(dense, text, output, *flags):
    """Runs apply and returns the files that it saved and its results, without what differs by itself."""
    ended = run("apply", *flags_of(dense, text, output), *flags)
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


@pytest.mark.parametrize("row", ROWS | OTHER_ROWS)
def test_a_refitted_folder_and_its_results_are_those_of_the_model_in_memory(
    row, make_model, make_masks, text, tmp_path
):
    model_type, values = (ROWS | OTHER_ROWS)[row]
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
    ended = run("apply", *flags_of(dense, text, tmp_path), *STREAM, "--weight_update", "fold")
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
    ended = run("apply", *flags_of(dense, text, untied), *STREAM, "--weight_update", "fold")
    assert (ended.code, ended.fault) == (2, "") and "tie_word_embeddings" in ended.err


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--do_zero_eval",), "zero-shot scores need the model in memory"),
        (("--refit_offload", "True"), "--refit_offload would do nothing beside --stream True"),
        (("--speed_batches", 3), "--speed_batches would do nothing beside --stream True"),
    ],
)
def test_what_needs_a_model_in_memory_is_refused(flags, told, dense, text, tmp_path):
    ended = run("apply", *flags_of(dense, text, tmp_path), *STREAM, *flags)
    assert (ended.code, ended.fault) == (2, "") and told in ended.err
    ended = run("prune", "--model_name_or_path", dense, *STREAM)
    assert "--stream acts in apply, not in prune" in ended.err
