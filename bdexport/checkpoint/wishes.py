"""What the caller of ``load_checkpoint`` knows better than a file or the defaults, and how it is put over them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, TypeAlias

from bdexport.architecture import DroppedTransition, Shortcut
from bdexport.errors import UsageError
from bdexport.preprocess import Preprocess

PreprocessWish: TypeAlias = Preprocess | Mapping[str, Any]  # all of it, or some of its fields by name
CORRECT_PREPROCESS = "correct it with --mean, --std, --size or --resize-short"


@dataclass(frozen=True)
class Wishes:
    """What the caller chose; None leaves it to the file, or to the default where the file does not say."""

    shortcut: Shortcut | None = None
    dropped_transition: DroppedTransition | None = None
    preprocess: PreprocessWish | None = None
    class_names: tuple[str, ...] | None = None


def preprocess_with(default: Preprocess, wish: PreprocessWish | None) -> Preprocess:
    """``default`` with what was wished for in its place.

    Where only the size changes and images are cut in the centre, the same share of the picture stays in it: 288 pixels
    instead of 224 take the shorter side to 329 instead of 256. Raises UsageError for a field that does not exist.
    """
    if wish is None or isinstance(wish, Preprocess):
        return default if wish is None else wish
    known = [field.name for field in fields(Preprocess)]
    unknown = [name for name in wish if name not in known]
    if unknown:
        raise UsageError("preprocess: unknown field", got=repr(unknown[0]), expected=f"some of {', '.join(known)}")
    changes: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in wish.items()}
    if "size" in changes and "resize_short" not in changes and default.resize_short is not None:
        changes["resize_short"] = round(default.resize_short * min(changes["size"]) / min(default.size))
    return replace(default, **changes)


def preprocess_text(preprocess: Preprocess) -> str:
    """One line: how an image becomes the network's input."""
    size = "{}x{}".format(*preprocess.size)
    fitted = f"scaled to {size} pixels"
    if preprocess.resize_short is not None:
        fitted = f"shorter side scaled to {preprocess.resize_short} pixels, centre {size} cut out"
    mean, std = (" ".join(f"{value:.4g}" for value in values) for values in (preprocess.mean, preprocess.std))
    return f"{fitted} ({preprocess.resampling}), mean {mean}, std {std}"


def preprocess_note(used: Preprocess, wish: PreprocessWish | None, reason: str) -> str:
    """What was assumed (``reason`` says why) and what was asked for."""
    text = f"preprocessing: {preprocess_text(used)}"
    if wish is None:
        return f"{text}: assumed ({reason}); {CORRECT_PREPROCESS}"
    if isinstance(wish, Preprocess):
        return f"{text}: asked for"
    asked = " and ".join(wish)
    rest = [name for name in ("size", "mean", "std") if name not in wish]
    # The reasons are about mean and deviation; the size is the family's.
    why = f" ({reason})" if {"mean", "std"} & set(rest) else ""
    return f"{text}: {asked} asked for" + (f", {' and '.join(rest)} assumed{why}" if rest else "")
