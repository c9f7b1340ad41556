"""The bundle: a folder with a manifest and the parts' graphs and engines; the only thing that build and run share.

The written spec is ``docs/bundle-format.md``; the ids R1, R2.. in the errors are its rules.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path

from bdexport.bundle_checks import (
    DIGEST,
    MAX_MANIFEST_BYTES,
    REBUILD,
    document_sha256,
    parse_document,
    read_document,
    rule_error,
)
from bdexport.errors import BundleError
from bdexport.files import sha256_file, usable_path, write_text
from bdexport.manifest import (
    DTYPE,
    FORMAT_VERSION,
    INPUT_NAME,
    MANIFEST,
    OUTPUT_NAME,
    SIGNATURE,
    FileEntry,
    Manifest,
    PartEntry,
    manifest_from_json,
)
from bdexport.signature import SigningKey, check_signature
from bdexport.zoo import zoo_name

__all__ = [
    "DTYPE",
    "FORMAT_VERSION",
    "INPUT_NAME",
    "MANIFEST",
    "OUTPUT_NAME",
    "SIGNATURE",
    "Bundle",
    "BundleFile",
    "FileEntry",
    "Manifest",
    "PartEntry",
    "file_entry",
    "file_problem",
    "file_problems",
    "manifest_from_json",
    "open_bundle",
    "opened_with_problems",
    "read_manifest",
    "write_manifest",
]

RUN_CHECKPOINT = "model.safetensors"  # ``checkpoint.reading.RUN_FILE``, which this half cannot import (torch)
VOLUME = "..data"  # in a Kubernetes volume, the link to the folder that the files really lie in, "..2026_11_30_.."
# What file managers, editors and download tools leave in every folder that they see.
DROPPINGS = re.compile(
    r"\.DS_Store|\._.*|Thumbs\.db|desktop\.ini|\.directory|__MACOSX|\.ipynb_checkpoints|__pycache__|\.cache|\.gitattributes"
    r"|\.gitignore|\.nfs.*|.*~|\..*\.swp|lost\+found",
    re.IGNORECASE,
)
CHECKPOINT_SUFFIXES = (".safetensors", ".th", ".pt", ".pth", ".t7", ".pth.tar")


@dataclass(frozen=True)
class _Identity:
    """Which folder a bundle was opened from, and the SHA-256 of the bytes of its manifest."""

    device: int
    inode: int
    document: str


@dataclass(frozen=True)
class BundleFile:
    """One file of a bundle for a backend to read. What it gets are always bytes that the manifest's SHA-256 is true of.

    Files are checked by path when a bundle is opened, and read by path afterwards: in between, the folder, a link in it
    or the file itself may have become another. So the bytes that are handed over are themselves hashed.
    """

    root: Path
    entry: FileEntry

    @property
    def path(self) -> Path:
        """Where it is."""
        return self.root / self.entry.path

    def __str__(self) -> str:
        return str(self.path)

    def read_bytes(self) -> bytes:
        """The whole file, read once. Raises :class:`BundleError` where it is not what the manifest says any more."""
        entry = self.entry
        try:
            with open(self.path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                data = file.read(entry.bytes) if size == entry.bytes else b""
        except OSError as error:
            raise _replaced_error(self.root, f"{entry.path} that cannot be read ({error.strerror})") from error
        if size != entry.bytes:
            raise _replaced_error(self.root, f"{entry.path} of {size} bytes", f"{entry.bytes}")
        digest = hashlib.sha256(data).hexdigest()
        if digest != entry.sha256:
            got = f"{entry.path} with SHA-256 {digest[:12]}.."
            raise _replaced_error(self.root, got, f"{entry.sha256[:12]}..")
        return data


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: every file named in the manifest was there and unchanged when it was opened.

    ``identity``: which bundle :meth:`check_in_place` looks for; None for one that was not opened from a folder.
    """

    path: Path
    manifest: Manifest
    identity: _Identity | None = field(default=None, kw_only=True, repr=False, compare=False)

    def check_in_place(self) -> None:
        """Raise :class:`BundleError` where another bundle has taken this one's place since it was opened."""
        if self.identity is not None:
            _check_identity(self.path, self.identity)

    def graph_file(self, part: str) -> BundleFile:
        """The part's ONNX file, to be read by a backend. Raises as :meth:`graph`."""
        return BundleFile(self.path, self._entry(part, "graph"))

    def engine_file(self, part: str) -> BundleFile:
        """The part's engine file, to be read by a backend. Raises as :meth:`engine`."""
        return BundleFile(self.path, self._entry(part, "engine"))

    def graph(self, part: str) -> Path:
        """The part's ONNX file. Raises :class:`BundleError` for a bundle that holds no graph of it."""
        return self.path / self._entry(part, "graph").path

    def engine(self, part: str) -> Path:
        """The part's engine file. Raises :class:`BundleError` for a bundle that holds no engine of it."""
        return self.path / self._entry(part, "engine").path

    @property
    def build_command(self) -> str:
        """What builds this bundle again from its checkpoint where it is, but for the settings that have defaults."""
        how = f"--backend {self.manifest.backend} --precision {self.manifest.precision}"
        return f"bdexport build CHECKPOINT {how} --out {shlex.quote(str(self.path))} --overwrite"

    @property
    def rebuild_command(self) -> str:
        """What builds its engines again from its own graphs."""
        return f"bdexport rebuild {shlex.quote(str(self.path))}"

    def _entry(self, part: str, kind: str) -> FileEntry:
        if part not in self.manifest.parts:
            raise BundleError(f"{self.path}: no part {part!r}", expected=", ".join(self.manifest.parts))
        entry = self.manifest.parts[part].graph if kind == "graph" else self.manifest.parts[part].engine
        if entry is None:
            raise BundleError(f"{self.path}: {part} has no {kind} file", remedy="rebuild it with `bdexport build`")
        return entry


