"""Signed bundles: who may load what. Skipped where py-minisign is not installed; errors of ours are tested anyway."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from bundles import make_bundle
from manifests import change_manifest
from signing import new_keys
from tiny import tiny_checkpoint_file, tiny_model

import bdexport
from bdexport import bundle as bundle_module
from bdexport.backends.null import NullBackend
from bdexport.build import build_bundle
from bdexport.bundle import SIGNATURE, open_bundle, read_manifest
from bdexport.cli.main import main
from bdexport.config import BuildConfig
from bdexport.errors import BundleError, UsageError
from bdexport.rebuild import rebuild_bundle
from bdexport.signature import SigningKey


@pytest.fixture
def signed(tmp_path: Path) -> tuple[Path, Path]:
    """A bundle that was signed when it was built, and the public key."""
    public = new_keys(tmp_path / "maker.key")
    checkpoint = tiny_checkpoint_file(tmp_path / "tiny.safetensors")
    out = tmp_path / "bundle"
    build_bundle(checkpoint, out, config=BuildConfig("null"), sign=tmp_path / "maker.key")
    return out, public


def test_a_signed_bundle_loads_by_its_key_and_without_one(signed: tuple[Path, Path]) -> None:
    """Oracle: the package that defines the format, on the bytes on the disk; the key as a file and as its text."""
    bundle, public = signed
    minisign = pytest.importorskip("minisign")
    minisign.PublicKey.from_file(public).verify_file(bundle / "manifest.json")
    text = public.read_text().splitlines()[1]
    for key in (None, public, str(public), text):
        with bdexport.load(bundle, verify_key=key) as loaded:
            assert loaded.manifest == read_manifest(bundle, key)


def test_nothing_of_a_bundle_by_somebody_else_is_parsed(
    signed: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the refusal, with a parser that must not be called; a bundle whose hashes are all true is not enough."""
    bundle, public = signed
    change_manifest(bundle, lambda manifest: manifest.update(name="another"))
    assert open_bundle(bundle).manifest.name == "another"
    stranger = new_keys(tmp_path / "stranger.key")
    SigningKey(tmp_path / "stranger.key").sign(bundle / SIGNATURE, (bundle / "manifest.json").read_bytes())
    assert open_bundle(bundle, stranger).manifest.name == "another"
    monkeypatch.setattr(bundle_module, "parse_document", lambda *_: pytest.fail("parsed"))
    for opened in (bdexport.load, open_bundle, read_manifest):
        with pytest.raises(BundleError, match=r"does not hold \(.*\) \[R19\]"):
            opened(bundle, verify_key=public)
    (bundle / SIGNATURE).unlink()
    with pytest.raises(BundleError, match=r"not signed \[R19\]"):
        bdexport.load(bundle, verify_key=public)


def test_commands_take_the_key(signed: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: every command that opens a bundle loads it by its key, and by another's refuses in one line, with 1."""
    bundle, public = signed
    other = new_keys(tmp_path / "other.key")
    assert main(["inspect", str(bundle), "--verify-key", str(public), "--json", str(tmp_path / "i.json")]) == 0
    assert "signature: holds" in capsys.readouterr().out
    integrity = json.loads((tmp_path / "i.json").read_text())["integrity"]
    assert (integrity["signed"], integrity["signature_checked"]) == (True, True)
    assert main(["inspect", str(bundle)]) == 0
    assert "signature: there, and not checked" in capsys.readouterr().out
    assert main(["profile", str(bundle), "--images", "1", "--rounds", "1", "--verify-key", str(public)]) == 0
    capsys.readouterr()
    for command in ("inspect", "run", "bench", "profile", "verify", "rebuild"):
        more = [str(tmp_path)] if command == "run" else []
        assert main([command, str(bundle), *more, "--verify-key", str(other)]) == 1
        err = capsys.readouterr().err
        assert len(err.splitlines()) == 1
        assert "[R19]" in err


def test_signed_from_the_command_line(tmp_path: Path) -> None:
    """Oracle: the key that it was signed by; an overwritten bundle has the new signature or none, never the old one."""
    public, checkpoint = new_keys(tmp_path / "maker.key"), tiny_checkpoint_file(tmp_path / "tiny.safetensors")
    command = ["build", str(checkpoint), "--backend", "null", "--out", str(tmp_path / "b"), "--overwrite"]
    for more in (["--sign", str(tmp_path / "maker.key")], ["--sign", str(tmp_path / "maker.key")], []):
        assert main([*command, *more]) == 0
        assert (tmp_path / "b" / SIGNATURE).exists() == bool(more)
        if more:
            assert open_bundle(tmp_path / "b", public).manifest.sealed


def test_a_rebuilt_bundle_says_that_it_is_not_signed(tmp_path: Path) -> None:
    """Oracle: the note. New engines have other hashes, and the old signature is not theirs."""
    public, bundle = new_keys(tmp_path / "maker.key"), make_bundle(tmp_path / "b", tiny_model())
    SigningKey(tmp_path / "maker.key").sign(bundle.path / SIGNATURE, (bundle.path / "manifest.json").read_bytes())
    made = rebuild_bundle(open_bundle(bundle.path, public), tmp_path / "new")
    assert any("minisign -Sm" in note for note in made.notes)
    with pytest.raises(BundleError, match="not signed"):
        open_bundle(made.path, public)


def test_keys_that_are_none(signed: tuple[Path, Path], tmp_path: Path) -> None:
    """Oracle: UsageError before anything else, which names the key and what to do."""
    bundle, public = signed
    new_keys(tmp_path / "locked.key", password="secret")
    (tmp_path / "zeros").write_bytes(bytes(100_000))
    for key in (bundle, tmp_path / "gone.pub", tmp_path / "maker.key", tmp_path / "zeros", "RW" + "A" * 53):
        with pytest.raises(UsageError, match="expected a minisign public key; name the file"):
            bdexport.load(bundle, verify_key=key)
    for key in (bundle, tmp_path / "gone.key", public, tmp_path / "zeros"):
        with pytest.raises(UsageError, match="expected a minisign secret key; make one: minisign -G -W"):
            SigningKey(key)
    with pytest.raises(UsageError, match="a key with a password, expected one without; build without --sign"):
        build_bundle(tmp_path / "nothing", sign=tmp_path / "locked.key")
    with pytest.raises(UsageError, match="verify_key has no effect on a bundle that is open"):
        bdexport.load(open_bundle(bundle), verify_key=public)


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the line that installs it; a bundle is not loaded unchecked in its absence."""
    monkeypatch.setitem(sys.modules, "minisign", None)
    bundle = make_bundle(tmp_path / "b", tiny_model(), NullBackend()).path
    for act in (lambda: bdexport.load(bundle, verify_key="KEY.pub"), lambda: SigningKey("KEY")):
        with pytest.raises(UsageError, match=r"py-minisign is not installed; pip install .*sign"):
            act()
    with bdexport.load(bundle):
        pass
