"""Hostile pickles, written opcode by opcode: they ask for code, for memory, or never end."""

from __future__ import annotations

import os
import pickle
import struct
from random import Random

from campaign.mutations import CANARY

# What a pickle may ask for that would leave a trace if it were called with (command,) or (path, mode).
CALLS = (
    ("os", "system"),
    ("posix", "system"),
    ("subprocess", "call"),
    ("builtins", "exec"),
    ("builtins", "eval"),
    ("builtins", "open"),
    ("builtins", "getattr"),
    ("pathlib", "Path.touch"),
    ("torch", "load"),
    ("torch.serialization", "load"),
    ("numpy", "load"),
    ("runpy", "_run_code"),
    ("importlib", "import_module"),
    ("bdexport.files", "write_text"),
    ("codecs", "encode"),
    ("functools", "partial"),
    ("collections", "OrderedDict"),
)


def hostile_pickle(random: Random) -> bytes:
    """One of the kinds below."""
    makers = (_call, _call, _build, _sized, _memo, _laughs, _deep, _many, _ints, _object_array)
    return random.choice(makers)(random)


def hostile_storage_pickle(random: Random) -> bytes:
    """A persistent id, as PyTorch writes storages, with odd content."""
    count = random.choice((10**9, -1, 1 << 40, 1 << 62, "many"))
    content = pickle.dumps(("storage", "torch.FloatStorage", "0", "cpu", count), protocol=2)[2:-1]
    return b"\x80\x02" + content + b"Q."


def _text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def _call(random: Random) -> bytes:
    canary = os.environ.get(CANARY, "/nowhere")
    module, name = random.choice(CALLS)
    command = {
        "exec": f"open({canary!r}, 'w')",
        "eval": f"open({canary!r}, 'w')",
        "open": canary,
        "write_text": canary,
    }.get(name, f"touch {canary}")
    arguments = _text(command) + (_text("w") if name in ("open", "write_text") else b"")
    by_line, by_stack = f"c{module}\n{name}\n".encode(), _text(module) + _text(name) + b"\x93"
    called = random.choice((by_line, by_stack))
    return b"\x80\x04" + called + b"(" + arguments + b"tR."


def _build(random: Random) -> bytes:
    module, name = random.choice((("torch.nn", "Module"), ("collections", "OrderedDict"), ("argparse", "Namespace")))
    state = pickle.dumps({"__class__": 1, "__reduce__": [1], "x" * 10: None}, protocol=2)[2:-1]
    return b"\x80\x02" + f"c{module}\n{name}\n".encode() + b")\x81" + state + b"b."


def _sized(random: Random) -> bytes:
    """Lengths that the file does not have, and types that allocate what they are told."""
    length = random.choice((1 << 31, 1 << 33, 1 << 40, (1 << 63) - 1))
    match random.randrange(4):
        case 0:
            return b"\x80\x05\x96" + struct.pack("<Q", length) + b"abc."  # BYTEARRAY8
        case 1:
            return b"\x80\x04\x8e" + struct.pack("<Q", length) + b"abc."  # BINBYTES8
        case 2:
            return b"\x80\x04\x8d" + struct.pack("<Q", length) + b"abc."  # BINUNICODE8
        case _:
            kind = random.choice(("bytearray", "bytes", "range", "list"))
            number = pickle.dumps(length, protocol=2)[2:-1]
            return b"\x80\x02" + f"cbuiltins\n{kind}\n(".encode() + number + b"tR."


def _memo(random: Random) -> bytes:
    index = random.choice((1 << 20, 1 << 28, (1 << 32) - 1))
    return b"\x80\x02]r" + struct.pack("<I", index) + b"."


def _laughs(random: Random) -> bytes:
    """Each list holds the one before it ten times: 10 to the power of the depth values, in a few bytes."""
    depth = random.choice((6, 12, 100))
    opening, closing = random.choice(((b"]", b"e"), (b"", b"t")))
    content = b"\x80\x02K\x01q\x00"
    for level in range(depth):
        inner = b"h" + bytes([level % 256])
        content += opening + b"(" + inner * 10 + closing + b"q" + bytes([(level + 1) % 256])
    return content + b"."


def _deep(random: Random) -> bytes:
    depth = random.choice((900, 20_000, 200_000))
    return b"\x80\x02" + b"]" * depth + b"a" * (depth - 1) + b"."


def _many(random: Random) -> bytes:
    """Many values from few bytes each."""
    count = random.choice((10**5, 3 * 10**6))
    return b"\x80\x02](" + b"N" * count + b"e."


def _ints(random: Random) -> bytes:
    digits = random.choice((5_000, 200_000))
    return b"\x80\x02I" + b"9" * digits + b"\n."


def _object_array(random: Random) -> bytes:
    """A numpy array that says it has more elements than bytes, or holds objects."""
    dtype = random.choice(("O8", "u1", "f8", "V4294967295", "U1073741824"))
    shape = pickle.dumps((random.choice((1 << 30, 1 << 40, -1)), 3072), protocol=2)[2:-1]
    head = b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00t" + _text("b") + b"tR"
    state = b"(K\x01" + shape + b"cnumpy\ndtype\n(" + _text(dtype) + b"K\x00K\x01tR" + b"\x89" + _text("abc") + b"tb."
    return head + state
