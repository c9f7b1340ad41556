"""Keys to sign bundles with, as ``minisign -G -W`` makes them."""

from __future__ import annotations

from pathlib import Path

import pytest


def new_keys(secret: Path, password: str | None = None) -> Path:
    """Write a new secret key to ``secret`` and its public key beside it, NAME.pub; returns the latter's path.

    The test is skipped where the package that signs is not installed.
    """
    minisign = pytest.importorskip("minisign", reason="py-minisign is not installed")
    pair = minisign.KeyPair.generate()
    if password is not None:
        pair.secret_key.encrypt(password, opslimit=1, memlimit=1)
    secret.write_bytes(bytes(pair.secret_key) + b"\n")
    public = secret.with_suffix(".pub")
    public.write_bytes(bytes(pair.public_key) + b"\n")
    return public
