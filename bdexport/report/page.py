"""The page: the same elements as HTML, with the figures inside it, and as Markdown, with the figures beside it."""

from __future__ import annotations

import base64
from collections.abc import Callable
from html import escape

from bdexport.report.document import TITLE, Drawing, Element, Heading, Items, Text
from bdexport.report.tables import Table

SVG_LIMIT = 1_500_000  # bytes: a figure with more paths than this is put on the page as pixels

CSS = """
:root { color-scheme: light dark; --ink: #222; --ground: #fff; --line: #d5d5d5; --pale: #f4f5f6; --soft: #5a5a5a; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e6e6; --ground: #17191c; --line: #3b4046; --pale: #22262b; --soft: #a9b0b7; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 84rem; padding: 1.5rem 1.25rem 4rem; background: var(--ground); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.9rem; line-height: 1.2; } h2 { margin-top: 3rem; border-bottom: 2px solid var(--line); }
h2, h3 { line-height: 1.3; padding-bottom: .25rem; }
pre { overflow-x: auto; background: var(--pale); padding: .75rem 1rem; border-radius: 6px; font-size: .85rem; }
figure { margin: 1.5rem 0; padding: 0; }
figure img { display: block; width: 100%; max-width: var(--width); height: auto; background: #fff; border-radius: 6px;
  border: 1px solid var(--line); padding: .5rem; }
figcaption, .notes { color: var(--soft); font-size: .9rem; margin-top: .4rem; }
.table { overflow-x: auto; margin: 1.75rem 0; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; font-size: 1rem; padding-bottom: .5rem; white-space: nowrap; }
th, td { text-align: left; padding: .35rem .8rem .35rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td { white-space: nowrap; } td.long { white-space: normal; min-width: 18rem; font-family: ui-monospace, monospace;
  font-size: .78rem; overflow-wrap: anywhere; }
thead th { border-bottom: 2px solid var(--line); } td.missing { color: var(--soft); font-style: italic; }
"""
LONG_COLUMNS = ("command",)
MISSING = ("not measured", "not in the paper")


def html_page(elements: list[Element], image: Callable[[Drawing], tuple[str, bytes, float]]) -> str:
    """One self-contained page. ``image(drawing)`` gives media type, bytes and the width in CSS pixels."""
    body = "\n".join(_html(element, image) for element in elements)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(TITLE)}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{CSS}</style>\n</head>\n'
        f"<body>\n<h1>{escape(TITLE)}</h1>\n{body}\n</body>\n</html>\n"
    )


def _html(element: Element, image: Callable[[Drawing], tuple[str, bytes, float]]) -> str:
    match element:
        case Heading():
            return f"<h{element.level}>{escape(element.text)}</h{element.level}>"
        case Text():
            text = escape(element.text)
            return f"<pre><code>{text}</code></pre>" if element.code else f"<p>{text}</p>"
        case Items():
            return "<ul>\n" + "\n".join(f"<li>{escape(item)}</li>" for item in element.items) + "\n</ul>"
        case Table():
            return _html_table(element)
        case Drawing():
            kind, content, width = image(element)
            data = base64.b64encode(content).decode()
            return (
                f'<figure style="--width: {width:.0f}px"><img src="data:{kind};base64,{data}" '
                f'alt="{escape(element.alt)}"><figcaption>{escape(element.caption)}</figcaption></figure>'
            )


def _html_table(table: Table) -> str:
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in table.columns)
    rows = [
        "<tr>" + "".join(_html_cell(column, cell) for column, cell in zip(table.columns, row, strict=True)) + "</tr>"
        for row in table.rows
    ]
    notes = "".join(f"<div>[{index}] {escape(note)}</div>" for index, note in enumerate(table.notes, start=1))
    notes = f'<div class="notes">{notes}</div>' if notes else ""
    return (
        f'<div class="table"><table><caption>{escape(table.title)}</caption>\n<thead><tr>{head}</tr></thead>\n<tbody>\n'
        + "\n".join(rows)
        + f"\n</tbody></table>{notes}</div>"
    )


def _html_cell(column: str, cell: str) -> str:
    kind = ' class="missing"' if cell in MISSING else ' class="long"' if column in LONG_COLUMNS else ""
    return f"<td{kind}>{escape(cell)}</td>"


def markdown_page(elements: list[Element]) -> str:
    """The twin of the page, with the figures under ``plots/``."""
    return "\n\n".join([f"# {TITLE}", *(_markdown(element) for element in elements)]) + "\n"


def _markdown(element: Element) -> str:
    match element:
        case Heading():
            return f"{'#' * element.level} {_plain(element.text)}"
        case Text():
            return f"```console\n$ {element.text}\n```" if element.code else _plain(element.text)
        case Items():
            return "\n".join(f"- {_plain(item)}" for item in element.items)
        case Table():
            return _markdown_table(element)
        case Drawing():
            return f"![{_plain(element.alt)}](plots/{element.name}.png)\n\n*{_plain(element.caption)}*"


def _markdown_table(table: Table) -> str:
    lines = [f"**{_plain(table.title)}**", ""]
    lines.append("| " + " | ".join(_cell(column) for column in table.columns) + " |")
    lines.append("|" + "---|" * len(table.columns))
    lines += ["| " + " | ".join(_cell(cell) for cell in row) + " |" for row in table.rows]
    if table.notes:
        lines += ["", *(f"\\[{index}\\] {_plain(note)}" for index, note in enumerate(table.notes, start=1))]
    return "\n".join(lines)


def _plain(text: str) -> str:
    """Text that Markdown and HTML take as it stands."""
    for sign in "\\`*_[]<>#":
        text = text.replace(sign, "\\" + sign)
    return " ".join(text.split())


def _cell(text: str) -> str:
    return _plain(text).replace("|", "\\|")
