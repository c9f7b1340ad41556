"""What a terminal would obey never reaches it: names of files and classes, manifests, checkpoints, libraries' texts."""

from __future__ import annotations

import io
import json
import logging
import os
import pickle
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.text import Text
from tiny import tiny_checkpoint_file

from bdexport.build import build_bundle
from bdexport.class_names import name_problem
from bdexport.cli import main as cli
from bdexport.cli.console import FittedTable, StageProgress, WideConsole, write_json_result
from bdexport.cli.failures import escaping_streams
from bdexport.cli.main import main
from bdexport.config import BuildConfig
from bdexport.files import without_controls
from bdexport.report.document import Element, Heading, Items
from bdexport.report.page import html_page

HOSTILE = "x\x1b]0;evil\x07\x1b[31m\x9b1m\u202egpj\x7f\r"  # title, red (7 and 8 bits), direction, delete, line start
SEEN = r"x\x1b]0;evil\x07\x1b[31m\x9b1m\u202egpj\x7f\r"
MARKUP = "[red]r[/red] [link=https://e.example]l[/link] :smile:"
CODES_OF_OURS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def check(text: str) -> str:
    """No control character but line ends and tabs, no mark that turns the direction."""
    bad = {character for character in text if character not in "\n\t" and name_problem(f"a{character}")}
    assert not bad, (bad, text)
    return text


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle, a checkpoint and images whose names are hostile."""
    folder = tmp_path_factory.mktemp("hostile")
    checkpoint = folder / f"{HOSTILE}.safetensors"
    tiny_checkpoint_file(checkpoint)
    bundle = folder / f"bundle {HOSTILE}"
    build_bundle(checkpoint, bundle, config=BuildConfig("null"), cache_dir=folder / "cache")
    images = folder / "images"
    images.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(images / f"good {HOSTILE}.png")
    (images / f"bad {HOSTILE}.png").write_bytes(b"\x1b]0;evil\x07 no image")
    for name in (f"class {HOSTILE}", "plain"):
        (folder / "data" / "test" / name).mkdir(parents=True)
        Image.fromarray(pixels).save(folder / "data" / "test" / name / "0.png")
    return folder


def lines_of(place: Path) -> list[list[str]]:
    """Command lines about these files; some succeed, some are refused."""
    bundle, checkpoint = str(place / f"bundle {HOSTILE}"), str(place / f"{HOSTILE}.safetensors")
    (place / f"{HOSTILE}.json").write_text('{"schema": "bdexport.evaluate/1", "checkpoint": "\\u001b]0;evil\\u0007"}')
    (place / f"{HOSTILE}.pkl").write_bytes(pickle.dumps({"\x1b]0;evil\x07": 1}))
    return [
        ["inspect", bundle],
        ["inspect", bundle, "--json", "-"],
        ["inspect", f"{bundle} none"],
        ["run", bundle, str(place / "images")],
        ["evaluate", checkpoint, "--dataset", "folder", "--data", str(place / "data")],
        ["evaluate", str(place / f"{HOSTILE}.pkl"), "--dataset", "digits"],
        ["report", str(place / f"{HOSTILE}.json"), "--out", str(place / f"out {HOSTILE}")],
        ["report", checkpoint, "--out", str(place / f"page {HOSTILE}")],
        [HOSTILE],
        ["inspect", HOSTILE, f"--{HOSTILE}"],
        ["zoo", f"zoo:{HOSTILE}"],
    ]


def test_no_command_prints_a_control_character(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: every character of stdout and stderr; JSON on stdout parses; the name is seen, escaped."""
    seen = 0
    for line in lines_of(place):
        main(line)
        captured = capsys.readouterr()
        out, err = check(captured.out), check(captured.err)
        assert out or err, line
        seen += "evil" in out + err
        if "-" in line:
            assert json.loads(out)["bundle"].endswith(HOSTILE)
    assert seen >= 9


def test_a_debug_traceback_is_escaped(capsys: pytest.CaptureFixture[str], place: Path) -> None:
    """Oracle: the traceback of an error about a hostile name, which Python prints itself."""
    assert main(["inspect", str(place / f"{HOSTILE} none"), "--debug"]) != 0
    assert "Traceback" in check(capsys.readouterr().err)


