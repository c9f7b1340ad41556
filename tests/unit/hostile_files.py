"""Small files that ask for much: each is written by hand, since no library would write it.

The pickles are made of their operations: ``]`` a list, ``}`` a dict, ``(`` a mark, ``t`` a tuple, ``q`` and ``r`` put
into the memo, ``h`` gets from it, ``c`` a name, ``R`` a call, ``Q`` a storage, ``.`` the end.
"""

from __future__ import annotations

import io
import json
import struct
import tarfile
import zipfile
from collections.abc import Callable

import numpy as np
import torch
from foreign_networks import PublicResNet

MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the first two of the pickles in a torch file from before 1.6 ..
VERSION, SYSTEM = b"\x80\x02M\xe9\x03.", b"\x80\x02}."
TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n"
BIG = 8_000_000_000


def text(value: str) -> bytes:
    """BINUNICODE."""
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def number(value: int) -> bytes:
    """LONG1."""
    return b"\x8a" + bytes([9]) + value.to_bytes(9, "little", signed=True)


def numbers(*values: int) -> bytes:
    """A tuple of numbers."""
    return b"(" + b"".join(map(number, values)) + b"t"


def storage(numel: int, key: str = "0", kind: str = "Float", old: bool = False) -> bytes:
    """A reference to a storage."""
    items = text("storage") + f"ctorch\n{kind}Storage\n".encode() + text(key) + text("cpu") + number(numel)
    return b"(" + items + (b"N" if old else b"") + b"tQ"


def tensor(stored: bytes, shape: tuple[int, ...], strides: tuple[int, ...], offset: int = 0) -> bytes:
    """A call that makes a tensor."""
    hooks = b"ccollections\nOrderedDict\n)R"
    return TENSOR + b"(" + stored + number(offset) + numbers(*shape) + numbers(*strides) + b"\x89" + hooks + b"tR"


def state(*entries: tuple[str, bytes]) -> bytes:
    """A pickle of a dict."""
    return b"\x80\x02}(" + b"".join(text(name) + value for name, value in entries) + b"u."


def torch_zip(pickled: bytes, stored: dict[str, bytes] | None = None, compression: int = zipfile.ZIP_STORED) -> bytes:
    """torch's archive."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        archive.writestr("a/data.pkl", pickled)
        archive.writestr("a/byteorder", b"little")
        for key, values in ({"0": bytes(4096)} if stored is None else stored).items():
            archive.writestr(f"a/data/{key}", values)
        archive.writestr("a/version", b"3\n")
    return buffer.getvalue()


def torch_old(pickled: bytes, stored: bytes = b"") -> bytes:
    """torch's sequence of pickles."""
    return MAGIC + VERSION + SYSTEM + pickled + b"\x80\x02](" + text("0") + b"e." + stored


def doubled(start: bytes, step: bytes, levels: int) -> bytes:
    """``start``, then in each level a value that holds the one before twice."""
    return b"\x80\x02" + start + b"q\x00" + b"".join(step + b"q\x00" for _ in range(levels))


def twice_in_tuples(levels: int = 40) -> bytes:
    """Tuples that hold each other twice."""
    return doubled(b"K\x01", b"h\x00\x86", levels)


def twice_in_lists(levels: int = 40) -> bytes:
    """Lists that hold each other twice."""
    content = b"\x80\x02]r\x00\x00\x00\x00"
    for level in range(1, levels):
        put, get = (code + struct.pack("<I", place) for code, place in ((b"r", level), (b"j", level - 1)))
        content += b"]" + put + b"(" + get + get + b"e"
    return content + b"."


def calling(module: str, name: str, *arguments: bytes) -> bytes:
    """A dict with the result of one call."""
    return state(("a", f"c{module}\n{name}\n".encode() + b"(" + b"".join(arguments) + b"tR"))


def encoded_often(times: int = 5_000, size: int = 1 << 20) -> bytes:
    """One long text, made bytes again and again."""
    encode = b"c_codecs\nencode\n(h\x00" + text("latin1") + b"tR"
    return b"\x80\x02(" + text("x" * size) + b"q\x00" + encode * times + b"t."


