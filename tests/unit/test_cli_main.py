"""The command line's frame: start-up, exit codes, one line per failure, signals."""

from __future__ import annotations

import errno
import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, NoReturn

import pytest

import bdexport
from bdexport.cli import app
from bdexport.cli import main as cli
from bdexport.cli.failures import explain
from bdexport.errors import BdexportError, BundleError, OutputError, UsageError

BDEXPORT = [sys.executable, "-m", "bdexport"]


def call(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*BDEXPORT, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env=os.environ | environment,
    )


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], None]:
    """Makes the command ``doctor`` raise what the test says."""

    def install(error: BaseException) -> None:
        def doctor() -> NoReturn:
            raise error

        monkeypatch.setattr(app, "_command", lambda _name: doctor)

    return install


def test_help_names_every_command() -> None:
    """Oracle: the table COMMANDS, uncut."""
    done = call("--help")
    assert done.returncode == 0
    for name, summary in app.COMMANDS.items():
        assert f"{name} " in done.stdout
        assert summary in done.stdout


def test_help_imports_no_command() -> None:
    """Oracle: sys.modules after `bdexport --help`: none of what makes a start slow."""
    code = "import sys; from bdexport.cli.main import main; main(['--help']); print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    slow = {"torch", "onnx", "onnxruntime", "numpy", "sklearn", "PIL", "bdexport.cli.train"}
    assert not slow & set(done.stderr.split())


@pytest.mark.parametrize("name", list(app.COMMANDS))
def test_every_command_has_help_without_torch_or_onnx(name: str) -> None:
    """Oracle: exit code, the usage line, and sys.modules: help imports neither torch nor onnx."""
    code = (
        "import sys; from bdexport.cli.main import main; code = main([sys.argv[1], '--help']);"
        "print(*sys.modules, file=sys.stderr); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code, name], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"Usage: bdexport {name} ")
    assert not {"torch", "onnx", "onnxruntime"} & set(done.stderr.split())


def test_version() -> None:
    """Oracle: the package's version."""
    done = call("--version")
    assert (done.returncode, done.stdout) == (0, f"bdexport {bdexport.__version__}\n")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["nonsense"], "No such command 'nonsense'"),
        (["--nonsense"], "No such option: --nonsense"),
        (["doctor", "--nonsense"], "No such option: --nonsense"),
        (["inspect"], "Missing argument"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(arguments: list[str], text: str) -> None:
    """Oracle: the documented exit code; stderr is a single line."""
    done = call(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(f"bdexport: error: {text}")
    assert done.stderr.count("\n") == 1
    assert "--help'" in done.stderr


def test_no_command_shows_help_and_is_wrong_usage() -> None:
    """Oracle: the documented exit code."""
    done = call()
    assert done.returncode == 2
    assert done.stdout.startswith("Usage: bdexport ")


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (BundleError("b: bad", got="x", expected="y", remedy="z"), 1, "b: bad: got x, expected y; z"),
        (UsageError("two\n  lines"), 2, "two lines"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "f.bin"), 1, "f.bin: no space left; free some space"),
        (PermissionError(errno.EACCES, "Permission denied", "f"), 1, "f: no permission (Permission denied); choose"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "f"), 1, "f: No such file or directory"),
        (MemoryError("Unable to allocate 9 GiB"), 1, "out of memory (MemoryError: Unable to allocate 9 GiB)"),
        (ModuleNotFoundError("No module named 'torch'", name="torch"), 1, "this needs torch, which is not installed"),
        (ModuleNotFoundError("no", name="onnxruntime"), 1, 'pip install "onnxruntime>='),
        (ModuleNotFoundError("no", name="onnxruntime.capi"), 1, "is installed, but cannot be used (no); pip install"),
        (UsageError("name\x1b[31m\x7f"), 2, "name\\x1b[31m\\x7f"),
        (ZeroDivisionError("division\nby zero"), 1, "internal error (ZeroDivisionError: division by zero); run again"),
    ],
)
def test_failure_is_one_line(
    failing: Callable[[BaseException], None], capsys: pytest.CaptureFixture[str], error: Exception, code: int, text: str
) -> None:
    """Oracle: the documented exit code; the text is one line on stderr and says what to do."""
    failing(error)
    assert cli.main(["doctor"]) == code
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("bdexport: error: ")
    assert shown.err.count("\n") == 1
    assert text in shown.err


