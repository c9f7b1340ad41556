"""The Typer application: the table of commands, each imported only when it is the one that is used."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Annotated, Any

import typer

from bdexport import __version__
from bdexport.cli.failures import WRONG_USAGE

COMMANDS = {  # in the order of the work; each is the function of that name in bdexport/cli/<name>.py
    "quickstart": "Train, build and bench a small network, nothing downloaded.",
    "train": "Train a policy for a pretrained network; resumes if cut off.",
    "evaluate": "Accuracy, block usage, FLOPs and masks of a checkpoint.",
    "retarget": "Another mean number of blocks for a trained policy.",
    "prune": "Remove the weakest filters inside each block (PFEC).",
    "export": "Write a checkpoint's parts as ONNX graphs, nothing else.",
    "calibrate": "Gather scales for INT8 and FP8 along the paths really taken.",
    "build": "Build a bundle: graphs, engines and a manifest.",
    "rebuild": "Build a bundle's engines anew from its own graphs.",
    "inspect": "Show what is in a bundle and check every hash.",
    "verify": "Compare a bundle's parts and paths with the reference.",
    "run": "Classify images: class, confidence, path taken, time.",
    "bench": "Measure dynamic against full: latency, accuracy, usage.",
    "report": "Runs and results as tables, plots and one page.",
    "profile": "Time per part and between parts, and a trace.",
    "zoo": "The trained models that ship with bdexport (zoo:NAME).",
    "doctor": "What is installed here, and how to get what is missing.",
}
DEBUG_VARIABLE = "BDEXPORT_DEBUG"


def run_line(arguments: Sequence[str]) -> int:
    """Run one command line without the program's name; returns the exit code, and lets every exception through."""
    # Global options take no value, so that the first other word is the command.
    chosen = next((word for word in arguments if not word.startswith("-")), None)
    app = build_app(chosen)
    result = app(list(arguments) or ["--help"], prog_name="bdexport", standalone_mode=False)
    if not arguments:
        return WRONG_USAGE
    return result if isinstance(result, int) else 0


def build_app(chosen: str | None = None) -> typer.Typer:
    """The Typer application with the ``chosen`` command imported and the others as a name and a line of help.

    Commands import numpy and more: a command line pays for its own only, and ``bdexport --help`` for none.
    """
    app = typer.Typer(
        help="Export a residual network with a BlockDrop policy block by block, and run only the blocks it keeps.",
        epilog="Exit codes: 0 done, 1 the job failed, 2 wrong usage. See 'bdexport COMMAND --help' for a command.",
        add_completion=False,
        rich_markup_mode=None,  # plain help: half the start-up time, and nothing is cut off in a pipe
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    )
    app.callback()(_global_options)
    for name, summary in COMMANDS.items():
        if name == chosen:
            app.command(name, short_help=summary)(_command(name))
        else:
            app.command(name, help=summary, short_help=summary)(_not_loaded)
    return app


def _command(name: str) -> Callable[..., Any]:
    function: Callable[..., Any] = getattr(import_module(f"bdexport.cli.{name}"), name)
    return function


def _not_loaded() -> None:
    raise AssertionError("a command that was not chosen cannot run")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"bdexport {__version__}")
        raise typer.Exit


def _global_options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help=f"Show the traceback of an error (also: {DEBUG_VARIABLE}=1).")
    ] = False,
) -> None:
    """Both options act before this: ``--version`` in its callback, ``--debug`` in :mod:`bdexport.cli.main`."""
