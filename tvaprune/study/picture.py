"""The comparison's picture: perplexity over sparsity, a line for each method and update."""

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

from tvaprune.flags.settings import VIB_ONCE
from tvaprune.report.plots import save_figure
from tvaprune.report.zero_shot import DENSE, PRUNED
from tvaprune.study.contents import LEARNED, Cells, middle_error, perplexity
from tvaprune.study.grid import VIB

STYLES: dict[str, Any] = {"none": "-.", "fold": "--", "refit": "-", "reconstruct": ":"}
NAMES = {
    VIB: "VIB gates", VIB_ONCE: "VIB gates, trained once", "taylor": "Taylor, in each layer",
    "taylor_global": "Taylor, global", "wanda_sp": "Wanda-sp", "flap": "FLAP", "bonsai": "Bonsai",
}  # fmt: skip


def plot(cells: Cells, path: Path) -> None:
    """Draws perplexity over sparsity: a panel for each model and text, a line for each method and update."""
    size = (1.5 + 4.5 * len(cells.texts), 0.8 + 3.6 * len(cells.models))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(cells.models), len(cells.texts), squeeze=False, sharex=True)
    colours = {method: f"C{index}" for index, method in enumerate(cells.methods)}
    for row, model in zip(panels, cells.models, strict=True):
        for axes, text in zip(row, cells.texts, strict=True):
            _panel(axes, cells, model, text, colours)
    figure.supxlabel("sparsity of the decoder", fontsize="medium")
    handles = [Line2D([], [], color=colour, label=NAMES.get(method, method)) for method, colour in colours.items()]
    if len(cells.updates) > 1:
        handles += [Line2D([], [], color="0.3", linestyle=STYLES.get(u, ":"), label=u) for u in cells.updates]
    handles.append(Line2D([], [], color="0.6", linewidth=1, label=DENSE))
    figure.legend(handles=handles, loc="outside right center", frameon=False)
    save_figure(figure, path)


def _panel(axes: Axes, cells: Cells, model: str, text: str, colours: dict[str, str]) -> None:
    axes.axhline(cells.of(model=model)[0]["perplexity"][text][DENSE], color="0.6", linewidth=1)
    for method in cells.methods:
        for update in cells.updates:
            place = {"model": model, "method": method, "weight_update": update}
            some = {sparsity: cells.of(target_sparsity=sparsity, **place) for sparsity in cells.sparsities}
            found = {sparsity: contents for sparsity, contents in some.items() if contents}
            values = {
                sparsity: [perplexity(content, text, PRUNED) for content in contents]
                for sparsity, contents in found.items()
            }
            middles = list(map(median, values.values()))
            errors = [middle_error(contents, text, PRUNED) for contents in found.values()]
            style: dict[str, Any] = {"color": colours[method], "linewidth": 2.2 if method in LEARNED else 1.3}
            axes.plot(list(values), middles, STYLES.get(update, ":"), marker=".", **style)
            _error_bars(axes, list(values), middles, errors, colours[method])
            axes.fill_between(list(values), list(map(min, values.values())), list(map(max, values.values())),
                              color=colours[method], alpha=0.15, linewidth=0)  # fmt: skip
    axes.set(yscale="log", title=f"{Path(model).name}, {cells.called[text]}", ylabel="perplexity")
    axes.set_xticks(cells.sparsities)
    bottom, top = axes.get_ylim()
    digits = "125" if top > 10 * bottom else "123456789"  # which do not crowd
    for which in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        which(FuncFormatter(lambda value, position: _tick(value, digits)))
    axes.grid(alpha=0.3, which="both")


def _error_bars(
    axes: Axes, places: Sequence[float], values: Sequence[float], errors: Sequence[float | None], colour: str
) -> None:
    """Draws the standard errors of those values that have one."""
    known = [one for one in zip(places, values, errors, strict=True) if one[2] is not None]
    if known:
        x, y, yerr = map(list, zip(*known, strict=True))
        axes.errorbar(x, y, yerr=yerr, fmt="none", ecolor=colour, elinewidth=1, capsize=2.5)


def _tick(value: float, digits: str) -> str:
    """Returns the label of a perplexity that begins with one of some digits; of others none."""
    return f"{value:,.0f}" if value >= 1 and f"{value:e}"[0] in digits else ""
