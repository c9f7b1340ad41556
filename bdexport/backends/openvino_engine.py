"""An engine file of the openvino backend: written when a part is built, read when a bundle is opened.

A stored (not compressed) zip of four members. ``model.xml`` and ``model.bin``: the part in OpenVINO's own form, for any
processor and any batch. ``compiled.blob``: the same compiled for single images, which is imported in a fifth of the
time that compiling takes; it belongs to one release of OpenVINO and one instruction set. ``part.json``: the part's
name, the precision, and what the blob belongs to (``requirements``, in OpenVINO's words). Where OpenVINO or the
processor is another one than that, ``model.xml`` is compiled anew. Files are trusted as far as the bundle's manifest
is, which has their hashes: neither OpenVINO's models nor its blobs are a safe format for files from strangers.
"""

from __future__ import annotations

import io
import json
import struct
import threading
import zipfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bdexport.backends.base import Readable
from bdexport.backends.first_use import once
from bdexport.backends.openvino_common import Reported, core, cpu_config, import_openvino
from bdexport.errors import BackendError, BundleError
from bdexport.files import writing
from bdexport.json_text import MalformedError, json_kind, parse_json, shown

if TYPE_CHECKING:
    from bdexport.bundle import PartEntry

SCHEMA = "bdexport-openvino-engine/2"
XML, WEIGHTS, BLOB, DESCRIPTION = "model.xml", "model.bin", "compiled.blob", "part.json"
MEMBERS = (DESCRIPTION, XML, WEIGHTS, BLOB)
FIELDS = ("schema", "part", "precision", "requirements")  # of part.json, all of them texts
REQUIREMENTS = "RUNTIME_REQUIREMENTS"  # OpenVINO's property of a compiled model: release and instruction set
CONTROL_FLOW = frozenset(("Loop", "TensorIterator", "If"))  # operators of OpenVINO's that hold a model
ANY_TIME = (1980, 1, 1, 0, 0, 0)  # in the zip, so that equal engines are equal files
REBUILD = "rebuild the bundle: bdexport build CHECKPOINT --backend openvino --out BUNDLE --overwrite"
PIECE_BYTES = 1 << 16  # read at a time
# What a zip reader raises for a damaged file: a flipped bit may claim a password, a compression or a later version.
DAMAGE = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, RuntimeError, NotImplementedError, ValueError)


def write_engine(part: str, engine: Path, model: Any, precision: str, members: dict[str, bytes]) -> None:
    """Write the file. ``members``: ``model.xml`` and ``model.bin`` of ``model``, which takes any batch."""
    compiled = compiled_for_one(model, cpu_config(precision, threads=1))
    about = {
        "schema": SCHEMA,
        "part": part,
        "precision": precision,
        "requirements": compiled.get_property(REQUIREMENTS),
    }
    blob = compiled.export_model().getvalue()
    ordered = {DESCRIPTION: json.dumps(about).encode(), **members, BLOB: blob}
    with writing(engine) as partial, zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as packed:
        for name, data in ordered.items():
            packed.writestr(zipfile.ZipInfo(name, ANY_TIME), data)


def compiled_for_one(model: Any, config: dict[str, Any]) -> Any:
    """``model`` compiled for single images. The model itself stays as it is."""
    single = model.clone()
    single.reshape({0: [1, *(size.get_length() for size in list(model.inputs[0].partial_shape)[1:])]})
    return core().compile_model(single, "CPU", config)


@once
def requirements_here() -> str:
    """What a blob must have been compiled for to be imported in this process."""
    openvino = import_openvino()
    x = openvino.opset13.parameter([1], np.float32)
    smallest = openvino.Model([openvino.opset13.relu(x)], [x], "requirements")
    return str(core().compile_model(smallest, "CPU", cpu_config("fp32", threads=1)).get_property(REQUIREMENTS))


class SourceModel:
    """A part in OpenVINO's own form, parsed when it is first needed: for larger batches and for fused paths."""

    def __init__(self, part: str, path: Readable, entry: PartEntry, xml: bytes, weights: Any) -> None:
        self._part, self._path, self._entry, self._xml = part, path, entry, xml
        self._weights = weights  # a tensor, which models and what is compiled from them share and keep alive
        self._model: Any = None
        self._parsing = threading.Lock()

    def __call__(self) -> Any:
        """The model, which nobody may change. Raises BackendError."""
        with self._parsing:
            if self._model is None:
                with Reported(self._part, f"cannot load {self._path}: {XML}", REBUILD):
                    model = core().read_model(self._xml, self._weights)
                check_straight(self._part, self._path, XML, (each.get_type_name() for each in model.get_ops()))
                check_shapes(self._part, self._path, model, self._entry)
                self._model = model
            return self._model

    def forget(self) -> None:
        """Free what can be parsed again; what is compiled stays as it is."""
        with self._parsing:
            self._model = None


@dataclass(frozen=True, eq=False)
class EngineFile:
    """What an engine file holds. ``blob``: a tensor of bytes; ``requirements``: what it belongs to."""

    source: SourceModel
    blob: Any
    requirements: str


