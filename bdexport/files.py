"""Files that are either whole or not there: atomic writes, folders that appear at once, hashes.

What is being written has a hidden sibling's name, ``.NAME.HOST-PID-START.XXXX.partial``, which says whose it is: a
process that was killed leaves it, and the next one that writes into that folder removes it (:func:`remove_stale`).
Scratch that is needed on the way is named in the same manner (:func:`scratch_folder`).
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import platform
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from bdexport.errors import OutputError, UsageError

try:
    import fcntl
except ImportError:  # no Unix
    fcntl = None  # type: ignore[assignment]

PROCESS_STATUS = Path("/proc/self/status")  # Linux: has a line with the umask
CACHE_VARIABLE = "BDEXPORT_CACHE"
PARTIAL, OLD = ".partial", ".old"  # being written; replaced, until the new one has the name
SMALL_READ = 2**20  # bytes
MOST_SHOWN = 1000  # characters of a path in a message
# Linux's constants AT_FDCWD and RENAME_EXCHANGE, and what renameat2 says where it or this flag is not offered.
_HERE, _EXCHANGE = -100, 2
_NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM)
SHOWN_NAME = 40  # characters of the whole's name in a partial's: names have limits
_OWNED = re.compile(
    r"\..+\.(?P<host>[0-9a-f]{10})-(?P<pid>\d{1,10})(-(?P<start>\d{1,20}))?(\.[a-z0-9_]+)?(\.partial|\.old)"
)


def default_cache_folder() -> Path:
    """``$BDEXPORT_CACHE``, or ``bdexport`` in ``$XDG_CACHE_HOME``, or ``~/.cache/bdexport``; may be deleted at will.

    Raises :class:`OutputError` for a user who has no home folder, as in many containers: who can do without a cache
    goes on, and says so. Raises :class:`UntrustedError` as :func:`check_trusted`.
    """
    if named := os.environ.get(CACHE_VARIABLE):
        return check_trusted(Path(named))
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if base.is_absolute():  # the XDG specification has relative values ignored
        return check_trusted(base / "bdexport")
    try:
        home = Path.home()
    except RuntimeError as error:  # neither $HOME nor an entry in the system's list of users
        remedy = f"set {CACHE_VARIABLE} to a folder that can be written"
        raise OutputError("no folder for a cache: this user has no home folder", remedy=remedy) from error
    return check_trusted(home / ".cache" / "bdexport")


def cache_folder(named: str | Path | None = None) -> tuple[Path | None, str]:
    """The cache to use and "", or None and the reason why the default one cannot be used, for who can do without.

    ``named``: instead of the default. Raises :class:`UntrustedError` for a folder that was named, here or in
    ``$BDEXPORT_CACHE``.
    """
    try:
        return check_trusted(Path(named)) if named is not None else default_cache_folder(), ""
    except OutputError as error:
        if named is not None or os.environ.get(CACHE_VARIABLE):
            raise
        return None, str(error)


class UntrustedError(OutputError):
    """Somebody else could have put files into a cache: they would be run as if they were this user's own."""


def check_trusted(path: Path) -> Path:
    """``path``, a cache's folder or file, where only this user or root can have written it, or where nothing is.

    Raises :class:`UntrustedError` otherwise. A sticky folder may be open to all, as a system's temporary one: each file
    in it is asked for its own owner. Windows has no such owners and modes, and nothing is checked there.
    """
    try:
        found = os.stat(path)
    except (OSError, ValueError):  # not there, or not to be reached: reading and writing say so themselves
        return path
    check_owner(path, found)
    return path


def check_owner(path: Path, found: os.stat_result) -> None:
    """:func:`check_trusted` for what is open already."""
    if not hasattr(os, "geteuid"):
        return
    user, name = os.geteuid(), shown(path)
    others = f"choose another folder with {CACHE_VARIABLE}"
    if found.st_uid not in (user, 0):
        what = f"{name}: the cache is not used, since it belongs to user {found.st_uid} and this process is user {user}"
        raise UntrustedError(what, remedy=f"chown it to user {user} (chown -R {user} {name}), or {others}")
    if found.st_mode & 0o022 and not (stat.S_ISDIR(found.st_mode) and found.st_mode & stat.S_ISVTX):
        what = f"{name}: the cache is not used, since other users can write to it (mode {found.st_mode & 0o7777:o})"
        raise UntrustedError(what, remedy=f"chmod go-w {name}, if all in it is yours, or {others}")