def long_tuple(use: bytes) -> bytes:
    """A tuple of 100,000 numbers, used in 20,000 places."""
    return b"\x80\x02((" + b"G\x00\x00\x00\x00\x00\x00\x00\x00" * 100_000 + b"tq\x00" + use * 20_000 + b"t."


def overlapping_zip() -> bytes:
    """Two entries of the directory lead to the same member."""
    whole = torch_zip(state(("a", b"K\x01")), {"0": bytes(4096), "1": bytes(4096)})
    first, second = (whole.rfind(name) for name in (b"a/data/0", b"a/data/1"))
    place = whole[first - 4 : first]  # the offset of a local header ends an entry, just before the name
    return whole[: second - 4] + place + whole[second:]


def long_directory() -> bytes:
    """An archive that is all directory: 9 MiB of it, for members that are not there."""
    entry = b"PK\x01\x02" + bytes(24) + struct.pack("<HHH", 8, 0, 0) + bytes(12) + b"a/data/0"
    entries = entry * (9 * 2**20 // len(entry))
    end = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, len(entries), 30, 0)
    return b"PK\x03\x04" + bytes(26) + entries + end


def tar_as_well() -> bytes:
    """A torch file of before 1.6 that is the head of a tar archive as well, whose entry claims 8 GB of attributes."""
    entry = tarfile.TarInfo("x")
    entry.size, entry.type = BIG, tarfile.XHDTYPE
    head = bytearray(entry.tobuf(tarfile.GNU_FORMAT))
    head[: len(MAGIC + VERSION)] = MAGIC + VERSION
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    return bytes(head)


def safetensors(entries: dict[str, object], content: bytes = b"", claimed: int | None = None) -> bytes:
    """A file with this header."""
    header = json.dumps(entries).encode()
    return struct.pack("<Q", len(header) if claimed is None else claimed) + header + content


def weights(shape: list[int], start: int, end: int, dtype: str = "F32") -> dict[str, object]:
    """The entry of one tensor in a header of safetensors."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def own_header(**changed: object) -> dict[str, object]:
    """The entry of our own form, of a network of 4,000 blocks unless something else is said."""
    network = {
        "family": "cifar",
        "block": "basic",
        "stages": [500] * 8,
        "widths": [16] * 8,
        "shortcut": "conv",
        "num_classes": 10,
        "dropped_transition": "shortcut",
    }
    preprocess = {"size": [32, 32], "mean": [0] * 3, "std": [1] * 3, "resampling": "bilinear", "resize_short": None}
    header = {
        "format_version": 1,
        "network": network,
        "policy": None,
        "preprocess": preprocess,
        "training": {},
        "class_names": list("abcdefghij"),
        **changed,
    }
    return {"__metadata__": {"bdexport": json.dumps(header)}}


def reference(shape: tuple[int, ...], claimed: int | None = None) -> bytes:
    """A .npz whose array claims ``shape``, and whose directory may claim more bytes than there are."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("logits.npy", "w") as file:
        np.lib.format.write_array_header_1_0(file, {"shape": shape, "fortran_order": False, "descr": "<f4"})
        file.write(bytes(1 << 20))
    whole = bytearray(buffer.getvalue())
    if claimed is not None:
        struct.pack_into("<I", whole, whole.rfind(b"PK\x01\x02") + 24, claimed)
    return bytes(whole)


def repeated(blocks: int, width: int) -> bytes:
    """torch's own file of a network in which every tensor is one number, expanded."""
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in PublicResNet((blocks,), (width,), 10).state_dict().items()}
    buffer = io.BytesIO()
    torch.save({name: torch.zeros(()).expand(shape) for name, shape in shapes.items()}, buffer)
    return buffer.getvalue()


def empty(**shapes: tuple[int, ...]) -> bytes:
    """torch's own file of tensors without elements, or of a few, that claim much by their names and shapes."""
    buffer = io.BytesIO()
    torch.save({name.replace("_", "."): torch.zeros(shape) for name, shape in shapes.items()}, buffer)
    return buffer.getvalue()


PRIME = 2**61 - 1  # Python's hash of an integer is its remainder by this


def keys_of_one_hash(count: int = 3_000) -> bytes:
    """A dict of integers that all have the hash 0."""
    integers = (number * PRIME for number in range(1, count + 1))
    return b"\x80\x02}(" + b"".join(number_of(value) + b"N" for value in integers) + b"u."


