"""The trained models that ship with bdexport: ``zoo:NAME`` wherever a command takes a checkpoint.

    NAME.safetensors   the checkpoint, byte for byte what the training run left
    NAME.json          its card: what it was trained on and how, and what was measured; written by bdexport.zoo.add
    NAME.md            the same card to read
    NAME.log.jsonl     the log of that training, an object per epoch (models from before it was kept have none)

Reading the list or a card needs neither torch nor numpy.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import Any

from bdexport.errors import CheckpointError, UsageError
from bdexport.files import sha256_file
from bdexport.json_text import MalformedError, parse_json, why

PREFIX = "zoo:"
CARD_SCHEMA = "bdexport.card/1"
LOG_SUFFIX = "log.jsonl"
MAX_BYTES = 12_000_000  # of all models and cards together: they are part of every install


def zoo_folder() -> Path:
    """Where the models lie: inside the installed package."""
    return Path(str(files(__name__)))


def zoo_names() -> tuple[str, ...]:
    """The models' names, sorted, without the prefix."""
    return tuple(sorted(path.stem for path in zoo_folder().glob("*.json")))


def zoo_name(text: str | Path) -> str | None:
    """NAME of ``zoo:NAME``; None for everything else, which is a path."""
    text = str(text)
    return text.removeprefix(PREFIX) if text.startswith(PREFIX) else None


def checked_name(name: str) -> str:
    """``name`` if the zoo has it (``zoo:`` in front is allowed). Raises :class:`UsageError` with the closest names."""
    name = name.removeprefix(PREFIX)
    known = zoo_names()
    if name not in known:
        close = get_close_matches(name, known, n=3, cutoff=0.5)
        meant = f"did you mean {' or '.join(PREFIX + match for match in close)}? " if close else ""
        raise UsageError(
            "no such model in the zoo",
            got=repr(PREFIX + name),
            expected=f"one of {', '.join(PREFIX + other for other in known)}",
            remedy=f"{meant}'bdexport zoo' lists them",
        )
    return name


def zoo_card(name: str) -> dict[str, Any]:
    """The card, as ``docs/zoo.md`` specifies it. Raises UsageError for a name that is not there, CheckpointError."""
    path = zoo_folder() / f"{checked_name(name)}.json"
    try:
        card = parse_json(path.read_bytes())
    except (OSError, MalformedError) as error:
        raise CheckpointError(f"{path}: cannot be read ({why(error)})", remedy="install bdexport again") from error
    if not isinstance(card, dict) or card.get("schema") != CARD_SCHEMA or not isinstance(card.get("sha256"), str):
        raise CheckpointError(
            f"{path}: not a model card", expected=f"schema {CARD_SCHEMA}", remedy="install bdexport again"
        )
    return card


@contextmanager
def reading_card(name: str) -> Iterator[None]:
    """Inside, a field of a card that is missing or of another kind is a CheckpointError that names the card."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        path = zoo_folder() / f"{name.removeprefix(PREFIX)}.json"
        raise CheckpointError(
            f"{path}: a damaged model card ({why(error)})", remedy="install bdexport again"
        ) from error


def zoo_model(name: str) -> Path:
    """The checkpoint file, which is the one that its card was measured on.

    Raises UsageError for a name that is not there; CheckpointError when the file is missing or another.
    """
    card = zoo_card(name)
    path = zoo_folder() / f"{checked_name(name)}.safetensors"
    if not path.is_file():
        raise CheckpointError(f"{path}: missing", remedy="install bdexport again")
    if sha256_file(path) != card["sha256"]:
        raise CheckpointError(f"{path}: not the file of its card (SHA-256 differs)", remedy="install bdexport again")
    return path
