"""The comparison's table and its figures, from the cells alone."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tvaprune.files import write_json, write_text
from tvaprune.models.parameters import SPARSITY_DEFINITION
from tvaprune.outputs import COMPARISON_NAME
from tvaprune.report.zero_shot import DENSE, PRUNED
from tvaprune.study.contents import (
    LEARNED,
    NONE,
    RECORDED,
    Cells,
    cost_of_choosing,
    dense_perplexities,
    errors_note,
    median_of,
    perplexity,
    spread,
    zero_shot,
)
from tvaprune.study.picture import plot

FOLD, REFIT = "fold", "refit"
TARGET_SPARSITY = 0.5
SOUGHT = {  # what the figures are to be at that sparsity
    "to_refitted": "at most 0.30",
    "to_folded": "at most 0.15",
    "closed": "at least 0.33",
    "to_best": "at most 0.60",
}


def write_report(contents: Iterable[dict[str, object]], folder: Path) -> None:
    """Writes ``compare.json``, ``compare.md`` and ``compare.png``."""
    cells = Cells(contents)
    figures = [row for model in cells.models for row in ratios(cells, model)]
    worst = [change for text in cells.texts if (change := worst_change(cells, text)) is not None]
    orders = [row for model in cells.models for row in orders_of(cells, model)]
    write_json({"figures": figures, "worst_change": worst, "orders": orders, "cells": cells.all},
               folder / COMPARISON_NAME)  # fmt: skip
    text = "\n".join([*_heading(cells), *_tables(cells), *_figures(figures, worst, orders)])
    write_text(text + "\n", folder / "compare.md")
    plot(cells, folder / "compare.png")


def ratios(cells: Cells, model: str) -> list[dict[str, object]]:
    """Returns the learned masks' gaps beside the best baseline's, for each sparsity and text of a model.

    ``to_refitted`` and ``to_folded`` divide the gap of the learned masks with refit by the smallest of the baselines'
    with refit and with fold; ``closed`` is the share of their own gap with fold that the refit closes; ``to_best``
    divides their gap with their best update by the smallest of the baselines' with theirs. Medians of the seeds;
    ``None`` where one is not measured.
    """
    rows = []
    places = [(method, sparsity, text) for method in LEARNED for sparsity in cells.sparsities for text in cells.texts]
    for method, sparsity, text in places:
        place = {"model": model, "target_sparsity": sparsity}
        folded, refitted = (
            cells.median_gap(text, method=method, weight_update=update, **place) for update in (FOLD, REFIT)
        )
        best_folded, best_refitted = (_best_baseline(cells, text, [update], **place) for update in (FOLD, REFIT))
        own = [cells.median_gap(text, method=method, weight_update=update, **place) for update in cells.updates]
        best = _best_baseline(cells, text, cells.updates, **place)
        if any(gap is not None for gap in own):
            ratio = _ratio(refitted, folded)
            rows.append(
                {
                    **place,
                    "method": method,
                    "text": text,
                    "to_refitted": _ratio(refitted, best_refitted[0]),
                    "best_refitted": best_refitted[1],
                    "to_folded": _ratio(refitted, best_folded[0]),
                    "best_folded": best_folded[1],
                    "closed": None if ratio is None else 1 - ratio,
                    "to_best": _ratio(min(gap for gap in own if gap is not None), best[0]),
                    "best": best[1],
                }
            )
    return rows


def _best_baseline(cells: Cells, text: str, updates: Sequence[str], **place: object) -> tuple[float | None, str]:
    """Returns the smallest median gap of a baseline with one of some updates, and the names of both."""
    gaps = {
        f"{method}, {update}": cells.median_gap(text, method=method, weight_update=update, **place)
        for update in updates
        for method in cells.methods
        if method not in LEARNED
    }
    return min(((value, name) for name, value in gaps.items() if value is not None), default=(None, NONE))


def _ratio(own: float | None, other: float | None) -> float | None:
    return own / other if own is not None and other and math.isfinite(other) else None


def worst_change(cells: Cells, text: str) -> dict[str, object] | None:
    """Returns the largest relative change of perplexity from fold to refit in any cell; ``None`` without pairs."""
    names = ("model", "method", "target_sparsity", "seed")
    found = []
    for refitted in cells.of(weight_update=REFIT):
        where = {name: refitted[name] for name in names}
        for folded in cells.of(weight_update=FOLD, **where):
            values = [perplexity(content, text, PRUNED) for content in (refitted, folded)]
            if math.isfinite(values[1]):
                found.append({"text": text, **where, "change": values[0] / values[1] - 1})
    return max(found, key=lambda row: row["change"], default=None)


def orders_of(cells: Cells, model: str) -> list[dict[str, object]]:
    """Returns the methods from the smallest median gap to the largest on each text, for each update and sparsity."""

    def order(text: str, **place: object) -> list[str]:
        gaps = {method: cells.median_gap(text, method=method, **place) for method in cells.methods}
        known = {method: value for method, value in gaps.items() if value is not None}
        return sorted(known, key=lambda method: known[method])

    rows = []
    for update in cells.updates:
        for sparsity in cells.sparsities:
            place = {"model": model, "weight_update": update, "target_sparsity": sparsity}
            rows.append(place | {"orders": {text: order(text, **place) for text in cells.texts}})
    return rows


def _heading(cells: Cells) -> list[str]:
    first = cells.all[0]
    texts = ", ".join(
        f"{name} ({first['windows'][text]} windows of {first['block_size']} tokens)"
        for text, name in cells.called.items()
    )
    seeds = " ".join(map(str, dict.fromkeys(content["seed"] for content in cells.all)))
    return [
        "# Learned gates against one-shot scores\n",
        f"`{first['command']}`\n",
        f"Gap: log perplexity pruned minus dense, on the {first['split']} splits of {texts}; median of seeds {seeds} "
        f"(least to largest). {''.join(f'{note} ' for note in errors_note(cells))}"
        "Units are chosen, and weights refitted, on the training split of "
        f"{first['dataset']}: {_gates(cells)}scores and refits on {first['calibration_samples']} blocks. "
        f"Sparsity: {SPARSITY_DEFINITION}. No fine-tuning. {_zero_shot_tasks(cells)}"
        "Choosing: seconds, and peak memory of the process while choosing; where one set of scores serves every "
        f"sparsity, its whole cost stands in each row. Hardware: {first['hardware']}.",
    ]  # fmt: skip


def _zero_shot_tasks(cells: Cells) -> str:
    """Returns what the zero-shot averages are of; nothing where no cell was scored."""
    scored = [content for content in cells.all if content["zero_shot"] is not None]
    if not scored:
        return ""
    tasks, seeds = list(scored[0]["zero_shot"][DENSE]["tasks"]), {content["seed"] for content in scored}
    return f"Zero-shot: average accuracy of {', '.join(tasks)}, {len(seeds)} {'seed' if len(seeds) == 1 else 'seeds'}. "


def _gates(cells: Cells) -> str:
    """Returns what the gates learned on: those of the comparison itself, and those of masks that were given."""
    learned = [content for content in cells.all if content["method"] in LEARNED]
    own = [f"gates on {content['train_samples']} blocks" for content in learned if "mask" not in content]
    given = [_given(content) for content in learned if "mask" in content]
    return "".join(f"{told}, " for told in dict.fromkeys(own + given))


def _given(content: dict[str, Any]) -> str:
    """Returns what the record beside a given mask tells of its training; cells of old did not keep it."""
    record = content.get("learned_on") or {}
    known = [form.format(record[name]) for name, form in RECORDED.items() if record.get(name) is not None]
    return f"the gates of {content['mask']} on {' '.join(known) or 'what nobody recorded'}"


def _tables(cells: Cells) -> list[str]:
    lines = []
    for model in cells.models:
        lines += [f"\n## {Path(model).name}\n", f"{dense_perplexities(cells, model)}\n"]
        gaps = [f"{name}, {update}" for name in cells.called.values() for update in cells.updates]
        scores = [f"zero-shot, {update}" for update in cells.updates]
        lines += _header(["sparsity", "method", *gaps, *scores, "choosing", "update", "peak memory"])
        places = [(sparsity, method) for sparsity in cells.sparsities for method in cells.methods]
        measured = [place for place in places if cells.of(model=model, target_sparsity=place[0], method=place[1])]
        lines += [_row(cells, model, sparsity, method) for sparsity, method in measured]
    return lines


def _header(names: Sequence[str]) -> list[str]:
    return [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]


def _row(cells: Cells, model: str, sparsity: float, method: str) -> str:
    place = {"model": model, "target_sparsity": sparsity, "method": method}
    gaps = [spread(cells.of(weight_update=update, **place), text) for text in cells.texts for update in cells.updates]
    scores = [zero_shot(cells, weight_update=update, **place) for update in cells.updates]
    costs = [
        cost_of_choosing(cells.of(**place), "seconds", "{:.1f} s"),
        median_of(lambda c: c["seconds"]["update"], cells.of(weight_update=cells.updates[-1], **place), "{:.1f} s"),
        cost_of_choosing(cells.of(**place), "peak_memory", "{:.0f} MiB", 2**20),
    ]
    return f"| {' | '.join([str(sparsity), method, *gaps, *scores, *costs])} |"


def _figures(figures: list[dict[str, Any]], worst: list[dict[str, Any]], orders: list[dict[str, Any]]) -> list[str]:
    """Returns the figures as Markdown, the targets in the head of their columns."""
    lines = ["\n## Figures\n"]
    if figures:  # none without learned masks
        lines += _header(
        [
            "model", "sparsity", "text", "masks",
            f"gap with refit / best baseline's with refit (sought at {TARGET_SPARSITY}: {SOUGHT['to_refitted']})",
            f"... / best baseline's with fold ({SOUGHT['to_folded']})",
            f"share of its gap with fold that refit closes ({SOUGHT['closed']})",
            f"gap with its best update / best baseline's with its best ({SOUGHT['to_best']})",
        ]
    )  # fmt: skip
    for row in figures:
        ratio, folded = (_number(row[name]) for name in ("to_refitted", "to_folded"))
        columns = [Path(row["model"]).name, str(row["target_sparsity"]), row["text"], row["method"]]
        columns += [f"{ratio} ({row['best_refitted']})", f"{folded} ({row['best_folded']})", _number(row["closed"])]
        columns.append(f"{_number(row['to_best'])} ({row['best']})")
        lines.append(f"| {' | '.join(columns)} |")
    lines.append("")
    for row in worst:
        where = f"{Path(row['model']).name}, {row['method']}, {row['target_sparsity']}, seed {row['seed']}"
        lines.append(f"- Largest change of perplexity from fold to refit in any cell, {row['text']}: "
                     f"{100 * row['change']:+.2f}% ({where}); sought: at most +1%.")  # fmt: skip
    for row in orders:
        if row["target_sparsity"] == TARGET_SPARSITY:
            where = f"{TARGET_SPARSITY}, {Path(row['model']).name}, {row['weight_update']}"
            lines.append(f"- Order at {where}: {_order(row['orders'])}.")
    return lines


def _order(orders: dict[str, list[str]]) -> str:
    (first, expected), *others = orders.items()
    texts = [f"{first}: {', '.join(expected)}"]
    texts += [f"{text}: {'the same' if order == expected else ', '.join(order)}" for text, order in others]
    return "; ".join(texts)


def _number(value: float | None) -> str:
    return NONE if value is None else f"{value:.3f}"
