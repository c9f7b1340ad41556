"""The command ``bdexport``, also as ``python -m bdexport``."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress


def main() -> int:
    """Run the command line of this process and return its exit code, or end the process where a signal ended it."""
    # Until the command handles Ctrl-C, it ends the process at once and without a traceback: nothing has begun.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from bdexport.cli.failures import ENDED_BY
    from bdexport.cli.main import main as run

    code = run()
    if code in ENDED_BY:
        # Everything is cleaned up. Python itself would end with the code of Ctrl-C whatever the signal was, where the
        # signal came in the middle of an import, and would wait for threads first.
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):  # a terminal that is gone
                stream.flush()
        os._exit(code)
    return code


if __name__ == "__main__":
    sys.exit(main())
