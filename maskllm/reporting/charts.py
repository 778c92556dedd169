"""Line charts for the page: matplotlib draws them, and the page shows them as inline SVG in its own colours."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass, replace
from html import escape
from typing import Literal
from xml.etree import ElementTree

import matplotlib
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, ScalarFormatter

WIDTH, HEIGHT = 340, 200
"""Size in points. The page shows a chart 300 to 500 pixels wide, so 12-point text is readable on a phone too."""
LEGEND_ROW = 16
"""Height in points that each legend entry adds to the chart."""
MAX_DOTS = 100
"""A curve with more points is drawn as a line without dots."""

# matplotlib draws in these colours. In the SVG each is replaced by a colour of the page, which knows the light and the dark theme.
TEXT, MUTED, RULE = "#000001", "#000002", "#000003"
CURVES = ("#000010", "#000011", "#000012")
PAGE_COLOURS = {TEXT: "var(--text)", MUTED: "var(--muted)", RULE: "var(--rule)"} | {
    colour: f"var(--curve-{number})" for number, colour in enumerate(CURVES)
}

STYLE = {
    "svg.fonttype": "none",  # text stays text: it can be selected, and the browser's font draws it
    "text.parse_math": False,
    "font.sans-serif": ["DejaVu Sans"],  # matplotlib has this font; the page replaces it by its own
    "font.size": 12,
    "axes.facecolor": "none",
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.spines.bottom": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 1,
    "xtick.bottom": False,
    "ytick.left": False,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "axes.labelcolor": TEXT,
    "axes.titlecolor": TEXT,
    "axes.titlelocation": "left",
    "axes.titlesize": "medium",
    "axes.titlepad": 10,
    "xtick.major.pad": 6,
    "axes.formatter.useoffset": False,
    "axes.unicode_minus": False,
    # The axes begin and end at a tick.
    "axes.autolimit_mode": "round_numbers",
    "axes.xmargin": 0,
    "axes.ymargin": 0,
    "lines.linewidth": 1.5,
    "legend.frameon": False,
    "legend.labelcolor": TEXT,
    "legend.borderaxespad": 0,
    "legend.borderpad": 0,
    "legend.labelspacing": 0.3,
}

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """One curve."""

    label: str
    points: list[Point]
    """(x, y), finite, in the order of x."""
    marker: Literal["small", "filled", "ring"] = "small"
    """The form of the dots. It tells curves apart without colour, and a filled dot inside a ring stays visible."""


def line_chart(title: str, series: list[Series], *, x_label: str, y_label: str, percent: bool = False) -> str:
    """An HTML `figure` of the curves, or an empty string if no curve has a point.

    The caption has the title and the first and last value of the first curve. A legend names the curves if there are several.
    Pointing at a dot shows its values. All texts are escaped. The same arguments give the same text.

    Args:
        series: at most three curves.
        percent: show values as percentages (0.5 as 50%).
    """
    series = [curve for curve in series if curve.points]
    if not series:
        return ""
    if percent:
        series = [replace(curve, points=[(x, 100 * y) for x, y in curve.points]) for curve in series]
    unit = "%" if percent else ""
    ends = [_ends(curve, unit) for curve in series]
    description = f"{title}. {y_label} over {x_label}. " + "; ".join(
        f"{curve.label}: {summary}" for curve, summary in zip(series, ends, strict=True)
    )
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # the user's matplotlibrc does not change the page
        matplotlib.rcParams.update(STYLE | {"svg.hashsalt": title})  # the salt makes the ids of a page's charts differ
        svg = _svg(_figure(series, x_label, y_label, unit))
    svg.attrib |= {"role": "img", "aria-label": description}
    for number, curve in enumerate(series):
        dots = svg.findall(f".//*[@id='{_curve_id(number)}']//use")
        for dot, (x, y) in zip(dots, curve.points if dots else (), strict=True):
            ElementTree.SubElement(dot, "title").text = f"{curve.label}, {x_label} {x:g}: {_value_text(y, unit)}"
    for element in svg.iter("g"):
        element.attrib.pop("id", None)  # such as "axes_1": every chart of the page has the same ones, and nothing refers to them
    return (
        f'<figure><figcaption><b>{escape(title)}</b> <span class="muted">{ends[0]}</span></figcaption>'
        f"{ElementTree.tostring(svg, encoding='unicode')}</figure>"
    )


def _figure(series: list[Series], x_label: str, y_label: str, unit: str) -> Figure:
    legend_rows = len(series) if len(series) > 1 else 0
    figure = Figure(figsize=(WIDTH / 72, (HEIGHT + LEGEND_ROW * legend_rows) / 72), frameon=False, layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(x_label)
    axes.set_title(y_label)  # above the axis, because a rotated label would make the plot narrower
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(_FormatterWithUnit(unit))
    axes.tick_params(grid_clip_on=False)  # the lines at the edges of the plot would lose half of their width
    for number, curve in enumerate(series):
        axes.add_line(_line(curve, CURVES[number], _curve_id(number)))
    axes.autoscale_view()
    if legend_rows:
        figure.legend(loc="outside upper left")
    return figure


class _FormatterWithUnit(ScalarFormatter):
    """matplotlib's tick labels, which have as many decimals as the axis needs, followed by a unit."""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def __call__(self, value: float, position: int | None = None) -> str:
        return super().__call__(value, position) + self.unit


def _line(curve: Series, colour: str, gid: str) -> Line2D:
    xs, ys = zip(*curve.points, strict=True)
    dots = {
        "small": {"marker": "o", "markersize": 4},
        "filled": {"marker": "o", "markersize": 7},
        "ring": {"marker": "o", "markersize": 11, "markerfacecolor": "none", "markeredgewidth": 2},
    }[curve.marker]
    # Not clipped, so that a dot on the edge of the plot is whole.
    return Line2D(
        xs, ys, color=colour, label=curve.label, gid=gid, clip_on=False, **(dots if len(curve.points) <= MAX_DOTS else {})
    )


def _curve_id(number: int) -> str:
    return f"curve-{number}"


def _svg(figure: Figure) -> ElementTree.Element:
    """The figure as an `svg` element for HTML: without namespaces, in the page's colours, and without a fixed size."""
    file = io.BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    svg = ElementTree.fromstring(file.getvalue())
    for element in svg.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.attrib = {name.rpartition("}")[2]: value for name, value in element.attrib.items()}
        for colour, page_colour in PAGE_COLOURS.items():
            if "style" in element.attrib:
                element.attrib["style"] = element.attrib["style"].replace(colour, page_colour)
    for name in ("width", "height", "version"):
        svg.attrib.pop(name, None)
    for child in [child for child in svg if child.tag == "metadata" or child.find("style") is not None]:
        svg.remove(child)  # the style sheet would apply to the whole page; `maskllm.reporting.page.STYLE` has its rule instead
    return svg


def _ends(curve: Series, unit: str) -> str:
    """The first and the last value of a curve: "5.22 → 3.66"."""
    first, last = (_value_text(curve.points[index][1], unit) for index in (0, -1))
    return f"{first} → {last}" if len(curve.points) > 1 else first


def _value_text(value: float, unit: str) -> str:
    """Three significant digits: 4.30, 108, 0.0406%."""
    decimals = 0 if value == 0 else max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{decimals}f}{unit}"
