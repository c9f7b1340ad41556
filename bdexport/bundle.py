"""The bundle: a folder with a manifest and the parts' graphs and engines; the only thing that build and run share.

The written spec is ``docs/bundle-format.md``; the ids R1, R2.. in the errors are its rules.
"""

from __future__ import annotations

import itertools
import json
import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from bdexport.bundle_checks import (
    REBUILD,
    Reader,
    check_chain,
    check_path,
    check_sha256,
    check_statistics,
    parse_document,
    rule_error,
)
from bdexport.errors import BundleError, InputError
from bdexport.files import sha256_file, write_json
from bdexport.fused import FusedPaths, fused_from_json
from bdexport.mask_map import MaskMapping, mapping_from_json
from bdexport.parts import part_names
from bdexport.preprocess import Preprocess, preprocess_from_json
from bdexport.tensors import TensorSpec, tensor_spec_from_json
from bdexport.zoo import zoo_name

SCHEMA = "bdexport-bundle"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
LAYOUT = "NCHW"
INPUT_NAME, OUTPUT_NAME, DTYPE = "x", "y", "float32"  # of every part's graph
RUN_CHECKPOINT = "model.safetensors"  # ``checkpoint.reading.RUN_FILE``, which this half cannot import (torch)
CHECKPOINT_SUFFIXES = (".safetensors", ".th", ".pt", ".pth", ".t7", ".pth.tar")
MAX_BLOCKS = 10_000  # far above any network; keeps a damaged number from filling the memory


@dataclass(frozen=True)
class FileEntry:
    """One file of a bundle: path relative to the bundle (POSIX), SHA-256 in lower-case hex, size in bytes."""

    path: str
    sha256: str
    bytes: int


@dataclass(frozen=True)
class PartEntry:
    """One part: its ONNX graph, its engine (None where the backend needs no such file), tensors, FLOPs of one image."""

    name: str
    graph: FileEntry | None
    engine: FileEntry | None
    input: TensorSpec
    output: TensorSpec
    flops: int


@dataclass(frozen=True)
class Manifest:
    """Everything that is known about a bundle without opening an engine.

    ``network`` is the residual network's full spec (``ResNetSpec.to_json``), ``architecture`` its usual name;
    ``extra`` is free for other tools, nothing here reads it.
    """

    name: str
    created: str  # UTC, ISO 8601
    architecture: str
    num_blocks: int
    transitions: tuple[int, ...]
    dropped_transition: str
    preprocess: Preprocess
    class_names: tuple[str, ...]
    backend: str
    precision: str
    max_batch: int | None
    parts: dict[str, PartEntry]
    versions: dict[str, str]
    fingerprint: str
    checkpoint: dict[str, str]  # "sha256", "form"
    compute_capability: str | None = None
    training: dict[str, Any] = field(default_factory=dict)
    policy_statistics: dict[str, Any] = field(default_factory=dict)
    verification: dict[str, Any] | None = None
    executor: dict[str, Any] | None = None
    network: dict[str, Any] = field(default_factory=dict)
    layout: str = LAYOUT
    format_version: int = FORMAT_VERSION
    extra: dict[str, Any] = field(default_factory=dict)
    fused: FusedPaths | None = None
    mask_mapping: MaskMapping | None = None

    def files(self) -> list[FileEntry]:
        """Every file of the bundle but the manifest itself, in the parts' order."""
        entries = [entry for part in self.parts.values() for entry in (part.graph, part.engine)]
        return [entry for entry in entries if entry is not None]

    def to_json(self) -> dict[str, Any]:
        """The manifest as ``manifest.json`` holds it; :func:`manifest_from_json` reads it back."""
        data: dict[str, Any] = {"schema": f"{SCHEMA}/{self.format_version}", "format_version": self.format_version}
        own = {"preprocess": self.preprocess.to_json(), "parts": [_part_to_json(part) for part in self.parts.values()]}
        plain = {name: getattr(self, name) for name in _FIELDS if name not in own and name not in data}
        lists = {"transitions": list(self.transitions), "class_names": list(self.class_names)}
        later = {name: getattr(self, name) for name in _LATER}
        return (
            data | plain | own | lists | {name: value.to_json() for name, value in later.items() if value is not None}
        )


