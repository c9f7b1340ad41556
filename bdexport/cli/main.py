"""The command ``bdexport``: the one place where errors become a line and an exit code.

Exit codes: 0 done; 1 the job failed; 2 wrong usage; 130 interrupted (Ctrl-C); 143 terminated (SIGTERM);
129 hung up (SIGHUP: the terminal was closed).
"""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from bdexport.cli.app import DEBUG_VARIABLE, run_line
from bdexport.cli.failures import (
    ENDED_BY,
    INTERRUPTED,
    discard_stdout_if_broken,
    escaping_streams,
    explain,
    open_closed_streams,
    terminable,
)
from bdexport.files import without_controls


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (``sys.argv`` by default) and return the exit code; prints at most one line of error."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)  # see bdexport.__main__
    open_closed_streams()
    arguments, debug = _take_debug(list(sys.argv[1:] if argv is None else argv))
    _print_any_name()
    # Pillow refuses bombs; that it warns of half of one says nothing to who has a camera of 100 megapixels.
    warnings.filterwarnings("ignore", message=r"Image size \(\d+ pixels\) exceeds limit")
    warnings.showwarning = _show_warning
    with escaping_streams(), terminable() as terminated:
        try:
            code = run_line(arguments)
            sys.stdout.flush()
        except BaseException as error:
            text, code = explain(error)
            discard_stdout_if_broken()
            if debug:
                traceback.print_exc()
            _say(text)
        if code == INTERRUPTED:
            code = terminated.exit_code or INTERRUPTED
            _say(f"bdexport: {ENDED_BY[code]}")
    return code


def _take_debug(arguments: list[str]) -> tuple[list[str], bool]:
    """``--debug`` is understood anywhere before ``--``: people add it at the end of the line that failed."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    before = [word for word in arguments[:end] if word != "--debug"]
    debug = len(before) < end or os.environ.get(DEBUG_VARIABLE, "") not in ("", "0")
    return before + arguments[end:], debug


def _print_any_name() -> None:
    """File and class names that the terminal's encoding lacks are printed as escapes, instead of ending the command."""
    for stream in (sys.stdout, sys.stderr):
        # Python writes "surrogateescape" in the locales C and POSIX, where characters beyond ASCII fail all the same.
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="backslashreplace")


def _show_warning(message: Warning | str, category: type[Warning], *_where: Any, **_output: Any) -> None:
    """One line for a warning, with the image that it is about: packages warn without saying which file it is."""
    preprocess = sys.modules.get("bdexport.preprocess")
    path = None if preprocess is None else preprocess.image_being_read()
    about = "" if path is None else f"{path}: "
    _say(f"bdexport: warning: {about}{' '.join(str(message).split())} ({category.__name__})")


def _say(text: str | None) -> None:
    if text:
        with suppress(OSError):  # a full disk or a terminal that is gone: the exit code still says that it failed
            print(without_controls(text), file=sys.stderr, flush=True)
