"""bdexport beside what users would pick instead, in turn on the same images; see benchmarks/README.md."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.suite.plan import KINDS, MODELS, QUICK, SuiteConfig

FOLDERS = ("--data", "--data-dir", "--out", "--work")  # options whose values are places on one machine


def main() -> None:
    arguments = _parser().parse_args()
    config = config_of(arguments)
    # Read when the libraries are first imported: pools of several libraries on the same cores fight.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(config.threads)))
    # What torch.compile makes when the suite is prepared is found again when it measures.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(arguments.work.resolve() / "inductor"))
    from bdexport.errors import BdexportError
    from benchmarks.suite.preparing import prepare, show_plan
    from benchmarks.suite.suite import run_suite

    try:
        if arguments.plan:
            show_plan(config, arguments.out, arguments.work)
        elif arguments.prepare:
            prepare(config, arguments.out, arguments.work, arguments.fresh)
        else:
            run_suite(config, arguments.out, arguments.work, arguments.fresh, public_command(sys.argv[1:]))
    except BdexportError as error:
        raise SystemExit(f"error: {error}") from error
    except KeyboardInterrupt:
        raise SystemExit("interrupted; the same line goes on with the next cell") from None


def config_of(arguments: argparse.Namespace) -> SuiteConfig:
    """The defaults, with what was asked for in their place."""
    config = QUICK if arguments.quick else SuiteConfig()
    asked: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in vars(arguments).items()
        if name in SuiteConfig.__dataclass_fields__ and name != "checkpoint" and value is not None
    }
    config = replace(config, **asked)
    given = dict(pair.split("=", 1) for pair in arguments.checkpoint)
    if config.data is not None and "dataset" not in asked:
        config = replace(config, dataset="cifar10")
    if arguments.batches is not None:
        config = replace(config, large_image_batches=tuple(arguments.batches))
    return replace(config, checkpoints=config.checkpoints | given)


def public_command(arguments: Sequence[str]) -> str:
    """The command line for the result, of paths the last component alone."""
    words, before = [], ""
    for word in arguments:
        option, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        if before in FOLDERS or (option in FOLDERS and equals):
            value = Path(value).name
        elif before == "--checkpoint" or (option == "--checkpoint" and equals):
            name, _, path = value.partition("=")
            value = f"{name}={path if path.startswith('zoo:') else Path(path).name}"
        words.append(f"{option}{equals}{value}")
        before = word
    return " ".join(["python -m benchmarks.suite", *words])


def _pair(text: str) -> str:
    name, _, path = text.partition("=")
    if name not in MODELS or not path:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected NAME=CKPT with NAME one of {', '.join(MODELS)}")
    return text


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number of at least 1")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    default = SuiteConfig()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.suite", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="ResNet-32, batches 1 and 8, three minutes")
    steps = parser.add_mutually_exclusive_group()
    steps.add_argument("--plan", action="store_true", help="print what would be measured and what it needs, and stop")
    steps.add_argument(
        "--prepare", action="store_true", help="build everything and call it once, without measuring; then --plan knows"
    )
    parser.add_argument(
        "--fresh",
        action="store_true",
        help="measure again what --out holds; with --prepare, build again what --work holds; needed after code changes",
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, metavar="NAME", help=f"default: {' '.join(MODELS)}")
    parser.add_argument(
        "--batches",
        nargs="+",
        type=_positive,
        help=f"default: {' '.join(map(str, default.batches))}, of those only 1 at 224 x 224",
    )
    parser.add_argument("--threads", nargs="+", type=_positive, help="default: 1")
    parser.add_argument(
        "--kinds", nargs="+", choices=KINDS, metavar="KIND", help=f"who takes part; default: all of {' '.join(KINDS)}"
    )
    parser.add_argument(
        "--minutes",
        type=float,
        help=f"default: {default.minutes:g}; shared out by need, at least {default.least_rounds} rounds each",
    )
    parser.add_argument(
        *("--checkpoint",), type=_pair, action="append", default=[], metavar="NAME=CKPT", help="a trained policy"
    )
    parser.add_argument("--dataset", help="whose test images trained policies see; default: cifar10-samples")
    parser.add_argument(
        *("--data", "--data-dir"), type=Path, help="folder of the data set (then cifar10, unless --dataset says more)"
    )
    parser.add_argument("--images", type=_positive, help=f"of them; default: {default.images}")
    parser.add_argument("--compile-batches", nargs="*", type=_positive, help="of torch.compile; default: 1")
    parser.add_argument(
        *("--no-footprint",), dest="footprint", action="store_false", default=None, help="no load time and memory"
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/suite"), help="default: %(default)s")
    parser.add_argument(
        "--work", type=Path, default=Path("engines/suite"), help="bundles, kept for the next run; default: %(default)s"
    )
    return parser


if __name__ == "__main__":
    main()
