"""What loading a pickle would take, counted from its operations before anything is loaded. No torch.

A pickle is a program for a small stack machine. A few of its bytes can ask for gigabytes: a position in the memo, a
length, a call such as ``bytearray(8_000_000_000)``, or lists that hold each other twice, forty levels deep.
:func:`scan` runs the program on records that know only how large each value would be, refuses what no honest file does,
and takes a time and memory in proportion to the number of operations. What a name stands for, and what may be called,
is told by the caller's :class:`Rules`.

A container is refused where it is filled after it was used (put into another one, or taken from the memo). Pickles of
plain data never do that unless a value holds itself, and so the size of a value is final when the value is used.
"""

from __future__ import annotations

import io
import pickletools
from collections.abc import Callable, Sequence
from pickle import UnpicklingError
from typing import Any, BinaryIO, Protocol, cast

from bdexport.limits import (
    GROWTH,
    GROWTH_FLOOR,
    PICKLE_ARGUMENTS,
    PICKLE_CHOSEN_KEYS,
    PICKLE_INTEGER,
    PICKLE_NAME,
    PICKLE_NESTING,
    PICKLE_VALUES,
)

SHORT_TEXT = 1000  # longer texts and bytes are only counted
HASH_MODULUS = 2**61 - 1  # sys.hash_info.modulus of a 64-bit Python
KEY_TUPLE, KEY_TUPLE_INTEGER = 3, 2**20  # values of a tuple that is a key, and what its integers are less than
HASHED_BY_NUMBERS = ("builtins.complex", "torch.Size")  # what these make has a hash that a file can choose


class Value:
    """A value of a pickle: ``kind`` is list, tuple, dict, text (a long one), name, storage or object.

    ``name``: what a name says, or what was called to make an object. ``items``: of a tuple, its values.
    ``values`` and ``size``: how many values it holds with itself, and how many bytes, shared ones at each place.
    ``depth``: levels of nesting. ``open``: it was not used yet, and may be filled. ``first``: its first may be a key.
    ``plain``: it holds numbers and short texts only. ``keys``: all that it holds may be keys. ``pairs``: all that it
    holds are pairs whose first is a key. ``texts``: of a dict, the short texts among its keys.

    Whatever is asked of a value takes no longer for a large one, since it may be asked at each of its places.
    """

    __slots__ = (
        "count",
        "depth",
        "first",
        "items",
        "keys",
        "kind",
        "name",
        "open",
        "pairs",
        "plain",
        "size",
        "texts",
        "values",
    )

    def __init__(self, kind: str, name: str = "", size: int = 0) -> None:
        self.kind, self.name, self.size = kind, name, size
        self.items: tuple[Any, ...] = ()
        self.texts: list[str] | None = None  # most values are no dicts, and take no list
        self.values, self.depth, self.count = 1, 1, 0
        self.open = kind in ("list", "dict", "object")
        self.keys = self.pairs = self.first = self.plain = True

    def hold(self, items: Sequence[Any]) -> None:
        """Count what is put into it. Raises pickle.UnpicklingError beyond the limits of nesting and values."""
        for item in items:
            if isinstance(item, Value):
                item.open = False
                self.values += item.values
                self.size += item.size
                self.depth = max(self.depth, item.depth + 1)
                self.plain = False
                self.keys = self.keys and is_key(item)
                self.pairs = self.pairs and _is_pair(item)
            else:
                self.values += 1
                self.size += len(item) if isinstance(item, str | bytes) else 0
                self.pairs = False
                self.keys = self.keys and is_key(item)
        if self.count == 0 and items:
            self.first = is_key(items[0])
        self.count += len(items)
        if self.depth > PICKLE_NESTING:
            raise UnpicklingError(f"nested more than {PICKLE_NESTING} deep")
        if self.values > PICKLE_VALUES:
            raise UnpicklingError(f"it would unfold to more than {PICKLE_VALUES:,} values")


