"""What a torch file would take, and whether it fits itself: counted before torch reads it.

torch's own reader trusts the numbers in a file: a tensor may claim more elements than are stored (with a stride of 0 it
repeats them), a storage more bytes than the archive has, a compressed member unpacks to a thousand times its size.
"""

from __future__ import annotations

import math
import re
import struct
import tarfile
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable
from io import BytesIO
from pickle import UnpicklingError
from typing import Any, BinaryIO

import torch

from bdexport.checkpoint.beside import MAPPINGS, known_beside_weights
from bdexport.checkpoint.fitting import shown
from bdexport.limits import CHECKPOINT_DIRECTORY, MIB, REPEATED_TENSOR
from bdexport.pickle_scan import Value, scan

MAGIC = 0x1950A86A20F9469CFC6C  # the first of the pickles in a file from before torch 1.6
OPERATIONS = frozenset(  # those that torch's restricted reader knows
    {
        *("PROTO", "STOP", "MARK", "GLOBAL", "REDUCE", "NEWOBJ", "BUILD", "BINPERSID", "NONE", "NEWTRUE", "NEWFALSE"),
        *("APPEND", "APPENDS", "SETITEM", "SETITEMS", "EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET", "EMPTY_TUPLE"),
        *("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
        *("BINUNICODE", "SHORT_BINSTRING", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET"),
    }
)
TENSORS = {f"torch._utils._rebuild_{name}" for name in ("tensor", "tensor_v2", "tensor_v3", "qtensor")}
AROUND_TENSORS = {f"torch._utils._rebuild_{name}" for name in ("parameter", "parameter_with_state", "sparse_tensor")}
OF_NO_SIZE = {"torch._utils._rebuild_meta_tensor_no_storage", "torch.serialization._get_layout", "torch.device"}
STATE_AT = {"torch._utils._rebuild_parameter_with_state": 3, "torch._tensor._rebuild_from_type_v2": 3}
OF_TENSORS = frozenset(dir(torch.nn.Parameter))
OF_MAPPINGS = frozenset((*dir(OrderedDict), *dir(Counter)))
ANY_TYPE = "torch._tensor._rebuild_from_type_v2"  # makes a tensor by another of these, then sets attributes
TEXT_CODINGS = ("latin1", "latin-1", "utf-8", "utf8", "ascii")
OF_TORCH_OR_PYTHON = re.compile(
    r"torch\.(\w+|_utils\.\w+|_tensor\.\w+|storage\.\w+)|(builtins|collections|_codecs)\.\w+"
)
STORED_ELEMENT = {  # bytes of one element, by the name of a kind of storage
    **dict.fromkeys(("Double", "Long", "ComplexFloat"), 8),
    **dict.fromkeys(("Float", "Int", "QInt32"), 4),
    **dict.fromkeys(("Half", "BFloat16", "Short"), 2),
    **dict.fromkeys(("Char", "Byte", "Bool", "QInt8", "QUInt8", "QUInt4x2", "QUInt2x4", "Untyped"), 1),
    "ComplexDouble": 16,
}
TYPES = {str(kind): kind.itemsize for kind in vars(torch).values() if isinstance(kind, torch.dtype)}
STORAGE = re.compile(r"torch\.(?:cuda\.|storage\.)?(\w+)Storage")


def count_torch_zip(file: BinaryIO, length: int) -> None:
    """Check a zip archive of torch's, ``length`` bytes long: its members, their checksums, then the pickle in it.

    Raises zipfile.BadZipFile and other exceptions for damage, and pickle.UnpicklingError for what is not allowed.
    """
    check_directory(file, length)
    with zipfile.ZipFile(file) as archive:
        members = _checked_members(archive, file)
        broken = archive.testzip()  # torch itself does not compare the checksums
        if broken is not None:
            raise zipfile.BadZipFile(f"{broken} has another checksum")
        top, pickled = _pickle_in(members)
        if pickled is None:
            return

        def stored(key: str) -> int:
            member = members.get(f"{top}/data/{key}")
            if member is None:
                raise zipfile.BadZipFile(f"the values data/{key} are missing")
            return member.file_size

        scan(BytesIO(archive.read(pickled)), length, _TorchRules(stored))


def zip_names(file: BinaryIO, length: int) -> set[str]:
    """The last parts of the members' names."""
    check_directory(file, length)
    with zipfile.ZipFile(file) as archive:
        return {name.rpartition("/")[2] for name in archive.namelist()}


def count_torch_pickles(file: BinaryIO, length: int) -> None:
    """Check a sequence of pickles as torch wrote it before 1.6: magic number, version, system, content, keys.

    Raises pickle.UnpicklingError for what is not allowed, and ValueError for damage.
    """
    try:
        tarfile.TarInfo.frombuf(file.read(tarfile.BLOCKSIZE), "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        file.seek(0)
    else:
        raise UnpicklingError("it is a tar archive as well")
    rules = _TorchRules(None, length)
    if scan(file, length, rules) != MAGIC:
        raise ValueError("Invalid magic number")
    for _ in ("version", "system", "content"):
        scan(file, length, rules)
    keys = scan(file, length, rules)
    if not isinstance(keys, Value) or keys.kind != "list" or not keys.keys:
        raise UnpicklingError("no list of its storages")


def check_directory(file: BinaryIO, length: int) -> None:
    """Check that a zip archive's directory is at its end, where Python and torch both look, and not too long.

    Raises zipfile.BadZipFile, and pickle.UnpicklingError for its length.
    """
    file.seek(max(0, length - 98))
    tail = file.read(98).rjust(98, b"\0")
    if tail[76:80] != b"PK\x05\x06":
        raise zipfile.BadZipFile("it does not end with its directory")
    size = struct.unpack_from("<I", tail, 76 + 12)[0]
    if tail[56:60] == b"PK\x06\x07":  # a zip64 locator, behind the record that it points to
        if tail[:4] != b"PK\x06\x06":
            raise zipfile.BadZipFile("its directory is not where it should be")
        size = struct.unpack_from("<Q", tail, 40)[0]
    if size > min(length, CHECKPOINT_DIRECTORY):
        raise UnpicklingError(f"a directory of {size:,} bytes, more than {CHECKPOINT_DIRECTORY:,}")
    file.seek(0)


def _checked_members(archive: zipfile.ZipFile, file: BinaryIO) -> dict[str, zipfile.ZipInfo]:
    """Members by name: stored as they are, one after the other, each name once however it is written."""
    end = 0
    members = sorted(archive.infolist(), key=lambda member: member.header_offset)
    for member in members:
        if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
            raise UnpicklingError(f"{shown(member.filename, 60)} is compressed, which torch.save never does")
        if member.header_offset < end or (end == 0 and member.header_offset != 0):
            raise zipfile.BadZipFile(f"{shown(member.filename, 60)} overlaps another member")
        file.seek(member.header_offset + 26)
        name, extra = struct.unpack("<HH", file.read(4))
        end = member.header_offset + 30 + name + extra + member.file_size
    if end > archive.start_dir:
        raise zipfile.BadZipFile("a member overlaps the directory")
    if len({member.filename.lower() for member in members}) != len(members):
        raise zipfile.BadZipFile("two members have the same name")
    return {member.filename: member for member in members}


def _pickle_in(members: dict[str, zipfile.ZipInfo]) -> tuple[str, str | None]:
    """The archive's one folder, and the member that torch reads the content from."""
    pickled = [name for name in members if name.lower().rpartition("/")[2] == "data.pkl"]
    if not pickled:
        return "", None
    tops = {name.partition("/")[0] for name in members}
    if len(tops) != 1 or pickled != [f"{(top := tops.pop())}/data.pkl"]:
        raise zipfile.BadZipFile("its members are not in one folder with one data.pkl")
    return top, pickled[0]


class _TorchRules:
    """What torch's reader would do at each call, in bytes.

    ``stored``: a storage's bytes by its key, in a zip archive; in a sequence of pickles the storages follow at the end,
    and together they are no longer than the file (``length``).
    """

    operations = OPERATIONS

    def __init__(self, stored: Callable[[str], int] | None, length: int = 0) -> None:
        self._stored, self._left = stored, length
        self._sizes: dict[str, int] = {}
        listed = (entry[1] for entry in known_beside_weights() if isinstance(entry, tuple))
        self._beside = frozenset(listed)
        self._harmless = self._beside | OF_NO_SIZE | AROUND_TENSORS

    def call(self, name: str, arguments: tuple[Any, ...], place: str) -> int | None:
        if name in STATE_AT:
            _check_tensor_state(_at(arguments, STATE_AT[name]))
        if name in TENSORS:
            return _tensor_bytes(name, arguments, place)
        if name == ANY_TYPE:
            function, inner = _at(arguments, 0), _at(arguments, 2)
            if not isinstance(function, Value) or function.name not in TENSORS | AROUND_TENSORS:
                raise UnpicklingError("a tensor that is made in another way than by torch")
            return self.call(function.name, inner.items if isinstance(inner, Value) else (), place)
        if name in self._harmless or _CALLS.get(name, _refuse)(arguments):
            return None
        if OF_TORCH_OR_PYTHON.fullmatch(name):
            raise UnpicklingError(f"it calls {name}{_shown(arguments)}")
        raise UnpicklingError(f"Unsupported global: GLOBAL {name}")

    def build(self, name: str, state: Any) -> None:
        if name not in self._beside and not name.startswith("collections."):
            raise UnpicklingError(f"it sets a state on what {name} has made")
        if name in MAPPINGS or name.startswith("collections."):  # the others take any state, and keep none
            _check_attributes(state, OF_MAPPINGS, "a dict")

    def storage(self, identity: Any) -> Value:
        """A storage whose bytes are its one item (its size is not counted: that of the tensors on it is)."""
        items = identity.items if isinstance(identity, Value) else ()
        if _at(items, 0) == "module" and isinstance(_at(items, 1), Value):
            raise UnpicklingError(f"Unsupported global: GLOBAL {items[1].name}")
        if len(items) not in (5, 6) or items[0] != "storage":
            raise UnpicklingError("a reference to what is no storage")
        kind = STORAGE.fullmatch(items[1].name) if isinstance(items[1], Value) else None
        key, numel = str(items[2]) if is_text(items[2]) else None, items[4]
        if kind is None or kind[1] not in STORED_ELEMENT or key is None or not is_count(numel):
            raise UnpicklingError("a storage of an unknown form")
        size = numel * STORED_ELEMENT[kind[1]]
        self._claim(key, size)
        view = items[5] if len(items) == 6 else None
        if view is not None:
            name, offset, length = view.items if isinstance(view, Value) and len(view.items) == 3 else (None, -1, 0)
            if not is_text(name) or not is_count(offset) or not is_count(length) or offset + length > numel:
                raise UnpicklingError("a part of a storage that is beyond its end")
            size = length * STORED_ELEMENT[kind[1]]
        storage = Value("storage", kind[1])
        storage.items = (size,)
        return storage

    def _claim(self, key: str, size: int) -> None:
        if key not in self._sizes:
            if self._stored is None:
                self._left -= size
            if self._left < 0 or (self._stored is not None and self._stored(key) != size):
                raise ValueError(f"storage {key[:20]!r} claims {size:,} bytes, which the file does not have")
            self._sizes[key] = size
        elif self._sizes[key] != size:
            raise UnpicklingError(f"storage {key[:20]!r} has two sizes")


def is_count(value: Any) -> bool:
    """Whether it is an integer that is not negative."""
    return type(value) is int and value >= 0


def is_text(value: Any) -> bool:
    """Whether it is a short text."""
    return isinstance(value, str)


def _tensor_bytes(name: str, arguments: tuple[Any, ...], place: str) -> int:
    """Bytes of a tensor, four at least for each element. Raises where it does not fit the storage that it views."""
    storage, offset, shape, strides = (_at(arguments, index) for index in range(4))
    sizes, steps = (value.items if isinstance(value, Value) else (None,) for value in (shape, strides))
    stands = f"tensor {place[:80]!r}" if place else "a tensor"
    known = isinstance(storage, Value) and storage.kind == "storage"
    if not known or len(sizes) != len(steps) or len(sizes) > 64 or not all(map(is_count, (offset, *sizes, *steps))):
        raise UnpicklingError(f"{stands} of an unknown form")
    itemsize = STORED_ELEMENT[storage.name]
    if name.endswith("_v3"):
        named = _at(arguments, 6)
        if not isinstance(named, Value) or named.name not in TYPES:
            raise UnpicklingError(f"{stands} of an unknown type")
        itemsize = TYPES[named.name]
    numel, stored = math.prod(sizes), int(storage.items[0])
    last = sum((size - 1) * step for size, step in zip(sizes, steps, strict=True))
    if numel and (offset + last + 1) * itemsize > stored:
        raise UnpicklingError(f"{stands} reaches beyond its storage of {stored:,} bytes")
    if numel * itemsize > max(stored, REPEATED_TENSOR):
        raise UnpicklingError(
            f"{stands} has {list(sizes)} elements on a storage of {stored // itemsize:,}: it repeats them (stride 0); "
            "call .contiguous() on it before saving"
        )
    return int(numel) * max(itemsize, 4)


def _check_tensor_state(state: Any) -> None:
    """Check the attributes that a file gives a tensor: a dict of them, alone or as the first of a pair."""
    parts = state.items if isinstance(state, Value) and state.kind == "tuple" else (state,)
    for part in parts:
        if part is not None:
            _check_attributes(part, OF_TENSORS, "a tensor")


def _check_attributes(state: Any, taken: frozenset[str], owner: str) -> None:
    """Refuse a state that would hide a method, which is called later on, behind a value of the file's."""
    if not isinstance(state, Value) or state.kind != "dict":
        raise UnpicklingError(f"it sets a state on {owner} that is no dict of attributes")
    for name in state.texts or ():
        if name in taken:
            raise UnpicklingError(f"it sets the attribute {shown(name, 60)} of {owner}, which has one of that name")


def _at(items: tuple[Any, ...], index: int) -> Any:
    return items[index] if index < len(items) else None


def _refuse(_: tuple[Any, ...]) -> bool:
    return False


def _bytes_like(value: Any) -> bool:
    if isinstance(value, Value):
        return value.kind == "text" or value.name == "_codecs.encode"
    return isinstance(value, str | bytes)


def _is_coding(arguments: tuple[Any, ...]) -> bool:
    return all(value in TEXT_CODINGS for value in arguments if not isinstance(value, Value)) and not any(
        isinstance(value, Value) for value in arguments
    )


def _mapping(arguments: tuple[Any, ...]) -> bool:
    """Python 2 wrote an OrderedDict as a list of pairs."""
    return not arguments or (len(arguments) == 1 and isinstance(arguments[0], Value) and arguments[0].pairs)


def _counts(arguments: tuple[Any, ...]) -> bool:
    """A Counter is written with a dict of its counts."""
    if not arguments:
        return True
    (first, *more) = arguments
    return not more and isinstance(first, Value) and first.kind == "dict" and first.plain


def _set(arguments: tuple[Any, ...]) -> bool:
    if not arguments:
        return True
    (first, *more) = arguments
    return not more and isinstance(first, Value) and first.kind in ("list", "tuple") and first.keys


_CALLS: dict[str, Callable[[tuple[Any, ...]], bool]] = {
    "collections.OrderedDict": _mapping,
    "collections.Counter": _counts,
    "builtins.set": _set,
    "builtins.bytearray": lambda arguments: not arguments or (_bytes_like(arguments[0]) and _is_coding(arguments[1:])),
    "builtins.complex": lambda arguments: all(isinstance(value, float) for value in arguments),
    "_codecs.encode": lambda arguments: bool(arguments) and _bytes_like(arguments[0]) and _is_coding(arguments[1:]),
    "torch.Size": lambda arguments: all(
        isinstance(value, Value) and value.count <= 64 and all(map(is_count, value.items)) for value in arguments
    ),
}


def _shown(arguments: tuple[Any, ...]) -> str:
    """Of the arguments of a refused call, a number that it would take."""
    return f"({arguments[0]:,})" if arguments and type(arguments[0]) is int and arguments[0] > MIB else ""