def _replaced_error(root: Path, got: str, expected: str | None = None) -> BundleError:
    what = f"{root}: was replaced meanwhile [R13]"
    remedy = "load it again; if that fails too, the bundle is damaged: copy it again"
    return BundleError(what, got=got, expected=expected or "what was there when it was opened", remedy=remedy)


def _identity(root: Path, document: bytes) -> _Identity:
    status = os.stat(root)
    return _Identity(status.st_dev, status.st_ino, hashlib.sha256(document).hexdigest())


def _check_identity(root: Path, identity: _Identity) -> None:
    try:
        now = _identity(root, read_document(root / MANIFEST))
    except (OSError, BundleError) as error:
        raise _replaced_error(root, "a folder without a manifest that can be read") from error
    if now != identity:
        raise _replaced_error(root, "another folder or manifest")


# ---- reading ----------------------------------------------------------------------------------------------------


def open_bundle(path: str | Path, verify_key: str | Path | None = None) -> Bundle:
    """Open a bundle after checking its manifest, the size and SHA-256 of every file, and that nothing else is there.

    ``verify_key``: a minisign public key, as a file or as its text; the manifest's signature must hold by it, which is
    checked before anything is parsed. Raises :class:`BundleError` naming the file, the rule it breaks and the remedy,
    also where another bundle took its place meanwhile; :class:`UsageError` for a key that is none.
    """
    bundle, problems = opened_with_problems(path, verify_key)
    if problems:
        raise problems[0]
    return bundle


def opened_with_problems(path: str | Path, verify_key: str | Path | None = None) -> tuple[Bundle, list[BundleError]]:
    """:func:`open_bundle` for a bundle whose files may be damaged: the bundle, and what is wrong with its files."""
    root = usable_path(path)
    bundle = _with_manifest(root, verify_key)
    try:
        problems = file_problems(root, bundle.manifest)
    except OSError as error:  # a folder that was there a moment ago
        bundle.check_in_place()
        remedy = "check its permissions"
        raise rule_error("R12", f"{root}: cannot be read ({error.strerror})", remedy=remedy) from error
    bundle.check_in_place()  # the files of two bundles are not damaged
    return bundle, problems


def read_manifest(path: str | Path, verify_key: str | Path | None = None) -> Manifest:
    """The manifest of the bundle at ``path``, fully validated; no file but it and its signature is looked at.

    Raises as :func:`open_bundle`.
    """
    return _with_manifest(usable_path(path), verify_key).manifest


def _with_manifest(root: Path, verify_key: str | Path | None) -> Bundle:
    """A bundle whose manifest has been checked and whose files have not."""
    if _holds_checkpoint(root):
        remedy = f"build it first: bdexport build {root}"
        raise rule_error("R1", f"{root}: not a bundle", got="a checkpoint", expected="a BUNDLE folder", remedy=remedy)
    if not root.exists():
        raise BundleError(f"{root}: no such bundle", remedy="build one with `bdexport build CKPT --out BUNDLE`")
    if not root.is_dir() or not (root / MANIFEST).is_file():
        raise rule_error("R1", f"{root}: not a bundle", got=f"no regular file {MANIFEST}", remedy=REBUILD)
    document = read_document(root / MANIFEST)
    try:
        identity = _identity(root, document)
    except OSError as error:
        raise _replaced_error(root, f"a folder that cannot be read ({error.strerror})") from error
    if verify_key is not None:
        try:
            check_signature(root / SIGNATURE, document, verify_key)
        except BundleError:
            _check_identity(root, identity)  # another bundle's signature says nothing about this one
            raise
    return Bundle(root, manifest_from_json(parse_document(document, root / MANIFEST), str(root)), identity=identity)


