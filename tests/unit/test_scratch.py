"""Scratch of processes that were killed, and outputs that are tried before the work for them begins."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bdexport import files
from bdexport.cli.main import main
from bdexport.files import scratch_folder

KILLS = 5  # of each precision


def test_a_killed_build_leaves_no_scratch(tmp_path: Path) -> None:
    """Oracle: the temporary folder after every kill, and everything beside the bundle after a build that ended."""
    temporary, work = tmp_path / "temporary", tmp_path / "work"
    temporary.mkdir()
    work.mkdir()
    here = Path(__file__).parent
    environment = os.environ | {"TMPDIR": str(temporary), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(here / "scratch_worker.py"), str(work), str(KILLS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["left"] == []
    assert found["moments"]["int8"] > found["moments"]["fp32"] > 100
    kept = sorted(path.name for path in work.iterdir() if not path.name.startswith("cache-"))
    assert kept == ["bundle", "images", "scales", "tiny.safetensors"]
    partials = [path for path in work.rglob("*") if path.suffix in (files.PARTIAL, files.OLD)]
    assert [path for path in partials if "cache-" not in str(path)] == []  # a cache's are swept with its next engine
    assert list(temporary.iterdir()) == []


def test_scratch_beside_the_output(tmp_path: Path) -> None:
    """Oracle: where the folder stands inside the block, and that it is gone after it."""
    with scratch_folder(tmp_path / "made" / "out") as folder:
        assert folder.parent == tmp_path / "made"
        assert folder.name.startswith(".out.")
        (folder / "file").write_text("x")
    assert list((tmp_path / "made").iterdir()) == []


def test_scratch_where_the_name_is_no_utf8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: a name that UTF-8 can hold, for libraries that take no other; what is there after the block."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    with scratch_folder(tmp_path / os.fsdecode(b"r\xff") / "out") as folder:
        assert folder.parent == tmp_path / "temporary"
    assert list((tmp_path / "temporary").iterdir()) == []


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux says when a process began")
def test_a_number_that_was_given_again_is_no_owner(tmp_path: Path) -> None:
    """Oracle: leftovers of this very process's number: with its own start, with another, and with none."""
    with scratch_folder(tmp_path / "out") as own:
        stem, start, end = own.name.rpartition(f"-{files._start(os.getpid())}.")
        assert start
        other, unknown = tmp_path / f"{stem}-1.{end}", tmp_path / f"{stem}.{end}"
        for folder in (other, unknown):
            (folder / "inside").mkdir(parents=True)
        files.remove_stale(tmp_path)
        assert own.is_dir()
        assert unknown.is_dir()  # by an earlier release, which did not name the start: the number lives
        assert not other.exists()


@pytest.mark.parametrize(
    "line",
    [
        "train --dataset digits --arch resnet8 --base {missing} --out {out}",
        "export {missing} --out {out}",
        "build {missing} --out {out}",
        "build {missing} --dataset folder --data {missing} --out {out}",
        "calibrate {missing} --dataset digits --out {out}",
        "calibrate {missing} --dataset digits --folder {out}",
        "prune {missing} --ratio 0.3 --out {out}.safetensors",
        "retarget {missing} --target-blocks 2 --dataset digits --out {out}.safetensors",
        "rebuild {missing} --out {out}",
        "report {missing} --out {out}",
        "bench {missing} --json {out}",
        "profile {missing} --trace {out}",
        "quickstart --out {out}",
    ],
)
def test_an_output_is_tried_before_the_work(line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: the first complaint. What is to be read is missing too, so nothing was read before it."""
    blocker = tmp_path / "blocker"
    blocker.write_text("a file, where a folder is needed")
    assert main(line.format(missing=tmp_path / "missing", out=blocker / "out").split()) == 1
    told = " ".join(capsys.readouterr().err.split())
    assert f"{blocker / 'out'}" in told
    assert "cannot be written (Not a directory)" in told
    assert blocker.read_text() == "a file, where a folder is needed"
    assert [path.name for path in tmp_path.iterdir()] == ["blocker"]


def test_a_list_of_images_replaces_no_other_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: the file as it was, and a folder, each refused before a checkpoint that is missing is looked for."""
    other = tmp_path / "notes.txt"
    other.write_text("my notes")
    line = f"calibrate {tmp_path / 'missing'} --dataset digits --folder {tmp_path / 'scales'} --out"
    assert main([*line.split(), str(other)]) == 1
    assert "holds no JSON; choose another name for --out" in " ".join(capsys.readouterr().err.split())
    assert other.read_text() == "my notes"
    assert main([*line.split(), str(tmp_path)]) == 1
    assert "cannot be written (Is a directory)" in " ".join(capsys.readouterr().err.split())
