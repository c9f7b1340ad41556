"""Documents that a report is made from, and their fields: read strictly, because anybody may have written them.

Every function that takes a field raises MalformedError with the field's name, what stands there and what was expected;
the callers add the file and the remedy.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from bdexport.errors import ReportError
from bdexport.files import without_controls
from bdexport.json_text import MalformedError, json_kind, parse_json, shown, why

MAX_BYTES = 64 << 20  # of one file; a long training writes less than 1 MiB
MAX_TEXT = 2_000  # characters of one text: longer ones take a plot's renderer seconds
MAX_FIGURE = 1e30  # far above the FLOPs of any network, and far below where a plot's arithmetic overflows
_MISSING = object()


def read_bytes(path: Path) -> bytes:
    """The bytes of a regular file. Raises ReportError (it cannot be read, or is larger than :data:`MAX_BYTES`)."""
    try:
        if not path.is_file():  # a pipe would keep the reader waiting
            reason = "not a regular file" if path.exists() else "No such file"
            raise ReportError(f"{path}: {reason}", remedy="name a file that exists")
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ReportError(f"{path}: cannot be read ({why(error)})", remedy="check its permissions") from error
    if len(data) > MAX_BYTES:
        raise ReportError(f"{path}: too large", expected=f"at most {MAX_BYTES >> 20} MiB", remedy="write it again")
    return data


def object_of(data: bytes) -> dict[str, Any]:
    """The JSON object in ``data``, with control characters of its texts as escapes. Raises MalformedError.

    Refused: what is no JSON, an integer that no double holds, and a text of more than :data:`MAX_TEXT` characters.
    """
    document = parse_json(data)
    if not isinstance(document, dict):
        raise MalformedError(f"{json_kind(document)} instead of an object")
    cleaned: dict[str, Any] = _cleaned(document)
    return cleaned


def _cleaned(value: Any) -> Any:
    if isinstance(value, dict):
        return {_cleaned(key): _cleaned(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_cleaned(item) for item in value]
    if isinstance(value, str):
        if len(value) > MAX_TEXT:
            raise MalformedError(f"a text of {len(value)} characters, expected at most {MAX_TEXT}")
        return without_controls(value)
    if isinstance(value, int) and abs(value) > MAX_FIGURE:
        raise MalformedError(f"an integer of {len(str(abs(value)))} digits")
    return value


def field(data: Any, path: str) -> Any:
    """The value at ``path`` (``full.latency_ms.mean``) of an object."""
    value = data
    done = ""
    for key in path.split("."):
        if not isinstance(value, dict):
            raise MalformedError(f"{done or 'the document'}: got {json_kind(value)}, expected an object")
        value = value.get(key, _MISSING)
        done = f"{done}.{key}" if done else key
        if value is _MISSING:
            raise MalformedError(f"{done} is missing")
    return value


def figure(data: Any, path: str, *, low: float = 0.0, high: float = MAX_FIGURE) -> float:
    """The number at ``path``, within ``low`` and ``high``."""
    value = field(data, path)
    if not is_figure(value, low=low, high=high):
        bounds = (
            f"a number in {low:g}..{high:g}" if high < MAX_FIGURE else f"a number from {low:g} on, at most {high:g}"
        )
        raise MalformedError(f"{path}: got {shown(value)}, expected {bounds}")
    return float(value)


def is_figure(value: Any, *, low: float = -MAX_FIGURE, high: float = MAX_FIGURE) -> bool:
    """Whether ``value`` is a number (true and false are none) that is finite and within bounds."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and low <= value <= high  # NaN compares false


def count(data: Any, path: str) -> int:
    """The whole number at ``path``, at least 0."""
    value = figure(data, path)
    if value != math.floor(value):
        raise MalformedError(f"{path}: got {value:g}, expected a whole number")
    return int(value)


def text(data: Any, path: str) -> str:
    """The text at ``path``, which is not empty."""
    value = field(data, path)
    if not isinstance(value, str) or not value.strip():
        raise MalformedError(f"{path}: got {shown(value)}, expected a text")
    return value


def part(data: Any, path: str) -> dict[str, Any]:
    """The object at ``path``."""
    value = field(data, path)
    if not isinstance(value, dict):
        raise MalformedError(f"{path}: got {json_kind(value)}, expected an object")
    return value


def optional(data: dict[str, Any], path: str, kind: type) -> Any:
    """What stands at the key ``path`` if it is of the ``kind`` (dict, str, bool); None where it is null or absent."""
    value = data.get(path)
    if value is not None and not isinstance(value, kind):
        words = {dict: "an object", str: "a text", bool: "true or false"}
        raise MalformedError(f"{path}: got {shown(value)}, expected {words[kind]} or null")
    return value