def read_engine(part: str, path: Readable, entry: PartEntry, precision: str) -> EngineFile:
    """Raises BackendError for a file that is damaged, or of another part, precision or format."""
    members = _members(part, path)
    about = _description(part, path, bytes(members[DESCRIPTION].data))
    for key, expected in (("schema", SCHEMA), ("part", part), ("precision", precision)):
        if about[key] != expected:
            what = f"{part} [openvino]: {path} is an engine of another {'format' if key == 'schema' else key}"
            raise BackendError(what, got=shown(about[key]), expected=shown(expected), remedy=REBUILD)
    source = SourceModel(part, path, entry, bytes(members[XML].data), members[WEIGHTS])
    return EngineFile(source, members[BLOB], about["requirements"])


def imported(part: str, path: Readable, entry: PartEntry, blob: Any, config: dict[str, Any]) -> Any:
    """The compiled model of a blob that fits :func:`requirements_here`. Raises BackendError."""
    with Reported(part, f"cannot load {path}: {BLOB}", REBUILD):
        # From a tensor, not from bytes: the model then uses the weights where they are.
        compiled = core().import_model(blob, "CPU", config)
    layers = (each.get_rt_info()["layerType"].astype(str) for each in compiled.get_runtime_model().get_ops())
    check_straight(part, path, BLOB, layers)
    check_shapes(part, path, compiled, entry)
    return compiled


def check_straight(part: str, path: Readable, member: str, kinds: Iterable[str]) -> None:
    """Raises BundleError for a model with control flow: a loop may have 2^62 trips, and no part has one."""
    found = sorted(CONTROL_FLOW.intersection(kinds))
    if found:
        what = f"{part} [openvino]: {path}: {member} holds control flow"
        raise BundleError(what, got=", ".join(found), expected="operators only", remedy=REBUILD)


def check_shapes(part: str, path: Readable, model: Any, entry: PartEntry) -> None:
    """The manifest and a model, compiled or not, agree on what goes in and comes out, beyond the batch."""
    for values, spec in ((model.inputs, entry.input), (model.outputs, entry.output)):
        shapes = [tuple(size.get_length() for size in list(value.partial_shape)[1:]) for value in values]
        if shapes != [spec.shape]:
            what = f"{part} [openvino]: {path} does not have the manifest's {spec.name}"
            raise BackendError(what, got=shapes, expected=[spec.shape], remedy=REBUILD)


def _members(part: str, path: Readable) -> dict[str, Any]:
    """The members as tensors of bytes, each by its checksum what was written."""
    expected = f"a zip of {', '.join(MEMBERS)}"
    data = b""
    try:
        data = path.read_bytes()
        with zipfile.ZipFile(io.BytesIO(data)) as packed:
            missing = [name for name in MEMBERS if name not in packed.namelist()]
            if not missing:
                return {name: _member(packed, name, len(data)) for name in MEMBERS}
            got = f"no {' and no '.join(missing)}"
    except OSError as error:
        what = f"{part} [openvino]: cannot read {path}"
        raise BackendError(what, got=error.strerror or "a damaged file", expected=expected, remedy=REBUILD) from error
    except DAMAGE as error:
        what = f"{part} [openvino]: {path} is damaged"
        got = f"{len(data)} bytes that are none, or not as they were written"
        raise BackendError(what, got=got, expected=expected, remedy=REBUILD) from error
    raise BackendError(f"{part} [openvino]: {path} is no engine", got=got, expected=expected, remedy=REBUILD)


def _member(packed: zipfile.ZipFile, name: str, most: int) -> Any:
    """Read in pieces into memory that OpenVINO owns: what whole copies leave behind is not given back to the system."""
    size = packed.getinfo(name).file_size
    if size > most:
        raise EOFError(f"{name} is larger than its file")
    tensor = import_openvino().Tensor(import_openvino().Type.u8, [size])
    begin = 0
    with packed.open(name) as member:
        while piece := member.read(PIECE_BYTES):
            tensor.data[begin : begin + len(piece)] = np.frombuffer(piece, np.uint8)
            begin += len(piece)
    if begin != size:
        raise EOFError(f"{name} ends early")
    return tensor


def _description(part: str, path: Readable, data: bytes) -> dict[str, str]:
    what, expected = f"{part} [openvino]: {path}: {DESCRIPTION}", f"an object with {', '.join(FIELDS)}"
    try:
        about = parse_json(data)
    except MalformedError as error:
        raise BackendError(what, got=str(error), expected=expected, remedy=REBUILD) from error
    if not isinstance(about, dict):
        raise BackendError(what, got=json_kind(about), expected=expected, remedy=REBUILD)
    for field in FIELDS:
        if not isinstance(about.get(field), str):
            got = f"no {field}" if field not in about else f"{field} {shown(about[field])}"
            raise BackendError(what, got=got, expected=f"{expected}, all texts", remedy=REBUILD)
    return about
