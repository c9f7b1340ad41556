"""What trainers save beside the weights and is no code: numbers and arrays of numpy, options, paths, dates.

torch's restricted reader refuses every name that it does not know. The names here are known and harmless, and even so
none of them is looked up: each stands for a builder of ours. numpy's numbers and arrays are read as numbers
(:mod:`bdexport.pickled_arrays`), containers become plain ones, the rest becomes :class:`Aside`, an object without use.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bdexport.pickled_arrays import array_names


class Aside:
    """Stands for an object that was saved beside the weights and is not used; takes whatever it is given."""

    def __new__(cls, *_: object, **__: object) -> Aside:
        return super().__new__(cls)

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __setstate__(self, _: object) -> None:
        pass


class AsideMapping:
    """Stands for a class of mappings: making one gives an ordinary OrderedDict, which the pickle fills."""

    def __new__(cls, *_: object) -> OrderedDict[Any, Any]:  # type: ignore[misc]
        return OrderedDict()


class AsideList:
    """Stands for a class of sequences: making one gives an ordinary list, which the pickle fills."""

    def __new__(cls, *_: object) -> list[Any]:  # type: ignore[misc]
        return []


def _empty_bytes(*_: object) -> bytes:
    """``bytes()``: how protocol 2 writes those of an empty array; a size that is asked for is not allocated."""
    return b""


_VALUES = {
    "argparse": ("Namespace",),
    "types": ("SimpleNamespace",),
    "pathlib": ("PurePath", "PurePosixPath", "PureWindowsPath", "Path", "PosixPath", "WindowsPath"),
    "pathlib._local": ("PurePath", "PurePosixPath", "PureWindowsPath", "Path", "PosixPath", "WindowsPath"),  # 3.13
    "datetime": ("date", "datetime", "time", "timedelta", "timezone"),
    "decimal": ("Decimal",),
    "fractions": ("Fraction",),
    "uuid": ("UUID",),
    "builtins": (
        *("Ellipsis", "bool", "dict", "float", "frozenset", "int", "list", "range", "slice", "str", "tuple"),
        *("unicode", "xrange"),  # what protocol 2 calls str and range
    ),
    "torch.torch_version": ("TorchVersion",),
    "numpy": ("bool_", "float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8"),  # as classes
    "pytorch_lightning.callbacks.model_checkpoint": ("ModelCheckpoint",),  # .. as the key of a dict
    "pytorch_lightning.callbacks.early_stopping": ("EarlyStopping",),
}
_MAPPINGS = {
    "collections": ("defaultdict",),
    "easydict": ("EasyDict",),
    "lightning_fabric.utilities.data": ("AttributeDict",),
    "lightning.fabric.utilities.data": ("AttributeDict",),
    "pytorch_lightning.utilities.parsing": ("AttributeDict",),
    "yacs.config": ("CfgNode",),
}
MAPPINGS = frozenset(f"{module}.{name}" for module, names in _MAPPINGS.items() for name in names)
_LISTS = {"collections": ("deque",)}


def known_beside_weights() -> list[Callable[..., Any] | tuple[Callable[..., Any], str]]:
    """(builder, full name) of every name that is allowed, for ``torch.serialization.safe_globals``."""
    found: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
        (builder, f"{module}.{name}") for (module, name), builder in array_names().items()
    ]
    kinds: dict[type, Mapping[str, Sequence[str]]] = {Aside: _VALUES, AsideMapping: _MAPPINGS, AsideList: _LISTS}
    found.append((_empty_bytes, "builtins.bytes"))
    for kind, names in kinds.items():
        found += [(kind, f"{module}.{name}") for module, listed in names.items() for name in listed]
    return found
