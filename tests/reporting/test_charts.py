"""The charts: the data are read back from the drawing, by the chart's own axes."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest

from maskllm.reporting.charts import Series, line_chart
from tests.reporting.html_reader import Page


class Drawing:
    """A chart read back."""

    def __init__(self, html: str) -> None:
        self.figure = ElementTree.fromstring(html)
        self.svg = self.figure.find("svg")
        self.caption = "".join(self.figure.find("figcaption").itertext())
        self.texts = [text.text for text in self.svg.iter("text")]

    def curves(self) -> list[np.ndarray]:
        """For each curve, the data (x, y) of its dots, found from their places by the labels of the axes."""
        ticks = [text for text in self.svg.iter("text") if re.fullmatch(r"-?[\d.]+%?", text.text)]
        numbers = [(tick, float(tick.text.rstrip("%"))) for tick in ticks]
        x_axis = [(float(text.get("x")), value) for text, value in numbers if "anchor: middle" in text.get("style")]
        values = [value for text, value in numbers if "anchor: end" in text.get("style")]
        grid = [float(path.get("d").split()[2]) for path in self.svg.iter("path") if "var(--rule)" in path.get("style", "")]
        assert len(values) == len(grid) >= 2 and len(x_axis) >= 2
        to_x, to_y = np.polyfit(*zip(*x_axis, strict=True), 1), np.polyfit(grid, values, 1)
        found = []
        for group in self.svg.iter("g"):
            dots = [use for use in group.findall("use") if use.find("title") is not None]
            if dots:
                places = np.array([(float(use.get("x")), float(use.get("y"))) for use in dots])
                found.append(np.stack([np.polyval(to_x, places[:, 0]), np.polyval(to_y, places[:, 1])], axis=1))
        return found

    def told(self) -> list[str]:
        """What pointing at a dot shows."""
        return [title.text for title in self.svg.iter("title")]


def test_the_drawing_holds_the_data():
    curves = [
        Series("training", [(5, 5.22), (10, 4.31), (20, 3.9), (30, 3.66)]),
        Series("validation, sampled", [(15, 4.01), (30, 3.75)], "filled"),
        Series("validation, arg-max", [(30, 3.7)], "ring"),
    ]
    chart = Drawing(line_chart("Loss", curves, x_label="iteration", y_label="nats per token"))
    found = chart.curves()
    assert len(found) == 3
    for points, curve in zip(found, curves, strict=True):
        assert points == pytest.approx(np.array(curve.points), abs=1e-3)
    assert chart.caption == "Loss 5.22 → 3.66"
    assert {"iteration", "nats per token", *(curve.label for curve in curves)} <= set(chart.texts)
    assert chart.svg.get("role") == "img"
    assert chart.svg.get("aria-label") == (
        "Loss. nats per token over iteration. training: 5.22 → 3.66; validation, sampled: 4.01 → 3.75; validation, arg-max: 3.70"
    )
    assert chart.told()[:2] == ["training, iteration 5: 5.22", "training, iteration 10: 4.31"]
    assert chart.told()[-1] == "validation, arg-max, iteration 30: 3.70"
    # The legend and its curve look alike, and the three curves do not.
    colours = [re.search(r"stroke: (var[^;]+)", use.get("style"))[1] for use in chart.svg.iter("use")]
    assert len(set(colours)) == 3 and colours[-3:] == list(dict.fromkeys(colours))


def test_a_single_curve_has_no_legend_and_shares_are_percentages():
    chart = Drawing(line_chart("Left", [Series("the curve", [(1, 0.002), (2, 0.012)])], x_label="step", y_label="y", percent=True))
    assert "the curve" not in chart.texts
    assert chart.caption == "Left 0.200% → 1.20%"
    assert chart.told() == ["the curve, step 1: 0.200%", "the curve, step 2: 1.20%"]
    assert [text for text in chart.texts if text.endswith("%")]
    assert chart.curves()[0] == pytest.approx(np.array([(1, 0.2), (2, 1.2)]), abs=1e-3)


@pytest.mark.parametrize("points", [[(7, 0.0)], [(1, 2.5), (2, 2.5)], [(1, -3.0), (2, -3.0)]])
def test_a_single_value_has_an_axis(points):
    chart = Drawing(line_chart("t", [Series("s", points)], x_label="x", y_label="y"))
    assert chart.curves()[0] == pytest.approx(np.array(points), abs=1e-3)


def test_a_long_curve_is_a_line_without_dots():
    chart = Drawing(line_chart("t", [Series("s", [(i, i * i) for i in range(2000)])], x_label="x", y_label="y"))
    assert not list(chart.svg.iter("use"))
    (line,) = [path.get("d") for path in chart.svg.iter("path") if "var(--curve-0)" in path.get("style", "")]
    places = np.array(re.findall(r"[ML] ([\d.]+) ([\d.]+)", line), float)
    # Square, so at half of the way to the right it is at a quarter of the height.
    right, height = (places[-1] - places[0]) / [1, -1]
    assert np.interp(places[0, 0] + right / 2, *places.T) == pytest.approx(places[0, 1] - height / 4, abs=0.5)


def test_without_points_there_is_no_chart():
    assert line_chart("t", [Series("s", [])], x_label="x", y_label="y") == ""
    chart = Drawing(line_chart("t", [Series("empty", []), Series("s", [(1, 2), (2, 3)])], x_label="x", y_label="y"))
    assert len(chart.curves()) == 1 and "empty" not in chart.texts


def test_texts_are_escaped_and_no_formulas():
    hostile = '<script>alert("x")</script>&amp;\' $\\frac{$ #000001'
    html = line_chart(hostile, [Series(hostile, [(0, 1), (1, 2)]), Series("b", [(1, 1)])], x_label=hostile, y_label=f"{hostile} %")
    assert "<script" not in html
    page = Page(html)
    assert page.texts_in("b") == [hostile]
    assert page.texts_in("text").count(hostile) == 2 and f"{hostile} %" in page.texts_in("text")
    assert f"{hostile}, {hostile} 1: 2.00" in page.texts_in("title")


def test_settings_of_matplotlib_neither_change_a_chart_nor_are_changed():
    def draw() -> str:
        return line_chart("t", [Series("s", [(1, 2), (2, 3)])], x_label="x", y_label="y")

    chart = draw()
    with matplotlib.rc_context({"lines.linestyle": "--", "xtick.labelsize": 30, "svg.fonttype": "path"}):
        before = dict(matplotlib.rcParams)
        assert draw() == chart
        assert dict(matplotlib.rcParams) == before