class Rules(Protocol):
    """What the names of a pickle stand for. Every method raises pickle.UnpicklingError for what is not allowed."""

    operations: frozenset[str]

    def call(self, name: str, arguments: tuple[Any, ...], place: str) -> int | None:
        """Allow a call; the bytes of its result, or None where they are those of its arguments."""

    def build(self, name: str, state: Any) -> None:
        """Allow a state to be set on what a call of ``name`` has made."""

    def storage(self, identity: Any) -> Value:
        """What a persistent identity stands for."""


_NUMBERS = ("BININT", "BININT1", "BININT2", "LONG1", "INT", "LONG", "FLOAT", "BINFLOAT")
_TEXTS = (
    *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE", "STRING", "BINSTRING", "SHORT_BINSTRING"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
)
ALL_OPERATIONS = frozenset(  # of data without persistent identities; nothing that jumps back on the stack
    {
        *(*_NUMBERS, *_TEXTS, "PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE", "GET", "BINGET", "LONG_BINGET"),
        *("PROTO", "FRAME", "STOP", "NONE", "NEWTRUE", "NEWFALSE", "EMPTY_LIST", "EMPTY_DICT", "EMPTY_TUPLE"),
        *("MARK", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "LIST", "DICT", "APPEND", "APPENDS", "SETITEM", "SETITEMS"),
        *("GLOBAL", "STACK_GLOBAL", "REDUCE", "NEWOBJ", "BUILD"),
    }
)


def scan(file: BinaryIO, length: int, rules: Rules) -> Any:
    """The one value of the pickle that begins at the position of ``file``, which then stands behind it.

    ``length``: bytes of the whole file, to which the limits are in proportion. The result is a number, None, a
    short text or a :class:`Value`. Raises pickle.UnpicklingError for what is not allowed, EOFError or ValueError for
    what is no pickle.
    """
    machine = _Machine(rules, GROWTH * length + GROWTH_FLOOR)
    reader = cast(BinaryIO, _Reader(file, length))  # it has what pickletools uses
    for operation, argument, _ in pickletools.genops(reader):
        if operation.name not in rules.operations:
            raise UnpicklingError(f"unexpected operation {operation.name}")
        if operation.name == "FRAME" and int(argument or 0) > length:
            raise EOFError(f"a frame of {argument:,} bytes in a file of {length:,}")
        machine.step(operation.name, argument)
    return machine.result()


class _Reader:
    """A file of which no more is asked than it has: reading allocates what is asked for, before it is there."""

    def __init__(self, file: BinaryIO, length: int) -> None:
        self._file, self._length = file, length
        self.readline = file.readline
        self.tell = file.tell

    def read(self, count: int) -> bytes:
        if count > io.DEFAULT_BUFFER_SIZE and count > self._length - self._file.tell():
            raise EOFError(f"a length of {count:,} bytes, more than the file has left")
        return self._file.read(count)


