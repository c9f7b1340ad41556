"""The folder of a report: ``report.html``, ``report.md``, ``report.json``, ``plots/*.svg`` and ``plots/*.png``.

The same sources and the same versions of matplotlib and Pillow give the same bytes: nothing holds a date.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from bdexport.config import ReportConfig
from bdexport.files import making_folder, utf8_text, write_json, write_text
from bdexport.report.collect import Report
from bdexport.report.document import Drawing, document, drawings
from bdexport.report.page import SVG_LIMIT, html_page, markdown_page
from bdexport.report.style import save, styled

HTML, MARKDOWN, JSON, PLOTS = "report.html", "report.md", "report.json", "plots"
CSS_PIXELS_PER_INCH = 96

Progress = Callable[[str, int, int], None]  # (what, done, total)


def write_report(
    report: Report,
    data: dict[str, Any],
    out: Path,
    config: ReportConfig,
    overwrite: bool = False,
    progress: Progress = lambda what, done, total: None,
) -> list[Path]:
    """Draw everything and write ``out``, whole or not at all; returns the files, the page first.

    ``data`` is the report as plain JSON. Raises OutputError where ``out`` exists and must not be replaced.
    """
    elements = document(report, config)
    figures = drawings(elements)
    with making_folder(out, overwrite) as staging:
        plots = staging / PLOTS
        plots.mkdir()
        widths = {}
        for index, drawing in enumerate(figures):
            progress("plots", index, len(figures))
            widths[drawing.name] = _draw(drawing, plots)
        progress("plots", len(figures), len(figures))

        def image(drawing: Drawing) -> tuple[str, bytes, float]:
            return *_inlined(plots / drawing.name), widths[drawing.name]

        write_text(staging / HTML, utf8_text(html_page(elements, image)))
        write_text(staging / MARKDOWN, utf8_text(markdown_page(elements)))
        write_json(staging / JSON, data)
    names = [HTML, MARKDOWN, JSON]
    names += [f"{PLOTS}/{figure.name}.{kind}" for figure in figures for kind in ("svg", "png")]
    return [out / name for name in names]


def _draw(drawing: Drawing, folder: Path) -> float:
    """Save both forms of a figure; its width in CSS pixels."""
    with styled():
        figure = drawing.make()
        save(figure, folder / drawing.name)
    return float(figure.get_figwidth()) * CSS_PIXELS_PER_INCH


def _inlined(stem: Path) -> tuple[str, bytes]:
    """The vector form, unless it is large."""
    vector = stem.with_name(f"{stem.name}.svg").read_bytes()
    if len(vector) <= SVG_LIMIT:
        return "image/svg+xml", vector
    return "image/png", stem.with_name(f"{stem.name}.png").read_bytes()
