"""JSON that somebody else may have written or damaged: read strictly, and refused in words that are not Python's."""

from __future__ import annotations

import json
import math
import re
from typing import Any, NoReturn

from bdexport.errors import BdexportError

MAX_DEPTH = 64  # of objects and lists in each other; far from where Python's recursion ends
MAX_DIGITS = 400  # of an integer; Python itself refuses some thousands, in words of its own
SHOWN_CHARACTERS = 60
_STRING = rb'"(?:[^"\\]++|\\.)*+"?'  # or what begins as one and has no end
_STRINGS = re.compile(_STRING + rb"(?:[^\[\]{}\"]++|" + _STRING + rb")*+", re.DOTALL)  # and all up to the next bracket
_NO_BRACKETS = bytes(byte for byte in range(256) if byte not in b"[]{}")
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")  # the escape of one half of a pair


class MalformedError(ValueError):
    """What is wrong with a document, as a part of a sentence: ``line 3, column 7 is not JSON``."""


def parse_json(data: bytes) -> Any:
    """UTF-8 JSON (RFC 8259) without NaN, infinite numbers, repeated keys and half surrogate pairs.

    How deep objects and lists stand in each other is counted before anything is parsed. Raises
    :class:`MalformedError`.
    """
    _check_depth(data)
    try:
        document = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique_keys,
            parse_constant=_refuse_constant,
            parse_float=_finite_number,
            parse_int=_integer,
        )
        if _SURROGATE.search(data):
            json.dumps(document, ensure_ascii=False).encode("utf-8")  # nothing can print half a surrogate pair
    except (UnicodeError, json.JSONDecodeError, RecursionError) as error:
        raise MalformedError(why(error)) from error
    return document


def why(error: Exception) -> str:
    """What an exception of a reader says about its document, in words that a user knows."""
    if isinstance(error, MalformedError | BdexportError):
        return str(error)
    if isinstance(error, json.JSONDecodeError):
        return f"line {error.lineno}, column {error.colno} is not JSON" if error.doc.strip() else "empty"
    if isinstance(error, UnicodeDecodeError):
        return f"byte {error.start} is not UTF-8"
    if isinstance(error, UnicodeError):
        return "half of a surrogate pair in a text"
    if isinstance(error, RecursionError):
        return "nested too deep"
    if isinstance(error, KeyError):
        return f"{error.args[0]} is missing" if error.args else "a key is missing"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    known = isinstance(error, ValueError | TypeError | AttributeError | OverflowError)
    return "a value is of another kind" if known else "damaged"


def shown(value: Any) -> str:
    """A value of a document as JSON has it, cut to what fits into a line."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}.."


def json_kind(value: Any) -> str:
    """JSON's word for the kind of a value."""
    if isinstance(value, dict | list | str):
        return {dict: "an object", list: "a list", str: "a string"}[type(value)]
    return shown(value) if value is None or isinstance(value, bool) else "a number"


def finite(value: Any) -> Any:
    """``value`` with null in place of every number that JSON does not have (NaN, infinity)."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        repeated = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise MalformedError(f"key {shown(repeated)} occurs twice")
    return found


def _finite_number(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise MalformedError(f"a number beyond the range of a double: {text[:20]}")
    return number


def _integer(text: str) -> int:
    if len(text) > MAX_DIGITS + 1:
        raise MalformedError(f"an integer of {len(text.lstrip('-'))} digits")
    return int(text)


def _refuse_constant(text: str) -> NoReturn:
    raise MalformedError(f"{text} is not JSON")


def _check_depth(data: bytes) -> None:
    """Raise MalformedError where brackets outside of strings are nested deeper than :data:`MAX_DEPTH`."""
    depth = 0
    for bracket in _STRINGS.sub(b"", data).translate(None, _NO_BRACKETS):
        depth += 1 if bracket in b"[{" else -1
        if depth > MAX_DEPTH:
            raise MalformedError(f"nested more than {MAX_DEPTH} deep")
