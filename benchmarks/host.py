"""What a command takes of the host's memory, over the weights: `prune` and `apply` of a checkpoint, on a CPU.

A random Llama of 86 million parameters in float32, each command in a process of its own: the peak of resident memory
over what the same command on a tiny model left, over the bytes of the weights. Weights that are read as they are stored
are pages of their file, which the system drops and reads again as it needs room: the second figure leaves these out. A
layer's share of a model and its activations are larger here than of a 7B. Nothing is timed, so the unpruned model need
not stay.

    python -m benchmarks.host

    prune, fold: 547 MiB, 1.68 times the weights; 1.65 without files
    prune, refit: 580 MiB, 1.78 times the weights; 1.78 without files
    apply, fold: 532 MiB, 1.63 times the weights; 0.66 without files
    apply, refit: 538 MiB, 1.65 times the weights; 0.65 without files

(Two cores of an AMD EPYC.)
"""

import gc
import multiprocessing
import os
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tvaprune.cli import run_verb
from tvaprune.measure.memory import PeakMemory
from tvaprune.models.shape import ModelShape, shape_of
from tvaprune.models.units import PerUnit
from tvaprune.plan.keep_plan import KeepPlan

WORDS = 512
SAME = {"vocab_size": WORDS, "num_attention_heads": 12, "max_position_embeddings": 64, "tie_word_embeddings": False}
LARGE = LlamaConfig(hidden_size=384, intermediate_size=1024, num_hidden_layers=48, **SAME)  # type: ignore[arg-type]
TINY = LlamaConfig(hidden_size=48, intermediate_size=96, num_hidden_layers=2, **SAME)  # type: ignore[arg-type]
SMALL = ("--block_size", "16", "--ctx_length", "16", "--max_eval_samples", "8", "--speed_batches", "0", "--use_cpu")
COMMANDS = {
    "prune, fold": ("prune", "--weight_update", "fold", "--max_steps", "4", "--disable_tqdm", "True"),
    "prune, refit": ("prune", "--refit_samples", "8", "--max_steps", "4", "--disable_tqdm", "True"),
    "apply, fold": ("apply", "--weight_update", "fold", "--do_eval", "True", "--plan", "plan.json"),
    "apply, refit": ("apply", "--refit_samples", "8", "--do_eval", "True", "--plan", "plan.json"),
}


def half_plan(shape: ModelShape) -> KeepPlan:
    """Returns the plan that keeps all hidden dims and half of all other units."""
    full = PerUnit.full(shape, 1.0)
    halves = [tuple(torch.arange(len(units) // 2) for units in kind) for kind in (full.attn, full.inter)]
    kept = PerUnit(torch.arange(shape.hidden_size), *halves)
    return KeepPlan(kept, kept.map(lambda units: torch.full((len(units),), 1.1)), shape, 1)


def checkpoint(folder: Path, config: LlamaConfig) -> int:
    """Writes a random model, its tokenizer, its plan and a text; returns the bytes of its weights."""
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(WORDS)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w1").save_pretrained(folder)
    half_plan(shape_of(config)).save(folder / "plan.json")
    ids = torch.randint(2, WORDS, (200, 60), generator=torch.Generator().manual_seed(0)).tolist()
    (folder / "text.txt").write_text("\n\n".join(" ".join(f"w{i}" for i in row) for row in ids), encoding="utf-8")
    return sum(weight.numel() * weight.itemsize for weight in model.parameters())


class _Peaks(PeakMemory):
    """Measures beside the peak that of what no file stands behind: `own`, over that at the start."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self._own_before = self._own_peak = self._unbacked()

    @property
    def own(self) -> int:
        """Bytes."""
        return self._own_peak - self._own_before

    def _unbacked(self) -> int:
        found = self._process.memory_info()
        return int(found.rss - found.shared)

    def _sample(self) -> None:
        super()._sample()
        self._own_peak = max(self._own_peak, self._unbacked())


def taken(folder: str, command: tuple[str, ...]) -> tuple[int, int]:
    """Returns the bytes that a command on the large model adds to what the same on the tiny one left in memory.

    First all, then those that no file stands behind.
    """
    flags = [*command[1:], "--model_name_or_path", ".", "--dataset_name", "text.txt", *SMALL, "--overwrite_output_dir"]
    flags += ["--output_dir", f"{command[0]}_{command[2]}"]
    os.chdir(Path(folder) / "tiny")
    run_verb(command[0], flags)
    gc.collect()
    os.chdir(Path(folder) / "large")
    memory = _Peaks()
    with memory:
        run_verb(command[0], flags)
    return memory.peak - memory.before, memory.own


def main() -> None:
    """Measures every command and prints a row each."""
    with tempfile.TemporaryDirectory() as folder:
        weights = checkpoint(Path(folder) / "large", LARGE)
        checkpoint(Path(folder) / "tiny", TINY)
        print(f"weights: {weights / 2**20:.0f} MiB")
        for name, command in COMMANDS.items():
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                more, own = pool.submit(taken, folder, command).result()
            told = f"{more / 2**20:.0f} MiB, {more / weights:.2f} times the weights; {own / weights:.2f} without files"
            print(f"{name}: {told}", flush=True)


if __name__ == "__main__":
    main()
