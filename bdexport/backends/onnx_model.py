"""An ONNX model that is read, changed and written without the onnx package, so that engines can be built without it.

What backends change is here as plain lists: nodes, constants and the two ends of the graph. Whatever else a file holds
is kept as it stands.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from bdexport.backends import onnx_wire as wire

_NODE_FIELDS = (wire.NODE_INPUT, wire.NODE_OUTPUT, wire.NODE_NAME, wire.NODE_OP, wire.NODE_ATTRIBUTE, wire.NODE_DOMAIN)
_GRAPH_FIELDS = (
    *(wire.GRAPH_NODE, wire.GRAPH_NAME, wire.GRAPH_INITIALIZER),
    *(wire.GRAPH_INPUT, wire.GRAPH_OUTPUT, wire.GRAPH_VALUE_INFO),
)


@dataclass(eq=False)
class Node:
    """A NodeProto. ``attributes`` are AttributeProtos, as bytes; ``rest``: fields that nobody here looks at."""

    op: str
    inputs: list[str]
    outputs: list[str]
    name: str = ""
    domain: str = ""
    attributes: list[bytes] = field(default_factory=list)
    rest: wire.Fields = field(default_factory=list)

    def to_bytes(self) -> bytes:
        """The message."""
        return wire.message(
            [(wire.NODE_INPUT, name) for name in self.inputs]
            + [(wire.NODE_OUTPUT, name) for name in self.outputs]
            + [(wire.NODE_NAME, self.name)] * bool(self.name)
            + [(wire.NODE_OP, self.op)]
            + [(wire.NODE_ATTRIBUTE, attribute) for attribute in self.attributes]
            + [(wire.NODE_DOMAIN, self.domain)] * bool(self.domain)
            + [*self.rest]
        )

    def sizes(self) -> dict[str, list[int]]:
        """The attributes that are lists of integers, by name; an empty list for one of another type."""
        found = [wire.read_fields(attribute) for attribute in self.attributes]
        return {wire.text(one, wire.ATTRIBUTE_NAME): wire.integers(one, wire.ATTRIBUTE_INTS) for one in found}


@dataclass(eq=False)
class Value:
    """A ValueInfoProto of a tensor: the name that may change, and the type that stays."""

    name: str
    type: bytes

    @property
    def channels(self) -> int | None:
        """The second dimension, where it is a number."""
        shape = wire.read_fields(wire.only(wire.read_fields(wire.only(wire.read_fields(self.type), 1)), 2))
        dimensions = [wire.read_fields(value) for number, value in shape if number == 1 and isinstance(value, bytes)]
        sizes = [next((size for number, size in one if number == 1), None) for one in dimensions]
        return sizes[1] if len(sizes) > 1 and isinstance(sizes[1], int) else None

    def to_bytes(self) -> bytes:
        """The message."""
        return wire.message([(wire.VALUE_NAME, self.name), (wire.VALUE_TYPE, self.type)])


class Model:
    """A ModelProto taken apart. ``constants``: TensorProtos by name, as fields."""

    def __init__(self, data: bytes) -> None:
        """Raises ValueError for bytes that are no such model."""
        model = wire.read_fields(data)
        graph = wire.read_fields(wire.only(model, wire.MODEL_GRAPH))
        self.nodes = [_node(message) for message in _messages(graph, wire.GRAPH_NODE)]
        self.inputs = [_value(message) for message in _messages(graph, wire.GRAPH_INPUT)]
        self.outputs = [_value(message) for message in _messages(graph, wire.GRAPH_OUTPUT)]
        tensors = [wire.read_fields(message) for message in _messages(graph, wire.GRAPH_INITIALIZER)]
        self.constants = {wire.text(tensor, wire.TENSOR_NAME): tensor for tensor in tensors}
        self.name = wire.text(graph, wire.GRAPH_NAME)
        self._infos = [one for one in graph if one[0] == wire.GRAPH_VALUE_INFO]
        self._graph_rest = [one for one in graph if one[0] not in _GRAPH_FIELDS]
        self._header = [one for one in model if one[0] != wire.MODEL_GRAPH]

    def to_bytes(self) -> bytes:
        """The model as a file holds it."""
        graph = wire.message(
            [(wire.GRAPH_NODE, node.to_bytes()) for node in self.nodes]
            + [(wire.GRAPH_NAME, self.name)]
            + [(wire.GRAPH_INITIALIZER, wire.message(tensor)) for tensor in self.constants.values()]
            + [(wire.GRAPH_INPUT, value.to_bytes()) for value in self.inputs]
            + [(wire.GRAPH_OUTPUT, value.to_bytes()) for value in self.outputs]
            + [*self._infos, *self._graph_rest]
        )
        return wire.message([*self._header, (wire.MODEL_GRAPH, graph)])

    def add_constant(self, name: str, array: NDArray[np.float32]) -> None:
        """One more constant, float32."""
        data = np.ascontiguousarray(array, "<f4").tobytes()
        dims = [(wire.TENSOR_DIMS, size) for size in array.shape]
        self.constants[name] = [
            *dims,
            (wire.TENSOR_TYPE, wire.FLOAT),
            (wire.TENSOR_NAME, name.encode()),
            (wire.TENSOR_RAW, data),
        ]

    def integers(self, name: str) -> list[int] | None:
        """The values of a constant of 64-bit integers; None where there is none of that name and type."""
        tensor = self.constants.get(name)
        if tensor is None or (wire.TENSOR_TYPE, wire.INT64) not in tensor:
            return None
        raw = [value for number, value in tensor if number == wire.TENSOR_RAW and isinstance(value, bytes)]
        if raw:
            values: list[int] = np.frombuffer(raw[0], "<i8").tolist()
            return values
        return wire.integers(tensor, wire.TENSOR_INT64)

    def dims(self, name: str) -> list[int]:
        """The shape of a constant; empty where there is none of that name, or it is a scalar."""
        return wire.integers(self.constants.get(name, []), wire.TENSOR_DIMS)

    def drop_unused_constants(self) -> None:
        """Remove what no node reads."""
        used = {name for node in self.nodes for name in node.inputs}
        self.constants = {name: tensor for name, tensor in self.constants.items() if name in used}

    def rename(self, names: Mapping[str, str]) -> None:
        """Other names for tensors, wherever they stand but at the graph's two ends. Types of inner ones are dropped."""
        for node in self.nodes:
            node.inputs = [names[name] for name in node.inputs]
            node.outputs = [names[name] for name in node.outputs]
        renamed = [(names[name], tensor) for name, tensor in self.constants.items()]
        self.constants = {
            name: [(number, name.encode() if number == wire.TENSOR_NAME else value) for number, value in tensor]
            for name, tensor in renamed
        }
        self._infos = []

    def set_properties(self, properties: Mapping[str, str]) -> None:
        """Replace the model's metadata."""
        self._header = [one for one in self._header if one[0] != wire.MODEL_PROPERTIES]
        entries = [wire.message([(1, key), (2, value)]) for key, value in properties.items()]
        self._header += [(wire.MODEL_PROPERTIES, entry) for entry in entries]

    def add_opset(self, domain: str, version: int) -> None:
        """Name a domain of operators, unless the model does."""
        named = [wire.read_fields(message) for message in _messages(self._header, wire.MODEL_OPSET)]
        if domain not in [wire.text(opset, 1) for opset in named]:
            self._header.append((wire.MODEL_OPSET, wire.message([(1, domain), (2, version)])))