def make_cache(folder: Path) -> None:
    """Make a cache's folder, for this user alone, where it is missing.

    Raises :class:`OutputError`, and :class:`UntrustedError` where somebody else has been faster.
    """
    with _reported(usable_path(folder)):
        if not folder.is_dir():
            folder.parent.mkdir(parents=True, exist_ok=True)
            folder.mkdir(mode=0o700, exist_ok=True)
    check_trusted(folder)


@contextmanager
def _reported(path: Path) -> Iterator[None]:
    """Map the operating system's refusals to one clear sentence about ``path``."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutputError(f"{shown(path)}: no space left; nothing was written", remedy="free some space") from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise OutputError(
                f"{shown(path)}: cannot be written ({error.strerror})", remedy="choose another place"
            ) from error
        if error.errno in (errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG):
            raise OutputError(
                f"{shown(path)}: cannot be written ({error.strerror})", remedy="choose another name"
            ) from error
        if error.errno == errno.ENOENT:  # of the kernel's own file systems, say
            cause = "no file can be made there" if path.parent.is_dir() else "its folder cannot be made"
            what = f"{shown(path)}: {cause} ({error.strerror})"
            raise OutputError(what, remedy="choose another place") from error
        raise


def refuse_existing(path: Path, overwrite: bool) -> None:
    """Raise :class:`OutputError` where ``path`` exists and nobody asked to replace it; for use before long work."""
    if usable_path(path).exists() and not overwrite:
        raise OutputError(f"{path}: exists already", remedy="choose another name, or pass --overwrite to replace it")


def write_bytes(path: Path, data: bytes, *, private: bool = False) -> None:
    """Write ``data`` as :func:`writing` does: a crash leaves the old file or the new one, never a part."""
    with writing(path, private=private) as partial:
        partial.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """:func:`write_bytes` for UTF-8 text."""
    write_bytes(path, text.encode())


def write_json(path: Path, data: Any) -> None:
    """Write JSON (indented, no NaN) atomically."""
    write_text(path, json.dumps(data, indent=2, allow_nan=False) + "\n")


def utf8_name(name: str | Path) -> str:
    """A file's name as UTF-8 can hold it: each byte that is no UTF-8 becomes its escape, always the same."""
    return str(name).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def check_writable(path: Path) -> None:
    """Raise :class:`OutputError` where a file ``path`` could not be written; for use before long work. Leaves nothing.

    Folders that are missing would be made. A disk that fills up meanwhile is found by the writing itself.
    """
    with _reported(usable_path(path)):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        _try_beside(path)


def check_new_folder(path: Path, overwrite: bool = False) -> None:
    """Raise :class:`OutputError` where :func:`making_folder` could not make ``path``; for use before long work.

    Leaves nothing, as :func:`check_writable`.
    """
    path = usable_path(path).absolute()
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise OutputError(f"{path}: exists and is not a folder", remedy="choose another name")
    with _reported(path):
        if path.is_dir() and any(path.iterdir()) and not overwrite:
            raise OutputError(
                f"{path}: exists already", remedy="choose another name, or pass --overwrite to replace it"
            )
        _try_beside(path)


def _try_beside(path: Path) -> None:
    """Raise OSError where nothing could be written beside ``path``, which may be in folders that are missing."""
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
    if not path.exists() or not _is_special(path):
        # Asked of the file system: permissions, read-only mounts and file systems of the kernel's own all count.
        with tempfile.TemporaryFile(dir=folder):
            pass


def _is_special(path: Path) -> bool:
    """Whether it is a device, a pipe or a socket, which is written to and never replaced."""
    return path.exists() and not path.is_file() and not path.is_dir()


