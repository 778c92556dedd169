"""The prose of a docstring: its text without examples, doctests, tables, section titles and markup."""

from __future__ import annotations

import inspect
import re

_FENCE = re.compile(r"\s*(```|~~~)")
_DOCTEST = re.compile(r"\s*(>>>|\.\.\. |\.\.\.$|In \[\d+\]:|\$ )")
_RULE = re.compile(r"\s*([-=~^#*+`\"'.:_<>| ])\1{2,}[-=~^+| ]*$")
_TABLE = re.compile(r"\s*[|+]")
_DIRECTIVE = re.compile(r"\s*\.\. ?([\w:-]+)::\s*(.*)$")
_COMMENT = re.compile(r"\s*\.\. ")
_PROSE_DIRECTIVES = {"note", "warning", "seealso", "tip", "important", "caution", "attention", "hint", "admonition"}
_BULLET = re.compile(r"\s*([-*+•]|\(?[0-9a-z]{1,2}[.)])\s+")
_SECTION = re.compile(r"\s*[A-Z][\w ]{2,28}:{1,2}$")
# A parameter: `name: text`, `name (type): text`, `name : type`, `name -- text`. The type is dropped; the text is prose.
_ENTRY = re.compile(
    r"\s*(?P<name>`{0,2}\*{0,2}[\w.]+`{0,2}(?:, ?\*{0,2}[\w.]+)*)(?: ?\((?P<type>.*?)\))?(?P<colon> ?:| --)(?:\s+(?P<text>.*))?$"
)
_MARKUP = (
    (re.compile(r":[\w+-]+(?::[\w+-]+)?:`~?([^`<]+?)(?:\s*<[^`>]*>)?`"), r"\1"),  # :role:`text <target>`
    (re.compile(r"`([^`<]+?)\s*<[^`>]*>`_{0,2}"), r"\1"),  # `text <target>`_
    (re.compile(r"\[([^\]]*)\]\([^)]*\)"), r"\1"),  # [text](target)
    (re.compile(r"\[`~?([^`]*)`\]"), r"\1"),  # [`name`]
    (re.compile(r"`{1,2}([^`]+)`{1,2}_{0,2}"), r"\1"),
    (re.compile(r"\*{1,2}(?=\w)([^*]+?)(?<=[\w.!?)])\*{1,2}"), r"\1"),
    (re.compile(r"\|(\w+)\|"), r"\1"),
)
_HAS_MARKUP = re.compile(r"[`*|\[]")


def prose_blocks(docstring: str) -> list[str]:
    """The prose paragraphs and list items of a docstring in reStructuredText, numpydoc, Google or Markdown style, in order.

    Each becomes one line without inline markup. Code, doctests, literal blocks, tables, formulas, section titles and type
    annotations are dropped, and so is any other block that does not look like sentences.
    """
    blocks = (_plain(block) for block in _blocks(_without_code(inspect.cleandoc(docstring).split("\n"))))
    return [block for block in blocks if _is_prose(block)]


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _without_code(lines: list[str]) -> list[str]:
    """Replace code, tables and titles by empty lines, and keep the text of directives that contain prose."""
    kept: list[str] = []
    fenced = doctest = False
    literal_below: int | None = None  # inside a literal block, which contains all lines indented deeper than this
    for line in lines:
        if literal_below is not None:
            if not line.strip() or _indent(line) > literal_below:
                kept.append("")
                continue
            literal_below = None
        if _FENCE.match(line):
            fenced = not fenced
            kept.append("")
            continue
        doctest = bool(line.strip()) and not fenced and (doctest or bool(_DOCTEST.match(line)))
        if fenced or doctest or _TABLE.match(line):
            kept.append("")
        elif _RULE.match(line):
            if kept and _indent(kept[-1]) == _indent(line):
                kept[-1] = ""  # the title above this underline
            kept.append("")
        elif directive := _DIRECTIVE.match(line):
            name, text = directive[1].lower(), directive[2]
            if name not in _PROSE_DIRECTIVES:
                literal_below = _indent(line)
            kept.append(text if name in _PROSE_DIRECTIVES else "")
        elif _COMMENT.match(line):
            literal_below = _indent(line)
        elif _SECTION.match(line):
            kept.append("")
        elif line.rstrip().endswith("::"):
            literal_below = _indent(line)
            kept.append(line.rstrip()[:-1])
        else:
            kept.append(line)
    return kept


def _blocks(lines: list[str]) -> list[str]:
    """Paragraphs, list items and parameter descriptions, each as one line."""
    blocks: list[list[str]] = [[]]
    hanging = False  # whether the block began with a bullet or a parameter name, so that its deeper lines belong to it
    start = previous = 0
    for line in lines:
        if not line.strip():
            blocks.append([])
            hanging = False
            continue
        indent = _indent(line)
        bullet = _BULLET.match(line)
        entry = _ENTRY.match(line) if ":" in line or " -- " in line else None
        first = not blocks[-1]
        deeper = hanging and indent > start
        if first or bullet or (entry and not deeper and indent <= previous) or (not deeper and indent != previous):
            if not first:
                blocks.append([])
            start, hanging = indent, bool(bullet or entry)
            if bullet:
                line = line[bullet.end() :]
            elif entry:
                numpydoc = entry["colon"] == " :"  # `name : type`; the text is on the lines below
                line = f"{entry['name']}: {'' if numpydoc else entry['text'] or ''}"
        blocks[-1].append(line.strip())
        previous = indent
    return [" ".join(block) for block in blocks if block]


def _plain(block: str) -> str:
    if _HAS_MARKUP.search(block):
        for pattern, replacement in _MARKUP:
            block = pattern.sub(replacement, block)
    return " ".join(block.split())


def _is_prose(block: str) -> bool:
    """Whether a block looks like sentences: enough words, nearly only letters and spaces, no brackets of code or TeX."""
    words = block.split()
    if len(words) < 8 or any(character in block for character in "{}\\@"):
        return False
    plain = sum(map(str.isalpha, block)) + block.count(" ")
    lower = sum(word.strip(".,;:()\"'").islower() for word in words)
    return plain >= 0.88 * len(block) and lower >= 0.6 * len(words) and block[-1] in ".:;!?)\"'"
