"""The page `report.html`: one file without scripts or external references. Its colours follow the system's light or dark theme.

The functions return HTML, in which all texts that they were given are escaped. Texts named `html` are HTML already.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from maskllm.reporting.formatting import UNKNOWN, format_bytes, format_seconds

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


def document(title: str, note: str, html: str) -> str:
    """A whole page. `note` is the line below the title."""
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
<p class="muted">{escape(note)}</p>
{html}
</main>
</body>
</html>
"""


def tiles(entries: Iterable[tuple[str, str, str]]) -> str:
    """The headline numbers. An entry is a name, a value and a note."""
    cards = "".join(
        f'<div class="card"><span class="muted">{escape(name)}</span><b>{escape(value)}</b><span class="muted">{escape(note)}</span></div>'
        for name, value, note in entries
    )
    return f'<div class="grid tiles">{cards}</div>'


def rows_table(name: str, header: Sequence[str], rows: Iterable[Sequence[str]], best: str | None) -> str:
    """A table with one line for each of `rows`, whose first cell is its name. The line named `best` is bold."""
    body = "".join(
        f'<tr{" class=best" if row[0] == best else ""}><th scope="row">{escape(row[0])}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    return _table(name, header, body)


def steps_table(steps: Sequence[dict[str, Any]]) -> str:
    """The name, seconds and peak_memory_bytes of each step, and its time as a bar."""
    longest = max((step["seconds"] for step in steps), default=0.0) or 1.0
    body = "".join(
        f'<tr><th scope="row">{escape(step["name"])}</th><td>{format_seconds(step["seconds"])}</td>'
        f"<td>{format_bytes(step['peak_memory_bytes'])}</td>"
        f'<td class="wide"><div class="bar" style="width: {100 * step["seconds"] / longest:.1f}%"></div></td></tr>'
        for step in steps
    )
    return _table("Steps", ("step", "time", "peak memory", ""), body)


def _table(name: str, header: Sequence[str], html: str) -> str:
    # A narrow screen scrolls the table sideways; `tabindex` lets the keyboard scroll it too.
    head = "".join(f'<th scope="col">{escape(cell)}</th>' if cell else "<td class=wide></td>" for cell in header)
    return (
        f'<div class="card scroll" role="region" tabindex="0" aria-label="{escape(name)}">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{html}</tbody></table></div>"
    )


def charts_section(heading: str, html: Sequence[str]) -> str:
    """A section of charts (`maskllm.reporting.charts.line_chart`); an empty string if all of them are empty."""
    found = "".join(html)
    return f'<h2>{heading}</h2>\n<div class="grid charts">{found}</div>\n' if found else ""


def pairs(sections: dict[str, dict[str, Any]]) -> str:
    """Names and JSON values, a card for each of `sections` by its heading. Keys that end in `_bytes` are sizes."""
    return f'<div class="grid pairs">{"".join(_pairs(*section) for section in sections.items())}</div>'


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
