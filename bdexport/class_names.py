"""What a class may be called: ordinary text of any language, because the names come from people's folders.

Refused is what breaks a line, a terminal or a file format: control characters (a tab, a line break), half of a
surrogate pair (what Python makes of bytes that are no UTF-8), and marks that turn the direction of the text after them.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence

MAX_LENGTH = 255  # characters: what file systems allow the name of a folder, in bytes or in characters
EXPECTED = f"ordinary text of 1 to {MAX_LENGTH} characters on one line"
CONTROLS = {"Cc", "Cs", "Zl", "Zp"}  # control characters, surrogates, line and paragraph separators
TURNING = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"  # embeddings and overrides of the direction
SUBSTITUTE = "?"


def name_problem(name: object) -> str | None:
    """Why no class can be called ``name``, as in "a tab"; None where one can."""
    if not isinstance(name, str):
        return "no text"
    if not name.strip():
        return "a blank name" if name else "an empty name"
    if len(name) > MAX_LENGTH:
        return f"{len(name)} characters"
    for character in name:
        problem = _problem_of(character)
        if problem is not None:
            return problem
    return None


def _problem_of(character: str) -> str | None:
    category = unicodedata.category(character)
    if category == "Cs":
        return "bytes that are no UTF-8"
    if character == "\t":
        return "a tab"
    if category in CONTROLS or character in TURNING:
        return f"the control character U+{ord(character):04X}"
    return None


def unusable_names(names: Iterable[object]) -> list[tuple[str, str]]:
    """The names that no class can have, in a form that can be printed, each with the reason."""
    found = ((name, name_problem(name)) for name in names)
    return [(ascii(name) if len(ascii(name)) <= 60 else f"{ascii(name)[:60]}..", why) for name, why in found if why]


def usable_names(names: Sequence[str]) -> tuple[str, ...]:
    """``names`` with what :func:`name_problem` objects to replaced by ``?``; those without a problem as they are."""
    return tuple(name if name_problem(name) is None else _cleaned(name) for name in names)


def _cleaned(name: str) -> str:
    kept = "".join(SUBSTITUTE if _problem_of(character) else character for character in name)[:MAX_LENGTH]
    return kept if kept.strip() else SUBSTITUTE
