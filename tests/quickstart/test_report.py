"""The report: the formulas against numbers worked out by hand, the table, the JSON and the page read back."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

from maskllm.quickstart.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Series, line_chart, nice_ticks
from maskllm.quickstart.formatting import format_bytes, format_perplexity, format_ratio, format_seconds, format_share
from maskllm.quickstart.report import (
    ModelResult,
    Report,
    best_one_shot,
    gap_closed,
    report_dict,
    table,
    times_best_one_shot,
    write_report,
)

GIB = 2**30
VOID = {"meta", "link", "br", "img", "hr", "input"}
HOSTILE = '<script>alert("x")</script>&amp;\''

DENSE = ModelResult("dense", 20.0, 0.0, None, None, one_shot=False)
MAGNITUDE = ModelResult("magnitude", 2020.0, 0.5, 3.2, GIB, one_shot=True)
WANDA = ModelResult("wanda", 120.0, 0.5, 61.0, 2 * GIB, one_shot=True)
LEARNED = ModelResult("learned", 60.0, 0.5, 400.0, 4 * GIB, one_shot=False)
RESULTS = [DENSE, MAGNITUDE, WANDA, LEARNED]


@pytest.fixture
def report() -> Report:
    def train(iteration: int, loss: float) -> dict:
        values = {"loss": loss, "temperature": 4.0 / iteration, "scale": 100.0 * iteration, "mean_max_probability": 0.75}
        return {
            "kind": "train",
            "iteration": iteration,
            **values,
            "changed_since_last": 0.01,
            "changed_since_prior": 0.001 * iteration,
        }

    return Report(
        model="SmolLM2",
        pattern="2:4",
        evaluation={"data": "held-out.jsonl", "windows": 16, "seq_length": 512, "dtype": "fp32"},
        machine={"cpu": "a processor", "cores": 2, "memory_bytes": 24 * GIB, "torch": "2.13.0"},
        settings={"train_iters": 3, "lr": 5e-4, "train_options": ["--hard"], "prior": None},
        results=RESULTS,
        steps=[
            {"name": "convert", "seconds": 30.5, "peak_memory_bytes": GIB},
            {"name": "train", "seconds": 400.0, "peak_memory_bytes": 4 * GIB},
        ],
        metrics=[
            *(train(iteration, loss) for iteration, loss in ((1, 5.0), (2, 4.5), (3, 4.0))),
            {"kind": "validation", "iteration": 3, "loss_sampled": 4.25, "loss_winner": 4.125},
        ],
    )


class Page(HTMLParser):
    """Reads a page strictly: every element is closed, in order. Keeps elements, and text by the element it is directly in."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> at {self.getpos()} with {self.open} open"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append((self.open[-1] if self.open else "", data.strip()))

    def texts_in(self, tag: str) -> list[str]:
        return [text for parent, text in self.texts if parent == tag]


def written_page(report: Report, directory) -> tuple[str, Page]:
    write_report(report, directory)
    text = (directory / "report.html").read_text(encoding="utf-8")
    return text, Page(text)


def test_gap_closed_and_ratio_by_hand():
    assert best_one_shot(RESULTS) is WANDA
    # From 120 to 20 are 100; 60 of them are closed. Magnitude is 1900 further away.
    assert gap_closed(LEARNED, RESULTS) == pytest.approx(0.6)
    assert gap_closed(WANDA, RESULTS) == 0.0
    assert gap_closed(MAGNITUDE, RESULTS) == pytest.approx(-19.0)
    assert gap_closed(replace(LEARNED, perplexity=20.0), RESULTS) == 1.0
    assert times_best_one_shot(LEARNED, RESULTS) == pytest.approx(0.5)
    assert times_best_one_shot(WANDA, RESULTS) == 1.0
    assert times_best_one_shot(DENSE, RESULTS) == pytest.approx(1 / 6)


def test_a_mask_that_is_not_one_shot_is_never_the_best_one_shot():
    assert best_one_shot([LEARNED, MAGNITUDE]) is MAGNITUDE


@pytest.mark.parametrize(
    "results",
    [
        [DENSE, LEARNED],
        [WANDA, LEARNED],
        [DENSE, replace(WANDA, perplexity=20.0), LEARNED],
        [DENSE, replace(WANDA, perplexity=math.inf), LEARNED],
    ],
    ids=["no one-shot mask", "no dense model", "no gap", "infinite gap"],
)
def test_no_gap_no_share(results):
    assert gap_closed(LEARNED, results) is None


def test_the_dense_model_closes_no_gap():
    assert gap_closed(DENSE, RESULTS) is None
    assert times_best_one_shot(DENSE, [DENSE, LEARNED]) is None


