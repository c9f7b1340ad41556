"""Damage and odd values, all drawn from a ``random.Random``."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Iterator
from math import isfinite
from pathlib import Path
from random import Random
from typing import Any

Step = str | int
HUGE = 1 << 62
CANARY = "CAMPAIGN_CANARY"  # environment variable: a file that exists when foreign code ran


def damaged(data: bytes, random: Random) -> bytes:
    """``data`` with one kind of damage: flipped bits, a cut, bytes moved, repeated, zeroed or added."""
    if not data:
        return random.randbytes(random.randint(1, 64))
    at = random.randrange(len(data))
    length = min(len(data) - at, random.choice((1, 2, 4, 8, 64, 1024)))
    match random.randrange(8):
        case 0 | 1:
            changed = bytearray(data)
            for _ in range(random.choice((1, 1, 1, 2, 16))):
                changed[random.randrange(len(data))] ^= 1 << random.randrange(8)
            return bytes(changed)
        case 2:
            return data[:at]
        case 3:
            return data[:at] + bytes(length) + data[at + length :]
        case 4:
            return data[:at] + random.randbytes(length) + data[at + length :]
        case 5:
            return data[:at] + data[at + length :]
        case 6:
            return data[: at + length] + data[at:]
        case _:
            return data + random.choice((b"\n", b"\0", random.randbytes(16), data[:1024]))


def damage_file(path: Path, random: Random) -> str:
    """Damage the file; sometimes it becomes something that is not a file. Returns what was done."""
    match random.randrange(20):
        case 0:
            path.unlink()
            return "removed"
        case 1:
            path.unlink()
            path.mkdir()
            return "a folder"
        case 2:
            path.unlink()
            os.mkfifo(path)
            return "a pipe that nobody writes"
        case 3:
            path.unlink()
            path.symlink_to(random.choice((path.name, "/dev/zero", "/nowhere", "..")))
            return "a link to nothing"
        case 4:
            path.write_bytes(b"")
            return "empty"
        case _:
            path.write_bytes(damaged(path.read_bytes(), random))
            return "damaged bytes"


def replace_by(path: Path, other: Path) -> None:
    """Copy ``other``'s content over ``path``."""
    shutil.copyfile(other, path)


def paths_in(value: Any, at: tuple[Step, ...] = ()) -> Iterator[tuple[Step, ...]]:
    """Where every value below ``value`` stands, containers included."""
    children: Any = ()
    if isinstance(value, dict):
        children = value.items()
    elif isinstance(value, list):
        children = enumerate(value)
    for step, child in children:
        yield (*at, step)
        yield from paths_in(child, (*at, step))


def odd_value(random: Random, old: Any) -> Any:
    """A value that does not belong there, often one of the right type."""
    if isinstance(old, bool):
        near: list[Any] = [not old]
    elif isinstance(old, int):
        near = [old + 1, old - 1, -old, old * 1000 + 7, *((float(old), old + 0.5) if abs(old) < HUGE else ())]
    elif isinstance(old, float):
        near = [old * 1.05, -old, old + 1e-6, old * 1e300, round(old) if isfinite(old) else 0]
    elif isinstance(old, str):
        near = [old + "x", old[:-1], old.upper(), "../" + old, old * 2000, old + "\x1b[31m\u202e", "/" + old]
    elif isinstance(old, list):
        near = [old[:-1], [*old, *old], old[::-1], [*old, None], old * 1000 if len(old) < 100 else old]
    elif isinstance(old, dict):
        near = [dict(list(old.items())[:-1]), {**old, "added": 1}, list(old), {str(key) + "_": old[key] for key in old}]
    else:
        near = []
    odd: list[Any] = [
        None,
        True,
        0,
        -1,
        HUGE,
        -HUGE,
        10**380,
        1e308,
        -0.0,
        "",
        "nan",
        "\0",
        "a" * 5000,
        "é\ud800",
        "[red]",
    ]
    odd += [[], {}, [[[]]], {"": None}, float("nan"), float("inf"), [0] * 1000]
    return random.choice(near) if near and random.random() < 0.5 else random.choice(odd)


def odd_document(document: Any, random: Random) -> Any:
    """A copy with one to three values changed, removed, added or exchanged."""
    changed = copy.deepcopy(document)
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        places = list(paths_in(changed))
        if not places:
            return odd_value(random, changed)
        *above, last = random.choice(places)
        parent = changed
        for step in above:
            parent = parent[step]
        match random.randrange(8):
            case 0:
                del parent[last]
            case 1 if isinstance(parent, dict):
                parent[random.choice((f"{last}_", "\x1b]0;x\x07", "schema", ""))] = parent[last]
            case 2:
                *others, step = random.choice(places)
                value = changed
                try:
                    for each in (*others, step):
                        value = value[each]
                except (KeyError, IndexError, TypeError):
                    continue
                parent[last] = copy.deepcopy(value)
            case _:
                parent[last] = odd_value(random, parent[last])
    return changed


def odd_text(document: Any, random: Random) -> bytes:
    """JSON text of an odd document; sometimes the text itself is odd."""
    changed = odd_document(document, random)
    try:
        text = json.dumps(changed, indent=random.choice((None, 1, 2)))
    except (ValueError, RecursionError):
        text = json.dumps(document)
    match random.randrange(30):
        case 0:
            return b"[" * random.choice((100, 10_000, 200_000)) + text.encode()
        case 1:
            return b'{"a":' * 50_000 + b"1" + b"}" * 50_000
        case 2:
            return text.encode("utf-16")
        case 3:
            return text.encode() + b" " * 5_000_000
        case 4:
            return text.replace(":", ": 1e999999, ", 1).encode()
        case 5:
            return text.replace("{", '{"schema": 1, ', 1).encode()
        case 6:
            digits = "9" * random.choice((380, 5000, 100_000))
            places = [index for index, character in enumerate(text) if character.isdigit()]
            if places:
                at = random.choice(places)
                return (text[:at] + digits + text[at:]).encode()
        case 7:
            return b"\xef\xbb\xbf" + text.encode()
        case 8 | 9 | 10:
            return damaged(text.encode(), random)
    return text.encode("utf-8", "surrogatepass")