@contextmanager
def scratch_folder(beside: Path) -> Iterator[Path]:
    """Yield an empty hidden folder beside ``beside``, named after it, which is gone when the block ends.

    A process that is killed inside leaves it, and the next one that writes beside ``beside`` removes it
    (:func:`remove_stale`). Where the folder's name is no UTF-8, which libraries need (:func:`native_path`), it is in
    the system's temporary folder, with a name of the same form.
    """
    with _partial_folder(beside if is_utf8(beside) else _without_output()) as folder:
        yield folder


@contextmanager
def _partial_folder(beside: Path) -> Iterator[Path]:
    with _reported(beside):
        beside.parent.mkdir(parents=True, exist_ok=True)
        remove_stale(beside.parent)
        folder = Path(tempfile.mkdtemp(prefix=f"{_owned_name(beside)}.", suffix=PARTIAL, dir=beside.parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _without_output() -> Path:
    """What stands for the output where there is none on a disk: scratch goes to the system's temporary folder.

    The next process that does the same sweeps it.
    """
    return Path(tempfile.gettempdir(), "bdexport")


@contextmanager
def writing(path: Path, *, private: bool = False) -> Iterator[Path]:
    """Yield a sibling of ``path`` to write to; it takes the name ``path`` when the block ends without an exception.

    A device or a pipe (``/dev/stdout``) is written to, never replaced. ``private``: only its owner may read or write
    the file, whatever the umask allows.
    """
    with _reported(usable_path(path)):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if _is_special(path):
            with scratch_folder(_without_output()) as folder:
                yield folder / "whole"
                with open(path, "wb") as special:
                    special.write((folder / "whole").read_bytes())
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_stale(path.parent)
        handle, name = tempfile.mkstemp(prefix=f"{_owned_name(path)}.", suffix=PARTIAL, dir=path.parent)
        os.close(handle)
        partial = Path(name)
        try:
            yield partial
            _sync(partial)
            if not private:
                os.chmod(partial, 0o666 & ~_umask(partial.parent))
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


@contextmanager
def making_folder(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty sibling folder; it takes the name ``path`` when the block ends without an exception.

    An existing ``path`` is refused with :class:`OutputError` unless ``overwrite`` is set (or it is an empty folder);
    the old folder stays in place until the new one is complete.
    """
    path = usable_path(path).absolute()
    remove_stale(path.parent)
    check_new_folder(path, overwrite)
    with _reported(path), _partial_folder(path) as staging:
        yield staging
        os.chmod(staging, 0o777 & ~_umask(path.parent))
        for file in sorted(staging.rglob("*")):
            if file.is_file():
                _sync(file)
        if overwrite:
            _swap(staging, path)
        else:
            _claim(staging, path)


@contextmanager
def holding(folder: Path) -> Iterator[None]:
    """Keep ``folder``, which is made if it is missing, from other processes that ask for it by this function.

    Raises :class:`OutputError` where one holds it. The hold ends with the process, however that ends. Systems without
    ``flock`` and file systems that do not support it do without.
    """
    with _reported(usable_path(folder)):
        folder.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        yield
        return
    with _reported(folder):
        handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            remedy = "wait until it ends, or choose another folder"
            raise OutputError(f"{folder}: another process is at work in it", remedy=remedy) from None
        except OSError:  # no locks on this file system
            pass
        yield
    finally:
        os.close(handle)


def _claim(staging: Path, path: Path) -> None:
    """Give ``staging`` the name ``path``, which must be free or an empty folder: another may have been faster."""
    try:
        os.rename(staging, path)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        remedy = "choose another name, or pass --overwrite to replace it"
        raise OutputError(f"{path}: has been made by somebody else meanwhile", remedy=remedy) from error


def _swap(staging: Path, path: Path) -> None:
    """Give ``staging`` the name ``path``; whatever happens on the way (Ctrl-C included), one of the two is there.

    Where the system can exchange two names, ``path`` is never missing, and ``staging`` is the old folder afterwards.
    """
    if not path.exists():
        os.rename(staging, path)
        return
    if _exchange(staging, path):
        return
    old = path.with_name(f".{path.name}.{_owner()}{OLD}")  # the whole name: a kill may leave it alone
    try:
        os.rename(path, old)
        os.rename(staging, path)
    finally:
        if old.exists() and not path.exists():
            os.rename(old, path)
        shutil.rmtree(old, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange the names of two folders in one step; False where the system or the file system cannot: all but Linux.

    Raises OSError where they must not be renamed.
    """
    import ctypes  # here, since few commands write folders

    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):  # another system, or an older C library
        return False
    if rename(_HERE, os.fsencode(one), _HERE, os.fsencode(other), ctypes.c_uint(_EXCHANGE)) == 0:
        return True
    code = ctypes.get_errno()
    if code in _NO_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), str(other))


