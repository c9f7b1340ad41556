"""Options without effect: whoever gives one expects one, so that a command refuses what it would not use."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, TypeAlias

import typer

from bdexport.cli.console import STDOUT
from bdexport.cli.failures import is_discarded
from bdexport.errors import OutputError, UsageError
from bdexport.limits import MAX_PIXELS, MAX_REPLACED_BYTES

# Of every command that reads image files.
MaxPixels: TypeAlias = Annotated[
    int | None, typer.Option(min=1, help=f"Refuse image files of more pixels. Default: {MAX_PIXELS:,}.")
]
LEAVE_OUT = "leave it out"

# Of every command that opens a bundle.
VerifyKey: TypeAlias = Annotated[
    str | None,
    typer.Option(help="Refuse the bundle unless it is signed by this minisign public key: its file, or RW...."),
]


def given(context: typer.Context, name: str) -> bool:
    """Whether the option of this parameter was on the command line, even with its default as the value."""
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def refuse(context: typer.Context, names: Iterable[str], why: str, remedy: str = LEAVE_OUT) -> None:
    """Raise UsageError for the first of the options that was given: it has no effect ``why``."""
    for name in names:
        if given(context, name):
            raise UsageError(f"{_flag(context, name)} has no effect {why}", remedy=remedy)


def writable(target: str | None) -> str | None:
    """The target of --json as it is, if it can be written: found out before minutes of work, not after.

    Raises :class:`bdexport.errors.OutputError`.
    """
    if target == STDOUT and is_discarded(sys.stdout):
        raise OutputError("--json -: stdout is closed", remedy="name a file, as in --json result.json")
    if target is not None and target != STDOUT:
        check_json_target(Path(target), "--json")
    return target


def check_json_target(path: Path, option: str) -> None:
    """Raise OutputError where JSON cannot be written to ``path``, or would replace a file that is something else."""
    from bdexport.files import check_writable

    check_writable(path)
    if path.is_file() and not _may_be_json(path):
        raise OutputError(f"{path}: the file is there and holds no JSON", remedy=f"choose another name for {option}")


def _may_be_json(path: Path) -> bool:
    """Whether nothing but an older result is lost when the file is replaced: it is empty or JSON."""
    from json import loads

    from bdexport.files import read_bytes

    try:
        loads(read_bytes(path, MAX_REPLACED_BYTES).strip() or b"{}")
    except (OSError, ValueError, RecursionError):
        return False
    return True


def refuse_threads(context: typer.Context, device: str) -> None:
    """Raise UsageError for --threads where a GPU computes."""
    if device.startswith("cuda"):
        refuse(context, ("threads",), f"on device {device}")


def _flag(context: typer.Context, name: str) -> str:
    option = next(parameter for parameter in context.command.params if parameter.name == name)
    return str(option.opts[0])
