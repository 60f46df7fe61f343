"""Charts of the page as inline SVG: no library's script, font or colour, so that they follow light and dark.

Lengths are units of the view box, near a pixel where the chart has its full width.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

from markupsafe import Markup

WIDTH, HEIGHT = 460, 250
LEFT, RIGHT, TOP, BOTTOM = 62, 10, 10, 42
COLOURS = 8  # classes s0 to s7 of the page's style; what comes after them takes them again, dashed
BARS = "Bars, where they are longer than a dot: the standard error to both sides."
CAP = 3.0  # half of what ends an error bar


class Point(NamedTuple):
    """A value at a place; None: nobody knows its standard error."""

    x: float
    y: float
    error: float | None = None

    @property
    def ends(self) -> tuple[float, float]:
        """The value less and plus its standard error."""
        error = self.error if _is_finite(self.error) else None
        return self.y - (error or 0.0), self.y + (error or 0.0)


@dataclass(frozen=True)
class Series:
    """One line, or set of dots; points without a finite value are left out, those with an error have a bar."""

    name: str
    points: Sequence[tuple[float, float] | Point]
    style: Literal["line", "dashed", "dots", "marked"] = "line"


@dataclass(frozen=True)
class Chart:
    """A chart, with its legend: names beside the classes that colour them."""

    kind: ClassVar[str] = "chart"
    title: str
    svg: Markup
    legend: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class _Scale:
    """Takes values to places on one axis."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return round(self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start), 2)


def line_chart(
    title: str, series: Sequence[Series], x_label: str, y_label: str, from_zero: bool = False
) -> Chart | None:
    """Draws series over one pair of axes; None where no series has a point.

    Args:
        from_zero: Whether the vertical axis has the zero.
    """
    every = [(index, one, _finite(one)) for index, one in enumerate(series)]
    shown = [(index, one, points) for index, one, points in every if points]
    if not shown:
        return None
    points = [point for _, _, its in shown for point in its]
    x = _Scale(*_span([p.x for p in points]), LEFT, WIDTH - RIGHT)
    values = [end for p in points for end in p.ends] + ([0.0] if from_zero else [])
    y = _Scale(*_span(values, margin=0.06), HEIGHT - BOTTOM, TOP)
    marks = [_series(one, its, _colour(index, one), x, y) for index, one, its in shown]
    whole = all(float(p.x).is_integer() for p in points)  # steps have no halves
    places = [tick for tick in ticks(x.low, x.high) if float(tick).is_integer() or not whole]
    svg = _frame(title, x, y, places, x_label, y_label, marks)
    return Chart(title, svg, tuple((one.name, _colour(index, one)) for index, one, _ in shown))


