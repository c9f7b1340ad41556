"""A detached signature of a manifest, for those who need to know who made a bundle: what hashes alone do not say.

The format is minisign's, whose command-line tool signs and checks the same files (``minisign -Sm manifest.json``,
``minisign -Vm manifest.json -p KEY.pub``). The manifest holds the SHA-256 of every other file, so its signature covers
the bundle. The package ``py-minisign`` is needed only where a bundle is signed or a signature is checked.
"""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path
from typing import Any

from bdexport.bundle_checks import rule_error
from bdexport.errors import UsageError
from bdexport.files import open_regular, write_bytes
from bdexport.packages import install_line

EXTRA = "sign"  # of pyproject.toml
MAX_BYTES = 16 << 10  # of a signature or a key; both have some hundreds
UNTRUSTED = "do not load this bundle, or ask whoever made it for a signature: minisign -Sm BUNDLE/manifest.json"
_PUBLIC_KEY = re.compile(r"RW[A-Za-z0-9+/]{54}")  # the second line of a public key's file


def check_signature(path: Path, document: bytes, verify_key: str | Path) -> None:
    """Check that the signature file ``path`` was made for the bytes ``document`` by the owner of ``verify_key``.

    ``verify_key``: a minisign public key, as a file or as its text (``RW..``, 56 characters). Raises
    :class:`BundleError` (R19) for a signature that is missing, damaged or of another key or document,
    :class:`UsageError` for a key that is none.
    """
    minisign = _minisign()
    key = _public_key(minisign, verify_key)
    if not path.is_file():
        raise rule_error("R19", f"{path.parent}: not signed", expected=f"a file {path.name}", remedy=UNTRUSTED)
    try:
        key.verify(document, minisign.Signature.from_bytes(_read(path)))
    except OSError as error:
        raise rule_error("R19", f"{path}: cannot be read ({error.strerror})", remedy="check its permissions") from error
    except ValueError as error:  # base of the library's own, and what it passes on
        what, expected = f"{path}: does not hold ({error})", "a signature of this manifest by the given key"
        raise rule_error("R19", what, expected=expected, remedy=UNTRUSTED) from error


class SigningKey:
    """A minisign secret key without a password, which is read before long work and not after it."""

    def __init__(self, path: str | Path) -> None:
        """Raises :class:`UsageError` for a file that is no such key."""
        minisign = _minisign()
        try:
            self._key: Any = minisign.SecretKey.from_bytes(_read(Path(path)))
            encrypted = self._key.is_encrypted()
        except (OSError, ValueError) as error:
            remedy = "make one: minisign -G -W -s KEY -p KEY.pub"
            raise _key_error("sign", path, error, "a minisign secret key", remedy) from error
        if encrypted:
            remedy = "build without --sign, then sign it yourself: minisign -Sm BUNDLE/manifest.json -s KEY"
            raise UsageError(f"sign: {path}", got="a key with a password", expected="one without", remedy=remedy)

    def sign(self, path: Path, document: bytes) -> None:
        """Write the signature of the bytes ``document`` to ``path``, atomically."""
        write_bytes(path, bytes(self._key.sign(document)) + b"\n")


def _public_key(minisign: Any, key: str | Path) -> Any:
    try:
        if _PUBLIC_KEY.fullmatch(str(key)):
            return minisign.PublicKey.from_base64(str(key))
        return minisign.PublicKey.from_bytes(_read(Path(key)))
    except (OSError, ValueError) as error:
        remedy = "name the file KEY.pub that `minisign -G` wrote, or the second line of it"
        raise _key_error("verify key", key, error, "a minisign public key", remedy) from error


def _key_error(option: str, key: str | Path, error: Exception, expected: str, remedy: str) -> UsageError:
    got = (error.strerror if isinstance(error, OSError) else None) or "another file"
    return UsageError(f"{option}: {key}", got=got, expected=expected, remedy=remedy)


def _read(path: Path) -> bytes:
    with open_regular(path) as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ValueError(f"larger than {MAX_BYTES} bytes")
    return data


def _minisign() -> Any:
    try:
        return import_module("minisign")
    except ImportError as error:
        raise UsageError("signatures: the package py-minisign is not installed", remedy=install_line(EXTRA)) from error
