"""Out of core: what is refused before any work, what a kill or a full disk leaves."""

import errno
import inspect
import itertools
import json
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub.constants import HF_HUB_CACHE
from safetensors.torch import load_file, save_file
from support import tiny
from support.families import make_plan
from support.folders import edit_config
from support.in_process import half_written, run
from support.streaming import STREAM, applied, apply, both, files_in, flags_of, save_dense
from transformers import AutoModelForCausalLM

from tvaprune.cut import stream
from tvaprune.cut.room import disk_needed
from tvaprune.models import layers, load, shards
from tvaprune.plan.keep_plan import KeepPlan

pytestmark = pytest.mark.usefixtures("other_families")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return tiny.write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture
def dense(make_model, make_masks, tmp_path):
    return save_dense(make_model, make_masks, tmp_path)


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


BROKEN = {  # what differs in the files of a checkpoint -> what is told
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
    asked = []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10_000))
    for name, needed in (("disk_needed", disk_needed), ("memory_needed", stream.memory_needed)):
        monkeypatch.setattr(stream, name, lambda *args, of=needed: asked.append(args[2:]) or of(*args))
    ended = apply(*flags_of(dense, text, tmp_path), *STREAM, "--per_device_eval_batch_size", 3)
    # tokens of a pass; those that are fitted, and those that choose: 12 and 6 blocks of 16
    assert asked == [(3 * 16, False), (12 * 16, 6 * 16, False)]
    assert (ended.code, ended.fault) == (2, "") and "put --save_pruned on a larger disk" in ended.err
    assert not (tmp_path / "pruned").exists()


def test_a_disk_that_holds_a_refit_alone_is_told_before_a_reconstruction(dense, text, tmp_path, monkeypatch):
    free = []
    monkeypatch.setattr(
        "tvaprune.run.SELECTION_SAMPLES", 4
    )  # else the shares of a refit are more than weights this small
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
