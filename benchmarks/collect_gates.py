"""Prints a Markdown table of the variants of gate training below a folder: gaps to dense, folded and refitted."""

import json
import sys
from pathlib import Path
from statistics import mean

from tvaprune.study.contents import gap
from tvaprune.study.report import FOLD, REFIT


def main(folder: Path) -> None:
    """Reads every comparison below the folder, the default first, and prints the table."""
    paths = sorted(
        folder.glob("*/compare.json"), key=lambda path: (path.parent.name != "default", path.stat().st_mtime)
    )
    print("| setting | gap folded, mean | each seed | gap refitted, mean | each seed | seconds of training |")
    print("|---|---|---|---|---|---|")
    for path in paths:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        columns = [path.parent.name.replace("-", " ", 1)]
        for update in (FOLD, REFIT):
            gaps = [gap(cell, cell["dataset"]) for cell in cells if cell["weight_update"] == update]
            columns += [f"{mean(gaps):.4f}", " ".join(f"{value:.4f}" for value in gaps)]
        columns.append(f"{mean(cell['seconds']['choosing'] for cell in cells):.0f}")
        print(f"| {' | '.join(columns)} |")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
