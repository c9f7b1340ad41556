"""What is checked of an engine, or a graph, before ONNX Runtime runs it: a bundle's hashes do not say who wrote a file.

An engine is a straight line of operators. A ``Loop`` may have 2^62 trips, so that a run of it never returns, and no
part has one; an operator that holds a graph (``Loop``, ``Scan``, ``If``) is refused, and so are functions, which would
hide it. The ``If`` of :mod:`bdexport.backends.onnxruntime_link` is made after this.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bdexport.backends import onnx_wire as wire
from bdexport.backends.base import Readable
from bdexport.backends.onnxruntime_common import (
    BLOCK_PROPERTY,
    BLOCKED,
    INPUT_PROPERTY,
    OUTPUT_PROPERTY,
    PART_PROPERTY,
    PLAIN,
    channel_block,
)
from bdexport.errors import BackendError, BundleError
from bdexport.json_text import shown

if TYPE_CHECKING:
    from bdexport.bundle import PartEntry

REBUILD = "rebuild the bundle: bdexport rebuild BUNDLE, or bdexport build CHECKPOINT --out BUNDLE --overwrite"
FLOAT_TENSOR = "tensor(float)"


def check_straight(part: str, path: Readable, data: bytes) -> None:
    """Raises BundleError for bytes that are no ONNX model, and for one with control flow or functions."""
    what = f"{part} [onnxruntime]: {path}"
    try:
        found = wire.control_flow(data)
    except ValueError as error:
        raise BundleError(f"{what} is no ONNX model ({error})", remedy=REBUILD) from error
    if found is not None:
        expected = "operators only: a part has no loops, branches or functions"
        raise BundleError(f"{what} holds control flow", got=found, expected=expected, remedy=REBUILD)


def check_ends(part: str, path: Readable, session: Any, entry: PartEntry, names: tuple[str, str]) -> None:
    """The manifest and the engine agree on what goes in and comes out. ``names``: of the input and the output.

    Raises BackendError for other shapes (beyond the batch), BundleError for other names or types.
    """
    what = f"{part} [onnxruntime]: {path} does not have the manifest's"
    ends = ((session.get_inputs(), entry.input, names[0]), (session.get_outputs(), entry.output, names[1]))
    for values, spec, name in ends:
        try:
            types = [(value.name, value.type) for value in values]
            shapes = [tuple(value.shape[1:]) for value in values]
        except ValueError as error:  # UnicodeDecodeError
            raise BundleError(f"{what} {spec.name}", got="names that are no text in UTF-8", remedy=REBUILD) from error
        if types != [(name, FLOAT_TENSOR)]:
            got, expected = shown(types), shown([(name, FLOAT_TENSOR)])
            raise BundleError(f"{what} {spec.name}", got=got, expected=expected, remedy=REBUILD)
        if shapes != [spec.shape]:
            raise BackendError(f"{what} {spec.name}", got=shapes, expected=[spec.shape], remedy="rebuild the bundle")


def blocks_of(part: str, path: Readable, session: Any, entry: PartEntry) -> tuple[int, int]:
    """Channels per block in which the engine takes its input and gives its output, by its metadata; 1: plain NCHW.

    Raises BundleError for metadata that is absent, unreadable or none of what a build writes; BackendError for another
    part's engine.
    """
    what = f"{part} [onnxruntime]: {path}: its metadata"
    try:
        properties = dict(session.get_modelmeta().custom_metadata_map)
    except ValueError as error:  # UnicodeDecodeError
        raise BundleError(f"{what} is no text in UTF-8", remedy=REBUILD) from error
    if PART_PROPERTY not in properties:
        raise BundleError(f"{what} does not say whose engine it is", expected=PART_PROPERTY, remedy=REBUILD)
    if properties[PART_PROPERTY] != part:
        other = f"{part} [onnxruntime]: {path} is another part's engine"
        raise BackendError(other, got=shown(properties[PART_PROPERTY]), expected=part, remedy="rebuild the bundle")
    here = channel_block()
    block = _one_of(what, properties, BLOCK_PROPERTY, ("1", str(here)))
    ends = []
    for name, spec in ((INPUT_PROPERTY, entry.input), (OUTPUT_PROPERTY, entry.output)):
        blocked = _one_of(what, properties, name, (PLAIN, BLOCKED)) == BLOCKED and block != "1"
        if blocked and (len(spec.shape) != 3 or spec.shape[0] % here):
            got, expected = f"{BLOCKED} for {spec.shape}", f"a multiple of {here} channels, or {PLAIN}"
            raise BundleError(f"{what}: {name}", got=got, expected=expected, remedy=REBUILD)
        ends.append(here if blocked else 1)
    return ends[0], ends[1]


def _one_of(what: str, properties: dict[str, str], name: str, allowed: tuple[str, str]) -> str:
    """A property, or the first of ``allowed`` where it is absent, as in a graph that is no engine."""
    value = properties.get(name, allowed[0])
    if value not in allowed:
        expected = " or ".join(dict.fromkeys(allowed))
        raise BundleError(f"{what}: {name}", got=shown(value), expected=expected, remedy=REBUILD)
    return value