class _Machine:
    def __init__(self, rules: Rules, most: int) -> None:
        self.rules, self.most = rules, most
        self.operations = 0
        self.stack: list[Any] = []
        self._chosen_keys = 0
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self._steps: dict[str, Callable[[Any], None]] = {
            **dict.fromkeys(_NUMBERS, self._number),
            **dict.fromkeys(_TEXTS, self._text),
            **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), self._put),
            **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), self._get),
            **dict.fromkeys(("REDUCE", "NEWOBJ"), self._call),
            **dict.fromkeys(("PROTO", "FRAME", "STOP"), lambda _: None),
            "NONE": lambda _: self.stack.append(None),
            "NEWTRUE": lambda _: self.stack.append(True),
            "NEWFALSE": lambda _: self.stack.append(False),
            "EMPTY_LIST": lambda _: self.stack.append(Value("list")),
            "EMPTY_DICT": lambda _: self.stack.append(Value("dict")),
            "EMPTY_SET": lambda _: self.stack.append(Value("set")),
            "EMPTY_TUPLE": lambda _: self._tuple([]),
            "TUPLE1": lambda _: self._tuple(self._last(1)),
            "TUPLE2": lambda _: self._tuple(self._last(2)),
            "TUPLE3": lambda _: self._tuple(self._last(3)),
            "TUPLE": lambda _: self._tuple(self._since_mark()),
            "MARK": self._mark,
            "APPEND": lambda _: self._append(self._last(1)),
            "APPENDS": lambda _: self._append(self._since_mark()),
            "SETITEM": lambda _: self._set_items(self._last(2)),
            "SETITEMS": lambda _: self._set_items(self._since_mark()),
            "LIST": self._list,
            "DICT": self._dict,
            "GLOBAL": lambda text: self.stack.append(_name(text.replace(" ", ".", 1))),
            "STACK_GLOBAL": self._name,
            "MEMOIZE": lambda _: self._put(len(self.memo)),
            "BINPERSID": lambda _: self.stack.append(self.rules.storage(self._last(1)[0])),
            "BUILD": self._build,
        }

    def result(self) -> Any:
        if len(self.stack) != 1 or self.marks:
            raise UnpicklingError("more or less than one value at its end")
        return self.stack[0]

    def step(self, name: str, argument: Any) -> None:
        self.operations += 1
        if self.operations > PICKLE_VALUES:
            raise UnpicklingError(f"more than {PICKLE_VALUES:,} operations")
        self._steps[name](argument)

    def _last(self, count: int) -> list[Any]:
        if len(self.stack) < count:
            raise UnpicklingError("a value is missing")
        items = self.stack[-count:]
        del self.stack[-count:]
        return items

    def _mark(self, _: Any) -> None:
        self.marks.append(self.stack)
        self.stack = []
        if len(self.marks) > 2 * PICKLE_NESTING:
            raise UnpicklingError(f"nested more than {PICKLE_NESTING} deep")

    def _since_mark(self) -> list[Any]:
        if not self.marks:
            raise UnpicklingError("a mark is missing")
        items, self.stack = self.stack, self.marks.pop()
        return items

    def _number(self, number: Any) -> None:
        if isinstance(number, int) and number.bit_length() > 8 * PICKLE_INTEGER:
            raise UnpicklingError(f"an integer of more than {PICKLE_INTEGER} bytes")
        self.stack.append(number)

    def _text(self, text: Any) -> None:
        self.stack.append(text if len(text) <= SHORT_TEXT else Value("text", size=len(text)))

    def _put(self, index: int) -> None:
        if index > self.operations or not self.stack:
            raise UnpicklingError(f"memo {index:,} after {self.operations:,} operations")
        self.memo[index] = self.stack[-1]

    def _get(self, index: int) -> None:
        if index not in self.memo:
            raise UnpicklingError(f"memo {index:,} is empty")
        value = self.memo[index]
        if isinstance(value, Value):
            value.open = False
        self.stack.append(value)

    def _tuple(self, items: list[Any]) -> None:
        value = Value("tuple")
        value.items = tuple(items)
        self._hold(value, items)
        self.stack.append(value)

    def _hold(self, value: Value, items: Sequence[Any]) -> None:
        value.hold(items)
        if value.size > self.most:
            raise UnpicklingError(
                f"its content, counted at each place where it stands, would take more than {self.most:,} bytes: save "
                "what stands in several places once"
            )

    def _target(self, *kinds: str) -> Value:
        target = self.stack[-1] if self.stack else None
        if not isinstance(target, Value) or target.kind not in kinds or not target.open:
            raise UnpicklingError(f"a value is put into what is no {kinds[0]}, or is complete already")
        return target

    def _append(self, items: list[Any]) -> None:
        self._hold(self._target("list", "object"), items)

    def _set_items(self, items: list[Any]) -> None:
        if len(items) % 2 or not all(map(is_key, items[::2])):
            raise UnpicklingError("a key that is neither a text nor an ordinary number")
        self._chosen_keys += sum(not _is_harmless(key) for key in items[::2])
        if self._chosen_keys > PICKLE_CHOSEN_KEYS:
            raise UnpicklingError(f"more than {PICKLE_CHOSEN_KEYS:,} keys that are neither texts nor small integers")
        target = self._target("dict", "object")
        if target.kind == "dict":
            target.texts = target.texts or []
            target.texts.extend(key for key in items[::2] if isinstance(key, str))
        self._hold(target, items)

    def _list(self, _: Any) -> None:
        items = self._since_mark()
        self.stack.append(Value("list"))
        self._append(items)

    def _dict(self, _: Any) -> None:
        items = self._since_mark()
        self.stack.append(Value("dict"))
        self._set_items(items)

    def _name(self, _: Any) -> None:
        module, name = self._last(2)
        if not isinstance(module, str) or not isinstance(name, str):
            raise UnpicklingError("a name that is no text")
        self.stack.append(_name(f"{module}.{name}"))

    def _build(self, _: Any) -> None:
        (state,) = self._last(1)
        target = self._target("object")
        self.rules.build(target.name, state)
        self._hold(target, [state])

    def _call(self, _: Any) -> None:
        called, arguments = self._last(2)
        if not isinstance(called, Value) or called.kind != "name":
            raise UnpicklingError("a call of what is no name")
        if not isinstance(arguments, Value) or arguments.kind != "tuple":
            raise UnpicklingError("a call without arguments")
        if arguments.count > PICKLE_ARGUMENTS:
            raise UnpicklingError(f"a call with {arguments.count:,} arguments")
        self._made(called.name, arguments)

    def _made(self, name: str, arguments: Value) -> None:
        size = self.rules.call(name, arguments.items, self._place())
        made = Value("object", name)
        self._hold(made, [arguments])
        if size is not None:
            made.size = 0
            self._hold(made, [Value("text", size=size)])
        self.stack.append(made)

    def _place(self) -> str:
        """The key under which the value that is being made will stand, or "", for a message."""
        for level in (self.stack, *self.marks[-1:]):
            if level and isinstance(level[-1], str):
                return level[-1]
            if len(level) > 1 and isinstance(level[-1], Value) and level[-1].kind == "name":
                return level[-2] if isinstance(level[-2], str) else ""
        return ""