_LATER = ("fused", "mask_mapping")  # keys that bundles of earlier builds do not have
_FIELDS = tuple(name for name in Manifest.__dataclass_fields__ if name not in _LATER)


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


def manifest_from_json(data: Any, where: str = "bundle") -> Manifest:
    """Inverse of :meth:`Manifest.to_json`. Raises :class:`BundleError` naming ``where``, the key and the rule."""
    reader = Reader(data, f"{where}: {MANIFEST}")
    version = _read_version(reader)
    num_blocks = reader.integer("num_blocks", "R5", 1, MAX_BLOCKS)
    transitions = _read_transitions(reader, num_blocks)
    manifest = Manifest(
        format_version=version,
        name=reader.text("name"),
        created=reader.time("created"),
        architecture=reader.text("architecture"),
        network=reader.mapping("network"),
        num_blocks=num_blocks,
        transitions=transitions,
        dropped_transition=reader.choice("dropped_transition", ("shortcut", "shortcut_relu")),
        preprocess=_read_preprocess(reader),
        class_names=reader.texts("class_names", minimum=2),
        layout=reader.choice("layout", (LAYOUT,)),
        backend=reader.text("backend"),
        precision=reader.text("precision"),
        max_batch=reader.optional_integer("max_batch", "R4", 1),
        parts=_read_parts(reader, part_names(num_blocks, transitions)),
        versions=reader.text_mapping("versions"),
        fingerprint=reader.text("fingerprint"),
        compute_capability=reader.optional_text("compute_capability"),
        training=reader.mapping("training"),
        policy_statistics=reader.mapping("policy_statistics"),
        checkpoint=_read_checkpoint(reader),
        verification=reader.optional_mapping("verification"),
        executor=reader.optional_mapping("executor"),
        extra=reader.mapping("extra"),
    )
    fused, mapping = (reader.absent_or_mapping(key, "R16") for key in _LATER)
    reader.finish()
    if fused is not None:
        manifest = replace(manifest, fused=fused_from_json(fused, num_blocks, reader.where))
    if mapping is not None:
        manifest = replace(manifest, mask_mapping=mapping_from_json(mapping, num_blocks, reader.where))
    check_chain(manifest, reader.where)
    check_statistics(manifest.policy_statistics, num_blocks, reader.where)
    return manifest


def _read_version(reader: Reader) -> int:
    """The format version: ``schema`` and ``format_version`` must agree, and not be newer than this package."""
    schema, version = reader.text("schema", "R2"), reader.integer("format_version", "R2", 1)
    name, _, number = schema.partition("/")
    if name != SCHEMA or not (number.isascii() and number.isdigit()) or len(number) > 9:
        raise rule_error("R2", f"{reader.where}: schema", got=repr(schema), expected=f"'{SCHEMA}/{FORMAT_VERSION}'")
    newest = max(version, int(number))
    if newest > FORMAT_VERSION:
        raise rule_error(
            "R2",
            f"{reader.where}: bundle format is newer than this bdexport",
            got=f"version {newest}",
            expected=f"at most {FORMAT_VERSION}",
            remedy="upgrade bdexport (pip install -U bdexport), or rebuild the bundle with this version",
        )
    if version != int(number):
        raise rule_error("R2", f"{reader.where}: format_version", got=version, expected=f"{number} as schema says")
    return version


def _read_transitions(reader: Reader, num_blocks: int) -> tuple[int, ...]:
    transitions = reader.integers("transitions", "R5")
    ascending = all(low < high for low, high in itertools.pairwise(transitions))
    if not ascending or not all(0 <= index < num_blocks for index in transitions):
        expected = f"ascending block numbers in 0..{num_blocks - 1}"
        raise rule_error("R5", f"{reader.where}: transitions", got=list(transitions), expected=expected)
    return transitions


