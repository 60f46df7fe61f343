"""What the cells of a comparison hold: looked up by what they are cells of, as numbers and in words."""

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

from tvaprune.flags.settings import VIB_ONCE
from tvaprune.measure.figures import ERRORS, log_gap, with_error
from tvaprune.report.zero_shot import DENSE, PRUNED
from tvaprune.study.grid import VIB

LEARNED = (VIB, VIB_ONCE)
NONE = "-"  # of what was not measured
# Of a mask's record, what says what its gates learned on; it is a file of the user's, who may have written anything.
RECORDED = {
    "train_blocks": "{} blocks",
    "block_size": "of {} tokens",
    "dataset_name": "of {}",
    "step": "as they were after {} steps",
}


class Cells:
    """The contents of cells, looked up by what they are cells of."""

    def __init__(self, contents: Iterable[dict[str, Any]]) -> None:
        self.all = list(contents)
        self.texts = list(self.all[0]["perplexity"])
        names = [Path(text).name for text in self.texts]
        # A file goes by its name: tables have a column of each text for each update.
        self.called = dict(zip(self.texts, names if len(set(names)) == len(names) else self.texts, strict=True))
        self.models, self.methods, self.updates, self.sparsities = (
            list(dict.fromkeys(content[name] for content in self.all))
            for name in ("model", "method", "weight_update", "target_sparsity")
        )
        self.sparsities.sort()

    def of(self, **values: object) -> list[dict[str, Any]]:
        """Returns the cells in which all the values are as given."""
        return [content for content in self.all if all(content[name] == value for name, value in values.items())]

    def median_gap(self, text: str, **values: object) -> float | None:
        """Returns the median gap over the seeds; ``None`` if there is no such cell."""
        found = [gap(content, text) for content in self.of(**values)]
        return median(found) if found else None


def gap(content: dict[str, Any], text: str) -> float:
    """Returns log perplexity pruned minus dense."""
    return log_gap(perplexity(content, text, PRUNED), perplexity(content, text, DENSE))


def error(content: dict[str, Any], text: str, name: str) -> float | None:
    """Returns the standard error of a cell's figure on a text; None: of a single window, of no number, of old."""
    found: float | None = (content["perplexity"][text].get("stderr") or {}).get(name)
    return found


def perplexity(content: dict[str, Any], text: str, name: str) -> float:
    """Returns a model's perplexity in a cell; one that was no number is infinite: it is no better than any."""
    value: float | None = content["perplexity"][text][name]
    return math.inf if value is None else value


def perplexity_in_words(content: dict[str, Any], text: str, name: str) -> str:
    """Returns the dense or the pruned model's perplexity in a cell, with its standard error."""
    return with_error(perplexity(content, text, name), error(content, text, name), digits=2)


def errors_note(cells: Cells, *more: str) -> list[str]:
    """Returns what the errors in a comparison's tables are, and more of them; nothing where no cell has any."""
    some = any(error(content, text, "gap") is not None for content in cells.all for text in cells.texts)
    return [f"{ERRORS} Of several seeds it is that of the one in the middle.", *more] if some else []


def dense_perplexities(cells: Cells, model: str) -> str:
    """Returns what the unpruned model makes of every text: of cells of old nobody knows the errors."""
    first = max(cells.of(model=model), key=lambda content: "stderr" in content["perplexity"][cells.texts[0]])
    values = (f"{name} {perplexity_in_words(first, text, DENSE)}" for text, name in cells.called.items())
    return f"Dense perplexity: {', '.join(values)}."


def zero_shot(cells: Cells, **place: object) -> str:
    """Returns the median of the average accuracies in some cells."""
    known = [cell["zero_shot"][PRUNED]["average"] for cell in cells.of(**place) if cell["zero_shot"]]
    return f"{median(known):.3f}" if known else NONE


def cost_of_choosing(found: Sequence[dict[str, Any]], what: str, form: str, unit: int = 1) -> str:
    """Returns the median of what choosing the units of some cells cost; of masks that were given, nothing is known."""
    known = [cell for cell in found if cell[what]["choosing"] is not None]
    return median_of(lambda cell: cell[what]["choosing"] / unit, known, form)


def median_of(value: Callable[[dict[str, Any]], float], found: Sequence[dict[str, object]], form: str) -> str:
    """Returns the median of a value over some cells, in words."""
    return form.format(median(map(value, found))) if found else NONE


def spread(found: Sequence[dict[str, Any]], text: str) -> str:
    """Returns the median gap of some cells with its error, and the least and largest gap where there are several."""
    if not found:
        return NONE
    gaps = [gap(content, text) for content in found]
    told = with_error(median(gaps), middle_error(found, text, "gap"))
    return told if len(gaps) == 1 else f"{told} ({min(gaps):.3f} to {max(gaps):.3f})"


def middle_error(found: Sequence[dict[str, Any]], text: str, name: str) -> float | None:
    """Returns the standard error of a figure in the cell whose gap is the median of some; None: nobody knows it.

    Of two cells in the middle the errors' mean counts: both are of the same windows, so it is at most that.
    """
    order = sorted(found, key=lambda content: gap(content, text))
    middle = order[(len(order) - 1) // 2 : len(order) // 2 + 1]
    errors = [value for content in middle if (value := error(content, text, name)) is not None]
    return mean(errors) if len(errors) == len(middle) else None
