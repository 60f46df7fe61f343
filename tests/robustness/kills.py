"""Kills a gate training and a fine-tuning at single file operations, goes on, and compares with the undisturbed run.

    python tests/robustness/kills.py              # 14 points, some two minutes on two cores
    python tests/robustness/kills.py --all        # every file operation

A process that has everything imported forks one for each point; in it an audit hook counts the operations that write
below the run's folder and sends SIGKILL in place of the N-th. At every other point the file that was written last is
cut in half first, as if the kill came within the write. What stood in the folder before, a finished run of other flags
and a saved model, must be whole there until the new one is. Last comes a control: with half checkpoints taken for whole
ones something must be wrong.
"""

import argparse
import hashlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS.parent), str(TESTS)]

from support.watch import Watch  # noqa: E402

VOLATILE = {"command", "versions", "hardware", "finetune", "train_runtime", "train_samples_per_second",
            "train_steps_per_second", "total_flos", "seconds"}  # fmt: skip


@dataclass(frozen=True)
class Job:
    """One of the two commands: its flags, those of the older run that it replaces, and how its results are read."""

    name: str
    flags: tuple[str, ...]
    older: tuple[str, ...]
    read: Callable[[Path], dict[str, object]]


@dataclass
class Outcome:
    """How a forked command ended."""

    code: int
    said: str
    operations: list[str]


def start(job: Job, root: Path, flags: tuple[str, ...], watch: Watch | None) -> int:
    """Forks a process that runs a command of `lora_ft_vib.py` into ``root``; returns its number."""
    pid = os.fork()
    if pid:
        return pid
    with (root / ".." / f"{root.name}.log").open("a", encoding="utf-8") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    code = 99
    try:
        if watch is not None:
            watch.install()
        sys.argv = ["lora_ft_vib.py", *job.flags, *flags, "--output_dir", str(root / "out"), "--save_pruned",
                    str(root / "saved")]  # fmt: skip
        import lora_ft_vib
        from tvaprune.cli import run_command

        code = run_command(lora_ft_vib.main)
        if watch is not None:
            (root / ".." / f"{root.name}.operations").write_text("\n".join(watch.seen), encoding="utf-8")
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run(job: Job, root: Path, flags: tuple[str, ...] = (), watch: Watch | None = None) -> Outcome:
    """Runs a command into ``root`` to its end, however it comes."""
    log = root.parent / f"{root.name}.log"
    log.unlink(missing_ok=True)
    _, status = os.waitpid(start(job, root, flags, watch), 0)
    operations = root.parent / f"{root.name}.operations"
    seen = operations.read_text(encoding="utf-8").splitlines() if operations.is_file() else []
    return Outcome(os.waitstatus_to_exitcode(status), log.read_text(encoding="utf-8"), seen)


def digests(folder: Path, *patterns: str) -> dict[str, object]:
    """Returns the content of files, by name."""
    paths = sorted(path for pattern in patterns for path in folder.glob(pattern))
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def mask_digest(path: Path) -> str:
    """Returns a digest of a mask's gates: a pickle's bytes also tell how its objects were made."""
    from tvaprune.identity import digest_of
    from tvaprune.plan.masks import load_masks

    masks = load_masks(path)
    return digest_of([values.tolist() for values in (*masks.mu, *masks.log_variance)])


def plain(path: Path, root: Path) -> object:
    """Returns a JSON file without what differs between two runs of the same flags: times, command, folder."""

    def clean(value: object) -> object:
        if isinstance(value, dict):
            return {key: clean(inner) for key, inner in value.items() if key not in VOLATILE}
        return (
            [clean(inner) for inner in value if "train_runtime" not in str(inner)] if isinstance(value, list) else value
        )

    return clean(json.loads(path.read_text(encoding="utf-8").replace(str(root), "ROOT")))


def gates_result(root: Path) -> dict[str, object]:
    """What a gate training leaves."""
    out = root / "out"
    found = digests(root, "saved/*.safetensors", "saved/config.json", "out/plan.json", "out/checkpoint-*/model.*")
    found |= digests(root, "out/checkpoint-*/optimizer.pt", "out/checkpoint-*/scheduler.pt")
    found |= {str(path.relative_to(root)): mask_digest(path) for path in out.glob("best/*.pkl")}
    return found | {name: plain(out / name, root) for name in ("results.json", "training_log.json")}


