"""Where results go: widths, JSON, progress without a terminal."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from rich.table import Table

from bdexport.cli.console import (
    PIPED_WIDTH,
    WideConsole,
    console,
    err_console,
    progress,
    table_console,
    to_plain,
    write_json_result,
)
from bdexport.errors import OutputError


def test_tables_are_not_squeezed_in_a_pipe(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: every cell of a table of 120 columns comes out whole, brackets included."""
    monkeypatch.delenv("COLUMNS", raising=False)
    table = Table(*(f"column {index:02d}" for index in range(10)))
    table.add_row(*["[build]"] * 10)
    WideConsole(markup=False, highlight=False).print(table)
    shown = capsys.readouterr().out
    assert "column 09" in shown
    assert shown.count("[build]") == 10
    assert max(map(len, shown.splitlines())) <= PIPED_WIDTH


def test_columns_from_the_environment_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the environment variable that terminals' programs honour."""
    monkeypatch.setenv("COLUMNS", "72")
    assert WideConsole().width == 72


def test_json_to_stdout_leaves_the_table_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: stdout parses as JSON by itself."""
    table_console("-").print("the table")
    write_json_result("-", {"schema": "test/1", "value": 1})
    shown = capsys.readouterr()
    assert json.loads(shown.out) == {"schema": "test/1", "value": 1}
    assert shown.err == "the table\n"


@pytest.mark.parametrize("target", [None, "result.json", Path("-.json")])
def test_table_goes_to_stdout_otherwise(target: str | Path | None) -> None:
    """Oracle: the console object."""
    assert table_console(target) is console


def test_json_to_a_file(tmp_path: Path) -> None:
    """Oracle: json.loads of the file; its folder is made."""
    write_json_result(tmp_path / "new" / "result.json", {"schema": "test/1", "path": tmp_path})
    found = json.loads((tmp_path / "new" / "result.json").read_text())
    assert found == {"schema": "test/1", "path": tmp_path.as_posix()}


def test_json_into_a_folder_is_refused(tmp_path: Path) -> None:
    """Oracle: the error tree."""
    with pytest.raises(OutputError, match="cannot be written"):
        write_json_result(tmp_path, {"schema": "test/1"})


def test_plain_values() -> None:
    """Oracle: the JSON types; NaN and infinity have none and become null."""
    data = {"a": np.float32(0.5), "b": np.arange(3), "c": (np.bool_(True), np.int64(7)), "d": float("nan"), 5: np.inf}
    assert to_plain(data) == {"a": 0.5, "b": [0, 1, 2], "c": [True, 7], "d": None, "5": None}
    json.dumps(to_plain(data), allow_nan=False)


def test_progress_without_a_terminal_is_one_line_per_stage(capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: one line per stage on stderr, whatever number of steps; stdout is untouched."""
    with progress() as bar:
        for text in ("first [build]", "second"):
            stage = bar.add_task(text, total=1000)
            for _ in range(1000):
                bar.advance(stage)
    shown = capsys.readouterr()
    assert shown.err == "first [build]\nsecond\n"
    assert shown.out == ""


def test_error_console_is_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: the stream."""
    err_console.print("careful")
    assert capsys.readouterr().err == "careful\n"
