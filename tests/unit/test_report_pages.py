"""Figures and pages say what the data say. Marks are counted in the SVG, where each has an id of its own."""

from __future__ import annotations

import base64
import re
from html import unescape
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from report_cases import CLASSES, LABELS, MASKS, NETWORK, epoch, point

from bdexport.config import ReportConfig
from bdexport.errors import OutputError
from bdexport.report import plots
from bdexport.report.collect import Report, Sheet
from bdexport.report.curves import curves_of
from bdexport.report.document import document, drawings
from bdexport.report.frontier import frontier
from bdexport.report.samples import Strip
from bdexport.report.sheets import GAP, TILE, contact_sheet, mosaic
from bdexport.report.style import save, styled
from bdexport.report.usage import usage_of_masks
from bdexport.report.write import write_report

CONFIG = ReportConfig()
HOSTILE = '<script>alert("1")</script> | run'


def ids(svg: Path | str, kind: str) -> list[str]:
    text = svg if isinstance(svg, str) else svg.read_text()
    return re.findall(rf'id="({kind}-[^"]+)"', text)


def full_report() -> Report:
    """Every kind of content, with a label that HTML and Markdown must not take for their own."""
    rows = [epoch("pretrain", 50.0), epoch("finetune", 60.0, 3.0, [1.0, 60.0])]
    pixels = np.arange(2 * 4 * 6 * 3, dtype=np.uint8).reshape(2, 4, 6, 3)
    sheets = [
        Sheet("run", "policies", (Strip("cat", "2 of 3 images, 2 blocks", (0, 1), (2, 2), "1100"),), (pixels,)),
        Sheet("run", "difficulty", (Strip("cat", "fewest blocks: 2", (0, 1), (2, 2)),), (pixels,)),
    ]
    return Report(
        "bdexport report run --out DIR",
        points=[point(HOSTILE), point("low", accuracy=20.0, method="first-k", finetuned=False)],
        curves=[curves_of("run", rows)],
        usages=[usage_of_masks("run", "hand-made", NETWORK, MASKS, LABELS, CLASSES)],
        sheets=sheets,
        notes=["a note"],
        skipped=["a thing & why"],
    )


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report") / "out"
    write_report(full_report(), {"schema": "bdexport.report/1"}, out, CONFIG)
    return out


def test_every_figure_is_there_twice_and_is_not_empty(written: Path) -> None:
    """Oracle: the figures of the document; a picture has more than two colours."""
    names = {drawing.name for drawing in drawings(document(full_report(), CONFIG))}
    assert len(names) == 8
    assert {path.stem for path in (written / "plots").glob("*.svg")} == names
    assert {path.stem for path in (written / "plots").glob("*.png")} == names
    for path in (written / "plots").glob("*.png"):
        with Image.open(path) as image:
            assert min(image.size) > 100, path
            assert len(image.convert("RGB").getcolors(maxcolors=1 << 24) or []) > 2, path


def test_frontier_has_a_mark_for_every_point(written: Path) -> None:
    """Oracle: the marks of :func:`frontier`, ours as 1, 2 and the paper's as P1, P2, .."""
    numbered = full_report().numbered("cifar10")
    for axis, expected in (("flops", 2 + 6), ("blocks", 2 + 12)):
        marks = frontier(numbered, axis, CONFIG.accuracy_span).marks  # type: ignore[arg-type]
        found = ids(written / "plots" / f"frontier-{axis}-cifar10.svg", "mark")
        assert sorted(found) == sorted(f"mark-{mark.number}" for mark in marks)
        assert len(found) == expected


def test_bars_are_as_high_as_the_data() -> None:
    """Oracle: the arrays of the usage; transitions alone are hatched."""
    usage = usage_of_masks("run", "hand-made", NETWORK, MASKS, LABELS, CLASSES)
    with styled():
        histogram, rates = plots.usage_histogram(usage).axes[0], plots.keep_rates(usage).axes[0]
        heat = plots.class_keep_rates(usage, most=100).axes[0]
    heights = [bar.get_height() for bar in histogram.patches if str(bar.get_gid()).startswith("bar")]  # type: ignore[attr-defined]
    assert heights == pytest.approx((100 * usage.histogram).tolist())
    bars = [bar for bar in rates.patches if str(bar.get_gid()).startswith("bar")]
    assert [bar.get_height() for bar in bars] == pytest.approx((100 * usage.keep_rate).tolist())  # type: ignore[attr-defined]
    assert [bool(bar.get_hatch()) for bar in bars] == [False, False, True, False]
    assert usage.class_keep_rate is not None
    drawn = np.asarray(heat.images[0].get_array())
    assert drawn == pytest.approx(100 * usage.class_keep_rate[[0, 2]])  # the dog has no images
    assert [label.get_text() for label in heat.get_yticklabels()] == ["cat", "newt"]


