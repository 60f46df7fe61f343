"""The page of a comparison, from its ``compare.json``: every method's gap over the sparsity, and the tables."""

from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from tvaprune.errors import InputError
from tvaprune.files import read_json
from tvaprune.outputs import COMPARISON_NAME
from tvaprune.report.charts import BARS, Chart, Point, Series, line_chart
from tvaprune.report.page import Block, Code, Page, Section, Table, charts
from tvaprune.study.contents import (
    Cells,
    cost_of_choosing,
    dense_perplexities,
    errors_note,
    gap,
    middle_error,
    spread,
    zero_shot,
)


def is_comparison(folder: Path) -> bool:
    """Tells whether a comparison wrote a folder."""
    return (folder / COMPARISON_NAME).is_file()


def comparison_page(folder: Path) -> Page:
    """Returns the page of a comparison.

    Raises:
        InputError: If its file cannot be read.
    """
    path = folder / COMPARISON_NAME
    try:
        cells = Cells(read_json(path)["cells"])
        return _page(cells)
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise InputError(
            f"{path}: cannot be read as a comparison ({type(error).__name__}); compare again, or give another folder"
        ) from error


def _page(cells: Cells) -> Page:
    first = cells.all[0]
    texts = ", ".join(
        f"{name} ({first['windows'][text]} windows of {first['block_size']})" for text, name in cells.called.items()
    )
    seeds = list(dict.fromkeys(content["seed"] for content in cells.all))
    return Page(
        "Methods side by side",
        f"{len(cells.all)} cells: {', '.join(Path(model).name for model in cells.models)}; {texts}, {first['split']} "
        f"splits; seeds {' '.join(map(str, seeds))}. Hardware: {first['hardware']}.",
        [
            *(_model(cells, model) for model in cells.models),
            Section("To repeat it", _origin(first)),
        ],
    )


def _model(cells: Cells, model: str) -> Section:
    """Returns the charts and the table of one model."""
    meaning = "Gap: log perplexity, pruned minus dense; the median over the seeds."
    note = " ".join([meaning, *errors_note(cells, BARS), dense_perplexities(cells, model)])
    return Section(Path(model).name, [*charts(_charts(cells, model)), *_tables(cells, model)], note)


def _charts(cells: Cells, model: str) -> Iterator[Chart | None]:
    """Yields the gap over the sparsity for each update and text, a line for each method; nothing for one sparsity."""
    if len(cells.sparsities) < 2:
        return
    for update in cells.updates:
        for text in cells.texts:
            lines = [
                Series(method, list(_points(cells, text, model=model, method=method, weight_update=update)), "marked")
                for method in cells.methods
            ]
            yield line_chart(f"{cells.called[text]}, {update}", lines, "sparsity of the decoder", "gap", from_zero=True)


def _points(cells: Cells, text: str, **place: object) -> Iterator[Point]:
    """Yields the median gap of each sparsity, with the error of the cell in the middle."""
    for sparsity in cells.sparsities:
        found = cells.of(target_sparsity=sparsity, **place)
        if found:
            value = median(gap(content, text) for content in found)
            yield Point(sparsity, value, middle_error(found, text, "gap"))


def _tables(cells: Cells, model: str) -> Iterator[Block]:
    """Yields the gaps of each sparsity: a row for each method."""
    columns = [(text, update) for text in cells.texts for update in cells.updates]
    for sparsity in cells.sparsities:
        rows = []
        scored = cells.updates if any(one["zero_shot"] for one in cells.of(target_sparsity=sparsity)) else []
        for method in cells.methods:
            found = cells.of(model=model, method=method, target_sparsity=sparsity)
            if not found:
                continue
            place = {"model": model, "method": method, "target_sparsity": sparsity}
            gaps = [spread(cells.of(weight_update=update, **place), text) for text, update in columns]
            scores = [zero_shot(cells, weight_update=update, **place) for update in scored]
            rows.append([method, *gaps, *scores, cost_of_choosing(found, "seconds", "{:.1f} s")])
        head = [
            "method",
            *(f"{cells.called[text]}, {update}" for text, update in columns),
            *(f"zero-shot, {update}" for update in scored),
            "choosing",
        ]
        yield Table(head, rows, f"Sparsity {sparsity:g}", numbers=True)


def _origin(first: dict[str, Any]) -> list[Block]:
    rows = [["hardware", first["hardware"]], *([name, version] for name, version in first["versions"].items())]
    return [Code("The command", first["command"], wraps=True), Table(["", "of the first cell"], rows)]