def remove_stale(folder: Path) -> None:
    """Remove what processes of this machine that are dead left half-written in ``folder``; everything else stays.

    A folder that was being replaced gets its name back where the kill came before the new one had it. What cannot be
    removed, or belongs to another machine (or to a container with process numbers of its own), is left alone.
    """
    with suppress(OSError):
        for name in os.listdir(folder):
            owner = _OWNED.fullmatch(name)
            if owner is not None and owner["host"] == _host() and _is_dead(int(owner["pid"]), owner["start"]):
                _remove(folder / name)


def _remove(leftover: Path) -> None:
    name = leftover.name.removeprefix(".").rpartition(f".{_host()}-")[0]
    if leftover.suffix == OLD and not os.path.lexists(leftover.with_name(name)):
        os.rename(leftover, leftover.with_name(name))
    elif leftover.is_dir() and not leftover.is_symlink():
        shutil.rmtree(leftover, ignore_errors=True)
    else:
        leftover.unlink(missing_ok=True)


def _owned_name(path: Path) -> str:
    return f".{path.name[:SHOWN_NAME]}.{_owner()}"


def _owner() -> str:
    """The process as names of partials have it: the machine, its number and, where that is known, its start."""
    start = _start(os.getpid())
    return f"{_host()}-{os.getpid()}" + ("" if start is None else f"-{start}")


def _start(pid: int) -> str | None:
    """When a process began, in clock ticks since the machine did; None where the system does not say.

    Numbers of processes are given again, soon so in containers; a number together with its start is not.
    """
    try:
        # Field 22 of proc(5); the second one, the program's name in parentheses, may have spaces and parentheses.
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[19].decode()
    except (OSError, IndexError):
        return None


@cache
def _host() -> str:
    """Where a process's number means something: ten hexadecimal digits for the machine and the number's namespace."""
    facts = [platform.node()]
    with suppress(OSError):
        facts.append(Path("/etc/machine-id").read_bytes().hex())
    with suppress(OSError):
        facts.append(os.readlink("/proc/self/ns/pid"))
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:10]


def _is_dead(pid: int, start: str | None) -> bool:
    """Whether no process has this number, or one that began at another time than ``start``; in doubt, it lives."""
    if os.name != "posix":  # where asking is killing
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):  # somebody else's, for one
        pass
    return start is not None and _start(pid) not in (start, None)


def usable_path(path: str | Path) -> Path:
    """``path`` as a :class:`Path`, for what a caller names; whether anything is there is another question.

    Raises :class:`UsageError` for a name that no file can have: too long for the system, or with a NUL character.
    """
    path = Path(path)
    try:
        os.lstat(path)
    except ValueError as error:  # a NUL character, or half of a surrogate pair
        raise UsageError(f"{shown(path)}: no file can have this name ({error})", remedy="check the path") from error
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            got = f"{len(os.fsencode(path))} bytes"
            raise UsageError(f"{shown(path)}: {error.strerror}", got=got, remedy="check the path") from error
    return path


