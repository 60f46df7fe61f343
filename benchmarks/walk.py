"""How far a reader walks through the files: the three main ways of a command, traced on a tiny model.

For each way it counts the package's files whose functions are called, and the stretches of one file in the order in
which its functions are first called: as often must a reader who follows the run open a file. What runs while a module
is imported, lambdas and comprehensions do not count. ``--files`` prints the stretches; ``--root`` walks another
checkout.

    python benchmarks/walk.py --root OTHER_CHECKOUT; python benchmarks/walk.py

| files, stretches | flags -> mask -> results | mask -> folder | mask -> adapter |
|---|---|---|---|
| commit 490b0f6, 37 modules in one folder | 25, 90 | 22, 56 | 29, 95 |
| commit cff8f95, in rooms | 41, 113 | 34, 78 | 43, 121 |
| commit 5796b54, more families, results as a dataclass, ranges of flags | 49, 135 | 38, 88 | 51, 143 |
| commit 6ff54f7, with vetting, locks, identities and marks | 54, 177 | 42, 108 | 55, 182 |
"""

import argparse
import json
import os
import runpy
import subprocess
import sys
import tempfile
from itertools import groupby
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parent.parent
WORDS = [f"w{i}" for i in range(45)]
# A layer that loses all heads takes a way of its own.
FLAGS = [
    "--block_size",
    "16",
    "--ctx_length",
    "16",
    "--max_eval_samples",
    "8",
    "--refit_samples",
    "8",
    "--keep_one_kv_head",
    "True",
]


def write_model(folder: Path) -> None:
    """Writes a random Llama of 3 layers with its tokenizer, and a text."""
    config = LlamaConfig(
        vocab_size=47, hidden_size=36, intermediate_size=52, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=6, max_position_embeddings=64, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<unk>", "</s>", *WORDS])}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="</s>")
    tokenizer.save_pretrained(folder / "model")
    drawn = torch.randint(0, len(WORDS), (500, 12)).tolist()
    text = "\n\n".join(" ".join(WORDS[place] for place in row) for row in drawn)
    (folder / "text.txt").write_text(text, encoding="utf-8")


def commands(folder: Path) -> dict[str, list[str]]:
    """Returns the command line of each way; the later ones need the mask of the first."""
    mask = next((folder / "prune" / "best").glob("*.pkl"), Path())
    source = ["--model_name_or_path", f"{folder}/model", "--dataset_name", f"{folder}/text.txt", *FLAGS]
    batches = ["--per_device_train_batch_size", "4", "--max_train_samples", "64", "--speed_batches", "2"]
    applied = ["lora_ft_vib.py", *source, "--mask_loc", str(mask)]
    return {
        "flags -> mask -> results": ["tva_prune.py", *source, *batches, "--output_dir", f"{folder}/prune"],
        "mask -> folder": [*applied, "--save_pruned", f"{folder}/pruned", "--output_dir", f"{folder}/apply"],
        "mask -> adapter": [*applied, "--do_train", *batches, "--lora_r", "2", "--num_train_epochs", "1",
                            "--output_dir", f"{folder}/tuned"],
    }  # fmt: skip


def trace(output: Path, script: str, arguments: list[str]) -> None:
    """Runs a script of the current folder's checkout and writes its functions in the order of their first call."""
    package = f"{Path.cwd()}/tvaprune/"
    calls: dict[tuple[str, str], None] = {}

    def record(frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(package):
            return
        file, name = code.co_filename.removeprefix(package), code.co_qualname
        if not name.endswith(">") and (file, name) not in calls and not _is_imported(frame, package):
            calls[file, name] = None

    sys.argv, sys.path[0] = [script, *arguments], str(Path.cwd())
    sys.setprofile(record)
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise
    finally:
        sys.setprofile(None)
        output.write_text(json.dumps(list(calls)), encoding="utf-8")


def _is_imported(frame: FrameType | None, package: str) -> bool:
    """Returns whether a call comes from the top level of one of the package's modules."""
    while frame is not None:
        if frame.f_code.co_name == "<module>" and frame.f_code.co_filename.startswith(package):
            return True
        frame = frame.f_back
    return False


def walk(root: Path, folder: Path, way: str) -> list[str]:
    """Returns a way's stretches: the file of each, in order."""
    command, output = commands(folder)[way], folder / "calls.json"
    environment = os.environ | {"TVAPRUNE_CACHE": f"{folder}/cache", "OMP_NUM_THREADS": "1"}
    traced = [sys.executable, str(Path(__file__).resolve()), "--trace", str(output), *command]
    subprocess.run(traced, cwd=root, env=environment, check=True, capture_output=True)
    calls = json.loads(output.read_text(encoding="utf-8"))
    return [file for file, _ in groupby(file for file, _ in calls)]


def main() -> None:
    """Walks the three ways and prints a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=ROOT, help="checkout to walk")
    parser.add_argument("--files", action="store_true", help="print the file of each stretch")
    parser.add_argument("--trace", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.trace:
        trace(Path(args.trace[0]), args.trace[1], args.trace[2:])
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder)
        for way in commands(folder):
            stretches = walk(args.root.resolve(), folder, way)
            print(f"{way}: {len(set(stretches))} files, {len(stretches)} stretches", flush=True)
            if args.files:
                print("  " + " ".join(stretches))


if __name__ == "__main__":
    main()
