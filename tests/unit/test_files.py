"""Files and folders that are whole or not there: after a race, an interruption, a refusal."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from bdexport import files
from bdexport.errors import OutputError
from bdexport.files import holding, making_folder, write_bytes, write_text


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
    """Oracle: Ctrl-C before or after each of the two renames leaves the old folder or the new one, and nothing else.

    Two of them where names cannot be exchanged.
    """
    monkeypatch.setattr(files, "_exchange", lambda *_: False)
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


@pytest.mark.parametrize("when", ["before", "after"])
def test_interrupted_while_the_names_are_exchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    """Oracle: as above, with the one step that exchanges them; the replaced folder goes in either case."""
    exchange = files._exchange
    fill(tmp_path / "bundle", "old")

    def interrupted(one: Path, other: Path) -> bool:
        if when == "after" and not exchange(one, other):
            pytest.skip("this system cannot exchange two names")
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "_exchange", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fill(tmp_path / "bundle", "new", overwrite=True)
    assert content(tmp_path) == {"bundle/a": "new" if when == "after" else "old"}
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_a_folder_that_is_replaced_is_never_missing(tmp_path: Path) -> None:
    """Oracle: the kernel: a thread that opens the file all the time, while the folder is replaced a hundred times."""
    target, missing, end = tmp_path / "bundle", [], threading.Event()
    fill(target, "0")
    (tmp_path / "other").mkdir()
    if not files._exchange(target, tmp_path / "other"):
        pytest.skip("this system cannot exchange two names")
    files._exchange(target, tmp_path / "other")

    def look() -> None:
        while not end.is_set():
            try:
                (target / "a").read_text()
            except OSError as error:
                missing.append(error)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        for number in range(100):
            fill(target, str(number), overwrite=True)
    finally:
        end.set()
        thread.join(10)
    assert missing == []
    assert content(tmp_path) == {"bundle/a": "99"}


def test_names_that_must_not_be_exchanged(tmp_path: Path) -> None:
    """Oracle: the system's own refusal, which is not taken for a system that cannot."""
    (tmp_path / "one").mkdir()
    if not hasattr(os, "posix_spawn") or sys.platform != "linux":
        pytest.skip("renameat2 is Linux's")
    with pytest.raises(FileNotFoundError):
        files._exchange(tmp_path / "one", tmp_path / "gone")


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


# ---- what a kill leaves ------------------------------------------------------------------------------------------

HALF_WAY = """
import sys, time
from pathlib import Path
from bdexport import files

with files.making_folder(Path(sys.argv[1]), overwrite=True) as folder, files.writing(Path(sys.argv[2])) as file:
    (folder / "a").write_text("half")
    file.write_text("half")
    if sys.argv[3] == "swapping":  # where names cannot be exchanged
        files._exchange = lambda *names: False
        rename = files.os.rename
        files.os.rename = lambda *names: (rename(*names), print("there", flush=True), time.sleep(600))
        files._swap(folder, Path(sys.argv[1]).absolute())
    print("there", flush=True)
    time.sleep(600)
"""


@contextmanager
def half_way(tmp_path: Path, where: str) -> Iterator[subprocess.Popen[str]]:
    """A process that is in the middle of writing a folder and a file; killed at the end, as the kernel kills."""
    words = [sys.executable, "-c", HALF_WAY, str(tmp_path / "bundle"), str(tmp_path / "state"), where]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        try:
            assert writer.stdout.readline() == "there\n"
            yield writer
        finally:
            writer.kill()


def hidden(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.name.startswith("."))


@pytest.mark.parametrize(
    "write", [lambda folder: write_text(folder / "other", "x"), lambda folder: fill(folder / "b", "x")]
)
def test_what_a_killed_process_left_is_removed(tmp_path: Path, write: Callable[[Path], None]) -> None:
    """Oracle: a real process: its files stay while it lives, and go with the first write into the folder after that."""
    with half_way(tmp_path, "writing"):
        assert len(hidden(tmp_path)) == 2
        write(tmp_path)
        assert len(hidden(tmp_path)) == 2
    assert len(hidden(tmp_path)) == 2
    write_text(tmp_path / "elsewhere" / "file", "x")
    assert len(hidden(tmp_path)) == 2
    shutil.rmtree(tmp_path / "b", ignore_errors=True)
    write(tmp_path)
    assert hidden(tmp_path) == []


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_was_being_replaced_comes_back(tmp_path: Path, overwrite: bool) -> None:
    """Oracle: its content; a kill between the two renames leaves the only copy under the hidden name."""
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "a").write_text("old")
    with half_way(tmp_path, "swapping"):
        assert not (tmp_path / "bundle").exists()
    if overwrite:
        fill(tmp_path / "bundle", "new", overwrite=True)
        assert content(tmp_path) == {"bundle/a": "new"}
        return
    with pytest.raises(OutputError, match="exists already"):
        fill(tmp_path / "bundle", "new")
    assert content(tmp_path) == {"bundle/a": "old"}


