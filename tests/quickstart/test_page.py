"""The page: it is strict HTML in one file, and it shows the report's numbers as text."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

from maskllm.quickstart.page import write_report
from maskllm.quickstart.report import ModelResult, Report
from tests.reporting.html_reader import Page

HOSTILE = '<script>alert("x")</script>&amp;\''
CHARTS = [
    "Loss", "Mean maximum probability", "Blocks that left the prior", "Blocks changed since the last log", "Gumbel temperature",
    "Scale of the logits",
]  # fmt: skip
WEIGHTS_CHARTS = ["Divergence from the dense model", "Cross-entropy with the text", "Blocks that left the prior, in both trainings"]


def written(report: Report, directory: Path) -> tuple[str, Page]:
    write_report(report, directory)
    text = (directory / "report.html").read_text(encoding="utf-8")
    return text, Page(text)


def chart_titles(page: Page) -> list[str]:
    return [label.split(".")[0] for label in page.values("aria-label") if " over iteration" in label]


def test_page_is_one_file_that_shows_the_whole_report(report, tmp_path):
    text, page = written(report, tmp_path)
    # Nothing is loaded from elsewhere, and a reference inside the page has exactly one target.
    assert not {tag for tag, _ in page.elements} & {"script", "link", "img", "iframe", "object", "image"}
    assert "http:" not in text and "https:" not in text and "@import" not in text and "url(" not in text
    assert not page.values("src") and not page.values("xlink:href")
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    assert {"#" + name for name in ids} == set(page.values("href"))
    # The colours follow the reader's theme, in the charts too.
    light, dark = re.findall(r":root \{(.*?)\}", text, re.DOTALL)
    assert (
        set(re.findall(r"var\((--[\w-]+)\)", text))
        == set(re.findall(r"(--[\w-]+):", light))
        == set(re.findall(r"(--[\w-]+):", dark))
    )
    assert "prefers-color-scheme: dark" in text
    colours = [value for style in page.values("style") for value in re.findall(r"(?:fill|stroke): ([^;]+)", style)]
    assert colours and all(colour == "none" or colour.startswith("var(") for colour in colours)

    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in page.elements
    assert ("html", {"lang": "en"}) in page.elements
    assert page.texts_in("h1") == ["2:4 masks of SmolLM2"]
    assert {"30.00", "90.0%", "60.00", "60.0%", "13 min 20 s", "5.00 GiB"} <= set(page.texts_in("b"))
    assert {"magnitude", "wanda", "learned", "final", "convert", "train", "train final"} <= set(page.texts_in("th"))
    assert {"--hard", "0.0005", "24.00 GiB", "a processor"} <= set(page.texts_in("dd"))
    assert [style for tag, attributes in page.elements if tag == "div" for style in [attributes.get("style")] if style] == [
        "width: 25.0%", "width: 100.0%", "width: 75.0%",
    ]  # fmt: skip

    assert chart_titles(page) == CHARTS + WEIGHTS_CHARTS
    assert set(CHARTS + WEIGHTS_CHARTS) <= set(page.texts_in("b"))
    shown = page.texts_in("title")
    assert [text for text in shown if text.startswith("training")] == [
        f"training, sampled masks, iteration {iteration}: {loss}"
        for values in (("5.00", "4.50", "4.00"), ("1.00", "0.500"), ("4.00", "3.50"))
        for iteration, loss in enumerate(values, start=1)
    ]
    assert [text for text in shown if text.startswith("validation, arg-max masks, iteration 2")] == [
        "validation, arg-max masks, iteration 2: 0.500", "validation, arg-max masks, iteration 2: 3.50",
    ]  # fmt: skip
    assert "validation, sampled masks, iteration 3: 4.25" in shown and "validation, arg-max masks, iteration 3: 4.12" in shown
    assert "Blocks that left the prior, iteration 2: 0.200%" in shown


def test_what_was_not_measured_has_no_curve(report, tmp_path):
    lines = [{"kind": "train", "iteration": 5 * number, "loss": loss} for number, loss in enumerate((5.0, math.nan, 4.0), start=1)]
    lines[1]["scale"] = lines[2]["scale"] = None
    # No validation, a loss that is not a number, values that are None, and a temperature of one step only.
    report = replace(report, metrics=[lines[0] | {"temperature": 4.0}, *lines[1:]], weights_metrics=[])
    report.results[-1] = replace(report.results[-1], perplexity=math.inf)
    text, page = written(report, tmp_path)
    assert chart_titles(page) == ["Loss", "Gumbel temperature"]
    assert [text for text in page.texts_in("title") if "iteration" in text] == [
        "training, sampled masks, iteration 5: 5.00", "training, sampled masks, iteration 15: 4.00",
        "temperature, iteration 5: 4.00",
    ]  # fmt: skip
    assert not any("validation" in text for _, text in page.texts)
    assert "inf" in page.texts_in("td")
    assert written(report, tmp_path)[0] == text, "the same report gave another page"


def test_the_texts_of_the_models_stand_side_by_side(report, tmp_path):
    text, page = written(replace(report, metrics=[], weights_metrics=[]), tmp_path)
    assert page.texts_in("h3") == ["The sky is \N{HORIZONTAL ELLIPSIS}", "One \N{HORIZONTAL ELLIPSIS}"]
    # An empty text is a dash. Line breaks inside of a text stay, and the page shows them.
    texts = page.texts_in("p")[-9:-1]  # one paragraph follows
    assert texts == ["blue.", "a a a", "is", "blue,\n\nand high", "two", "-", "of", "two"]
    assert "white-space: pre-wrap" in text
    assert [name for name in page.texts_in("b") if name in ("dense", "wanda", "learned", "final")] == [
        "dense", "wanda", "learned", "final",
    ] * 2  # fmt: skip
    assert page.texts_in("span").count("\N{MIDDLE DOT} perplexity 30.00") == 2


def test_the_compressed_model_stands_beside_the_dense_one(report, tmp_path):
    _, page = written(report, tmp_path)
    assert "Smaller and faster" in page.texts_in("h2")
    cells = page.texts_in("td")
    start = cells.index("1.00 GiB", cells.index("5.00 GiB", cells.index("11 min 40 s")) + 1) - 1
    assert cells[start : start + 8] == ["2.00 GiB", "1.00 GiB", "0.50 s", "30.0", "5.00 GiB", "2.50 GiB", "0.20 s", "10.2"]


def test_fixed_masks_are_not_called_sampled(report, tmp_path):
    lines = [{"kind": "train", "iteration": 1, "loss": 4.0, "kl": 1.0}, {"kind": "validation", "iteration": 1, "loss_winner": 3.0}]
    _, page = written(replace(report, metrics=[], weights_metrics=lines), tmp_path)
    assert chart_titles(page) == WEIGHTS_CHARTS[:2]
    assert [text for text in page.texts_in("title") if "iteration" in text] == [
        "training, iteration 1: 1.00", "training, iteration 1: 4.00", "validation, iteration 1: 3.00",
    ]  # fmt: skip


def test_a_report_without_metrics_steps_or_masks_has_a_page(report, tmp_path):
    empty = {"metrics": [], "weights_metrics": [], "steps": [], "continuations": [], "speed": []}
    _, page = written(replace(report, **empty, results=report.results[:1]), tmp_path)
    assert page.texts_in("h2")[:2] == ["Models", "Steps"] and not chart_titles(page)
    assert page.texts_in("th")[-4:] == ["dense", "step", "time", "peak memory"]


def test_every_text_is_escaped(report, tmp_path):
    hostile = replace(
        report,
        model=HOSTILE,
        pattern=HOSTILE,
        evaluation={"data": HOSTILE, "windows": HOSTILE, "seq_length": HOSTILE, HOSTILE: HOSTILE},
        machine={HOSTILE: HOSTILE},
        settings={HOSTILE: [HOSTILE]},
        results=[report.results[0], ModelResult(HOSTILE, 120.0, 0.5, 61.0, 2**30, one_shot=True), report.results[-1]],
        steps=[{"name": HOSTILE, "seconds": 1.0, "peak_memory_bytes": 1}],
        metrics=[],
        weights_metrics=[],
        continuations=[{"prompt": HOSTILE, "texts": {HOSTILE: HOSTILE, "final": HOSTILE}}],
        speed=[],
    )
    text, page = written(hostile, tmp_path)
    assert "<script" not in text
    assert f"{HOSTILE} masks of {HOSTILE}" in page.texts_in("h1")
    # The model, the pattern and the data; the model's row and the step's; the other sections.
    assert [page.texts_in(tag).count(HOSTILE) for tag in ("th", "dt", "dd")] == [2, 3, 6]
    assert (page.texts_in("p").count(HOSTILE), page.texts_in("b").count(HOSTILE)) == (2, 1)
    assert page.texts_in("h3") == [f"{HOSTILE} \N{HORIZONTAL ELLIPSIS}"]
