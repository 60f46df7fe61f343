"""Seeded damage to whatever a user hands over: each run ends in a true result, or in one line and exit code 2.

``TVAPRUNE_MUTATIONS=10`` tries ten times as many, ``TVAPRUNE_MUTATION_SEED=7`` others. A failure names its seed.
"""

import contextlib
import json
import math
import os
import pickle
import random
import shutil
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support import tiny
from support.in_process import Ended, half_written, run, strict_json
from support.mutate import damage_bytes, damage_json, damage_tensors
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tvaprune.models.shape import shape_of
from tvaprune.models.units import PerUnit
from tvaprune.plan.masks import Masks, save_masks
from tvaprune.text.blocks import token_blocks

TIMES = float(os.environ.get("TVAPRUNE_MUTATIONS", "1"))
SEED = int(os.environ.get("TVAPRUNE_MUTATION_SEED", "0"))
SLOWEST = 20  # seconds that a damaged file of some kilobytes may cost
WINDOW = 16
REFUSED, TRUE = "refused", "true result"
QUIET = ("--use_cpu", "--weight_update", "none", "--dim_multiple", 1)
MEASURED = ("--block_size", WINDOW, "--ctx_length", WINDOW, "--max_eval_samples", 4, "--speed_batches", 0)


@pytest.fixture(scope="module")
def whole(make_model, make_masks, tmp_path_factory):
    """What is damaged: a model, masks, a text, a pruned checkpoint."""
    base = tmp_path_factory.mktemp("whole")
    model = make_model()
    tiny.save_checkpoint(model, base / "model")
    shape = shape_of(model.config)
    save_masks(Masks(PerUnit.full(shape, 1.0), PerUnit.full(shape, -9.0)), base / "mask_info_1.0.pkl")
    save_masks(make_masks(shape), base / "mask_info_2.0.pkl")
    tiny.write_text(base / "text.txt", 1500)
    ended = run("apply", "--model_name_or_path", base / "model", "--mask_loc", base / "mask_info_2.0.pkl",
                "--save_pruned", base / "pruned", "--do_eval", "False", *QUIET)  # fmt: skip
    assert ended.code == 0, ended
    return base


@torch.no_grad()
def stock_logits(folder: Path) -> torch.Tensor:
    """What transformers alone computes of a folder's weights."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        config.__dict__.pop("auto_map", None)  # a damaged one trips transformers; no class here needs it
        model = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32).eval()
    ids = torch.arange(12).unsqueeze(0) % model.config.vocab_size
    return model(input_ids=ids, use_cache=False).logits


def same(first: torch.Tensor, second: torch.Tensor) -> str:
    if first.shape == second.shape and torch.allclose(first, second, atol=1e-4, rtol=1e-3, equal_nan=True):
        return ""
    return f"the logits are not those of transformers: {first.shape} and {second.shape}"


def save(work: Path) -> Ended:
    return run("apply", "--model_name_or_path", work / "model", "--mask_loc", work / "mask_info_1.0.pkl",
               "--save_pruned", work / "out", "--do_eval", "False", *QUIET)  # fmt: skip


def saved_truly(work: Path, ended: Ended) -> str:
    """A model that keeps everything is the one that transformers loads."""
    if ended.code:
        return "a refused command wrote a checkpoint" if (work / "out").exists() else ""
    return same(stock_logits(work / "out"), stock_logits(work / "model"))


def measure(work: Path, text: Path | None = None) -> Ended:
    return run("apply", "--model_name_or_path", work / "model", "--mask_loc", work / "mask_info_1.0.pkl",
               "--save_loc", work / "out", "--output_dir", work / "out", "--dataset_name", text or work / "text.txt",
               *MEASURED, *QUIET)  # fmt: skip


@torch.no_grad()
def measured_truly(work: Path, ended: Ended, text: Path | None = None) -> str:
    """The perplexity is the one of transformers' model on the blocks of transformers' tokenizer."""
    results = work / "out" / "results.json"
    if ended.code:
        return "a refused command wrote results" if results.exists() else ""
    told = strict_json(results)
    tokenizer = AutoTokenizer.from_pretrained(work / "model")
    blocks = token_blocks(tokenizer, str(text or work / "text.txt"), "validation", WINDOW, 4)
    ids = torch.stack([row["input_ids"] for row in blocks])
    model = AutoModelForCausalLM.from_pretrained(work / "model", dtype=torch.float32).eval()
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    expected = functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).exp()
    found = [told["perplexity"][name] for name in ("dense", "pruned")]
    fits = all(math.isclose(value, float(expected), rel_tol=1e-3) for value in found)
    return "" if fits else f"perplexities {found}, transformers' is {float(expected)}"


class Plain(pickle.Unpickler):
    """Reads what random damage left of our own mask, nothing else."""

    def find_class(self, module: str, name: str) -> object:
        if (module, name) in (("torch._utils", "_rebuild_tensor_v2"), ("torch.storage", "_load_from_bytes")):
            return super().find_class(module, name)
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        raise ValueError(name)


def channels(path: Path) -> list[int]:
    """How many MLP channels a mask keeps in each layer, counted on what Python's own unpickler reads."""
    with path.open("rb") as file:
        content = Plain(file).load()
    pairs = [(content[f"inter_layer{i}_z_mu"], content[f"inter_layer{i}_z_logD"]) for i in range(3)]
    return [int((log_variance - 2 * mu.abs().log() < 0).sum()) for mu, log_variance in pairs]


