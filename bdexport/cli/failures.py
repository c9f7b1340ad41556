"""What a failure says and how it exits: every exception becomes one line and an exit code."""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any, TextIO, cast

import typer

from bdexport.errors import BdexportError
from bdexport.files import shown, without_controls
from bdexport.packages import install_line

FAILED, WRONG_USAGE = 1, 2
INTERRUPTED, TERMINATED, HUNG_UP = 130, 143, 129  # 128 and the number of SIGINT, SIGTERM, SIGHUP, as a shell says it
ENDED_BY = {INTERRUPTED: "interrupted", TERMINATED: "terminated", HUNG_UP: "hung up"}
# SIGHUP is sent when a terminal is closed; Windows does not have it.
ENDING_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))
RAISED_AGAIN_S = 0.01  # when a signal came where nothing can be raised
LONGEST_LINE, ENDING = 5000, 500  # characters of an error's line; of its end, where it is shortened

EXTRA_OF = {  # module that an optional part needs -> the extra that installs it
    "torch": "build",
    "onnx": "build",
    "ml_dtypes": "build",
    "safetensors": "build",
    "sklearn": "build",
    "tensorboard": "build",
    "matplotlib": "report",
    "onnxruntime": "cpu",
    "openvino": "openvino",
    "tensorrt": "tensorrt",
    "cuda": "gpu",
    "pycuda": "pycuda",
    "tensorrt_rtx": "tensorrt-rtx",
}


@dataclass
class Terminated:
    """Set when SIGTERM or SIGHUP arrived: 128 and the signal's number, as a shell says it."""

    exit_code: int | None = None


@contextmanager
def terminable() -> Iterator[Terminated]:
    """Inside, SIGTERM and SIGHUP are a KeyboardInterrupt: whatever Ctrl-C cleans up is cleaned up for them too.

    A signal that is ignored stays ignored: ``nohup`` starts a command so that SIGHUP does not end it. Python prints and
    drops what is raised in a finaliser or in a weak reference's callback, which imports have: the signal is sent again.
    """
    state = Terminated()
    if threading.current_thread() is not threading.main_thread():  # signals belong to the main thread
        yield state
        return
    owner = os.getpid()

    def interrupt(number: int, _frame: FrameType | None) -> None:
        if os.getpid() != owner:  # a worker forked from here just ends; its parent cleans up
            os._exit(128 + number)
        state.exit_code = 128 + number
        raise KeyboardInterrupt

    def dropped(what: sys.UnraisableHookArgs) -> None:
        if not issubclass(what.exc_type, KeyboardInterrupt):
            hook(what)
            return
        number = signal.SIGINT if state.exit_code is None else state.exit_code - 128
        again = threading.Timer(RAISED_AGAIN_S, _signal_main_thread, (number,))
        again.daemon = True
        again.start()

    heard = [number for number in ENDING_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, interrupt) for number in heard}
    hook, sys.unraisablehook = sys.unraisablehook, dropped
    try:
        yield state
    finally:
        sys.unraisablehook = hook
        for number, handler in before.items():
            signal.signal(number, handler)


def _signal_main_thread(number: int) -> None:
    """Send a signal so that it ends what the main thread waits for."""
    if hasattr(signal, "pthread_kill"):
        signal.pthread_kill(threading.main_thread().ident or 0, number)
    else:  # Windows
        signal.raise_signal(number)


def explain(error: BaseException) -> tuple[str | None, int]:
    """The line for stderr (None: say nothing) and the exit code of whatever ended a command."""
    if isinstance(error, SystemExit):
        return None, _exit_code(error)
    if isinstance(error, KeyboardInterrupt | typer.Abort):
        return None, INTERRUPTED  # main says which signal it was
    if isinstance(error, BrokenPipeError):  # `bdexport inspect B | head -1`: the reader has what it wanted
        return None, FAILED
    if isinstance(error, BdexportError):
        return _line(str(error)), error.exit_code
    if hasattr(error, "format_message"):  # a usage error of Typer's, under whatever name this version gives it
        return _usage_line(error), WRONG_USAGE
    return _line(_describe(error)), FAILED


