"""Files and folders that are whole or not there: after a race, an interruption, a refusal."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from bdexport.errors import OutputError
from bdexport.files import making_folder, write_text


def content(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


def fill(target: Path, text: str, *, overwrite: bool = False, then: Callable[[], object] = lambda: None) -> None:
    """Make ``target`` with one file; ``then`` happens just before it takes its name."""
    with making_folder(target, overwrite) as staging:
        (staging / "a").write_text(text)
        then()


def test_what_another_process_made_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    """Oracle: the first of two writers of one new name; the second is refused and leaves nothing."""
    target = tmp_path / "new"

    def faster() -> None:
        with making_folder(target) as staging:
            (staging / "a").write_text("first")

    with pytest.raises(OutputError, match="--overwrite"):
        fill(target, "second", then=faster)
    assert content(tmp_path) == {"new/a": "first"}
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_a_file_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    """Oracle: the file's text."""
    target = tmp_path / "new"
    with pytest.raises(OutputError, match="meanwhile"):
        fill(target, "mine", then=lambda: target.write_text("yours"))
    assert content(tmp_path) == {"new": "yours"}


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    """Oracle: the documented exception to the refusal."""
    (tmp_path / "new").mkdir()
    fill(tmp_path / "new", "mine")
    assert content(tmp_path) == {"new/a": "mine"}


@pytest.mark.parametrize("calls", [1, 2])
@pytest.mark.parametrize("when", ["before", "after"])
def test_interrupted_while_the_names_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: int, when: str
) -> None:
    """Oracle: Ctrl-C before or after each of the two renames leaves the old folder or the new one, and nothing else."""
    target = tmp_path / "bundle"
    target.mkdir()
    (target / "a").write_text("old")
    rename, done = os.rename, 0

    def interrupted(source: Path, destination: Path) -> None:
        nonlocal done
        done += 1
        if done == calls and when == "before":
            raise KeyboardInterrupt
        rename(source, destination)
        if done == calls and when == "after":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fill(target, "new", overwrite=True, then=lambda: monkeypatch.setattr(os, "rename", interrupted))
    assert content(tmp_path) == {"bundle/a": "new" if (calls, when) == (2, "after") else "old"}
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_a_pipe_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    """Oracle: its reader gets the text, and it is still a pipe: ``--json /dev/null`` must not cost root the device."""
    pipe, got = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: got.append(pipe.read_text()))
    reader.start()
    write_text(pipe, "text")
    reader.join(10)
    assert got == ["text"]
    assert pipe.is_fifo()


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    """Oracle: OutputError that names it, and nothing is left in or beside it."""
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match="folder: cannot be written"):
        write_text(tmp_path / "folder", "text")
    assert [path.name for path in tmp_path.rglob("*")] == ["folder"]


def test_a_folder_that_cannot_be_made_is_named_as_the_caller_named_it() -> None:
    """Oracle: the kernel's own file system makes no folders; the error is about the wanted file, not a hidden one."""
    wanted = Path("/proc/bdexport/model.safetensors")
    if not Path("/proc/self").exists():
        pytest.skip("no /proc here")
    with pytest.raises(OutputError, match=r"^/proc/bdexport/model.safetensors: .*choose another place"):
        write_text(wanted, "x")
