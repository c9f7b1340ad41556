"""Just enough of ONNX's file format (protobuf) for graphs without the onnx package, which a production box lacks.

Field numbers are those of onnx.proto (https://github.com/onnx/onnx/blob/main/onnx/onnx.proto3). A message is read as a
list of (field number, value): int for a varint, bytes for anything with a length, :class:`Fixed` for a number of a
fixed size.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

Fields = list[tuple[int, int | bytes]]

MODEL_IR_VERSION, MODEL_GRAPH, MODEL_OPSET, MODEL_PROPERTIES, MODEL_FUNCTIONS = 1, 7, 8, 14, 25
GRAPH_NODE, GRAPH_NAME, GRAPH_INITIALIZER, GRAPH_INPUT, GRAPH_OUTPUT, GRAPH_VALUE_INFO = 1, 2, 5, 11, 12, 13
NODE_INPUT, NODE_OUTPUT, NODE_NAME, NODE_OP, NODE_ATTRIBUTE, NODE_DOMAIN = 1, 2, 3, 4, 5, 7
ATTRIBUTE_NAME, ATTRIBUTE_INTEGER, ATTRIBUTE_GRAPH, ATTRIBUTE_INTS, ATTRIBUTE_GRAPHS, ATTRIBUTE_TYPE = (
    1,
    3,
    6,
    8,
    11,
    20,
)
TYPE_INTEGER, TYPE_GRAPH, TYPE_INTS = 2, 5, 7  # AttributeProto.AttributeType
VALUE_NAME, VALUE_TYPE = 1, 2
TENSOR_DIMS, TENSOR_TYPE, TENSOR_INT64, TENSOR_NAME, TENSOR_RAW = 1, 2, 7, 8, 9
FLOAT, INT64, BOOL = 1, 7, 9  # TensorProto.DataType


FIXED = {1: 8, 5: 4}  # protobuf's wire types of numbers of a fixed size -> bytes
LARGEST_TAG = (1 << 32) - 1  # protobuf cuts a longer one, and would read another field than is read here


class Fixed(bytes):
    """A number of 4 or 8 bytes."""


def read_fields(data: bytes) -> Fields:
    """The fields of one message in their order. Raises ValueError for bytes that are no such message."""
    fields: Fields = []
    position = 0
    while position < len(data):
        tag, position = _read_varint(data, position)
        size = FIXED.get(tag & 7)
        if size is not None and tag <= LARGEST_TAG and position + size <= len(data):
            fields.append((tag >> 3, Fixed(data[position : position + size])))
            position += size
            continue
        value, position = _read_varint(data, position)
        if tag & 7 == 0 and tag <= LARGEST_TAG:
            fields.append((tag >> 3, value))
        elif tag & 7 == 2 and tag <= LARGEST_TAG and position + value <= len(data):
            fields.append((tag >> 3, data[position : position + value]))
            position += value
        else:
            raise ValueError(f"not an ONNX message (tag {tag} at byte {position})")
    return fields


def message(fields: Iterable[tuple[int, int | bytes | str]]) -> bytes:
    """The bytes of a message with these fields."""
    parts: list[bytes] = []
    for number, value in fields:
        if isinstance(value, int):
            parts += [_varint(number << 3), _varint(value)]
        elif isinstance(value, Fixed):
            parts += [_varint(number << 3 | (5 if len(value) == FIXED[5] else 1)), value]
        else:
            data = value.encode() if isinstance(value, str) else value
            parts += [_varint(number << 3 | 2), _varint(len(data)), data]
    return b"".join(parts)


def only(fields: Fields, number: int) -> bytes:
    """The one length-delimited field of that number."""
    found = [value for field, value in fields if field == number and isinstance(value, bytes)]
    if len(found) != 1:
        raise ValueError(f"{len(found)} fields of number {number}, expected 1")
    return found[0]


def text(fields: Fields, number: int) -> str:
    """The field of that number as text; empty where there is none. Raises ValueError for bytes that are no text."""
    return next((value.decode() for field, value in fields if field == number and isinstance(value, bytes)), "")


def control_flow(model: bytes) -> str | None:
    """What of a model may run more than once or not at all, in words; None for a straight line of operators.

    That is an operator that holds a graph, and functions, whose operators stand elsewhere. Raises ValueError for bytes
    that are no such model.
    """
    fields = read_fields(model)
    if any(number == MODEL_FUNCTIONS for number, _ in fields):
        return "functions"
    for number, value in read_fields(only(fields, MODEL_GRAPH)):
        if number == GRAPH_NODE and isinstance(value, bytes):
            node_fields = read_fields(value)
            for kind, attribute in node_fields:
                if kind == NODE_ATTRIBUTE and isinstance(attribute, bytes):
                    held = {one for one, _ in read_fields(attribute)} & {ATTRIBUTE_GRAPH, ATTRIBUTE_GRAPHS}
                    if held:
                        return text(node_fields, NODE_OP)
    return None


def integers(fields: Fields, number: int) -> list[int]:
    """A repeated field of 64-bit integers, packed into one or not."""
    values: list[int] = []
    for field, value in fields:
        if field == number and isinstance(value, int):
            values.append(value)
        elif field == number and isinstance(value, bytes):
            position = 0
            while position < len(value):
                one, position = _read_varint(value, position)
                values.append(one)
    return [value - (1 << 64) if value >> 63 else value for value in values]


def node(op: str, inputs: Sequence[str], output: str, attributes: Sequence[bytes] = (), domain: str = "") -> bytes:
    """A NodeProto with one output, named after it."""
    return message(
        [(NODE_INPUT, name) for name in inputs]
        + [(NODE_OUTPUT, output), (NODE_NAME, output), (NODE_OP, op)]
        + [(NODE_ATTRIBUTE, attribute) for attribute in attributes]
        + [(NODE_DOMAIN, domain)]
    )


def with_input(node: bytes, name: str, other: str) -> bytes:
    """The same NodeProto, reading ``other`` where it reads ``name``."""
    old, new = name.encode(), other.encode()
    fields = read_fields(node)
    return message((field, new if field == NODE_INPUT and value == old else value) for field, value in fields)


def integers_attribute(name: str, values: Sequence[int]) -> bytes:
    """An AttributeProto that holds a list of integers, none of them negative."""
    ints = [(ATTRIBUTE_INTS, value) for value in values]
    return message([(ATTRIBUTE_NAME, name), *ints, (ATTRIBUTE_TYPE, TYPE_INTS)])


def integer_attribute(name: str, value: int) -> bytes:
    """An AttributeProto that holds an integer, not negative."""
    return message([(ATTRIBUTE_NAME, name), (ATTRIBUTE_INTEGER, value), (ATTRIBUTE_TYPE, TYPE_INTEGER)])


def graph_attribute(name: str, graph: bytes) -> bytes:
    """An AttributeProto that holds a graph."""
    return message([(ATTRIBUTE_NAME, name), (ATTRIBUTE_GRAPH, graph), (ATTRIBUTE_TYPE, TYPE_GRAPH)])


def tensor_info(name: str, dtype: int, shape: Sequence[int]) -> bytes:
    """A ValueInfoProto of a tensor with fixed dimensions."""
    dims = message((1, message([(1, size)])) for size in shape)
    return message([(VALUE_NAME, name), (VALUE_TYPE, message([(1, message([(1, dtype), (2, dims)]))]))])


def renamed_info(value_info: bytes, name: str) -> bytes:
    """The same ValueInfoProto under another name."""
    return message([(VALUE_NAME, name), (VALUE_TYPE, only(read_fields(value_info), VALUE_TYPE))])


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _read_varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if position >= len(data) or shift > 63:
            raise ValueError("truncated ONNX message")
        byte = data[position]
        value |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if byte < 0x80:
            return value, position
