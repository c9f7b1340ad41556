"""The tables of the commands in a terminal of 80 columns."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from bundles import make_bundle
from rich.console import Console
from rich.table import Table
from tiny import tiny_model

from bdexport.bundle import Bundle
from bdexport.cli.console import FittedTable
from bdexport.cli.main import main

NARROW = 80


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("tables") / "bundle", tiny_model(), max_batch=8)


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(NARROW))


def first_cells(text: str) -> set[str]:
    """What stands in the first column of the tables in ``text``, line by line."""
    return {line.split("│")[1].strip() for line in text.splitlines() if line.startswith("│")}


def test_zoo(capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: the names in the JSON stand whole in the first column; no line is wider than the terminal."""
    assert main(["zoo"]) == 0
    printed = capsys.readouterr().out
    assert main(["zoo", "--json", "-"]) == 0
    names = {f"zoo:{card['name']}" for card in json.loads(capsys.readouterr().out)["models"]}
    assert names <= first_cells(printed)
    assert "…" not in printed
    assert "policy" in printed
    assert max(map(len, printed.splitlines())) <= NARROW


@pytest.mark.parametrize("command", ["profile", "inspect", "verify"])
def test_every_part_is_named(bundle: Bundle, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: the manifest's parts; nothing is cut with an ellipsis."""
    few = {"profile": ["--images", "2", "--rounds", "1"], "inspect": [], "verify": ["--masks", "1"]}[command]
    assert main([command, str(bundle.path), *few]) == 0
    printed = capsys.readouterr().out
    assert set(bundle.manifest.parts) - {"full"} <= first_cells(printed)
    assert "…" not in printed


def test_bench_of_all_executors(bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: the executors in the JSON, whole, with their gain; columns that had no room are named."""
    from PIL import Image

    for name in bundle.manifest.class_names:
        (tmp_path / "data" / "test" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "data" / "test" / name / "a.png")
    line = ["bench", str(bundle.path), "--dataset", "folder", "--data", str(tmp_path / "data"), "--rounds", "1"]
    assert main([*line, "--executor", "all", "--json", str(tmp_path / "bench.json")]) == 0
    printed = capsys.readouterr().out
    executors = json.loads((tmp_path / "bench.json").read_text())["executors"]
    assert set(executors) <= {cell.removesuffix(" (auto)") for cell in first_cells(printed)}
    assert "gain" in printed.partition("executors, in turn")[2]
    assert "left out at 80 columns: " in printed
    assert "…" not in printed


def test_doctor_fits_a_screen(capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: every finding of the JSON is named in at most 40 lines, though some machines lack most packages."""
    main(["doctor"])
    printed = capsys.readouterr().out
    main(["doctor", "--json", "-"])
    for found in json.loads(capsys.readouterr().out)["findings"]:
        assert found["name"] in printed
    assert len(printed.splitlines()) <= 40


def test_inspect_leaves_the_settings_to_verbose(bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: the rows that say how images and engines are treated, in both; --verbose is no shorter."""
    texts = []
    for words in ([], ["--verbose"]):
        assert main(["inspect", str(bundle.path), *words]) == 0
        texts.append(capsys.readouterr().out)
        assert {"network", "engines", "preprocessing", "verified"} <= first_cells(texts[-1])
    assert len(texts[0]) <= len(texts[1])


def rendered(table: Table, width: int) -> str:
    console = Console(width=width, markup=False, color_system=None)
    with console.capture() as caught:
        console.print(table)
    return caught.get()


@pytest.mark.parametrize("width", [200, 80, 60, 40, 25, 12, 8])
def test_no_character_is_lost_at_any_width(width: int) -> None:
    """Oracle: the cells, put together again from their lines, in the columns that are shown; the first always is."""
    table = FittedTable("name", expendable=("p90",))
    for heading in ("p50", "p90", "p99"):
        table.add_column(heading, justify="right")
    cells = ("a-name-without-any-blank-in-it", "0.123 ms", "4.567 ms", "8.910 ms")
    table.add_row(*cells)
    lines = [line for line in rendered(table, width).splitlines() if line.startswith("│")]
    columns = ["".join(parts) for parts in zip(*(map(str.strip, line.split("│")[1:-1]) for line in lines), strict=True)]
    assert columns[0] == cells[0]
    assert set(columns[1:]) <= set(cells[1:])
    assert max(map(len, lines)) <= width
    if width == 60:
        assert columns[1:] == [cells[1], cells[3]]


@pytest.mark.parametrize("width", [80, 40, 24])
@pytest.mark.parametrize("header", [True, False])
def test_a_long_word_costs_no_column(width: int, header: bool) -> None:
    """Oracle: the cells, put together again from their lines: a hash without a blank is folded, not left out."""
    table = FittedTable("what", "value", show_header=header)
    cells = ("base", "0123456789abcdef" * 8)
    table.add_row(*cells)
    printed = rendered(table, width)
    lines = [line.split("│")[1:-1] for line in printed.splitlines() if line.startswith("│")]
    assert (
        tuple("".join(parts) for parts in zip(*([cell.strip() for cell in line] for line in lines), strict=True))
        == cells
    )
    assert "left out" not in printed
    assert max(map(len, printed.splitlines())) <= width