def _name(text: str) -> Value:
    if len(text) > PICKLE_NAME:
        raise UnpicklingError(f"a name of {len(text):,} characters")
    module, _, rest = text.partition(".")
    return Value("name", f"builtins.{rest}" if module == "__builtin__" else text)


def is_key(value: Any) -> bool:
    """Whether a value can be a dict's key at no cost.

    A hash of tuples in each other takes a time without limit. So does a dict whose keys all have the same hash: that of
    a number is its remainder by HASH_MODULUS, and that of a tuple or a complex number follows from its numbers.
    """
    if not isinstance(value, Value):
        return not isinstance(value, int | float) or abs(value) < HASH_MODULUS  # NaN is not less
    if value.kind == "tuple":
        return value.count <= KEY_TUPLE and all(map(_is_in_key, value.items))
    return value.kind in ("text", "name") or (value.kind == "object" and value.name not in HASHED_BY_NUMBERS)


def _is_harmless(key: Any) -> bool:
    """Whether nobody can choose many such keys that a dict looks for in the same places: texts' hashes are random."""
    if isinstance(key, Value):
        return key.kind == "text"
    return isinstance(key, str | bytes) or (isinstance(key, int) and abs(key) < KEY_TUPLE_INTEGER)


def _is_in_key(value: Any) -> bool:
    """Whether a tuple that is a key may hold it: of few and small integers no two tuples of a file share a hash."""
    if isinstance(value, int):
        return abs(value) < KEY_TUPLE_INTEGER
    return value is None or isinstance(value, str | bytes)


def _is_pair(value: Any) -> bool:
    return isinstance(value, Value) and value.kind in ("list", "tuple") and value.count == 2 and value.first