def mask(choose: random.Random, work: Path) -> tuple[Ended, str]:
    path = work / "mask_info_2.0.pkl"
    counts, whole = channels(path), path.read_bytes()
    path.write_bytes(damage_bytes(choose, whole))
    ended = run("describe", path, "--model_name_or_path", work / "model", "--json", "--dim_multiple", 1)
    if ended.code:
        return ended, ""
    with contextlib.suppress(Exception):  # what Python refuses and no number depends on, as a frame's length: the whole
        counts = channels(path)
    told = json.loads(ended.out)["learned"]["intermediate_size"]
    return ended, "" if told == counts else f"{told} channels told, {counts} in the mask"


def config(choose: random.Random, work: Path) -> tuple[Ended, str]:
    path = work / "model" / choose.choice(("config.json", "config.json", "config.json", "generation_config.json"))
    path.write_bytes(damage_json(choose, path.read_bytes()))
    ended = save(work)
    return ended, saved_truly(work, ended)


def weights(choose: random.Random, work: Path) -> tuple[Ended, str]:
    damage_tensors(choose, work / "model" / "model.safetensors")
    ended = save(work)
    return ended, saved_truly(work, ended)


def tokenizer(choose: random.Random, work: Path) -> tuple[Ended, str]:
    path = work / "model" / choose.choice(("tokenizer.json", "tokenizer_config.json"))
    if choose.random() < 0.05:
        path.unlink()
    else:
        path.write_bytes(damage_json(choose, path.read_bytes()))
    ended = measure(work)
    return ended, measured_truly(work, ended)


def text(choose: random.Random, work: Path) -> tuple[Ended, str]:
    plain = (work / "text.txt").read_text(encoding="utf-8")
    if choose.random() < 0.5:
        path = work / "text.txt"
        path.write_bytes(damage_bytes(choose, plain.encode()))
    else:
        rows = [{"text": part} for part in plain.split("\n\n")]
        places = choose.sample(range(len(rows)), choose.choice((1, 3, len(rows))))
        for place in places:
            rows[place] = choose.choice(({"text": None}, {"text": 3}, {"text": ["a"]}, {"other": "a"}, {}, "a", None,
                                         {"text": ""}, {"text": "\x00\ud800"}, {"text": "w" * 5000}))  # fmt: skip
        path = work / "text.jsonl"
        lines = "\n".join(json.dumps(row) for row in rows).encode()
        path.write_bytes(damage_bytes(choose, lines) if choose.random() < 0.3 else lines)
    ended = measure(work, path)
    return ended, measured_truly(work, ended, path)


GIVEN = ("nan", "inf", "-inf", "0", "-1", "1", "0.5", "1e308", "1000000000000", "abc", "", "True", "False", "None",
         "[]", "x\ny", "2", "4", "8", "float32", "bfloat16", "fold", "test", "0.3")  # fmt: skip
FLAGS = {
    "apply": ("mask_loc", "dtype", "block_size", "ctx_length", "max_eval_samples", "dim_multiple",
              "keep_one_kv_head", "uniform", "tensor_parallel", "weight_update", "refit_samples", "eval_split", "seed",
              "per_device_eval_batch_size", "data_dir", "dataset_name", "model_name_or_path", "save_pruned", "config",
              "do_eval", "compare_dense", "unheard_of"),
    "prune": ("prune_method", "target_sparsity", "max_train_samples", "block_size", "dim_multiple", "uniform", "seed",
              "tensor_parallel", "dtype", "weight_update", "refit_samples", "output_dir", "eval_split", "save_pruned",
              "per_device_train_batch_size", "per_device_eval_batch_size", "resume_from_checkpoint"),
}  # fmt: skip


