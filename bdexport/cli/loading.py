"""The options of every command that loads a checkpoint, in one place: what a file does not say itself.

A command takes them one by one, under the names of :class:`Loading`'s fields, and puts them together::

    found = load_checkpoint(checkpoint, **Loading(arch, shortcut, ..).arguments())
    say_assumed(found, checkpoint)
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from bdexport.cli.console import err_console
from bdexport.errors import UsageError
from bdexport.files import read_bytes, shown
from bdexport.limits import MAX_NAMES_BYTES

if TYPE_CHECKING:
    from bdexport.checkpoint import Checkpoint

PANEL = "What the checkpoint does not say itself"

Arch: TypeAlias = Annotated[
    str | None, typer.Option(help="The architecture that is expected, e.g. resnet32.", rich_help_panel=PANEL)
]
ShortcutKind: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--shortcut", help="Shortcuts without weights: avgpool, option_a or zeros_last.", rich_help_panel=PANEL
    ),
]
DroppedRule: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--dropped-transition",
        help="What a dropped transition gives: shortcut or shortcut_relu.",
        rich_help_panel=PANEL,
    ),
]
Mean: TypeAlias = Annotated[
    str | None,
    typer.Option(help="Mean of red, green and blue, for pixels in 0..1: R,G,B or one number.", rich_help_panel=PANEL),
]
Std: TypeAlias = Annotated[
    str | None,
    typer.Option(help="Deviation of red, green and blue, likewise: R,G,B or one number.", rich_help_panel=PANEL),
]
Size: TypeAlias = Annotated[
    str | None, typer.Option(help="Pixels that the network reads: N for NxN, or HEIGHTxWIDTH.", rich_help_panel=PANEL)
]
ResizeShort: TypeAlias = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="Scale the shorter side to N pixels and cut out the centre; 0: scale straight to the size.",
        rich_help_panel=PANEL,
    ),
]
ClassNames: TypeAlias = Annotated[
    Path | None,
    typer.Option(help="Text file with a class name a line, in the order of the outputs.", rich_help_panel=PANEL),
]
CheckAgainst: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        help="LOGITS.npz or model.onnx: fail unless the undropped network gives the same logits.", rich_help_panel=PANEL
    ),
]


@dataclass(frozen=True)
class Loading:
    """The options as they were typed; None: not given."""

    arch: str | None = None
    shortcut: str | None = None
    dropped_transition: str | None = None
    mean: str | None = None
    std: str | None = None
    size: str | None = None
    resize_short: int | None = None
    class_names: Path | None = None

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of :func:`bdexport.checkpoint.load_checkpoint`. Raises UsageError for what is malformed."""
        return {
            "arch": self.arch,
            "shortcut": self.shortcut,  # load_checkpoint refuses a word that is no kind
            "dropped_transition": self.dropped_transition,
            "preprocess": self.preprocess() or None,
            "class_names": None if self.class_names is None else read_class_names(self.class_names),
        }

    def preprocess(self) -> dict[str, Any]:
        """The fields of the preprocessing that were given."""
        found: dict[str, Any] = {}
        if self.mean is not None:
            found["mean"] = _triple("--mean", self.mean, lowest=0.0)
        if self.std is not None:
            found["std"] = _triple("--std", self.std, lowest=1e-6)
        if self.size is not None:
            found["size"] = _pixels(self.size)
        if self.resize_short is not None:
            found["resize_short"] = self.resize_short or None
        return found

    def words(self) -> tuple[str, ...]:
        """The options that were given, as they are typed."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return tuple(
            word
            for name, value in values.items()
            if value is not None
            for word in (f"--{name.replace('_', '-')}", str(value))
        )

    def load_several(self, paths: Sequence[Path]) -> dict[Path, Checkpoint]:
        """The checkpoints of a command that takes several: the options are about those that do not say it themselves.

        Raises UsageError where options were given, and every checkpoint says everything itself.
        """
        from bdexport.checkpoint import load_checkpoint

        arguments = self.arguments()
        found = {path: load_checkpoint(path) for path in dict.fromkeys(paths)}
        foreign = [path for path, checkpoint in found.items() if checkpoint.form != "bdexport"]
        if self.words() and not foreign:
            raise UsageError(
                f"{self.words()[0]} has no effect: every checkpoint here says it itself",
                remedy="leave it out, or correct one checkpoint: bdexport evaluate CKPT ..",
            )
        for path in foreign if self.words() else []:
            fixed = found[path].network.shortcut == "conv"  # the weights say it
            found[path] = load_checkpoint(path, **arguments | ({"shortcut": None} if fixed else {}))
        return found


def say_assumed(found: Checkpoint, path: Path) -> None:
    """What loading assumed, left aside or put in the place of what the file says: a line each, on stderr."""
    for note in found.notes:
        err_console.print(f"{path.name}: {note}", soft_wrap=True)


def read_class_names(path: Path) -> tuple[str, ...]:
    """A name a line; empty lines at the end do not count. Raises UsageError."""
    try:
        lines = read_bytes(path, MAX_NAMES_BYTES).decode("utf-8-sig").rstrip().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        if isinstance(error, OSError):
            reason, remedy = error.strerror, "check the path"
        else:
            reason, remedy = "not UTF-8", "save it as text in UTF-8"
        raise UsageError(f"--class-names {shown(path)}: cannot be read ({reason})", remedy=remedy) from error
    names = tuple(line.strip() for line in lines)
    if not names or "" in names:
        where = f"line {names.index('') + 1} is empty" if names else "an empty file"
        raise UsageError(f"--class-names {path}", got=where, expected="a class name in each line")
    return names


def _triple(option: str, text: str, lowest: float) -> tuple[float, float, float]:
    try:
        values = [float(word) for word in re.split(r"[,\s]+", text.strip())]
    except ValueError:
        values = []
    values = values * 3 if len(values) == 1 else values
    if len(values) != 3 or not all(lowest <= value <= 1 for value in values):
        raise UsageError(
            option,
            got=repr(text),
            expected=f"three numbers of {lowest:g} to 1 with commas, or one, for pixels in 0..1",
            remedy="divide by 255 if they are for pixels in 0..255" if any(value > 1 for value in values) else None,
        )
    return values[0], values[1], values[2]


def _pixels(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,4})(?:x(\d{1,4}))?", text.strip().lower())
    if match is None or int(match.group(1)) < 1:
        raise UsageError("--size", got=repr(text), expected="pixels: 64, or 48x64 for height and width")
    height = int(match.group(1))
    return height, int(match.group(2) or height)
