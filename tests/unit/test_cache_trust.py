"""A cache that somebody else could have filled is not used: its engines would run as this user's own.

Owners other than root can only be given by root; these cases are skipped for everybody else.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tiny import tiny_checkpoint_file

from bdexport import files
from bdexport.build import build_bundle
from bdexport.config import BuildConfig
from bdexport.engine_cache import EngineCache
from bdexport.errors import OutputError
from bdexport.files import UntrustedError, cache_folder, check_trusted, make_cache

pytestmark = pytest.mark.skipif(not hasattr(os, "geteuid"), reason="no owners and modes on this system")
SOMEBODY = 12345
needs_root = pytest.mark.skipif(getattr(os, "geteuid", lambda: 1)() != 0, reason="only root can give files away")


@pytest.mark.parametrize(
    ("mode", "trusted"), [(0o700, True), (0o755, True), (0o1777, True), (0o775, False), (0o777, False), (0o757, False)]
)
def test_a_folder_that_others_can_write_to(tmp_path: Path, mode: int, trusted: bool) -> None:
    """Oracle: POSIX's own rules for who can put a file there, or put one in the place of this user's."""
    folder = tmp_path / "cache"
    folder.mkdir()
    folder.chmod(mode)
    if trusted:
        assert cache_folder(folder) == (folder, "")
        return
    with pytest.raises(UntrustedError, match=rf"other users can write to it \(mode {mode:o}\); chmod go-w .*cache"):
        cache_folder(folder)


@needs_root
def test_a_folder_of_somebody_elses(tmp_path: Path) -> None:
    """Oracle: the error names both users, as for root in a container with a mounted folder."""
    folder = tmp_path / "cache"
    folder.mkdir(mode=0o700)
    os.chown(folder, SOMEBODY, -1)
    with pytest.raises(UntrustedError, match=f"belongs to user {SOMEBODY} and this process is user 0; chown"):
        check_trusted(folder)


def test_roots_files_are_trusted_by_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: an image of a container, whose files root has made and whose service is another user."""
    found = os.stat_result((0o40755, 0, 0, 2, 0, 0, 0, 0, 0, 0))
    monkeypatch.setattr(os, "geteuid", lambda: SOMEBODY)
    files.check_owner(tmp_path, found)


def test_a_named_folder_is_an_error_and_the_default_one_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: who names a folder learns at once that it is not used; nobody else has to mend anything."""
    folder = tmp_path / "bdexport"
    folder.mkdir()
    folder.chmod(0o777)
    monkeypatch.setenv(files.CACHE_VARIABLE, str(folder))
    with pytest.raises(OutputError, match="other users can write to it"):
        cache_folder()
    monkeypatch.delenv(files.CACHE_VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    used, why = cache_folder()
    assert used is None
    assert "other users can write to it" in why
    checkpoint = tiny_checkpoint_file(tmp_path / "net.safetensors")
    built = build_bundle(checkpoint, tmp_path / "bundle", config=BuildConfig("null"))
    assert any("other users can write to it" in note and "not kept" in note for note in built.notes)
    assert not list(folder.iterdir())


def test_what_is_made_belongs_to_its_user_alone(tmp_path: Path) -> None:
    """Oracle: the modes, under a umask that lets the group write; what was kept is read again."""
    before = os.umask(0o002)
    try:
        cache = EngineCache(tmp_path / "new" / "cache")
        cache.store("abcd", b"engine")
    finally:
        os.umask(before)
    assert cache.root.stat().st_mode & 0o777 == 0o700
    assert cache.path("abcd").stat().st_mode & 0o777 == 0o600
    assert cache.fetch("abcd") == b"engine"


def test_a_file_that_others_can_write_to_is_not_read(tmp_path: Path) -> None:
    """Oracle: the error, although the folder is open to all as the system's temporary one is."""
    tmp_path.chmod(0o1777)
    cache = EngineCache(tmp_path)
    cache.store("abcd", b"engine")
    assert cache.fetch("abcd") == b"engine"
    cache.path("abcd").chmod(0o666)
    with pytest.raises(UntrustedError, match="other users can write"):
        cache.fetch("abcd")
    if os.geteuid() == 0:
        cache.path("abcd").chmod(0o600)
        os.chown(cache.path("abcd"), SOMEBODY, -1)
        with pytest.raises(UntrustedError, match=f"belongs to user {SOMEBODY}"):
            cache.fetch("abcd")


def test_a_folder_that_somebody_else_has_made_meanwhile(tmp_path: Path) -> None:
    """Oracle: the refusal by the writer too, which looks after it has made the folder."""
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o777)
    with pytest.raises(UntrustedError):
        make_cache(tmp_path / "cache")