def flag(choose: random.Random, work: Path) -> tuple[Ended, str]:
    verb = choose.choice(sorted(FLAGS))
    own = ("--mask_loc", work / "mask_info_2.0.pkl") if verb == "apply" else (
        "--prune_method", "magnitude", "--max_train_samples", 8)  # fmt: skip
    changed = [word for name in choose.sample(FLAGS[verb], choose.choice((1, 1, 2)))
               for word in (f"--{name}", choose.choice(GIVEN))]  # fmt: skip
    ended = run(verb, "--model_name_or_path", work / "model", "--output_dir", work / "out", "--dataset_name",
                work / "text.txt", *MEASURED, *QUIET, *own, *changed)  # fmt: skip
    told = work / "out" / "results.json"
    if ended.code or not told.is_file():
        return ended, ""
    found = dict(strict_json(told)["perplexity"])
    errors = (found.pop("stderr", None) or {}).values()  # of a single window there are none
    wrong = [value for value in found.values() if not (isinstance(value, float) and 1 <= value)]
    wrong += [value for value in errors if not (isinstance(value, float) and 0 <= value)]
    return ended, f"{changed}: perplexities and errors {wrong}" if wrong else ""


def checkpoint(choose: random.Random, work: Path) -> tuple[Ended, str]:
    folder = work / "pruned"
    kind = choose.choice(("config.json", "config.json", "weights", "tokenizer_config.json", "missing"))
    if kind == "weights":
        damage_tensors(choose, folder / "model.safetensors")
    elif kind == "missing":
        choose.choice([path for path in sorted(folder.iterdir()) if path.name != "model.safetensors"]).unlink()
    else:
        (folder / kind).write_bytes(damage_json(choose, (folder / kind).read_bytes()))
    ended = run("export", "--format", "vanilla", folder, work / "out")
    if ended.code:
        return ended, "a refused command wrote a checkpoint" if (work / "out").exists() else ""
    return ended, same(stock_logits(work / "out"), stock_logits(folder))


KINDS: dict[str, tuple[Callable[[random.Random, Path], tuple[Ended, str]], int]] = {
    "mask": (mask, 120),
    "config": (config, 70),
    "weights": (weights, 40),
    "tokenizer": (tokenizer, 30),
    "text": (text, 30),
    "flag": (flag, 40),
    "checkpoint": (checkpoint, 40),
}


def try_one(kind: str, seed: int, whole: Path, work: Path) -> str:
    """Damages a copy and runs it; returns how it ended: `REFUSED`, `TRUE`, or what was wrong."""
    shutil.copytree(whole, work)
    begin = time.perf_counter()
    ended, lie = KINDS[kind][0](random.Random(f"{kind} {seed}"), work)
    seconds = time.perf_counter() - begin
    left = [name for name in half_written(work) if f"{work}/out" in name or ".part" in name]
    wrong = ended.fault or lie or "; ".join(left) or ("" if seconds < SLOWEST else f"{seconds:.0f} seconds")
    shutil.rmtree(work)
    return wrong or (REFUSED if ended.code else TRUE)


@pytest.mark.parametrize("kind", KINDS)
def test_damage_ends_in_a_true_result_or_in_one_line(kind, whole, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    seen: Counter[str] = Counter()
    wrong = []
    for seed in range(SEED, SEED + round(KINDS[kind][1] * TIMES)):
        ends = try_one(kind, seed, whole, tmp_path / "work")
        seen[ends if ends in (REFUSED, TRUE) else "wrong"] += 1
        if ends not in (REFUSED, TRUE):
            wrong.append(f"{kind} {seed}: {ends}")
    with capsys.disabled():
        print(f"\nmutations of a {kind}: {sum(seen.values())} tried, {dict(seen)}")
    assert not wrong, f"{len(wrong)} of {sum(seen.values())}\n" + "\n".join(wrong)
    assert seen[REFUSED] and (TIMES < 1 or seen[TRUE]), seen  # control: damage is felt, and some does no harm


def test_the_suite_sees_a_lie(whole, tmp_path, monkeypatch):
    """Control: a loader that lets tensors be of another size, or a mask of other numbers, is found."""
    shutil.copytree(whole, tmp_path / "work")
    ended = save(tmp_path / "work")
    assert saved_truly(tmp_path / "work", ended) == ""
    tensors = (tmp_path / "work" / "out" / "model.safetensors").read_bytes()
    (tmp_path / "work" / "out" / "model.safetensors").write_bytes(tensors[:-64] + b"\x01\x02\x03\x3f" * 16)
    assert "not those of transformers" in saved_truly(tmp_path / "work", ended)
    (tmp_path / ".out.part").touch()
    (tmp_path / "x.json").write_text('{"a": NaN}')
    assert len(half_written(tmp_path)) == 2
