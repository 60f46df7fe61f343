"""The page's charts: their axes, lines, error bars and bars lie where the numbers say."""

import math
import re

import pytest

from tvaprune.report.charts import HEIGHT, TOP, Series, bar_chart, line_chart, ticks


def test_round_ticks_lie_within_their_span():
    assert ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert ticks(-3, 7) == [-2, 0, 2, 4, 6]
    for low, high in ((0.2141, 0.2727), (1e-9, 3e-9), (19, 150_000), (-1, -0.999)):
        found = ticks(low, high)
        assert 3 <= len(found) <= 7 and low <= found[0] and found[-1] <= high + 1e-12


def test_a_line_goes_through_its_points_in_the_frame():
    """Ends of the axes: the left and right edge; the greatest value lies above the least."""
    chart = line_chart("t", [Series("a", [(0, 1.0), (5, math.nan), (10, 3.0)])], "x", "y")
    ((left, bottom), (right, top)) = (
        map(float, p.split()) for p in re.search(r'd="M([^"]*)"/>$', _line(chart)).group(1).split("L")
    )
    assert (left, right) == (62, 450) and 10 < top < bottom < 208
    assert line_chart("t", [Series("a", [(1, math.nan)])], "x", "y") is None
    assert line_chart("t", [Series("a", [(1, 2.0)])], "x", "y").svg.count("<circle") == 1  # one point: a dot


def test_a_bar_goes_as_far_as_the_error_to_both_sides():
    points = [(0, 1.0, 0.25), (1, 2.0), (2, 2.5, math.nan), (3, 3.0, 0.0), (4, 4.0, 1.0)]
    chart = line_chart("t", [Series("a", points)], "x", "y", from_zero=True)
    bars = re.findall(r'class="error s0" d="M\S+ ([\d.]+)H.*?V([\d.]+)M', chart.svg)
    ends = [tuple(map(float, bar)) for bar in bars]
    _, *places = (float(place.split()[1]) for place in re.search(r'd="M([^"]*)"/>', _line(chart)).group(1).split("L"))
    assert len(ends) == 2  # of the first and the last, whose errors are known and not nothing
    scale = (places[-1] - places[0]) / 2.0  # from the second point, 2.0, to the last, 4.0
    (low, high), (lowest, highest) = ends
    assert high - low == pytest.approx(0.5 * scale, abs=0.03) and highest - lowest == pytest.approx(2 * scale, abs=0.03)
    assert (lowest + highest) / 2 == pytest.approx(places[-1], abs=0.02)
    assert TOP < highest < lowest < HEIGHT  # the frame has room for it
    bare = line_chart("t", [Series("a", [point[:2] for point in points])], "x", "y", from_zero=True)
    assert "error" not in bare.svg and _line(bare) != _line(chart)  # control: no bars, so less room above


def _line(chart):
    return next(line for line in chart.svg.split("\n") if 'class="line' in line).removesuffix("</svg>")


def test_bars_are_as_high_as_what_is_kept():
    chart = bar_chart("t", [2, 0], [4, 4], "layer", "heads")
    heights = [float(found) for found in re.findall(r'height="([\d.]+)"', chart.svg)]
    full, kept = heights[:2], heights[2:]
    assert full[0] == full[1] > 0 and kept == pytest.approx([full[0] / 2, 0.0], abs=0.02)
