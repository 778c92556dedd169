"""The page `report.html`: one file without scripts or external references. Its colours follow the system's light or dark theme."""

from __future__ import annotations

from html import escape
from typing import Any

from maskllm.quickstart.charts import Series, line_chart
from maskllm.quickstart.formatting import (
    RESULT_COLUMNS,
    UNKNOWN,
    format_bytes,
    format_perplexity,
    format_ratio,
    format_seconds,
    format_share,
    result_cells,
)
from maskllm.quickstart.report import FINAL, LEARNED

STYLE = """
:root { color-scheme: light dark; --page: #f7f7f5; --card: #fff; --text: #1a1a19; --muted: #5f5e5a; --rule: #dddcd6;
  --curve-0: #2a6fc9; --curve-1: #c2410c; --curve-2: #0f7a5a; }
@media (prefers-color-scheme: dark) { :root { --page: #151514; --card: #1f1f1e; --text: #f0efec; --muted: #a9a8a2; --rule: #3a3a37;
  --curve-0: #6aa5f0; --curve-1: #f0925a; --curve-2: #4cc79b; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 64rem; background: var(--page); color: var(--text);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: .5rem 0; } h2 { font-size: 1.15rem; margin: 2rem 0 .75rem; }
h3 { font-size: 1rem; font-weight: 600; margin: 1.25rem 0 .5rem; }
.texts { grid-template-columns: repeat(auto-fit, minmax(min(100%, 13rem), 1fr)); }
.texts p { margin: .25rem 0 0; white-space: pre-wrap; } .card.chosen { border-color: var(--curve-0); }
.muted { color: var(--muted); font-size: .875rem; } p.muted { margin: .5rem 0; }
.grid { display: grid; gap: .75rem; } .tiles { grid-template-columns: repeat(auto-fit, minmax(max(8.5rem, 22%), 1fr)); }
.charts { grid-template-columns: repeat(auto-fit, minmax(min(100%, 23rem), 1fr)); }
.card, figure { background: var(--card); border: 1px solid var(--rule); border-radius: .5rem; padding: .75rem; margin: 0; }
.tiles b { display: block; font-size: 1.2rem; line-height: 1.4; font-weight: 600; white-space: nowrap; } .tiles span { display: block; }
.scroll { overflow-x: auto; padding: 0; } table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { overflow-wrap: normal; padding: .45rem .75rem; text-align: right; white-space: nowrap; border-top: 1px solid var(--rule); }
thead td { border-top: 0; } thead th { border-top: 0; color: var(--muted); font-size: .875rem; font-weight: 500; }
th:first-child { text-align: left; font-weight: 500; position: sticky; left: 0; background: var(--card); }
.best th, .best td { font-weight: 700; } .wide { width: 45%; } .bar { height: .6rem; background: var(--curve-0); }
@media (max-width: 36rem) { .wide { display: none; } th, td { padding: .4rem .5rem; font-size: .9rem; } th { white-space: normal; } }
figure { display: flex; flex-direction: column; justify-content: space-between; }
figcaption { margin-bottom: .5rem; } figcaption .muted { white-space: nowrap; }
figure svg { display: block; width: 100%; height: auto; stroke-linejoin: round; }
figure text { font-family: inherit !important; } figure use { pointer-events: all; }
dl { display: grid; grid-template-columns: minmax(7rem, max-content) 1fr; gap: .25rem 1rem; margin: 0; }
dt { color: var(--muted); } dd { margin: 0; }
.pairs { grid-template-columns: repeat(auto-fit, minmax(min(100%, 19rem), 1fr)); } .pairs h2 { margin: 0 0 .5rem; }
"""


