"""Prints a Markdown table of the fine-tunings under a folder: what was chosen by what, and the gap that each closes."""

import json
import sys
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any

from tvaprune.measure.figures import log_gap

HEAD = (
    "model", "chosen by", "parameters", "loss", "seeds", "dense", "pruned, each", "gap", "fine-tuned, each", "gap left",
    "closed, each", "median", "seconds",
)  # fmt: skip


def main(folder: Path) -> None:
    """Reads the results of every fine-tuning below the folder and prints the table."""
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.rglob("results.json"))]
    runs = [run for run in runs if "finetune" in run]  # others only chose
    cells: dict[tuple[str, str, str], list[dict[str, Any]]] = defaultdict(list)
    for run in runs:
        cells[Path(run["model"]).name, run["prune_method"], terms_of(run["finetune"])].append(run)
    print(f"| {' | '.join(HEAD)} |\n{'|---' * len(HEAD)}|")
    for (model, method, terms), found in sorted(cells.items(), key=lambda item: (item[0][0], len(item[0][2]))):
        ppl = [run["perplexity"] for run in found]
        cut, left = ([log_gap(value[of], value["dense"]) for value in ppl] for of in ("pruned", "finetuned"))
        closed = [1 - after / before for before, after in zip(cut, left, strict=True)]
        columns = [
            model,
            method,
            f"{median(run['parameters']['pruned'] for run in found):,.0f}",
            terms,
            " ".join(str(run["seed"]) for run in found),
            f"{ppl[0]['dense']:.2f}",
            " ".join(f"{value['pruned']:.2f}" for value in ppl),
            f"{median(cut):.3f}",
            " ".join(f"{value['finetuned']:.2f}" for value in ppl),
            f"{median(left):.3f}",
            " ".join(f"{share:.0%}" for share in closed),
            f"{median(closed):.0%}",
            " ".join(f"{run['finetune']['seconds']:.0f}" for run in found),
        ]
        print(f"| {' | '.join(columns)} |")
    told, first, text = runs[0]["finetune"], runs[0], runs[0]["protocol"]
    print(
        f"\nText: {text['dataset_name']}, {text['split']}, {text['num_windows']} windows of {text['window']}. "
        f"Trained on {told['train_blocks']} blocks of {first['block_size']}, {told['steps']} steps of "
        f"{told['blocks_per_step']}, learning rate {told['learning_rate']}; weights updated by "
        f"{first['weight_update']}. Gaps are medians. Hardware: {first['hardware']}."
    )
    ratios = [run["training_speed_up"]["per_batch"] for run in runs if "training_speed_up" in run]
    if ratios:
        print(
            f"Speed-up of a training step, median of {len(ratios)} runs: {median(ratios):.2f}x "
            f"({min(ratios):.2f} to {max(ratios):.2f})."
        )


def terms_of(told: dict[str, Any]) -> str:
    """Returns the loss of a run in words."""
    terms = ["CE"]
    if told["teacher"]:
        temperature = "" if told["distill_temp"] == 1 else f" at temperature {told['distill_temp']:g}"
        terms.append(f"{told['distill_ce_loss_alpha']:g} KL{temperature}")
    if told["distill_hidden_alpha"]:
        terms.append(f"{told['distill_hidden_alpha']:g} hidden")
    return " + ".join(terms)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
