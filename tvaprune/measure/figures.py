"""How a measured figure is told: against the dense model's, with its standard error where it has one."""

import math

ERRORS = "±: the standard error over the windows; of a gap, over the same windows."
HUGE = 1e7


def log_gap(perplexity: float, dense: float) -> float:
    """Returns log perplexity minus the dense model's."""
    return math.log(perplexity / dense)


def with_error(value: float, error: float | None, sign: str = "", digits: int = 3) -> str:
    """Returns a value with its standard error where it has one; what has no digits to spare, as a power of ten."""
    form = f".{digits}f" if abs(value) < HUGE else ".3g"  # a collapsed model's perplexity has hundreds of digits
    told = f"{value:{sign}{form}}"
    return told if error is None else f"{told} ± {error:{form}}"