def test_curves_draw_every_series_that_has_values() -> None:
    """Oracle: the series themselves; what a run does not have is not drawn."""
    curves = curves_of("run", [epoch("pretrain", 50.0), epoch("finetune", 60.0, 3.0, [1.0, 60.0])])
    with styled():
        figure = plots.training_curves(curves)
    lines = {str(line.get_gid()): line for axes in figure.axes for line in axes.lines if line.get_gid()}
    drawn = {"loss", "validation_accuracy", "train_reward", "blocks_mean", "unique_masks"}
    assert set(lines) == {f"curve-{name}" for name in drawn}
    assert np.asarray(lines["curve-validation_accuracy"].get_ydata()).tolist() == [50.0, 60.0]
    assert np.asarray(lines["curve-blocks_mean"].get_ydata())[1] == 3.0
    assert any(band.get_gid() == "band-blocks" for axes in figure.axes for band in axes.collections)


def test_mosaic_places_every_image_whole() -> None:
    """Oracle: nearest-neighbour scaling by a whole factor, undone by slicing; white where there is no image."""
    rng = np.random.default_rng(0)
    first, second = (rng.integers(0, 255, (count, 8, 8, 3), dtype=np.uint8) for count in (2, 1))
    canvas = mosaic((first, second), columns=2)
    pitch = TILE + GAP
    for row, column, image in ((0, 0, first[0]), (0, 1, first[1]), (1, 0, second[0])):
        top, left = row * pitch + GAP // 2, column * pitch + GAP // 2
        tile = canvas[top : top + TILE, left : left + TILE]
        assert np.array_equal(tile[:: TILE // 8, :: TILE // 8], image)
    assert (canvas[pitch:, pitch:] == 255).all()


def test_sheets_show_the_mask_of_a_strip(tmp_path: Path) -> None:
    """Oracle: one marker for each block; those of kept blocks are filled."""
    with styled():
        figure = contact_sheet(full_report().sheets[0])
        save(figure, tmp_path / "sheet")
    assert ids(tmp_path / "sheet.svg", "mask") == ["mask-1100"]
    (squares,) = figure.axes[0].collections
    faces = np.asarray(squares.get_facecolor())
    assert [bool((face[:3] < 1).any()) for face in faces] == [True, True, False, False]


def test_html_is_self_contained_and_says_what_the_data_say(written: Path) -> None:
    """Oracle: the tables of the report, cell by cell; the figures' own bytes; no address but data:."""
    page = (written / "report.html").read_text()
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert len(sources) == 8
    assert all(source.startswith("data:image/") for source in sources)
    inside = {base64.b64decode(source.partition(",")[2]) for source in sources}
    assert inside == {path.read_bytes() for path in (written / "plots").glob("*.svg")}
    cells = [unescape(cell) for cell in re.findall(r"<td[^>]*>(.*?)</td>", page)]
    report = full_report()
    expected = [cell for table in report.tables("cifar10") for row in table.rows for cell in row]
    assert cells[: len(expected)] == expected
    assert "not measured" in expected
    assert "a thing &amp; why" in page


def test_text_from_outside_is_text(written: Path) -> None:
    """Oracle: no tag of a label's gets through; a Markdown table keeps its number of columns."""
    assert "<script" not in (written / "report.html").read_text()
    markdown = (written / "report.md").read_text()
    assert re.search(r"(?<!\\)<", markdown) is None
    row = next(line for line in markdown.splitlines() if "alert" in line)
    assert len(re.findall(r"(?<!\\)\|", row)) == 11  # ten columns


def test_markdown_links_exist(written: Path) -> None:
    """Oracle: the file system."""
    links = re.findall(r"\]\(([^)]+)\)", (written / "report.md").read_text())
    assert len(links) == 8
    for link in links:
        assert (written / link).is_file(), link


def test_the_same_data_give_the_same_bytes(written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: every file twice, the second time years later and with a user's own matplotlib settings."""
    import matplotlib as mpl

    monkeypatch.setenv("SOURCE_DATE_EPOCH", "2000000000")
    with mpl.rc_context({"font.size": 30, "axes.facecolor": "red", "svg.hashsalt": "other"}):
        write_report(full_report(), {"schema": "bdexport.report/1"}, tmp_path / "again", CONFIG)
    files = sorted(path.relative_to(written) for path in written.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(tmp_path / "again") for path in (tmp_path / "again").rglob("*.*"))
    for file in files:
        assert (written / file).read_bytes() == (tmp_path / "again" / file).read_bytes(), file


def test_an_existing_report_is_kept_unless_told_otherwise(tmp_path: Path) -> None:
    """Oracle: the old file's bytes; nothing else is left in the folder when drawing fails."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    small = Report("bdexport report x --out DIR", points=[point()])
    with pytest.raises(OutputError, match="exists already"):
        write_report(small, {}, tmp_path / "out", CONFIG)

    def fail(_what: str, _done: int, _total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_report(small, {}, tmp_path / "out", CONFIG, overwrite=True, progress=fail)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "mine").read_text() == "x"
