"""A bundle's manifest: everything that is known about it without opening an engine; written and read as JSON.

The written spec is ``docs/bundle-format.md``; the ids R1, R2.. in the errors are its rules.
"""

from __future__ import annotations

import itertools
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from bdexport.bundle_checks import (
    DIGEST,
    Reader,
    check_chain,
    check_document,
    check_path,
    check_printable,
    check_sha256,
    check_statistics,
    rule_error,
)
from bdexport.class_names import EXPECTED, unusable_names
from bdexport.errors import InputError
from bdexport.files import without_controls
from bdexport.fused import FusedPaths, fused_from_json
from bdexport.mask_map import MaskMapping, mapping_from_json
from bdexport.parts import part_names
from bdexport.preprocess import Preprocess, preprocess_from_json
from bdexport.tensors import TensorSpec, tensor_spec_from_json

SCHEMA = "bdexport-bundle"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
SIGNATURE = "manifest.json.minisig"  # beside it, where somebody signed it (bdexport.signature)
LAYOUT = "NCHW"
INPUT_NAME, OUTPUT_NAME, DTYPE = "x", "y", "float32"  # of every part's graph
MAX_BLOCKS = 10_000  # far above any network; keeps a damaged number from filling the memory


@dataclass(frozen=True)
class FileEntry:
    """One file of a bundle: path relative to the bundle (POSIX), SHA-256 in lower-case hex, size in bytes."""

    path: str
    sha256: str
    bytes: int


@dataclass(frozen=True)
class PartEntry:
    """One part: its ONNX graph, its engine (None where the backend needs no such file), tensors, FLOPs of one image.

    ``source``: the graph that the engine was built from, where that is not ``graph`` (int8: the one with scales).
    """

    name: str
    graph: FileEntry | None
    engine: FileEntry | None
    input: TensorSpec
    output: TensorSpec
    flops: int
    source: FileEntry | None = None

    def files(self) -> dict[str, FileEntry]:
        """Its files, by what they are for."""
        files = {"graph": self.graph, "engine": self.engine, "source": self.source}
        return {kind: entry for kind, entry in files.items() if entry is not None}


@dataclass(frozen=True)
class Manifest:
    """Everything that is known about a bundle without opening an engine.

    ``network`` is the residual network's full spec (``ResNetSpec.to_json``), ``architecture`` its usual name;
    ``extra`` is free for other tools, nothing here reads it. ``sealed``: the document that it was read from holds its
    own digest, which is true.
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
    sealed: bool = field(default=False, compare=False)

    def files(self) -> list[FileEntry]:
        """Every file of the bundle but the manifest itself, in the parts' order."""
        return [entry for part in self.parts.values() for entry in part.files().values()]

    def to_json(self) -> dict[str, Any]:
        """The manifest as ``manifest.json`` holds it, without its digest; :func:`manifest_from_json` reads it back."""
        data: dict[str, Any] = {"schema": f"{SCHEMA}/{self.format_version}", "format_version": self.format_version}
        free = {name: _printable(getattr(self, name)) for name in _FREE}
        own = free | {
            "preprocess": self.preprocess.to_json(),
            "parts": [_part_to_json(part) for part in self.parts.values()],
        }
        plain = {name: getattr(self, name) for name in _FIELDS if name not in own and name not in data}
        lists = {"transitions": list(self.transitions), "class_names": list(self.class_names)}
        later = {name: getattr(self, name) for name in _LATER}
        return (
            data | plain | own | lists | {name: value.to_json() for name, value in later.items() if value is not None}
        )


# What other programs, paths and people wrote: their control characters are stored as escapes.
_FREE = ("name", "training", "policy_statistics", "verification", "executor", "versions", "extra")
_LATER = ("fused", "mask_mapping")  # keys that bundles of earlier builds do not have
_FIELDS = tuple(name for name in Manifest.__dataclass_fields__ if name not in (*_LATER, "sealed"))


def _printable(value: Any) -> Any:
    """``value``, plain data, with an escape for every character that R4 refuses."""
    if isinstance(value, dict):
        return {_printable(key): _printable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_printable(item) for item in value]
    return without_controls(value) if isinstance(value, str) else value


def _part_to_json(part: PartEntry) -> dict[str, Any]:
    return {
        "name": part.name,
        "graph": None if part.graph is None else asdict(part.graph),
        "engine": None if part.engine is None else asdict(part.engine),
        "input": part.input.to_json(),
        "output": part.output.to_json(),
        "flops": part.flops,
    } | ({} if part.source is None else {"source": asdict(part.source)})


# ---- reading ----------------------------------------------------------------------------------------------------


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
        class_names=_read_class_names(reader),
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
    digest = reader.absent_or_text(DIGEST, "R18")
    reader.finish()
    if fused is not None:
        manifest = replace(manifest, fused=fused_from_json(fused, num_blocks, reader.where))
    if mapping is not None:
        manifest = replace(manifest, mask_mapping=mapping_from_json(mapping, num_blocks, reader.where))
    check_chain(manifest, reader.where)
    check_statistics(manifest.policy_statistics, num_blocks, reader.where)
    check_printable(data, reader.where)
    return replace(manifest, sealed=check_document(data, digest, reader.where))


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


def _read_class_names(reader: Reader) -> tuple[str, ...]:
    names = reader.texts("class_names", minimum=2)
    if refused := unusable_names(names):
        raise rule_error(
            "R4", f"{reader.where}: class_names", got=f"{refused[0][0]} ({refused[0][1]})", expected=EXPECTED
        )
    return names


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
    seen = {MANIFEST: "the manifest", SIGNATURE: "its signature"}
    for part in parts:
        for kind, entry in part.files().items():
            user = f"{part.name} {kind}"
            if (other := seen.setdefault(entry.path.casefold(), user)) != user:
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
        source=_file(reader.absent_or_mapping("source"), f"{reader.where} source"),
    )
    reader.finish()
    return part


def _read_file(reader: Reader, key: str) -> FileEntry | None:
    return _file(reader.optional_mapping(key), f"{reader.where} {key}")


def _file(data: dict[str, Any] | None, where: str) -> FileEntry | None:
    if data is None:
        return None
    entry = Reader(data, where)
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