def _read_preprocess(reader: Reader) -> Preprocess:
    data = reader.mapping("preprocess", "R6")
    try:
        preprocess = preprocess_from_json(data)
    except InputError as error:
        raise rule_error("R6", f"{reader.where}: preprocess: {error}") from error
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        expected = "size of two integers, mean and std of three numbers, resampling, resize_short (an integer or null)"
        raise rule_error("R6", f"{reader.where}: preprocess", got=data, expected=expected) from error
    if preprocess.to_json() != data:
        raise rule_error("R6", f"{reader.where}: preprocess", got=data, expected=preprocess.to_json())
    return preprocess


def _read_parts(reader: Reader, names: tuple[str, ...]) -> dict[str, PartEntry]:
    entries = [_read_part(Reader(data, f"{reader.where}: parts")) for data in reader.items("parts", "R7")]
    got = tuple(part.name for part in entries)
    if got != names:
        missing, extra = sorted(set(names) - set(got)), sorted(set(got) - set(names))
        detail = f"missing {missing}, unknown {extra}" if missing or extra else "repeated or in another order"
        raise rule_error("R7", f"{reader.where}: parts", got=detail, expected=f"the {len(names)} parts in path order")
    _check_distinct(entries, reader.where)
    return {part.name: part for part in entries}


def _check_distinct(parts: list[PartEntry], where: str) -> None:
    """R9: no two files under one path, whatever the case: some file systems fold it, and bundles are copied around."""
    seen = {MANIFEST: "the manifest"}
    for part in parts:
        for kind, entry in (("graph", part.graph), ("engine", part.engine)):
            user = f"{part.name} {kind}"
            if entry is not None and (other := seen.setdefault(entry.path.casefold(), user)) != user:
                raise rule_error("R9", f"{where}: path {entry.path!r}", got=f"used by {other} and {user}")


def _read_part(reader: Reader) -> PartEntry:
    name = reader.text("name", "R7")
    reader.where += f" {name}"
    part = PartEntry(
        name=name,
        graph=_read_file(reader, "graph"),
        engine=_read_file(reader, "engine"),
        input=_read_tensor(reader, "input", INPUT_NAME),
        output=_read_tensor(reader, "output", OUTPUT_NAME),
        flops=reader.integer("flops", "R4", 0),
    )
    reader.finish()
    return part


def _read_file(reader: Reader, key: str) -> FileEntry | None:
    data = reader.optional_mapping(key)
    if data is None:
        return None
    entry = Reader(data, f"{reader.where} {key}")
    file = FileEntry(entry.text("path", "R8"), entry.text("sha256", "R10"), entry.integer("bytes", "R10", 0))
    entry.finish()
    check_path(file.path, entry.where)
    check_sha256(file.sha256, entry.where)
    return file


def _read_tensor(reader: Reader, key: str, name: str) -> TensorSpec:
    data = reader.mapping(key, "R11")
    expected = f"name {name!r}, dtype {DTYPE!r}, shape ['N', sizes..]"
    try:
        spec = tensor_spec_from_json(data)
    except (KeyError, TypeError, ValueError) as error:
        raise rule_error("R11", f"{reader.where}: {key}", got=data, expected=expected) from error
    if spec.name != name or spec.dtype != DTYPE or spec.to_json() != data:
        raise rule_error("R11", f"{reader.where}: {key}", got=data, expected=expected)
    return spec


def _read_checkpoint(reader: Reader) -> dict[str, str]:
    checkpoint = reader.text_mapping("checkpoint")
    if set(checkpoint) != {"sha256", "form"}:
        raise rule_error("R4", f"{reader.where}: checkpoint", got=sorted(checkpoint), expected="form and sha256")
    check_sha256(checkpoint["sha256"], f"{reader.where}: checkpoint")
    return checkpoint


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


def _part_to_json(part: PartEntry) -> dict[str, Any]:
    return {
        "name": part.name,
        "graph": None if part.graph is None else asdict(part.graph),
        "engine": None if part.engine is None else asdict(part.engine),
        "input": part.input.to_json(),
        "output": part.output.to_json(),
        "flops": part.flops,
    }