def test_nothing_else_is_removed(tmp_path: Path) -> None:
    """Oracle: leftovers of another machine, of a living process, of earlier releases, and what only looks like one."""
    dead = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True, check=True
    )
    pid = int(dead.stdout)
    host = files._host()
    names = [
        f".state.0123456789-{pid}.abc_1.partial",
        f".state.{host}-{os.getppid()}.abc_1.partial",
        f".state.{host}-1.abc_1.partial",
        f".state.{host}-{10**9}{pid}.abc_1.partial",
        f"state.{host}-{pid}.abc_1.partial",
        f".state.{host}-{pid}.abc_1.partial2",
        f".state.{host}-x.abc_1.partial",
        ".state.x1y2z3_a.partial",
        ".state.partial",
    ]
    for name in names:
        (tmp_path / name).write_text("")
    stale = tmp_path / f".{'a' * 40}.{host}-{pid}.abc_1.partial"
    stale.write_text("")
    files.remove_stale(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(names)
    files.remove_stale(tmp_path / "nowhere")


def test_long_names_can_be_written(tmp_path: Path) -> None:
    """Oracle: the longest name that the file system takes, and what is left beside it."""
    name = "n" * os.pathconf(tmp_path, "PC_NAME_MAX")
    write_text(tmp_path / name, "x")
    fill(tmp_path / f"{name[:-1]}m", "x")
    assert [len(path.name) for path in tmp_path.iterdir()] == [len(name)] * 2


def test_a_folder_is_held_against_another_process_until_that_ends(tmp_path: Path) -> None:
    # Oracle: the kernel. A process that was killed cannot have let go by itself.
    folder = tmp_path / "run"
    code = "import sys\nfrom pathlib import Path\nfrom bdexport.files import holding\n"
    code += "with holding(Path(sys.argv[1])):\n    print('held', flush=True)\n    sys.stdin.read()\n"
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(OutputError, match="another process is at work in it"), holding(folder):
            pass
        other.kill()
    with holding(folder):
        with pytest.raises(OutputError), holding(folder):
            pass
        (folder / "file").write_text("kept")
    with holding(folder):
        assert content(folder) == {"file": "kept"}


def test_no_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the variables that name a cache folder still count; without any, the error says which one to set."""
    monkeypatch.delenv(files.CACHE_VARIABLE, raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(OutputError, match=f"no home folder; set {files.CACHE_VARIABLE}"):
        files.default_cache_folder()
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert files.default_cache_folder() == Path("/elsewhere/bdexport")


def test_a_file_whose_name_is_no_utf8_is_opened_by_another_name(tmp_path: Path) -> None:
    """Oracle: the file's bytes, read through the name that a library would be given; nothing of it stays."""
    strange, plain = tmp_path / os.fsdecode(b"r\xff.bin"), tmp_path / "gr\u00fcn.bin"
    for path in (strange, plain):
        path.write_bytes(path.name.encode(errors="surrogateescape"))
        with files.native_path(path) as name:
            assert Path(name).read_bytes() == path.read_bytes()
            assert name.encode().endswith(b".bin")
            assert (name == str(path)) == (path == plain)
        assert path == plain or not os.path.lexists(name)


def test_names_on_one_line() -> None:
    """Oracle: Python's escapes for control characters; letters of any script stay."""
    assert files.shown(Path("a\nb\x1b[31m\u7530\x85")) == "a\\nb\\x1b[31m\u7530\\x85"
    assert files.utf8_text(os.fsdecode(b"a\xff")) == "a\\udcff"


@pytest.mark.parametrize("told", [True, False])
def test_the_umask_is_never_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: bool) -> None:
    """Oracle: the modes of files that another thread makes meanwhile, and of what is written; ``told``: by the system.

    A changed umask shows itself as a call of ``os.umask`` too, which raises here.
    """
    before = os.umask(0o027)
    try:

        def refuse(_mask: int) -> int:
            raise AssertionError("the umask belongs to all threads")

        with monkeypatch.context() as patch:
            patch.setattr(os, "umask", refuse)
            if not told:
                patch.setattr(files, "PROCESS_STATUS", tmp_path / "nothing")
            modes, stop = set(), threading.Event()

            def make() -> None:
                number = 0
                while not stop.is_set():
                    path = tmp_path / f"other{number}"
                    os.close(os.open(path, os.O_CREAT | os.O_EXCL, 0o666))
                    modes.add(path.stat().st_mode & 0o777)
                    path.unlink()
                    number += 1

            other = threading.Thread(target=make)
            other.start()
            try:
                for number in range(50):
                    write_bytes(tmp_path / f"own{number}", b"x")
                fill(tmp_path / "folder", "x")
            finally:
                stop.set()
                other.join()
    finally:
        os.umask(before)
    assert modes == {0o640}
    assert {path.stat().st_mode & 0o777 for path in tmp_path.glob("own*")} == {0o640}
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o750
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