def bar_chart(title: str, kept: Sequence[int], full: Sequence[int], x_label: str, y_label: str) -> Chart:
    """Draws what is kept of what was there, a bar for each layer."""
    x = _Scale(-0.5, len(full) - 0.5, LEFT, WIDTH - RIGHT)
    y = _Scale(0, max(*full, 1) * 1.04, HEIGHT - BOTTOM, TOP)
    marks = []
    for name, heights in (("full", full), ("kept", kept)):
        for layer, height in enumerate(heights):
            left, right = x(layer - 0.4), x(layer + 0.4)
            marks.append(
                Markup('<rect class="{}" x="{}" y="{}" width="{:.2f}" height="{:.2f}"><title>{}</title></rect>').format(
                    name, left, y(height), right - left, y(0) - y(height),
                    f"layer {layer}: {kept[layer]:,} of {full[layer]:,}",
                )
            )  # fmt: skip
    step = math.ceil(len(full) / 16)
    svg = _frame(title, x, y, [float(layer) for layer in range(0, len(full), step)], x_label, y_label, marks)
    return Chart(title, svg, (("dense", "full"), ("pruned", "kept")))


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Returns round numbers within a span, about so many."""
    raw = (high - low) / count
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * magnitude for factor in (1, 2, 2.5, 5, 10) if factor * magnitude >= raw * 0.999)
    return [round(index * step, 10) for index in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _span(values: Sequence[float], margin: float = 0.0) -> tuple[float, float]:
    """Returns the ends of an axis, with a share of room beyond the values; a zero that is an end stays one."""
    low, high = min(values), max(values)
    if high - low <= 1e-12 * max(abs(low), abs(high), 1e-300):
        room = abs(low) * 0.1 or 1.0
        return low - room, high + room
    room = margin * (high - low)
    return (0.0 if low == 0 else low - room), (0.0 if high == 0 else high + room)


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _finite(one: Series) -> list[Point]:
    points = (Point(*point) for point in one.points)
    return [point for point in points if _is_finite(point.x) and _is_finite(point.y)]


def _colour(index: int, one: Series) -> str:
    dashed = one.style == "dashed" or index >= COLOURS
    return f"s{index % COLOURS}{' dashed' if dashed else ''}{' dots' if one.style == 'dots' else ''}"


def _series(one: Series, points: Sequence[Point], colour: str, x: _Scale, y: _Scale) -> Markup:
    drawn = Markup("")
    if one.style != "dots":
        path = "L".join(f"{x(point.x)} {y(point.y)}" for point in points)
        drawn += Markup('<path class="line {}" d="M{}"/>').format(colour, path)
    for point in points:
        low, high = point.ends
        if low < high:
            left, right = round(x(point.x) - CAP, 2), round(x(point.x) + CAP, 2)
            bar = f"M{left} {y(low)}H{right}M{x(point.x)} {y(low)}V{y(high)}M{left} {y(high)}H{right}"
            drawn += Markup('<path class="error {}" d="{}"/>').format(colour, bar)
    if one.style in ("dots", "marked") or len(points) == 1:
        for point in points:
            told = f"{one.name}: {point.y:.4g}{_beside(point)} at {point.x:.4g}"
            drawn += Markup('<circle class="dot {}" cx="{}" cy="{}" r="3"><title>{}</title></circle>').format(
                colour, x(point.x), y(point.y), told
            )
    return drawn


def _beside(point: Point) -> str:
    low, high = point.ends
    return f" ± {point.error:.2g}" if low < high else ""


def _frame(
    title: str, x: _Scale, y: _Scale, x_ticks: Sequence[float], x_label: str, y_label: str, marks: Sequence[Markup]
) -> Markup:
    """Returns the whole picture: grid, labelled axes, and what is drawn within."""
    middle = (LEFT + WIDTH - RIGHT) / 2, (TOP + HEIGHT - BOTTOM) / 2
    parts = [*_grid(y), *_below(x, x_ticks), *marks]
    parts.append(Markup('<text class="label" x="{}" y="{}">{}</text>').format(middle[0], HEIGHT - 6, x_label))
    parts.append(
        Markup('<text class="label" transform="translate(12 {}) rotate(-90)">{}</text>').format(middle[1], y_label)
    )
    return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        WIDTH, HEIGHT, f"{title}: {y_label} over {x_label}", Markup("\n").join(parts)
    )


def _grid(y: _Scale) -> Iterator[Markup]:
    for tick in ticks(y.low, y.high):
        yield Markup('<path class="grid" d="M{} {}H{}"/>').format(LEFT, y(tick), WIDTH - RIGHT)
        yield Markup('<text class="tick end" x="{}" y="{}">{}</text>').format(LEFT - 6, y(tick) + 4, _number(tick))


def _below(x: _Scale, places: Sequence[float]) -> Iterator[Markup]:
    yield Markup('<path class="axis" d="M{} {}H{}"/>').format(LEFT, HEIGHT - BOTTOM, WIDTH - RIGHT)
    for tick in places:
        yield Markup('<text class="tick" x="{}" y="{}">{}</text>').format(x(tick), HEIGHT - BOTTOM + 16, _number(tick))


def _number(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) else f"{value:g}"