def html_page(report: dict[str, Any]) -> str:
    """The page that shows what `maskllm.quickstart.report.report_dict` returns. Every text in it is escaped."""
    title = f"{report['pattern']} masks of {report['model']}"
    evaluation = report["evaluation"]
    data = f"Perplexity on {evaluation['data']}, {evaluation['windows']} windows of {evaluation['seq_length']} tokens."
    best = report["best_one_shot"] or UNKNOWN
    sections = [
        _texts(report),
        _charts("Mask learning", _mask_charts(report["metrics"])),
        _charts("Weights trained too", _weights_charts(report["weights_metrics"])),
    ]
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<h1>{escape(title)}</h1>
<p class="muted">{escape(data)}</p>
<div class="grid tiles">{"".join(_tiles(report))}</div>
<h2>Models</h2>
{_models(report)}
<p class="muted">Gap closed: how much of the perplexity gap between the best one-shot mask ({escape(best)}) and the dense model
a model closes. Zeros: the share of zeros in the blocks' linear layers. Time and peak memory: for making the model, all processes
together. The final model starts from the learned masks and includes their time. Its weights were trained too; all others have the dense
model's weights.</p>
{"".join(sections)}
<h2>Steps</h2>
{_steps(report["steps"])}
<h2>How it was measured</h2>
<div class="grid pairs">{_pairs("Evaluation", evaluation)}{_pairs("Settings", report["settings"])}
{_pairs("Machine", report["machine"])}</div>
</main>
</body>
</html>
"""


def _tiles(report: dict[str, Any]) -> list[str]:
    """The headline numbers: what the trained models achieved, and what they cost."""
    results = {result["name"]: result for result in report["results"]}
    dense, best = results.get("dense"), results.get(report["best_one_shot"])
    tiles = []
    for name, words in ((FINAL, "final model"), (LEARNED, "learned masks")):
        if name not in results:
            continue
        result = results[name]
        beside = f"dense {format_perplexity(dense['perplexity'])}" if dense else ""
        tiles.append((f"Perplexity, {words}", format_perplexity(result["perplexity"]), beside))
        if best:
            ratio = f"{format_ratio(result['times_best_one_shot'])} \N{MULTIPLICATION SIGN}"
            tiles.append(("Times the best one-shot mask", ratio, f"{best['name']} {format_perplexity(best['perplexity'])}"))
            tiles.append(("Gap to dense closed", format_share(result["gap_closed"]), f"from {best['name']} to dense"))
        tiles.append((f"Zeros, {words}", format_share(result["zeros"]), "of the blocks' linear layers"))
    tiles.append(("Time", format_seconds(report["seconds"]), "all steps together"))
    tiles.append(("Peak memory", format_bytes(report["peak_memory_bytes"]), "all processes together"))
    return [
        f'<div class="card"><span class="muted">{escape(name)}</span><b>{escape(value)}</b><span class="muted">{escape(note)}</span></div>'
        for name, value, note in tiles
    ]


def _models(report: dict[str, Any]) -> str:
    trained = [result["name"] for result in report["results"] if result["name"] in (LEARNED, FINAL)]
    body = "".join(
        f'<tr{" class=best" if row[0] in trained[-1:] else ""}><th scope="row">{escape(row[0])}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in map(result_cells, report["results"])
    )
    return _table("Models", RESULT_COLUMNS, body)


def _steps(steps: list[dict[str, Any]]) -> str:
    longest = max((step["seconds"] for step in steps), default=0.0) or 1.0
    body = "".join(
        f'<tr><th scope="row">{escape(step["name"])}</th><td>{format_seconds(step["seconds"])}</td>'
        f"<td>{format_bytes(step['peak_memory_bytes'])}</td>"
        f'<td class="wide"><div class="bar" style="width: {100 * step["seconds"] / longest:.1f}%"></div></td></tr>'
        for step in steps
    )
    return _table("Steps", ("step", "time", "peak memory", ""), body)


def _table(name: str, header: tuple[str, ...], body: str) -> str:
    # A narrow screen scrolls the table sideways; `tabindex` lets the keyboard scroll it too.
    head = "".join(f'<th scope="col">{escape(cell)}</th>' if cell else "<td class=wide></td>" for cell in header)
    return (
        f'<div class="card scroll" role="region" tabindex="0" aria-label="{escape(name)}">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _texts(report: dict[str, Any]) -> str:
    """What the models add to each prompt, side by side; an empty string without prompts."""
    perplexities = {result["name"]: result["perplexity"] for result in report["results"]}

    def card(name: str, text: str) -> str:
        chosen = " chosen" if name == FINAL else ""
        perplexity = f" \N{MIDDLE DOT} perplexity {format_perplexity(perplexities[name])}" if name in perplexities else ""
        return (
            f'<div class="card{chosen}"><b>{escape(name)}</b><span class="muted">{perplexity}</span>'
            f"<p>{escape(text.strip() or UNKNOWN)}</p></div>"
        )

    prompts = "".join(
        f"<h3>{escape(entry['prompt'])} \N{HORIZONTAL ELLIPSIS}</h3>\n"
        f'<div class="grid texts">{"".join(card(*text) for text in entry["texts"].items())}</div>\n'
        for entry in report["continuations"]
    )
    if not prompts:
        return ""
    return (
        "<h2>Read the difference</h2>\n"
        '<p class="muted">Each model continues the same prompt. Every token is the one that it finds most probable.</p>\n' + prompts
    )


def _charts(heading: str, charts: list[str]) -> str:
    """A section of charts; an empty string if all of them are empty."""
    found = "".join(charts)
    return f'<h2>{heading}</h2>\n<div class="grid charts">{found}</div>\n' if found else ""


def _series(metrics: list[dict[str, Any]], key: str, label: str, kind: str = "train", marker: str = "small") -> Series:
    """The values of `key` in the lines of one kind."""
    lines = [line for line in metrics if line["kind"] == kind and line.get(key) is not None]
    return Series(label, [(line["iteration"], line[key]) for line in lines], marker)


def _loss(metrics: list[dict[str, Any]], key: str) -> list[Series]:
    """A term of the loss in training and in validation."""
    drawn = any("temperature" in line for line in metrics)  # else the masks are fixed
    return [
        _series(metrics, key, "training, sampled masks" if drawn else "training"),
        _series(metrics, f"{key}_sampled", "validation, sampled masks", "validation", "filled"),
        _series(metrics, f"{key}_winner", "validation, arg-max masks" if drawn else "validation", "validation", "ring"),
    ]


def _mask_charts(metrics: list[dict[str, Any]]) -> list[str]:
    """The charts of mask learning; a chart without points is an empty string."""
    shares = (
        ("mean_max_probability", "Mean maximum probability", "mean over blocks"),
        ("changed_since_prior", "Blocks that left the prior", "share of blocks"),
        ("changed_since_last", "Blocks changed since the last log", "share of blocks"),
    )
    return [
        line_chart("Loss", _loss(metrics, "loss"), x_label="iteration", y_label="nats per token"),
        *(
            line_chart(title, [_series(metrics, key, title)], x_label="iteration", y_label=y, percent=True)
            for key, title, y in shares
        ),
        *(
            line_chart(title, [_series(metrics, key, key)], x_label="iteration", y_label=key)
            for key, title in (("temperature", "Gumbel temperature"), ("scale", "Scale of the logits"))
        ),
    ]


def _weights_charts(metrics: list[dict[str, Any]]) -> list[str]:
    """The charts of the training of the weights, as `_mask_charts`. Each title is on the page once."""
    left = "Blocks that left the prior, in both trainings"
    return [
        line_chart("Divergence from the dense model", _loss(metrics, "kl"), x_label="iteration", y_label="nats per token"),
        line_chart("Cross-entropy with the text", _loss(metrics, "loss"), x_label="iteration", y_label="nats per token"),
        line_chart(
            left, [_series(metrics, "changed_since_prior", left)], x_label="iteration", y_label="share of blocks", percent=True
        ),
    ]


def _pairs(heading: str, values: dict[str, Any]) -> str:
    pairs = "".join(f"<dt>{escape(_label(key))}</dt><dd>{escape(_text(key, value))}</dd>" for key, value in values.items())
    return f'<section class="card"><h2>{escape(heading)}</h2><dl>{pairs}</dl></section>'


def _label(key: str) -> str:
    return key.removesuffix("_bytes").replace("_", " ")


def _text(key: str, value: Any) -> str:
    if value is None or value == []:
        return UNKNOWN
    if key.endswith("_bytes"):
        return format_bytes(value)
    if isinstance(value, float):
        return f"{value:.6g}"
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