class _Reader(io.BufferedReader):
    """Asked for more bytes than the file has, as a length inside a damaged file may be, it takes no memory for them."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > SMALL_READ:
            size = min(size, max(SMALL_READ, os.fstat(self.fileno()).st_size - self.tell()))
        return super().read(size)


@contextmanager
def open_regular(path: Path) -> Iterator[io.BufferedReader]:
    """A regular file, open for reading bytes. It never waits, as opening a FIFO would.

    Raises OSError, whose ``strerror`` says so, for everything else: a folder, a FIFO, a socket, a device; also for a
    name that no file can have.
    """
    try:
        _check_regular(os.stat(path).st_mode, path)  # before opening: that alone makes some devices act
        flags = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        handle = os.open(path, flags)
    except ValueError as error:  # a NUL character, or half of a surrogate pair
        raise OSError(errno.EINVAL, f"no file can have this name: {error}", str(path)) from error
    with _Reader(io.FileIO(handle, "rb")) as file:
        _check_regular(os.fstat(handle).st_mode, path)
        yield file


def _check_regular(mode: int, path: Path) -> None:
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))


def read_bytes(path: Path, most: int) -> bytes:
    """The bytes of a regular file that has at most ``most``. Raises OSError, also for a larger one and other kinds."""
    with open_regular(path) as file:
        data = file.read(most + 1) if os.fstat(file.fileno()).st_size <= most else b""
        if len(data) > most or os.fstat(file.fileno()).st_size > most:
            raise OSError(errno.EFBIG, f"larger than {most / 2**20:g} MiB", str(path))
    return data


def shown(path: Path | str) -> str:
    """A file's name on one line, with an escape for what a terminal would obey instead of printing it.

    A name that is longer than any file's is cut in the middle.
    """
    text = str(path)
    if len(text) > MOST_SHOWN:
        text = f"{text[: MOST_SHOWN // 4]}..{text[-MOST_SHOWN // 4 :]}"
    return without_controls(text).replace("\t", "\\t").replace("\n", "\\n")


# Control characters but for the tab and the line feed, the separators of lines and paragraphs, embeddings and
# overrides of the direction of writing, and halves of surrogate pairs: what bdexport.class_names refuses, too.
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def without_controls(text: str) -> str:
    """``text`` with an escape, such as backslash x1b, for every character that a terminal obeys instead of showing it.

    A tab and the end of a line stay as they are. Also escaped: what turns the direction of the text that follows.
    """
    return CONTROLS.sub(lambda found: ascii(found[0])[1:-1], text)


@contextmanager
def native_path(path: Path) -> Iterator[str]:
    """The name under which a library that takes UTF-8 only opens the file ``path``: its own, or a link's while inside.

    Names on disk are bytes. Python opens any of them; libraries in C++ and Rust are given UTF-8, which is another name
    where these bytes are none, or where the locale has Python read them in another encoding.
    """
    if is_utf8(path):
        yield str(path)
        return
    with scratch_folder(_without_output()) as folder:
        link = Path(folder, f"linked{path.suffix}" if is_utf8(Path(path.suffix)) else "linked")
        link.symlink_to(path.absolute())
        yield str(link)


def is_utf8(path: Path) -> bool:
    """Whether the name's bytes on disk are the UTF-8 of its text."""
    return os.fsencode(path) == str(path).encode(errors="surrogatepass")


def utf8_text(text: str) -> str:
    """``text`` with what is no character (a byte of a file name that is no UTF-8) as an escape: backslash, udcff."""
    return text.encode(errors="backslashreplace").decode()


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a regular file's bytes. Raises OSError, also for what is no regular file."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _umask(folder: Path) -> int:
    """The process's umask, which is only read: ``os.umask`` would change it for a moment, for every thread.

    Where the system does not tell it, a file that is made in ``folder`` for a moment does.
    """
    with suppress(OSError):
        for line in PROCESS_STATUS.read_text().splitlines():
            if line.startswith("Umask:"):
                return int(line.split()[1], 8)
    probe = folder / f"{_owned_name(Path('umask'))}.{secrets.token_hex(4)}{PARTIAL}"
    handle = os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o777)
    try:
        return 0o777 & ~stat.S_IMODE(os.fstat(handle).st_mode)
    finally:
        os.close(handle)
        probe.unlink()
