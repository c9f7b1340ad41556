"""What is done once in a process, whoever asks first: importing a backend's package and setting it up.

Threads that load their first bundles at once would otherwise see each other's packages half imported, or set up what is
there once per process a second time.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from functools import cache, wraps
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")
_FIRST_USE = threading.RLock()  # one for all: setting up one thing imports another

if hasattr(os, "register_at_fork"):  # no system without fork has it
    # A fork waits for the end of an import that another thread is at: what is half imported never ends in the child.
    os.register_at_fork(
        before=_FIRST_USE.acquire, after_in_parent=_FIRST_USE.release, after_in_child=_FIRST_USE.release
    )


def once(make: Callable[P, T]) -> Callable[P, T]:
    """``make``, called once for each of its arguments: every thread waits for that call and gets what it gave.

    A call that raises is made again by the next.
    """
    made = cache(make)

    @wraps(make)
    def first(*arguments: P.args, **named: P.kwargs) -> T:
        with _FIRST_USE:
            return made(*arguments, **named)  # type: ignore[arg-type]  # each of them is hashable

    return first