def number_of(value: int) -> bytes:
    """LONG1 of as many bytes as it takes."""
    length = value.bit_length() // 8 + 1
    return b"\x8a" + bytes([length]) + value.to_bytes(length, "little", signed=True)


def with_key(key: bytes) -> bytes:
    """A dict with one key."""
    return b"\x80\x02}" + key + b"Ns."


def with_attribute(name: str) -> bytes:
    """An OrderedDict, of which the file sets an attribute."""
    return b"\x80\x02ccollections\nOrderedDict\n)R}" + text(name) + b"K\x05sb."


def tensor_with_attribute(name: str) -> bytes:
    """A parameter, of which the file sets an attribute."""
    inner = tensor(storage(1024), (1024,), (1,)) + b"\x89ccollections\nOrderedDict\n)R"
    made = b"ctorch._utils\n_rebuild_parameter_with_state\n(" + inner + b"}" + text(name) + b"K\x05stR"
    return state(("conv1.weight", made))


COMPLEX = b"cbuiltins\ncomplex\n" + (b"G" + struct.pack(">d", 1.0)) * 2 + b"\x86R"
KEYS: dict[str, bytes] = {  # each stands for many that have the same hash
    "large integer": number_of(PRIME),
    "large negative integer": number_of(-PRIME),
    "large float": b"G" + struct.pack(">d", 2.0**61),
    "infinity": b"G" + struct.pack(">d", float("inf")),
    "no number": b"G" + struct.pack(">d", float("nan")),
    "tuple with a large integer": number_of(PRIME) + b"\x85",
    "tuple with a float": b"G" + struct.pack(">d", 0.5) + b"\x85",
    "long tuple": b"(" + number_of(-1) + number_of(-2) * 9 + b"t",  # -1 and -2 have the same hash
    "complex number": COMPLEX,
    "shape": b"ctorch\nSize\n" + number_of(3) + b"\x85\x85R",
}


MANY = 1_990_000  # operations, within what is allowed