def _holds_checkpoint(path: Path) -> bool:
    """Whether ``path`` names what bundles are built from: a checkpoint's file, a run's folder, a model of the zoo."""
    if zoo_name(path) is not None:
        return True
    if path.is_dir():
        return (path / RUN_CHECKPOINT).is_file() and not (path / MANIFEST).exists()
    return path.is_file() and path.name.endswith(CHECKPOINT_SUFFIXES)


# ---- files ------------------------------------------------------------------------------------------------------


def file_problems(root: Path, manifest: Manifest) -> list[BundleError]:
    """Every difference between the manifest and the folder, as errors ready to be raised; empty when all holds."""
    problems = [problem for entry in manifest.files() if (problem := file_problem(root, entry)) is not None]
    known = {entry.path for entry in manifest.files()} | {MANIFEST}
    if (root / SIGNATURE).is_file():
        known.add(SIGNATURE)
    folders = {parent.as_posix() for path in known for parent in Path(path).parents}
    strange = [name for name in _entries(root, folders) if name not in known and name not in folders]
    dropped = [name for name in strange if DROPPINGS.fullmatch(Path(name).name)]
    if dropped:
        files = " ".join(shlex.quote(str(root / name)) for name in dropped)
        what = f"{root}: left in the bundle by a file manager or another program: {', '.join(dropped)}"
        problems.append(rule_error("R14", what, remedy=f"remove it: rm -r {files}"))
    for name in strange:
        if name not in dropped:
            remedy = "remove it, or move it out of the bundle"
            problems.append(rule_error("R14", f"{root / name}: not part of the bundle's manifest", remedy=remedy))
    return problems


def file_problem(root: Path, entry: FileEntry) -> BundleError | None:
    """What is wrong with one file of a bundle: missing, another size, another SHA-256; None when it holds.

    A symbolic link stands for the file at its end: a download cache and a Kubernetes volume are made of them.
    """
    path = root / entry.path
    try:
        if path.is_symlink() and not path.exists():
            what, expected = f"{path}: a symbolic link to nothing", "one to a regular file"
            return rule_error("R12", what, got=os.readlink(path), expected=expected, remedy=REBUILD)
        if not path.is_file():
            return rule_error("R12", f"{path}: missing from the bundle", expected="a regular file", remedy=REBUILD)
        size = path.stat().st_size
        if size != entry.bytes:
            return rule_error("R13", f"{path}: changed", got=f"{size} bytes", expected=entry.bytes, remedy=REBUILD)
        digest = sha256_file(path)
    except OSError as error:
        return rule_error("R12", f"{path}: cannot be read ({error.strerror})", remedy="check its permissions")
    if digest != entry.sha256:
        got, expected = f"SHA-256 {digest[:12]}..", f"{entry.sha256[:12]}.."
        return rule_error("R13", f"{path}: changed", got=got, expected=expected, remedy=REBUILD)
    return None


def _entries(root: Path, folders: set[str]) -> list[str]:
    """Every entry of the bundle's ``folders`` as a POSIX path, but for what a Kubernetes volume keeps its files in."""
    names: list[str] = []
    for folder in folders:
        if (root / folder).is_dir():
            names += [(root / folder / name).relative_to(root).as_posix() for name in os.listdir(root / folder)]
    # A name that is no UTF-8 must still be printable in an error.
    printable = sorted(os.fsencode(name).decode("utf-8", "replace") for name in names)
    return printable if not (root / VOLUME).is_symlink() else [name for name in printable if name[:2] != ".."]


# ---- writing ----------------------------------------------------------------------------------------------------


def file_entry(root: Path, path: Path) -> FileEntry:
    """The entry of an existing file ``path`` below ``root``."""
    return FileEntry(path.relative_to(root).as_posix(), sha256_file(path), path.stat().st_size)


def write_manifest(root: Path, manifest: Manifest, key: SigningKey | None = None) -> None:
    """Write ``manifest.json`` into a staging folder, after checking that it can be read back as the same manifest.

    It gets its digest (R18) and, by a ``key``, its signature.
    """
    try:
        data = json.loads(json.dumps(manifest.to_json(), allow_nan=False))
    except (TypeError, ValueError) as error:
        remedy = "check what training recorded"
        raise BundleError(f"{root}: manifest is not plain JSON ({error})", remedy=remedy) from error
    if manifest_from_json(data, str(root)).to_json() != data:
        raise BundleError(f"{root}: manifest does not survive being written", remedy="report this as a bug")
    data[DIGEST] = document_sha256(data)
    text = json.dumps(data, indent=2) + "\n"
    if len(text) > MAX_MANIFEST_BYTES:  # all of it is ASCII
        expected, remedy = f"at most {MAX_MANIFEST_BYTES}", "keep less of what training recorded, or fuse fewer paths"
        raise BundleError(f"{root}: manifest", got=f"{len(text)} bytes", expected=expected, remedy=remedy)
    write_text(root / MANIFEST, text)
    if key is not None:
        key.sign(root / SIGNATURE, (root / MANIFEST).read_bytes())