def finetune_result(root: Path) -> dict[str, object]:
    """What a fine-tuning leaves."""
    out = root / "out"
    found = digests(root, "saved/*.safetensors", "saved/*.json", "out/plan.json", "out/adapter/*.safetensors")
    found |= digests(root, "out/merged/*.safetensors", "out/checkpoint-*/adapter_model.safetensors")
    return found | {name: plain(out / name, root) for name in ("results.json", "finetune_log.json")}


def saved_models(root: Path) -> dict[str, object]:
    """Returns the folders that are written whole, by their content."""
    from tvaprune.files import foreign_files

    found = {}
    for name in ("saved", "out/adapter", "out/merged"):
        if (root / name).is_dir():  # the card tells paths and times
            assert foreign_files(root / name) == []
            found[name] = digests(root / name, "*.safetensors", "config.json")
    return found


def leftovers(root: Path) -> list[str]:
    """Temporary files and locks."""
    found = (path for path in root.rglob(".tvaprune-*"))
    return [str(path.relative_to(root)) for path in found]


def make_jobs(folder: Path) -> list[Job]:
    """Writes the tiny model, its text and a mask; returns both commands."""
    from support import tiny
    from transformers import AutoConfig, AutoModelForCausalLM, set_seed

    from tvaprune.models.shape import shape_of
    from tvaprune.models.units import PerUnit
    from tvaprune.plan.masks import Masks, save_masks

    set_seed(0)
    config = AutoConfig.for_model(
        "llama", hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, head_dim=6,
        num_key_value_heads=2, vocab_size=47, max_position_embeddings=64, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = tiny.save_checkpoint(AutoModelForCausalLM.from_config(config), folder / "model")
    text = tiny.write_text(folder / "text.txt")
    ones = PerUnit.full(shape_of(config), 1.0)
    mask = folder / "mask_info_1.0.pkl"
    save_masks(Masks(ones, ones.map(lambda values: values * 0 + 2.0 - 4.0 * (values.cumsum(0) > 1).float())), mask)
    both = (
        "--do_train", "--model_name_or_path", model, "--dataset_name", text, "--block_size", 16, "--ctx_length", 16,
        "--max_eval_samples", 8, "--max_train_samples", 24, "--per_device_train_batch_size", 4, "--speed_batches", 0,
        "--use_cpu", "--dim_multiple", 4, "--weight_update", "fold", "--disable_tqdm", True, "--save_steps", 2,
        "--eval_steps", 2, "--logging_steps", 1, "--overwrite_output_dir",
    )  # fmt: skip
    tuned = ("--mask_loc", mask, "--gradient_accumulation_steps", 1, "--lora_r", 2, "--num_train_epochs", 1)
    words = [tuple(map(str, flags)) for flags in (both, (*both, *tuned))]
    return [
        Job("gates", words[0] + ("--target_sparsity", "0.4"), ("--target_sparsity", "0.2"), gates_result),
        Job("fine-tuning", words[1], ("--learning_rate", "0.01", "--weight_update", "none"), finetune_result),
    ]


@dataclass
class Reference:
    """What the older run left, what the undisturbed run leaves, and its file operations."""

    older: Path
    older_models: dict[str, object]
    result: dict[str, object]
    models: dict[str, object]
    operations: list[str]


def reference(job: Job, folder: Path) -> Reference:
    """Runs the older and the undisturbed command."""
    older = folder / f"{job.name}-older"
    (older / "out").mkdir(parents=True)
    done = run(job, older, job.older)
    assert done.code == 0, done.said
    whole = Path(shutil.copytree(older, folder / f"{job.name}-whole"))
    done = run(job, whole, (), Watch(str(whole)))
    assert done.code == 0, done.said
    assert leftovers(whole) == [], leftovers(whole)
    return Reference(older, saved_models(older), job.read(whole), saved_models(whole), done.operations)


def check_killed(root: Path, known: Reference) -> list[str]:
    """Returns what is wrong with the folders that are written whole, right after the kill."""
    wrong = []
    found = saved_models(root)
    for name in known.older_models:
        alike = [models[name] == found.get(name) for models in (known.older_models, known.models)]
        if not any(alike) and not (name == "out/adapter" and name not in found):
            wrong.append(f"{name} is neither the old nor the new one")
    return wrong


def try_point(job: Job, known: Reference, folder: Path, at: int, halves: bool) -> str:
    """Kills at one operation, goes on, compares; returns what is wrong, or nothing."""
    root = Path(shutil.copytree(known.older, folder / f"{job.name}-{at}"))
    killed = run(job, root, (), Watch(str(root), at, halves))
    if killed.code != -signal.SIGKILL:
        return f"was not killed (exit {killed.code}): {killed.said[-500:]}"
    wrong = check_killed(root, known)
    again = run(job, root, ("--resume_from_checkpoint", "True"))
    if again.code == 2 and "is the checkpoint of a run with" in again.said:  # the older run's stands there still
        again = run(job, root)
    if again.code != 0:
        return "; ".join([*wrong, f"does not go on (exit {again.code}): {again.said[-1500:]}"])
    result = job.read(root)
    wrong += [
        f"{name} differs" for name in known.result.keys() | result.keys() if known.result.get(name) != result.get(name)
    ]
    if leftovers(root):
        wrong.append(f"left over: {leftovers(root)}")
    if not wrong:
        shutil.rmtree(root)
    return "; ".join(wrong)


def control(job: Job, known: Reference, folder: Path) -> str:
    """Kills within a checkpoint, and takes the half of it for a whole one; returns what is wrong."""
    from tvaprune import checkpoints

    checkpoints.missing_in = lambda checkpoint: []
    names = [operation.split("/", 1)[-1] for operation in known.operations]
    return try_point(job, known, folder, names.index("checkpoint-6/optimizer.pt", 40) + 1, halves=True)


def points_of(known: Reference, count: int | None) -> list[int]:
    """Returns the operations to kill at: all, or evenly many."""
    total = len(known.operations)
    if count is None or count >= total:
        return list(range(1, total + 1))
    return sorted({1 + round(i * (total - 1) / (count - 1)) for i in range(count)})


def in_pairs(tasks: list[Callable[[], str]], workers: int) -> list[str]:
    """Runs tasks in forked processes, some at a time; returns what each found wrong."""
    results: list[str] = [""] * len(tasks)
    running: dict[int, tuple[int, int]] = {}
    waiting = list(enumerate(tasks))
    while waiting or running:
        while waiting and len(running) < workers:
            index, task = waiting.pop(0)
            read, write = os.pipe()
            pid = os.fork()
            if not pid:
                try:
                    found = task()
                except BaseException as error:  # a reader of results may meet anything
                    found = f"{type(error).__name__}: {error}"
                os.write(write, found.encode()[:30000])
                os._exit(0)
            os.close(write)
            running[pid] = (index, read)
        pid, _ = os.wait()
        index, read = running.pop(pid)
        with os.fdopen(read, encoding="utf-8") as pipe:
            results[index] = pipe.read()
    return results


def main(arguments: list[str] | None = None) -> int:
    """Tries the points, prints what was seen, and returns 1 if anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--points", type=int, default=7, help="of each command")
    parser.add_argument("--all", action="store_true", help="every file operation")
    parser.add_argument("--at", type=int, nargs="+", help="these operations of both commands")
    parser.add_argument("--keep", action="store_true", help="leave the folders where something was wrong")
    args = parser.parse_args(arguments)
    folder = Path(tempfile.mkdtemp(prefix="tvaprune-kills-"))
    began, failures, tried = time.monotonic(), 0, 0
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HOME": f"{folder}/hf", "TVAPRUNE_CACHE": f"{folder}/cache",
                   "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}  # fmt: skip
    import torch

    import tvaprune.stages.finetune
    import tvaprune.stages.prune  # noqa: F401

    torch.set_num_threads(1)
    for job in make_jobs(folder):
        known = reference(job, folder)
        points = args.at or points_of(known, None if args.all else args.points)
        tasks = [partial(try_point, job, known, folder, at, halves=bool(i % 2)) for i, at in enumerate(points)]
        print(f"{job.name}: {len(known.operations)} file operations, killed at {len(points)}", flush=True)
        for i, (at, wrong) in enumerate(zip(points, in_pairs(tasks, os.cpu_count() or 1), strict=True)):
            tried, failures = tried + 1, failures + bool(wrong)
            half = ", the last file cut in half" if i % 2 else ""
            print(f"  {at:4} {known.operations[at - 1]}{half}: {wrong or 'goes on to the same result'}")
        (found,) = in_pairs([partial(control, job, known, folder)], 1)
        failures += not found
        print(
            f"  control, half a checkpoint taken for a whole one: {found.splitlines()[0][:90] if found else 'NOT SEEN'}"
        )
    print(f"{tried} kills, {failures} wrong, {time.monotonic() - began:.0f} s")
    if not (args.keep and failures):
        shutil.rmtree(folder, ignore_errors=True)
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
