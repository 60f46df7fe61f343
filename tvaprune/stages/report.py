"""`tvaprune report DIR ...`: the results page of what runs left in folders, several side by side."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from tvaprune.errors import InputError, reason
from tvaprune.report.folders import RunFolder, read_runs
from tvaprune.report.page import PAGE_NAME, Page
from tvaprune.report.results import RESULTS_NAME
from tvaprune.report.runs import page_of
from tvaprune.study.page import comparison_page, is_comparison


def report(folders: Sequence[Path], output: Path | None = None) -> Path:
    """Writes the page of some folders and returns it.

    Args:
        folders: Of runs, or one of a comparison.
        output: The page's file; None: ``report.html`` in the only folder, or in the working folder.

    Raises:
        InputError: If a folder holds no results of this version, or the page cannot be written.
    """
    if not folders:
        raise InputError("report: no folder was given; give those of runs, or that of a comparison")
    compared = [folder for folder in folders if is_comparison(folder)]
    if compared and len(folders) > 1:
        raise InputError(f"report: {compared[0]} is of a comparison, which has a page of its own; give it alone")
    page = comparison_page(compared[0]) if compared else _page(read_runs(folders))
    path = output or (folders[0] if len(folders) == 1 else Path()) / PAGE_NAME
    if path.is_dir():
        raise InputError(f"--output {path}: is a folder; give the page's file")
    try:
        page.write(path)
    except OSError as error:
        raise InputError(f"--output {path}: cannot be written ({reason(error)}); give another file") from error
    return path


def _page(runs: Sequence[RunFolder]) -> Page:
    try:
        return page_of(runs)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:  # files changed by hand
        raise InputError(
            f"{', '.join(str(run.path) for run in runs)}: what is in {RESULTS_NAME} is not what a run measures "
            f"({reason(error)}); run it again, or give another folder"
        ) from error


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the verb's flags."""
    found = argparse.ArgumentParser(prog="tvaprune report", description=__doc__)
    found.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="a run's output folder (or --save_loc); "
                        "or a comparison's")  # fmt: skip
    found.add_argument("--output", type=Path, help=f"the page's file; default: {PAGE_NAME} in the only folder, or "
                        "in the working folder where there are several")  # fmt: skip
    return found


def main(arguments: list[str]) -> Path:
    """Parses the flags, writes the page and prints where it is."""
    args = parser().parse_args(arguments)
    path = report(args.folders, args.output)
    print(f"page: {path}")
    return path