def test_table_is_aligned_and_complete(report):
    header, rule, *rows = table(report).splitlines()
    assert {len(line) for line in (header, rule, *rows)} == {len(header)}
    columns = [slice(start, start + len(dashes)) for start, dashes in spans(rule)]
    assert [header[column].strip() for column in columns] == [
        "model", "perplexity", "x best one-shot", "gap closed", "zeros", "time", "peak memory",
    ]  # fmt: skip
    cells = [[row[column] for column in columns] for row in rows]
    assert [cell.strip() for cell in cells[0]] == ["dense", "20.00", "0.167", "-", "0.0%", "-", "-"]
    assert [cell.strip() for cell in cells[1]] == ["magnitude", "2,020", "16.8", "-1,900%", "50.0%", "3.20 s", "1.00 GiB"]
    assert [cell.strip() for cell in cells[3]] == ["learned", "60.00", "0.500", "60.0%", "50.0%", "6 min 40 s", "4.00 GiB"]
    for row in cells:
        assert row[0] == row[0].lstrip() and all(cell == cell.rstrip() for cell in row[1:])


def spans(rule: str) -> list[tuple[int, str]]:
    """Start and text of each run of dashes."""
    starts = [i for i, c in enumerate(rule) if c == "-" and (i == 0 or rule[i - 1] == " ")]
    return [(start, rule[start:].split(" ")[0]) for start in starts]


@pytest.mark.parametrize(
    "told, wanted",
    [
        (format_perplexity(99.996), "100.0"),
        (format_perplexity(math.inf), "inf"),
        (format_ratio(0.9999), "1.00"),
        (format_share(0.00049), "0.0%"),
        (format_seconds(0.4), "0.40 s"),
        (format_seconds(59.97), "1 min 00 s"),
        (format_seconds(3599.7), "1 h 00 min"),
        (format_seconds(7380), "2 h 03 min"),
        (format_bytes(231 * 2**20), "231 MiB"),
        (format_seconds(None), "-"),
    ],
)
def test_numbers_are_rounded_before_their_unit_is_chosen(told, wanted):
    assert told == wanted


def test_json_holds_every_field_and_what_follows(report, tmp_path):
    write_report(report, tmp_path)
    found = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert found == report_dict(report)
    derived = {name: found.pop(name) for name in ("best_one_shot", "seconds", "peak_memory_bytes")}
    assert derived == {"best_one_shot": "wanda", "seconds": 430.5, "peak_memory_bytes": 4 * GIB}
    assert [result.pop("gap_closed") for result in found["results"]] == [None, -19.0, 0.0, 0.6]
    assert found["results"][3].pop("times_best_one_shot") == 0.5
    for result in found["results"]:
        result.pop("times_best_one_shot", None)
    assert Report(**(found | {"results": [ModelResult(**result) for result in found["results"]]})) == report


def test_numbers_json_has_not_are_null(report, tmp_path):
    report.metrics[1]["loss"] = math.nan
    results = [DENSE, WANDA, replace(LEARNED, perplexity=math.inf)]
    _, page = written_page(replace(report, results=results), tmp_path)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    found = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"), parse_constant=refuse)
    assert found["results"][2]["perplexity"] is None and found["metrics"][1]["loss"] is None
    assert "inf" in page.texts_in("td")
    assert "inf" in table(replace(report, results=results)).splitlines()[-1].split()
    losses = [text for text in page.texts_in("title") if text.startswith("training")]
    assert losses == ["training, sampled masks, iteration 1: 5.00", "training, sampled masks, iteration 3: 4.00"]


def test_page_is_well_formed_and_needs_nothing_else(report, tmp_path):
    text, page = written_page(report, tmp_path)
    assert "http:" not in text and "https:" not in text and "url(" not in text and "@import" not in text
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "link", "img", "iframe", "object"}
    assert not any(name in attributes for _, attributes in page.elements for name in ("src", "href", "xlink:href"))
    assert "prefers-color-scheme: dark" in text
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in page.elements
    assert ("html", {"lang": "en"}) in page.elements
    assert page.texts_in("h1") == ["2:4 masks of SmolLM2"]
    # Headline, table, settings and machine in the forms a person reads.
    assert {"60.00", "60.0%", "7 min 10 s", "4.00 GiB"} <= set(page.texts_in("b"))
    assert {"magnitude", "wanda", "learned", "convert", "train"} <= set(page.texts_in("th"))
    assert {"--hard", "0.0005", "24.00 GiB", "a processor"} <= set(page.texts_in("dd"))


