"""Prints a Markdown table of the runs under a folder: gap to dense in log perplexity, by model and method."""

import json
import math
import sys
from collections import defaultdict
from pathlib import Path
from statistics import median


def main(folder: Path) -> None:
    """Reads every results.json below the folder and prints the table."""
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*/results.json"))]
    cells: dict[tuple[str, str], list[dict]] = defaultdict(list)
    for run in runs:
        cells[Path(run["model"]).name, run["prune_method"]].append(run)
    print("| model | method | seeds | dense | pruned, median | gap, median | gap, each | decoder sparsity | speed-up |")
    print("|---|---|---|---|---|---|---|---|---|")
    for (model, method), found in sorted(cells.items()):
        perplexities = [run["perplexity"] for run in found]
        gaps = [math.log(value["pruned"] / value["dense"]) for value in perplexities]
        columns = [
            model,
            method,
            " ".join(str(run["seed"]) for run in found),
            f"{perplexities[0]['dense']:.2f}",
            f"{median(value['pruned'] for value in perplexities):.2f}",
            f"{median(gaps):.3f}",
            " ".join(f"{gap:.3f}" for gap in gaps),
            " ".join(f"{run['widths']['decoder_sparsity']:.3f}" for run in found),
            f"{median(run['speed_up']['whole_set'] for run in found):.2f}x",
        ]
        print(f"| {' | '.join(columns)} |")
    first = runs[0]
    print(
        f"\nText: {first['dataset_name']}, {first['split']} split, {first['num_windows']} windows of {first['window']}."
    )
    print(f"Sparsity: {first['sparsity_definition']}. Hardware: {first['hardware']}.")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
