"""Line charts of a run's log as inline SVG: training losses and validation scores in the report.

Curves differ in dash as well as colour; both come from the page's style sheet (classes c0, c1, …).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

LOSS_CURVES = {
    "loss": "loss (total)",
    "seg": "segmentation",
    "lmvsd": "LMVSD",
    "vmlsd": "VMLSD",
    "joint": "both at once",
}
"""Key in `metrics.jsonl` -> name in the legend. A curve without values is left out."""

SCORE_CURVES = {"oIoU": "oIoU", "mIoU": "mIoU"}

WIDTH, HEIGHT = 480, 270
LEFT, RIGHT, TOP, BOTTOM = 50, 14, 10, 40
"""Size of a chart and margins around its axes, in units of its view box."""
MAX_POINTS = 200
"""Maximum number of points per curve; more would not be visible at this width."""
MAX_VALUE = 1e100
"""A logged value beyond this counts as infinite, so that no sum or difference of two overflows."""

Points = list[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Curve:
    """One line of the legend.

    Attributes:
        index: number of the curve, which decides its colour and dash.
        name: name in the legend.
        last: last logged value, which may be NaN.
    """

    index: int
    name: str
    last: str


@dataclass(frozen=True, slots=True)
class Chart:
    """One figure.

    Attributes:
        title: caption above the chart.
        svg: content of the `svg` element; empty where no value is finite.
        legend: the curves that are drawn.
        note: how many values are not drawn, and how many are averaged into a point.
    """

    title: str
    svg: Markup
    legend: list[Curve]
    note: str


def run_charts(rows: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """Draw the charts of a run's log.

    Args:
        rows: rows of `metrics.jsonl`: a `step` and any of the keys of LOSS_CURVES and SCORE_CURVES. Other rows and keys
            are ignored.

    Returns:
        Training losses and validation scores; a chart without values is left out.
    """
    losses = {name: _points(rows, key) for key, name in LOSS_CURVES.items()}
    scores = {name: [(x, 100 * y) for x, y in _points(rows, key)] for key, name in SCORE_CURVES.items()}
    titled = {"Training loss": losses, "Validation score, percent": scores}
    return [_chart(title, curves) for title, curves in titled.items() if any(curves.values())]


def _points(rows: Sequence[Mapping[str, Any]], key: str) -> Points:
    """The (step, value) points of one key. Non-finite values become NaN; non-finite steps are left out."""
    pairs = [(row.get("step"), row.get(key)) for row in rows]
    numbers = [(x, y) for x, y in pairs if isinstance(x, int | float) and isinstance(y, int | float)]
    return [(float(x), float(y) if abs(y) < MAX_VALUE else math.nan) for x, y in numbers if abs(x) < MAX_VALUE]


def _chart(title: str, curves: Mapping[str, Points]) -> Chart:
    """Non-finite values are left out of the curves and counted in the note."""
    finite = {name: [(x, y) for x, y in points if math.isfinite(y)] for name, points in curves.items()}
    omitted = sum(map(len, curves.values())) - sum(map(len, finite.values()))
    note = f"{omitted} logged values were NaN or infinite and are not drawn." if omitted else ""
    all_points = [point for points in finite.values() for point in points]
    if not all_points:
        return Chart(title, Markup(), [], note)
    axes = _Axes.around(all_points)
    parts, legend, largest = [axes.svg()], [], 1
    for index, (name, points) in enumerate(finite.items()):
        if points:
            thinned, size = _thinned(points)
            parts.append(_curve(axes, index, thinned))
            legend.append(Curve(index, name, _number(curves[name][-1][1])))
            largest = max(largest, size)
    if largest > 1:
        note = f"{note} Each point is the mean of up to {largest} logged values.".lstrip()
    return Chart(title, Markup("").join(parts), legend, note)


@dataclass(frozen=True, slots=True)
class _Axes:
    """Ranges and ticks of both axes."""

    x_low: float
    x_high: float
    x_ticks: list[float]
    y_ticks: list[float]

    @classmethod
    def around(cls, points: Points) -> _Axes:
        """Axes that show all points; the value axis includes 0."""
        xs, ys = [x for x, _ in points], [y for _, y in points]
        x_high = max(max(xs), min(xs) + 1e-9 * max(1.0, abs(min(xs))))
        return cls(min(xs), x_high, _ticks(min(xs), max(xs), 5), _ticks(min(0.0, *ys), max(ys), 5))

    def x(self, step: float) -> float:
        """Horizontal position of a step."""
        return LEFT + (WIDTH - LEFT - RIGHT) * (step - self.x_low) / (self.x_high - self.x_low)

    def y(self, value: float) -> float:
        """Vertical position of a value."""
        low, high = self.y_ticks[0], self.y_ticks[-1]
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - low) / (high - low)

    def svg(self) -> Markup:
        """Grid, ticks with their numbers, and both axes."""
        base, end = HEIGHT - BOTTOM, WIDTH - RIGHT
        parts = []
        for value in self.y_ticks:
            y = self.y(value)
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{end}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_number(value)}</text>')
        for step in self.x_ticks:
            if self.x_low <= step <= self.x_high:
                x = self.x(step)
                parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{base}" y2="{base + 4}"/>')
                parts.append(f'<text x="{x:.1f}" y="{base + 17}" text-anchor="middle">{_number(step)}</text>')
        parts.append(f'<path class="axis" d="M{LEFT} {TOP}V{base}H{end}"/>')
        parts.append(f'<text x="{(LEFT + end) / 2}" y="{HEIGHT - 4}" text-anchor="middle">step</text>')
        return Markup("".join(parts))  # numbers only


def _curve(axes: _Axes, index: int, points: Points) -> Markup:
    """A line, with a dot at every point where there are at most 30."""
    places = [(f"{axes.x(x):.1f}", f"{axes.y(y):.1f}") for x, y in points]
    line = f'<polyline class="curve c{index}" points="{" ".join(map(",".join, places))}"/>'
    dots = [f'<circle class="dot c{index}" cx="{x}" cy="{y}" r="2.6"/>' for x, y in places if len(places) <= 30]
    return Markup(line + "".join(dots))  # numbers only


def _thinned(points: Points) -> tuple[Points, int]:
    """At most MAX_POINTS points, each the mean of a group of neighbours; and the size of a group."""
    size = math.ceil(len(points) / MAX_POINTS) or 1
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups], size


def _ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers (multiples of 1, 2 or 5 times a power of ten) that cover low to high."""
    span = max((high - low) or abs(high) or 1.0, 1e-9 * max(abs(low), abs(high)), 1e-99)
    raw = span / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, max(last, first + 1) + 1)]


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
