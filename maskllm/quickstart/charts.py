"""Line charts as inline SVG: no library, no script, the colours from the page's style sheet."""

from __future__ import annotations

import math
from dataclasses import dataclass
from html import escape
from typing import Literal

# Units of the drawing, about pixels: a chart is shown 300 to 500 pixels wide, so that its text can be read on a phone too.
WIDTH, HEIGHT = 360, 210
LEFT, RIGHT, TOP, BOTTOM = 48, 24, 26, 38
MAX_DOTS = 100
"""Lines of more points are drawn without a dot at each of them."""

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """One curve. The style sheet colours class `s0` the first series of a chart, `s1` the second, and so on."""

    label: str
    points: list[Point]
    """(x, y), finite, in the order of x."""
    marker: Literal["small", "filled", "ring"] = "small"
    """Told apart without colour as well, and a ring leaves a filled dot at the same place visible."""


def line_chart(title: str, series: list[Series], *, x_label: str, y_label: str, percent: bool = False) -> str:
    """An HTML `figure` of the curves; empty without any point.

    Args:
        percent: show shares as percentages.

    The caption tells the title and the first curve's first and last values, with a legend where there are several curves. Every dot
    names its values when pointed at. All texts are escaped.
    """
    series = [curve for curve in series if curve.points]
    if not series:
        return ""
    xs = [x for curve in series for x, _ in curve.points]
    ys = [y for curve in series for _, y in curve.points]
    first, last = (min(xs), max(xs)) if min(xs) < max(xs) else (xs[0] - 1, xs[0] + 1)
    y_ticks = nice_ticks(min(ys), max(ys))
    low, high = y_ticks[0], y_ticks[-1]

    def place(x: float, y: float) -> Point:
        across = LEFT + (x - first) / (last - first) * (WIDTH - LEFT - RIGHT)
        return across, HEIGHT - BOTTOM - (y - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    parts = [f'<text class="axis" x="4" y="14">{escape(y_label)}</text>']
    for tick in y_ticks:
        _, y = place(first, tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_tick_text(tick, y_ticks, percent)}</text>')
    x_ticks = nice_ticks(first, last, intervals=5, smallest_step=1)
    for tick in x_ticks:
        if first <= tick <= last:
            x, _ = place(tick, low)
            parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{_tick_text(tick, x_ticks)}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text class="axis" x="{middle:.0f}" y="{HEIGHT - 4}" text-anchor="middle">{escape(x_label)}</text>')
    for number, curve in enumerate(series):
        drawn = [place(*point) for point in curve.points]
        parts.append(f'<polyline class="s{number}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in drawn)}"/>')
        if len(drawn) <= MAX_DOTS:
            for (x, y), (at, value) in zip(drawn, curve.points, strict=True):
                told = escape(f"{curve.label}, {x_label} {at:g}: {_value_text(value, percent)}")
                parts.append(f"{_dot(curve, number, x, y)}<title>{told}</title></circle>")

    ends = [_value_text(value, percent) for _, value in (series[0].points[0], series[0].points[-1])]
    summary = f"{ends[0]} → {ends[1]}" if len(series[0].points) > 1 else ends[0]
    legend = "".join(
        f'<span><svg class="key" viewBox="0 0 22 14" aria-hidden="true"><line class="s{number}" x1="1" x2="21" y1="7" y2="7"/>'
        f"{_dot(curve, number, 11, 7)}</circle></svg>{escape(curve.label)}</span>"
        for number, curve in enumerate(series)
        if len(series) > 1
    )
    described = escape(f"{title}. {y_label} over {x_label}. {series[0].label}: {summary}")
    return (
        f'<figure><figcaption><b>{escape(title)}</b> <span class="muted">{summary}</span>'
        + (f'<div class="legend">{legend}</div>' if legend else "")
        + f'</figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{described}">{"".join(parts)}</svg></figure>'
    )


def nice_ticks(low: float, high: float, *, intervals: int = 4, smallest_step: float = 0.0) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten, about `intervals` apart, the first at most `low` and the last at least `high`."""
    if low == high:
        high = low + (abs(low) / 10 or 1.0)
    wanted = max((high - low) / intervals, smallest_step)
    power = 10.0 ** math.floor(math.log10(wanted))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= wanted * (1 - 1e-9))
    # Without the tolerance 0.3 / 0.1 = 2.9999999999999996 would lie above one tick more than it has to.
    return [i * step for i in range(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1)]


def _dot(curve: Series, number: int, x: float, y: float) -> str:
    radius = {"small": 2, "filled": 3.5, "ring": 5.5}[curve.marker]
    return f'<circle class="s{number} {curve.marker}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}">'


def _tick_text(tick: float, ticks: list[float], percent: bool = False) -> str:
    unit = 100 if percent else 1
    decimals = max(0, -math.floor(math.log10((ticks[1] - ticks[0]) * unit) + 1e-9))
    return f"{tick * unit:,.{decimals}f}{'%' if percent else ''}"


def _value_text(value: float, percent: bool) -> str:
    """Three significant digits: 4.30, 108, 0.0406%."""
    value *= 100 if percent else 1
    decimals = 0 if value == 0 else max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{decimals}f}{'%' if percent else ''}"
