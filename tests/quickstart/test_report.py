"""The report's formulas against numbers worked out by hand, its table, and `report.json` read back."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from maskllm.quickstart.page import write_report
from maskllm.quickstart.report import (
    ModelResult,
    Report,
    best_one_shot,
    gap_closed,
    report_dict,
    speed_table,
    table,
    times_best_one_shot,
)

GIB = 2**30
DENSE = ModelResult("dense", 20.0, 0.0, None, None, one_shot=False)
MAGNITUDE = ModelResult("magnitude", 2020.0, 0.5, 3.2, GIB, one_shot=True)
WANDA = ModelResult("wanda", 120.0, 0.5, 61.0, 2 * GIB, one_shot=True)
LEARNED = ModelResult("learned", 60.0, 0.5, 400.0, 4 * GIB, one_shot=False)
RESULTS = [DENSE, MAGNITUDE, WANDA, LEARNED]


def test_gap_closed_and_ratio_by_hand():
    assert best_one_shot(RESULTS) is WANDA
    # The gap from 120 to 20 is 100, and the learned mask closes 60 of it. Magnitude is 1900 worse than Wanda.
    assert gap_closed(LEARNED, RESULTS) == pytest.approx(0.6)
    assert gap_closed(WANDA, RESULTS) == 0.0
    assert gap_closed(MAGNITUDE, RESULTS) == pytest.approx(-19.0)
    assert gap_closed(replace(LEARNED, perplexity=20.0), RESULTS) == 1.0
    assert times_best_one_shot(LEARNED, RESULTS) == pytest.approx(0.5)
    assert times_best_one_shot(WANDA, RESULTS) == 1.0
    assert times_best_one_shot(DENSE, RESULTS) == pytest.approx(1 / 6)


def test_a_learned_mask_is_never_the_best_one_shot_mask():
    assert best_one_shot([LEARNED, MAGNITUDE]) is MAGNITUDE


def test_the_table_of_speeds(report):
    assert speed_table(report).splitlines() == [
        "model       weight files  weights in memory  first token  tokens a second",
        "----------  ------------  -----------------  -----------  ---------------",
        "compressed      2.00 GiB           1.00 GiB       0.50 s             30.0",
        "dense           5.00 GiB           2.50 GiB       0.20 s             10.2",
    ]


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
def test_without_a_gap_there_is_no_share_of_it(results):
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
    assert [cell.strip() for cell in cells[4]] == ["final", "30.00", "0.250", "90.0%", "50.0%", "11 min 40 s", "5.00 GiB"]
    for row in cells:
        assert row[0] == row[0].lstrip() and all(cell == cell.rstrip() for cell in row[1:])


def spans(rule: str) -> list[tuple[int, str]]:
    """Start and text of each run of dashes."""
    starts = [i for i, c in enumerate(rule) if c == "-" and (i == 0 or rule[i - 1] == " ")]
    return [(start, rule[start:].split(" ")[0]) for start in starts]


def test_json_holds_every_field_and_the_computed_values(report, tmp_path):
    report = replace(report, metrics=report.metrics[-1:], weights_metrics=[])  # one chart, which is quick to draw
    write_report(report, tmp_path)
    found = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert found == report_dict(report)
    computed = {name: found.pop(name) for name in ("best_one_shot", "seconds", "peak_memory_bytes")}
    assert computed == {"best_one_shot": "wanda", "seconds": 800.0, "peak_memory_bytes": 5 * GIB}
    assert [result.pop("gap_closed") for result in found["results"]] == [None, -19.0, 0.0, 0.6, 0.9]
    assert [result.pop("times_best_one_shot") for result in found["results"]] == pytest.approx([1 / 6, 2020 / 120, 1.0, 0.5, 0.25])
    assert Report(**(found | {"results": [ModelResult(**result) for result in found["results"]]})) == report


def test_numbers_that_json_cannot_hold_become_null(report, tmp_path):
    report = replace(report, metrics=[{"kind": "train", "iteration": 1, "loss": math.nan}], weights_metrics=[])
    report.results[-1] = replace(LEARNED, perplexity=math.inf)
    write_report(report, tmp_path)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    found = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"), parse_constant=refuse)
    assert found["results"][-1]["perplexity"] is None and found["metrics"] == [{"kind": "train", "iteration": 1, "loss": None}]
    assert "inf" in table(report).splitlines()[-1].split()