TORCH: dict[str, Callable[[], bytes]] = {
    "stride 0": lambda: torch_zip(state(("conv1.weight", tensor(storage(1024), (BIG,), (0,))))),
    "stride 0 in a wide network": lambda: repeated(2, 4096),
    "stride 0 in a deep network": lambda: repeated(200, 128),
    "4,000 blocks": lambda: empty(
        **{f"layer{stage}_499_conv1_weight": (8, 3, 3, 3) for stage in range(1, 9)},
        **{f"layer{stage}_499_bn1_weight": (8,) for stage in range(1, 9)},
        **{f"layer{stage}_0_conv1_weight": (8, 3, 3, 3) for stage in range(1, 9)},
        **{f"layer{stage}_0_bn1_weight": (8,) for stage in range(1, 9)},
        conv1_weight=(8, 3, 3, 3),
    ),
    "classes without end": lambda: empty(
        conv1_weight=(8, 3, 3, 3), layer1_0_conv1_weight=(8, 8, 3, 3), layer1_0_bn1_weight=(8,), fc_weight=(BIG, 0)
    ),
    "numbers for a mean": lambda: empty(mean=(1 << 20,), std=(1 << 20,)),
    "stride 0, old": lambda: torch_old(state(("w", tensor(storage(4, old=True), (BIG, 9), (0, 0)))), bytes(64)),
    "stride 0, small ones": lambda: torch_zip(
        state(*((f"w{i}", tensor(storage(1024), (250_000,), (0,))) for i in range(500)))
    ),
    "overlapping windows": lambda: torch_zip(state(("w", tensor(storage(1024), (512, 512, 512), (1, 1, 0))))),
    "beyond its storage": lambda: torch_zip(state(("w", tensor(storage(1024), (1024,), (1,), offset=8)))),
    "storage beyond its member": lambda: torch_zip(state(("w", tensor(storage(BIG), (BIG,), (1,))))),
    "storage beyond the file": lambda: torch_old(state(("w", tensor(storage(BIG, old=True), (BIG,), (1,))))),
    "one tensor in many places": lambda: torch_zip(
        state(
            ("w", tensor(storage(1 << 18), (1 << 18,), (1,)) + b"q\x01"), *((f"w{i}", b"h\x01") for i in range(9999))
        ),
        {"0": bytes(1 << 20)},
    ),
    "negative size": lambda: torch_zip(state(("w", tensor(storage(1024), (-BIG,), (1,))))),
    "sizes without end": lambda: torch_zip(
        state(("w", tensor(storage(0), (0, *[2**60] * 30_000), (1,) * 30_001))), {"0": b""}
    ),
    "bytearray": lambda: torch_zip(calling("builtins", "bytearray", number(BIG))),
    "bytearray, old": lambda: torch_old(calling("__builtin__", "bytearray", number(BIG))),
    "empty tensor": lambda: torch_zip(calling("torch", "FloatTensor", number(BIG))),
    "empty storage": lambda: torch_zip(calling("torch.storage", "UntypedStorage", number(BIG))),
    "set of a tensor's numbers": lambda: torch_zip(
        state(("w", b"cbuiltins\nset\n(" + tensor(storage(1 << 22), (1 << 22,), (1,)) + b"tR")), {"0": bytes(1 << 24)}
    ),
    "encoded often": lambda: torch_zip(encoded_often()),
    "encoded otherwise": lambda: torch_zip(calling("_codecs", "encode", text("x" * 100_000), text("punycode"))),
    "a long tuple in many sets": lambda: torch_zip(long_tuple(b"cbuiltins\nset\n(h\x00tR")),
    "a long tuple in many lists": lambda: torch_zip(long_tuple(b"]h\x00a")),
    "many arguments": lambda: torch_zip(long_tuple(b"cbuiltins\ncomplex\nh\x00R")),
    "tuples as a key": lambda: torch_zip(b"\x80\x02}" + twice_in_tuples()[2:] + b"K\x01s."),
    "tuples in a set": lambda: torch_zip(b"\x80\x02cbuiltins\nset\n]" + twice_in_tuples()[2:] + b"a\x85R."),
    "keys of one hash": lambda: torch_zip(keys_of_one_hash()),
    "keys of one hash, old": lambda: torch_old(keys_of_one_hash()),
    "set of one hash": lambda: torch_zip(b"\x80\x02cbuiltins\nset\n](" + number_of(PRIME) * 9 + b"e\x85R."),
    "attribute of a dict": lambda: torch_zip(with_attribute("items")),
    "attribute of a tensor": lambda: torch_zip(tensor_with_attribute("is_floating_point")),
    "tuples": lambda: torch_zip(twice_in_tuples() + b"."),
    "lists": lambda: torch_zip(twice_in_lists()),
    "filled afterwards": lambda: torch_zip(b"\x80\x02]q\x00]q\x01(h\x00h\x00e\x86h\x00h\x01a\x86."),
    "deep": lambda: torch_zip(b"\x80\x02" + b"]" * 20_000 + b"a" * 19_999 + b"."),
    "deep marks": lambda: torch_zip(b"\x80\x02" + b"(" * 1_000_000 + b"t" * 1_000_000 + b"."),
    "memo": lambda: torch_zip(b"\x80\x02]r\x00\x00\x00\x10."),
    "length": lambda: torch_zip(b"\x80\x02X\xff\xff\xff\xff."),
    "many lists": lambda: torch_zip(b"\x80\x02](" + b"]" * MANY + b"e."),
    "many names": lambda: torch_zip(b"\x80\x02](" + b"cbuiltins\nset\n" * (MANY // 4) + b"e."),
    "many in the memo": lambda: torch_zip(
        b"\x80\x02](" + b"".join(b"]r" + struct.pack("<I", i) for i in range(MANY // 2)) + b"e."
    ),
    "too many lists": lambda: torch_zip(b"\x80\x02](" + b"]" * 4_000_000 + b"e."),
    "compressed": lambda: torch_zip(
        state(("w", tensor(storage(1 << 21), (1 << 21,), (1,)))), {"0": bytes(1 << 23)}, zipfile.ZIP_DEFLATED
    ),
    "overlapping": overlapping_zip,
    "directory": long_directory,
    "tar as well": tar_as_well,
}
SAFETENSORS: dict[str, Callable[[], bytes]] = {
    "header beyond the file": lambda: safetensors({"a": weights([1], 0, 4)}, bytes(4), claimed=BIG),
    "long header": lambda: safetensors({f"{i:07}" * 100: weights([1], 0, 4) for i in range(12_000)}, bytes(4)),
    "many tensors": lambda: safetensors({f"{i}": weights([0], 0, 0) for i in range(120_000)}),
    "overlapping": lambda: safetensors({f"w{i}": weights([1 << 18], 0, 1 << 20) for i in range(9)}, bytes(1 << 20)),
    "offsets beyond the file": lambda: safetensors({"w": weights([BIG], 0, 4 * BIG)}, bytes(8)),
    "shape beyond its bytes": lambda: safetensors({"w": weights([BIG, BIG, BIG], 0, 8)}, bytes(8)),
    "4,000 blocks": lambda: safetensors(own_header()),
    "wide blocks": lambda: safetensors(
        own_header(network=json.loads(own_header()["__metadata__"]["bdexport"])["network"] | {"widths": [8192] * 8})  # type: ignore[index]
    ),
    "nested header": lambda: safetensors({"__metadata__": {"bdexport": "[" * 4_000_000}}),
    "header of lists": lambda: safetensors({"__metadata__": {"bdexport": "[" + "[]," * 2_500_000 + "[]]"}}),
    "header of keys": lambda: safetensors(
        {"__metadata__": {"bdexport": "{" + ",".join(f"'{i}':[]".replace("'", '"') for i in range(500_000)) + "}"}}
    ),
}
REFERENCE: dict[str, Callable[[], bytes]] = {
    "shape beyond its bytes": lambda: reference((BIG, 10)),
    "claimed size": lambda: reference((1 << 18,), 4_000_000_000),
}
CIFAR: dict[str, Callable[[], bytes]] = {
    "keys of one hash": keys_of_one_hash,
    "lists": twice_in_lists,
    "tuples": lambda: twice_in_tuples() + b".",
    "tuples as a key": lambda: b"\x80\x02}" + twice_in_tuples()[2:] + b"K\x01s.",
    "filled afterwards": lambda: b"\x80\x02]q\x00]q\x01(h\x00h\x00e\x86h\x00h\x01a\x86.",
    "contains itself": lambda: b"\x80\x02}q\x00X\x04\x00\x00\x00datah\x00s.",
    "memo": lambda: b"\x80\x02]r\x00\x00\x00\x10.",
    "memo as text": lambda: b"\x80\x02]p1000000000\n.",
    "text": lambda: b"\x80\x04\x8d" + struct.pack("<Q", BIG) + b"x.",
    "bytes": lambda: b"\x80\x04\x8e" + struct.pack("<Q", BIG) + b"x.",
    "bytearray": lambda: b"\x80\x05\x96" + struct.pack("<Q", BIG) + b"x.",
    "bytearray(n)": lambda: calling("builtins", "bytearray", number(BIG)),
    "bytes(n)": lambda: calling("builtins", "bytes", number(BIG)),
    "frame": lambda: b"\x80\x04\x95" + struct.pack("<Q", BIG) + b"N.",
    "duplicates": lambda: b"\x80\x02]" + b"2a" * 100_000 + b".",
    "encoded often": lambda: encoded_often(),
    "integer": lambda: b"\x80\x02\x8b" + struct.pack("<i", 2_000_000) + b"\x7f" * 2_000_000 + b".",
    "integer as text": lambda: b"L" + b"9" * 2_000_000 + b"L\n.",
    "many lists": lambda: b"\x80\x02](" + b"]" * MANY + b"e.",
    "many numbers": lambda: b"\x80\x02](" + b"K\x01" * MANY + b"e.",
    "many keys": lambda: b"\x80\x02}(" + b"".join(b"J" + struct.pack("<i", i) + b"N" for i in range(MANY // 2)) + b"u.",
    "too many numbers": lambda: b"\x80\x02](" + b"K\x01" * 4_000_000 + b"e.",
}

SLOW = {
    "many lists",
    "many names",
    "many in the memo",
    "many numbers",
    "many keys",
    "too many lists",
    "too many numbers",
}
SLOW |= {"header of lists", "header of keys", "many tensors"}