def test_every_error_of_ours_has_an_exit_code_of_ours() -> None:
    """Oracle: the documented codes 1 and 2, over the whole error tree."""
    kinds: list[type[BdexportError]] = [BdexportError, *BdexportError.__subclasses__()]
    assert {kind.exit_code for kind in kinds} == {1, 2}
    for kind in kinds:
        assert explain(kind("what"))[1] == kind.exit_code


@pytest.mark.parametrize("place", ["before", "after", "environment"])
def test_debug_shows_the_traceback(
    failing: Callable[[BaseException], None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    place: str,
) -> None:
    """Oracle: Python's traceback header above the same last line."""
    failing(OutputError("full"))
    if place == "environment":
        monkeypatch.setenv(app.DEBUG_VARIABLE, "1")
    arguments = {"before": ["--debug", "doctor"], "after": ["doctor", "--debug"], "environment": ["doctor"]}[place]
    assert cli.main(arguments) == 1
    shown = capsys.readouterr().err
    assert "Traceback (most recent call last)" in shown
    assert shown.endswith("bdexport: error: full\n")


def test_debug_after_a_double_dash_is_an_argument() -> None:
    """Oracle: the POSIX meaning of `--`: what follows is a name, even of a file called --debug."""
    assert cli._take_debug(["run", "bundle", "--", "--debug"]) == (["run", "bundle", "--", "--debug"], False)


def test_exit_code_of_a_command_is_kept(failing: Callable[[BaseException], None]) -> None:
    """Oracle: sys.exit's argument."""
    failing(SystemExit(7))
    assert cli.main(["doctor"]) == 7


def test_interrupt(failing: Callable[[BaseException], None], capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: the shell's convention 128 + SIGINT."""
    failing(KeyboardInterrupt())
    assert cli.main(["doctor"]) == 130
    assert capsys.readouterr().err == "bdexport: interrupted\n"


@pytest.mark.parametrize(
    ("number", "code", "said"),
    [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interrupted"), (signal.SIGHUP, 129, "hung up")],
)
def test_a_signal_runs_cleanup(tmp_path: Path, number: signal.Signals, code: int, said: str) -> None:
    """Oracle: the file that cleanup leaves, the exit code and the line, in a process that gets a real signal."""
    started, cleaned = tmp_path / "started", tmp_path / "cleaned"
    script = f"""
import sys, time
from pathlib import Path
from bdexport.cli import app
from bdexport.cli import main as cli
def doctor():
    try:
        Path({str(started)!r}).touch()
        time.sleep(30)
    finally:
        Path({str(cleaned)!r}).touch()
app._command = lambda name: doctor
sys.exit(cli.main(["doctor"]))
"""
    with subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 20
        while not started.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(number)
        _, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (code, f"bdexport: {said}\n")
    assert cleaned.exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_signal_where_nothing_can_be_raised(number: signal.Signals, code: int) -> None:
    """Oracle: Python drops what a weak reference's callback raises; the command ends all the same, by its one line."""
    script = f"""
import signal, sys, time, weakref
from bdexport.cli import app
from bdexport.cli import main as cli
class Gone:
    pass
def doctor():
    gone = Gone()
    seen = weakref.ref(gone, lambda _: signal.raise_signal({int(number)}))
    del gone
    time.sleep(20)
app._command = lambda name: doctor
sys.exit(cli.main(["doctor"]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=15, check=False)
    assert done.returncode == code
    assert done.stderr.startswith("bdexport: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_in_the_first_moments(tmp_path: Path, number: signal.Signals) -> None:
    """Oracle: the shell's codes, no traceback and no file, whenever the signal comes while modules are imported."""
    random, ended = Random(5), []
    for _ in range(8):
        words = [sys.executable, "-X", "importtime", "-m", "bdexport", "run", str(tmp_path / "none"), str(tmp_path)]
        with subprocess.Popen(words, stderr=subprocess.PIPE, text=True, cwd=tmp_path) as process:
            assert process.stderr is not None
            while not process.stderr.readline().endswith("bdexport.cli\n"):  # Python itself has started
                pass
            time.sleep(random.random() * 0.12)
            process.send_signal(number)
            err = "".join(line for line in process.stderr if not line.startswith("import time:"))
            process.wait(20)
        code = process.returncode
        ended.append(128 - code if code < 0 else code)
        assert "Traceback" not in err
        assert code in (-number, 128 + number, 1)  # 1: it had ended by itself, as there is no such bundle
        assert not list(tmp_path.iterdir())
    assert 128 + number in ended


def test_nohup_is_respected(tmp_path: Path) -> None:
    """Oracle: a command that is started with SIGHUP ignored runs to its end."""
    words = [
        "sh",
        "-c",
        'trap "" HUP; exec "$@"',
        "sh",
        sys.executable,
        "-m",
        "bdexport",
        "inspect",
        str(tmp_path / "none"),
    ]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
        time.sleep(0.1)  # until the shell has set it
        for _ in range(40):
            if process.poll() is None:
                process.send_signal(signal.SIGHUP)
            time.sleep(0.02)
        _, err = process.communicate(timeout=20)
    assert process.returncode == 1
    assert "no such bundle" in err


def test_a_closed_pipe_is_quiet() -> None:
    """Oracle: nothing on stderr when the reader of stdout has gone."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [*BDEXPORT, "--help"], stdout=writer, stderr=subprocess.PIPE, text=True, check=False, timeout=60
        )
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, which Linux has")
def test_a_full_disk_under_stdout_is_one_line() -> None:
    """Oracle: Linux's /dev/full, where every write fails with ENOSPC."""
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*BDEXPORT, "--version"], stdout=full, stderr=subprocess.PIPE, text=True, check=False, timeout=60
        )
    assert (done.returncode, done.stderr) == (1, "bdexport: error: no space left; free some space\n")


def test_usage_errors_name_the_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the command whose help answers the question."""

    def doctor(count: int) -> None:
        raise AssertionError(count)

    commands: dict[str, Any] = {"doctor": doctor}
    monkeypatch.setattr(app, "_command", commands.__getitem__)
    assert cli.main(["doctor", "many"]) == 2
    shown = capsys.readouterr().err
    assert "(see 'bdexport doctor --help')" in shown
    assert shown.count("\n") == 1


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams(tmp_path: Path, closed: str) -> None:
    """Oracle: exit codes and files are those of a command whose streams are open; no traceback."""
    line = f'"{sys.executable}" -m bdexport zoo --json "{tmp_path / "zoo.json"}" {closed}'
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "zoo.json").stat().st_size > 1000
    line = line.replace("zoo ", "nonsense ", 1)
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_json_to_a_closed_stdout_is_refused(tmp_path: Path) -> None:
    """Oracle: the result would be lost, so that exit code and line say so before the work."""
    line = f'"{sys.executable}" -m bdexport zoo --json - >&-'
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert "stdout is closed; name a file" in done.stderr


def test_an_ascii_terminal_prints_any_name(tmp_path: Path) -> None:
    """Oracle: the error line's escape, in the POSIX locale without Python's help and with PYTHONIOENCODING=ascii."""
    posix = {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    for environment in (posix, {"PYTHONIOENCODING": "ascii"}):
        done = call("inspect", str(tmp_path / "gr\u00fcn"), **environment)
        assert done.returncode == 1
        assert "no such bundle" in done.stderr
        assert "\\" in done.stderr


@pytest.mark.parametrize(
    ("version", "said"),
    [
        ("1.0.0", "onnx 1.0.0 is too old, 1.18 or newer is needed; pip install --upgrade"),
        ("999.0", "onnx 999.0 is installed, but cannot be used (cannot import name"),
    ],
)
def test_a_package_that_is_there_is_not_called_missing(tmp_path: Path, version: str, said: str) -> None:
    """Oracle: the version in the package's metadata against the bound in ours."""
    if importlib.util.find_spec("torch") is None:
        pytest.skip("torch is not installed, and is missed first")
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "__init__.py").write_text("")
    information = tmp_path / f"onnx-{version}.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: onnx\nVersion: {version}\n")
    (information / "top_level.txt").write_text("onnx\n")
    search = os.pathsep.join([str(tmp_path), str(Path(bdexport.__file__).parents[1])])
    done = call("export", "zoo:resnet20-digits", "--out", str(tmp_path / "graphs"), PYTHONPATH=search)
    assert done.returncode == 1
    assert said in done.stderr
    assert "not installed" not in done.stderr


def test_warnings_name_the_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: the file that the thread is decoding; the text stays one line, without control characters."""
    from bdexport import preprocess

    preprocess._reading.path = tmp_path / "odd.tif"
    try:
        cli._show_warning("Metadata\nis \x1b bad", UserWarning, "TiffImagePlugin.py", 5)
    finally:
        preprocess._reading.path = None
    said = capsys.readouterr().err
    assert said == f"bdexport: warning: {tmp_path / 'odd.tif'}: Metadata is \\x1b bad (UserWarning)\n"
