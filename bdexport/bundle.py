"""The bundle: a folder with a manifest and the parts' graphs and engines; the only thing that build and run share.

The written spec is ``docs/bundle-format.md``; the ids R1, R2.. in the errors are its rules.
"""

from __future__ import annotations

import json
import os
import shlex
from dataclasses import dataclass
from pathlib import Path

from bdexport.bundle_checks import REBUILD, parse_document, rule_error
from bdexport.errors import BundleError
from bdexport.files import sha256_file, write_json
from bdexport.manifest import (
    DTYPE,
    FORMAT_VERSION,
    INPUT_NAME,
    MANIFEST,
    OUTPUT_NAME,
    FileEntry,
    Manifest,
    PartEntry,
    manifest_from_json,
)
from bdexport.zoo import zoo_name

__all__ = [
    "DTYPE",
    "FORMAT_VERSION",
    "INPUT_NAME",
    "MANIFEST",
    "OUTPUT_NAME",
    "Bundle",
    "FileEntry",
    "Manifest",
    "PartEntry",
    "file_entry",
    "file_problem",
    "file_problems",
    "manifest_from_json",
    "open_bundle",
    "read_manifest",
    "write_manifest",
]

RUN_CHECKPOINT = "model.safetensors"  # ``checkpoint.reading.RUN_FILE``, which this half cannot import (torch)
CHECKPOINT_SUFFIXES = (".safetensors", ".th", ".pt", ".pth", ".t7", ".pth.tar")


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: every file named in the manifest was there and unchanged when it was opened."""

    path: Path
    manifest: Manifest

    def graph(self, part: str) -> Path:
        """The part's ONNX file. Raises :class:`BundleError` for a bundle that holds no graph of it."""
        return self._file(part, "graph")

    def engine(self, part: str) -> Path:
        """The part's engine file. Raises :class:`BundleError` for a bundle that holds no engine of it."""
        return self._file(part, "engine")

    @property
    def build_command(self) -> str:
        """What builds this bundle again from its checkpoint where it is, but for the settings that have defaults."""
        how = f"--backend {self.manifest.backend} --precision {self.manifest.precision}"
        return f"bdexport build CHECKPOINT {how} --out {shlex.quote(str(self.path))} --overwrite"

    @property
    def rebuild_command(self) -> str:
        """What builds its engines again from its own graphs."""
        return f"bdexport rebuild {shlex.quote(str(self.path))}"

    def _file(self, part: str, kind: str) -> Path:
        if part not in self.manifest.parts:
            raise BundleError(f"{self.path}: no part {part!r}", expected=", ".join(self.manifest.parts))
        entry = self.manifest.parts[part].graph if kind == "graph" else self.manifest.parts[part].engine
        if entry is None:
            raise BundleError(f"{self.path}: {part} has no {kind} file", remedy="rebuild it with `bdexport build`")
        return self.path / entry.path


# ---- reading ----------------------------------------------------------------------------------------------------


def open_bundle(path: str | Path) -> Bundle:
    """Open a bundle after checking its manifest, the size and SHA-256 of every file, and that nothing else is there.

    Raises :class:`BundleError` naming the file, the rule it breaks and the remedy.
    """
    root = Path(path)
    manifest = read_manifest(root)
    problems = file_problems(root, manifest)
    if problems:
        raise problems[0]
    return Bundle(root, manifest)


def read_manifest(path: str | Path) -> Manifest:
    """The manifest of the bundle at ``path``, fully validated; no other file is looked at."""
    root = Path(path)
    if _holds_checkpoint(root):
        remedy = f"build it first: bdexport build {root}"
        raise rule_error("R1", f"{root}: not a bundle", got="a checkpoint", expected="a BUNDLE folder", remedy=remedy)
    if not root.exists():
        raise BundleError(f"{root}: no such bundle", remedy="build one with `bdexport build CKPT --out BUNDLE`")
    if not root.is_dir() or not (root / MANIFEST).is_file() or (root / MANIFEST).is_symlink():
        raise rule_error("R1", f"{root}: not a bundle", got=f"no regular file {MANIFEST}", remedy=REBUILD)
    return manifest_from_json(parse_document(root / MANIFEST), str(root))


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
    folders = {parent.as_posix() for path in known for parent in Path(path).parents}
    for name in _walk(root):
        if name not in known and name not in folders:
            remedy = "remove it, or move it out of the bundle"
            problems.append(rule_error("R14", f"{root / name}: not part of the bundle's manifest", remedy=remedy))
    return problems


def file_problem(root: Path, entry: FileEntry) -> BundleError | None:
    """What is wrong with one file of a bundle: missing, a link, another size, another SHA-256; None when it holds."""
    path = root / entry.path
    try:
        links = [part for part in (path, *path.parents) if part != root and root in part.parents and part.is_symlink()]
        if links:
            return rule_error(
                "R12", f"{links[0]}: a symbolic link", expected="a regular file or folder", remedy=REBUILD
            )
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


def _walk(root: Path) -> list[str]:
    """Every entry below ``root`` as a POSIX path; links to folders are listed, not followed."""
    names: list[str] = []
    for folder, folders, files in os.walk(root):
        names += [(Path(folder) / name).relative_to(root).as_posix() for name in (*folders, *files)]
    # A name that is no UTF-8 must still be printable in an error.
    return sorted(os.fsencode(name).decode("utf-8", "replace") for name in names)


# ---- writing ----------------------------------------------------------------------------------------------------


def file_entry(root: Path, path: Path) -> FileEntry:
    """The entry of an existing file ``path`` below ``root``."""
    return FileEntry(path.relative_to(root).as_posix(), sha256_file(path), path.stat().st_size)


def write_manifest(root: Path, manifest: Manifest) -> None:
    """Write ``manifest.json`` into a staging folder, after checking that it can be read back as the same manifest."""
    try:
        data = json.loads(json.dumps(manifest.to_json(), allow_nan=False))
    except (TypeError, ValueError) as error:
        remedy = "check what training recorded"
        raise BundleError(f"{root}: manifest is not plain JSON ({error})", remedy=remedy) from error
    if manifest_from_json(data, str(root)).to_json() != data:
        raise BundleError(f"{root}: manifest does not survive being written", remedy="report this as a bug")
    write_json(root / MANIFEST, data)