def test_a_page_has_no_raw_name() -> None:
    """Oracle: HTML's own escapes of what would be a tag."""
    elements: list[Element] = [Heading("<script>alert(1)</script>"), Items(("<img src=x onerror=y>",))]
    page = html_page(elements, lambda _: ("", b"", 1.0))
    assert "<script>" not in page
    assert "<img" not in page


def shown(*items: Any, terminal: bool = False) -> str:
    """What a console of ours writes for these."""
    written = io.StringIO()
    console = WideConsole(file=written, markup=False, highlight=False, emoji=False, force_terminal=terminal, width=200)
    for item in items:
        console.print(item)
    return written.getvalue()


def test_every_kind_of_thing_that_is_printed_is_escaped() -> None:
    """Oracle: the escaped text; markup stands as it is; columns are as wide as what is seen."""
    table = FittedTable("name", HOSTILE, title=HOSTILE)
    table.add_row(HOSTILE, MARKUP)
    table.add_row(Text(HOSTILE), HOSTILE)
    for terminal in (False, True):
        text = CODES_OF_OURS.sub("", shown(HOSTILE, Text(HOSTILE), table, MARKUP, terminal=terminal))
        check(text)
        assert text.count(SEEN) >= 5
        assert text.count(MARKUP) == 2
    rows = [line for line in shown(table).splitlines() if SEEN in line and "name" not in line]
    assert len({len(line) for line in rows[1:]}) == 1


def test_a_progress_bar_is_escaped() -> None:
    """Oracle: as above, of a live display on a terminal."""
    written = io.StringIO()
    console = WideConsole(file=written, markup=False, highlight=False, emoji=False, force_terminal=True, width=120)
    with StageProgress(console=console) as bar:
        bar.add_task(HOSTILE, total=2)
        bar.refresh()
    check(CODES_OF_OURS.sub("", written.getvalue()).replace("\r", ""))
    assert "evil" in written.getvalue()


def test_what_libraries_print_is_escaped(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: print, logging, warnings and an exception's text inside a command, through the real entry."""

    def command(_words: object) -> int:
        print(HOSTILE)
        sys.stderr.writelines([HOSTILE, "\n"])
        logger = logging.Logger("hostile")
        logger.addHandler(logging.StreamHandler())
        logger.warning("%s", HOSTILE)
        warnings.warn(HOSTILE, UserWarning, stacklevel=1)
        raise RuntimeError(HOSTILE)

    monkeypatch.setattr(cli, "run_line", command)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert main([]) == 1
    captured = capsys.readouterr()
    assert check(captured.out).count(SEEN) == 1
    assert check(captured.err).count(r"\x1b]0;evil\x07") == 4


def test_colours_of_ours_pass_the_stream(capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: inside the escaping streams a terminal's console still writes its own codes, and JSON is as it was."""
    with escaping_streams():
        WideConsole(markup=False, force_terminal=True, color_system="standard").print("a", style="bold")
        write_json_result("-", {"schema": "test/1", "name": HOSTILE})
    out = capsys.readouterr().out
    assert "\x1b[1m" in out
    assert json.loads(out[out.index("{") :])["name"] == HOSTILE


def test_languages_are_not_escaped() -> None:
    """Oracle: ordinary text of several scripts, with joiners and marks of direction that names may hold."""
    text = "Käfer 猫 кот \u200fقط\u200e नी\u200dला \U0001f600\n\t"
    assert without_controls(text) == text


@pytest.mark.skipif(os.name != "posix", reason="a pseudo-terminal of POSIX")
def test_on_a_real_terminal(place: Path) -> None:
    """Oracle: the bytes that a terminal gets, without the colour and cursor codes that Rich writes."""
    import pty

    master, slave = pty.openpty()
    words = [sys.executable, "-m", "bdexport", "inspect", str(place / f"bundle {HOSTILE}")]
    env = os.environ | {"TERM": "xterm-256color", "COLUMNS": "300", "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(words, stdin=slave, stdout=slave, stderr=slave, env=env)
    os.close(slave)
    got = b""
    try:
        while chunk := os.read(master, 65536):
            got += chunk
    except OSError:  # Linux: the other end is closed
        pass
    os.close(master)
    assert process.wait(60) == 0
    text = CODES_OF_OURS.sub("", got.decode()).replace("\r\n", "\n")
    check(text)
    assert r"x\x1b]0;evil\x07" in text
