"""Processes forked from one that has loaded a bundle: threads are not in them, and what waits for a thread hangs.

A fork copies a process's memory and the one thread that called it. Two things hang then for ever (measured, Linux):
handing work to a pool of the parent's, and destroying an ONNX Runtime session with threads or anything of OpenVINO's,
which waits for threads that are not there; Python destroys both when the child ends, whether or not it ever used them.
So what a session says here is never destroyed in a forked process; the operating system takes the memory back.
"""

from __future__ import annotations

import ctypes
import os
import threading
from weakref import WeakSet

from bdexport.errors import UsageError

LOAD_IN_WORKERS = "load the bundle in each worker, after the fork"


class KeptInForks:
    """Base of what must not be destroyed in a process forked from the one that made it; its attributes are kept."""

    def __new__(cls, *_arguments: object, **_named: object) -> KeptInForks:
        made = super().__new__(cls)
        _kept.add(made)
        return made


_kept: WeakSet[KeptInForks] = WeakSet()


def _keep() -> None:
    """Called in the child: one more reference to everything that the kept objects refer to, which nobody gives up."""
    for made in list(_kept):
        # The attributes and not the object alone: close() lets go of them.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(dict(vars(made))))


_inside: dict[object, int] = {}  # what is inside a library's code at this moment, and the thread it is in
_cut = False


class Inside:
    """While it is entered, forks know that this thread is inside a library. A class: a call may take microseconds."""

    __slots__ = ()

    def __enter__(self) -> None:
        _inside[self] = threading.get_ident()

    def __exit__(self, *_error: object) -> None:
        _inside.pop(self, None)


def _remember() -> None:
    """Called in the child: whether another thread was inside a library, whose locks then stay locked for ever."""
    global _cut
    _cut = _cut or any(thread != threading.get_ident() for thread in _inside.values())
    _inside.clear()


if hasattr(os, "register_at_fork"):  # no system without fork has it
    os.register_at_fork(after_in_child=_keep)
    os.register_at_fork(after_in_child=_remember)


def was_cut() -> bool:
    """Whether this process was forked while another thread was inside a library."""
    return _cut


def forked_error(what: str, why: str, *, more: str = "") -> UsageError:
    """What is raised for a session that a forked process cannot use."""
    said = f"{what}: used in a process forked from the one that loaded it, {why}"
    return UsageError(said, remedy=LOAD_IN_WORKERS + more)


_pools: dict[str, tuple[int, int]] = {}  # by library: the process that began its threads, and how many


def note_pool(library: str, threads: int, *, one_waits_too: bool = False) -> None:
    """To be called before a library is used with so many threads, for which it makes one pool per process.

    Raises UsageError in a process forked from one where there is such a pool: the library would wait for ever for
    threads that a fork does not copy. ``one_waits_too``: even where one thread is asked for.
    """
    process, begun = _pools.get(library, (os.getpid(), threads))
    if process != os.getpid() and (threads > 1 or one_waits_too):
        raise UsageError(
            f"{library}: no bundle can be loaded with threads={threads} in a process forked from one that used "
            f"{begun}: its pool of {begun} threads is not copied, and {library} would wait for it",
            remedy=f"{LOAD_IN_WORKERS}, before one is loaded in the parent; or start workers by 'spawn'"
            + ("" if one_waits_too else "; or pass threads=1"),
        )
    if threads > 1:
        _pools[library] = (os.getpid(), threads)
