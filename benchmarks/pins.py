"""What must not change when code moves: digests of masks, plans, weights and perplexities of small seeded runs.

Runs the commands of the checkout that it stands in (or of another: ``--root``) on the shipped miniature models and
prints one JSON line for each. Two checkouts that do the same print the same, bit for bit, on one machine.

    python -m benchmarks.pins --root OTHER_CHECKOUT > before.txt; python -m benchmarks.pins > after.txt
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tvaprune.plan.masks import load_masks

ROOT = Path(__file__).resolve().parent.parent
TEXT = ["--dataset_name", "python_docs", "--block_size", "256", "--ctx_length", "256", "--max_eval_samples", "16"]
MASKS = {"mistral": "25.5535406026844", "llama3": "32.390028919294274"}


def model_of(name: str) -> list[str]:
    """Returns the flags that name a shipped miniature."""
    return ["--model_name_or_path", f"{name}_saves_tva/mini_{name}", *TEXT, "--speed_batches", "0"]


def commands(name: str) -> dict[str, list[str]]:
    """Returns the runs of one miniature: gates, a one-shot score, and the shipped mask under each weight update."""
    mask = ["lora_ft_vib.py", "--mask_loc", f"{name}_saves_tva/mask_info_{MASKS[name]}.pkl", "--do_eval"]
    gates = ["--max_train_samples", "96", "--per_device_train_batch_size", "4", "--eval_steps", "8"]
    runs = {
        "gates": ["tva_prune.py", *gates, "--weight_update", "fold"],
        "flap": ["tva_prune.py", "--prune_method", "flap", "--max_train_samples", "16", "--weight_update", "fold"],
    }
    for update in ("none", "fold", "refit"):
        fitted = ["--refit_samples", "16"] if update == "refit" else []
        runs[update] = [*mask, "--weight_update", update, *fitted]
    return {key: [*flags, *model_of(name)] for key, flags in runs.items()}


def digest(values: bytes) -> str:
    """Returns 16 hex digits of some bytes."""
    return hashlib.sha256(values).hexdigest()[:16]


def gates_in(path: Path) -> bytes:
    """Returns the values of a mask file's tensors; the pickle around them may differ."""
    values = load_masks(path)
    return b"".join(tensor.numpy().tobytes() for tensor in (*values.mu, *values.log_variance))


def observe(folder: Path) -> dict[str, Any]:
    """Returns what a run left: digests of mask, plan and saved weights, and the perplexities."""
    results = json.loads((folder / "out" / "results.json").read_text(encoding="utf-8"))
    plan = json.loads((folder / "out" / "plan.json").read_text(encoding="utf-8"))
    units = {kind: plan[kind] for kind in ("hidden", "attn", "inter")}
    weights = load_file(folder / "pruned" / "model.safetensors")
    flat = b"".join(
        name.encode() + weights[name].contiguous().view(torch.uint8).numpy().tobytes() for name in sorted(weights)
    )
    seen = {
        "perplexity": results["perplexity"],
        "plan": digest(json.dumps(units, sort_keys=True).encode()),
        "weights": digest(flat),
        "refit share": (results.get("refit") or {}).get("share"),
    }
    masks = sorted((folder / "out" / "best").glob("mask_info_*.pkl"))
    return seen | {"masks": {path.name: digest(gates_in(path)) for path in masks}}


def main() -> None:
    """Runs everything and prints a line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=ROOT, help="checkout to run")
    parser.add_argument("--only", nargs="*", default=["gates", "flap", "none", "fold", "refit"], help="which runs")
    parser.add_argument("--models", nargs="*", default=list(MASKS), help="which miniatures")
    args = parser.parse_args()
    environment = os.environ | {"PYTHONPATH": str(args.root), "OMP_NUM_THREADS": "1"}
    for name in args.models:
        for key in args.only:
            with tempfile.TemporaryDirectory() as folder:
                outputs = ["--output_dir", f"{folder}/out", "--save_pruned", f"{folder}/pruned"]
                command = [sys.executable, *commands(name)[key], *outputs]
                subprocess.run(command, cwd=args.root, env=environment, check=True, stdout=subprocess.DEVNULL)
                print(json.dumps({"run": f"{name} {key}"} | observe(Path(folder))), flush=True)


if __name__ == "__main__":
    main()