def test_page_has_the_curves_with_their_points(report, tmp_path):
    _, page = written_page(report, tmp_path)
    captions = page.texts_in("b")
    assert {"Loss", "Gumbel temperature", "Scale of the logits", "Mean maximum probability", "Blocks that left the prior"} <= set(
        captions
    )
    told = page.texts_in("title")
    assert [text for text in told if text.startswith("training")] == [
        f"training, sampled masks, iteration {iteration}: {loss}" for iteration, loss in ((1, "5.00"), (2, "4.50"), (3, "4.00"))
    ]
    assert "validation, sampled masks, iteration 3: 4.25" in told and "validation, arg-max masks, iteration 3: 4.12" in told
    assert "temperature, iteration 2: 2.00" in told and "scale, iteration 3: 300" in told
    assert "Mean maximum probability, iteration 1: 75.0%" in told
    assert "Blocks that left the prior, iteration 3: 0.300%" in told
    # Without sight of the drawing: a role and a name that sums it up.
    names = [attributes["aria-label"] for tag, attributes in page.elements if tag == "svg" and attributes.get("role") == "img"]
    assert "Loss. nats per token over iteration. training, sampled masks: 5.00 → 4.00" in names
    assert {"training, sampled masks", "validation, sampled masks", "validation, arg-max masks"} <= set(page.texts_in("span"))


def test_a_curve_without_values_and_a_run_without_metrics_are_left_out(report, tmp_path):
    for line in report.metrics:
        line.pop("changed_since_prior", None)
    _, page = written_page(report, tmp_path)
    assert "Loss" in page.texts_in("b") and "Blocks that left the prior" not in page.texts_in("b")
    _, page = written_page(replace(report, metrics=[], steps=[], results=[DENSE]), tmp_path)
    assert "Mask learning" not in page.texts_in("h2") and "Loss" not in page.texts_in("b")


def test_every_text_is_escaped(report, tmp_path):
    hostile = replace(
        report,
        model=HOSTILE,
        pattern=HOSTILE,
        evaluation={"data": HOSTILE, "windows": HOSTILE, "seq_length": HOSTILE, HOSTILE: HOSTILE},
        machine={HOSTILE: HOSTILE},
        settings={HOSTILE: [HOSTILE]},
        results=[DENSE, replace(WANDA, name=HOSTILE), LEARNED],
        steps=[{"name": HOSTILE, "seconds": 1.0, "peak_memory_bytes": 1}],
    )
    text, page = written_page(hostile, tmp_path)
    assert "<script" not in text
    assert f"{HOSTILE} masks of {HOSTILE}" in page.texts_in("h1")
    assert HOSTILE in page.texts_in("th") and HOSTILE in page.texts_in("dt") and HOSTILE in page.texts_in("dd")
    chart = line_chart(HOSTILE, [Series(HOSTILE, [(0, 1)]), Series(HOSTILE, [(1, 1)])], x_label=HOSTILE, y_label=HOSTILE)
    assert "<script" not in chart
    assert Page(chart).texts_in("b") == [HOSTILE]


def test_line_chart_places_points_to_scale():
    # Ticks of 0..10 end at the data's own ends, so the corners of the plot are the corners of the data.
    chart = Page(line_chart("t", [Series("s", [(10, 0), (20, 10), (30, 5)])], x_label="x", y_label="y"))
    (points,) = [attributes["points"] for tag, attributes in chart.elements if tag == "polyline"]
    found = [tuple(map(float, point.split(","))) for point in points.split()]
    middle_x, middle_y = (LEFT + WIDTH - RIGHT) / 2, (TOP + HEIGHT - BOTTOM) / 2
    wanted = [(LEFT, HEIGHT - BOTTOM), (middle_x, TOP), (WIDTH - RIGHT, middle_y)]
    assert np.asarray(found) == pytest.approx(np.asarray(wanted), abs=0.06)
    texts = chart.texts_in("text")
    assert texts[0] == "y" and texts[-1] == "x" and {"0", "5", "10", "15", "20", "30"} <= set(texts)


@pytest.mark.parametrize("points", [[(7, 0.0)], [(1, 2.5), (2, 2.5)], [(1, -3.0), (2, -3.0)]])
def test_line_chart_of_a_single_value(points):
    chart = Page(line_chart("t", [Series("s", points)], x_label="x", y_label="y"))
    for tag, attributes in chart.elements:
        if tag == "circle":
            assert LEFT <= float(attributes["cx"]) <= WIDTH - RIGHT and TOP <= float(attributes["cy"]) <= HEIGHT - BOTTOM


def test_line_chart_of_a_long_run_is_a_line_without_dots():
    chart = Page(line_chart("t", [Series("s", [(i, i * i) for i in range(2000)])], x_label="x", y_label="y"))
    (polyline,) = [attributes for tag, attributes in chart.elements if tag == "polyline"]
    assert len(polyline["points"].split()) == 2000
    assert not any(tag == "circle" for tag, _ in chart.elements)


@pytest.mark.parametrize(
    "low, high, wanted",
    [(0, 1, [0, 0.5, 1]), (0, 0.3, [0, 0.1, 0.2, 0.3]), (3.66, 5.22, [3.5, 4, 4.5, 5, 5.5]), (-7, 12, [-10, -5, 0, 5, 10, 15])],
)
def test_nice_ticks(low, high, wanted):
    assert nice_ticks(low, high) == pytest.approx(wanted)