def conv_node(name: str, source: str, weight: str, target: str, kernel: Sequence[int], stride: int = 1) -> Node:
    """A convolution without padding and bias."""
    attributes = [wire.integers_attribute("kernel_shape", kernel)]
    if stride != 1:
        attributes.append(wire.integers_attribute("strides", [stride, stride]))
    return Node("Conv", [source, weight], [target], name, attributes=attributes)


def _messages(fields: wire.Fields, number: int) -> Iterable[bytes]:
    return (value for field, value in fields if field == number and isinstance(value, bytes))


def _node(message: bytes) -> Node:
    fields = wire.read_fields(message)
    return Node(
        op=wire.text(fields, wire.NODE_OP),
        inputs=[value.decode() for value in _messages(fields, wire.NODE_INPUT)],
        outputs=[value.decode() for value in _messages(fields, wire.NODE_OUTPUT)],
        name=wire.text(fields, wire.NODE_NAME),
        domain=wire.text(fields, wire.NODE_DOMAIN),
        attributes=list(_messages(fields, wire.NODE_ATTRIBUTE)),
        rest=[one for one in fields if one[0] not in _NODE_FIELDS],
    )


def _value(message: bytes) -> Value:
    fields = wire.read_fields(message)
    return Value(wire.text(fields, wire.VALUE_NAME), wire.only(fields, wire.VALUE_TYPE))
