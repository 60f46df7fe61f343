"""What the sections of one run, or of several side by side, have in common."""

from collections.abc import Callable, Sequence

from tvaprune.report.folders import RunFolder
from tvaprune.report.page import Block, Note, Table
from tvaprune.report.results import Results

NONE = "–"  # of what was not measured


def columns(runs: Sequence[RunFolder], rows: dict[str, Callable[[Results], str | None]]) -> list[Block]:
    """Returns a table of a row for each fact that some run knows, and a column for each run."""
    cells = [[name, *(value(run.results) for run in runs)] for name, value in rows.items()]
    known = [[cell or NONE for cell in row] for row in cells if any(cell for cell in row[1:])]
    return [Table(["", *(run.name for run in runs)], known)] if known else []


def named(run: RunFolder, runs: Sequence[RunFolder], what: str) -> list[Block]:
    """Returns a line that says whose the next blocks are, where there are several."""
    return [Note(f"{run.name}, {what}:")] if len(runs) > 1 else []


def alone(run: RunFolder, runs: Sequence[RunFolder]) -> str:
    """Returns a run's name where there are several."""
    return run.name if len(runs) > 1 else ""


def of(run: RunFolder, runs: Sequence[RunFolder], what: str) -> str:
    """Returns a title or sentence, after the run's name where there are several."""
    return f"{run.name}: {what}" if len(runs) > 1 else what[:1].upper() + what[1:]