def _describe(error: BaseException) -> str:
    module = (error.name or "").partition(".")[0] if isinstance(error, ImportError) else ""
    if module in EXTRA_OF:
        return _describe_import(module, error)
    if _is_out_of_memory(error):
        return f"out of memory ({type(error).__name__}: {error}); use a smaller batch or fewer jobs"
    if isinstance(error, OSError) and error.strerror:
        return _describe_os_error(error)
    from bdexport.requirements import all_outdated  # reads packages' metadata: not at every start

    internal = f"internal error ({type(error).__name__}: {error})"
    if too_old := all_outdated():  # the likely cause, whatever the error is: nobody tested these versions
        return f"{too_old[0]}; {too_old[0].remedy} ({internal})"
    return f"{internal}; run again with --debug and report the traceback"


def _describe_import(module: str, error: BaseException) -> str:
    """A package that is not there, is too old, or is there and cannot be imported: three remedies."""
    from bdexport.requirements import installed_version, outdated, package_of

    package = package_of(module)
    absent = isinstance(error, ModuleNotFoundError) and error.name == module
    if absent or installed_version(package) is None:
        return f"this needs {module}, which is not installed; {install_line(EXTRA_OF[module])}"
    if (too_old := outdated(package)) is not None:
        return f"{too_old}; {too_old.remedy} ({error})"
    version = installed_version(package)
    return f"{package} {version} is installed, but cannot be used ({error}); pip install --force-reinstall {package}"


def _describe_os_error(error: OSError) -> str:
    where = f"{shown(error.filename)}: " if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{where}no space left; free some space"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{where}no permission ({error.strerror}); choose another place"
    return f"{where}{error.strerror}"


def _is_out_of_memory(error: BaseException) -> bool:
    # torch has its own types for it, which cannot be named without importing torch.
    names = {kind.__name__ for kind in type(error).__mro__}
    return bool(names & {"MemoryError", "OutOfMemoryError"}) or "can't allocate memory" in str(error)


def _usage_line(error: BaseException) -> str:
    message: str = error.format_message()  # type: ignore[attr-defined]
    context = getattr(error, "ctx", None)
    command = getattr(context, "command_path", None) or "bdexport"
    return f"{_line(message)} (see '{command} --help')"


def _line(text: str) -> str:
    one_line = without_controls(" ".join(part.strip() for part in text.splitlines() if part.strip()))
    if len(one_line) > LONGEST_LINE:  # a text out of a damaged file; the remedy stands at the end
        left_out = len(one_line) - LONGEST_LINE
        one_line = f"{one_line[: LONGEST_LINE - ENDING]} .. ({left_out} characters left out) .. {one_line[-ENDING:]}"
    return "bdexport: error: " + one_line


def _exit_code(error: SystemExit) -> int:
    if error.code is None:
        return 0
    return error.code if isinstance(error.code, int) else FAILED


def open_closed_streams() -> None:
    """Give a process without stdin, stdout or stderr (a daemon, ``>&-``) the null device in their place.

    Python has None for a stream that was closed when it started. Worse, the next file that is opened would get the free
    number 1 or 2, and whatever a library prints would be written into that file.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:  # files are opened at the smallest free number, and the smaller ones are taken by now
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115


def is_discarded(stream: TextIO) -> bool:
    """Whether :func:`open_closed_streams` has put the null device in the place of this stream."""
    return getattr(stream, "name", None) == os.devnull


def discard_stdout_if_broken() -> None:
    """Point stdout nowhere when it cannot be written; otherwise the interpreter complains once more at exit."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.close(nowhere)


class EscapingStream:
    """A text stream that shows control characters as escapes: what a terminal would obey becomes ordinary text.

    File names, class names and the exceptions of libraries may hold any character. Everything that is printed passes
    through here except what Rich writes, whose colours and cursor movements are codes that a terminal shall obey; the
    texts that Rich is given are escaped by :class:`bdexport.cli.console.WideConsole`.
    """

    def __init__(self, stream: TextIO) -> None:
        self.rich_proxied_file = stream  # the attribute in which Rich looks for the stream to write to

    def write(self, text: str) -> int:
        """Write ``text``, escaped; returns the number of characters of ``text``."""
        self.rich_proxied_file.write(without_controls(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write every line, escaped."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.rich_proxied_file, name)


@contextmanager
def escaping_streams() -> Iterator[None]:
    """Inside, everything that Python code prints to stdout or stderr passes through an :class:`EscapingStream`."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (cast(TextIO, EscapingStream(stream)) for stream in before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
