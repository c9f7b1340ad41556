"""``bdexport quickstart``: the whole way on data that ships with a dependency, as the commands one would type.

With ``--model zoo:NAME`` the same without training: a model of the zoo on sample images that ship with bdexport.
"""

from __future__ import annotations

import json as json_text
import shlex
import sys
import time
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bdexport.base_figures import BaseFigures, points
from bdexport.cli.app import run_line
from bdexport.cli.console import STDOUT, FittedTable, table_console, write_json_result
from bdexport.cli.options import writable
from bdexport.config import PRESETS, QuickstartConfig

if TYPE_CHECKING:
    from rich.table import Table

DEFAULT = QuickstartConfig()
DATASET, RESULT = "digits", "result.json"
SAMPLES_OF = {"digits": "digits", "cifar10": "cifar10-samples"}  # data set of a model -> test images that are installed


def quickstart(
    model: Annotated[
        str | None, typer.Option(help="zoo:NAME: take this model instead of training one, on installed sample images.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help=f"Folder for everything. Default: {DEFAULT.out}, with -NAME for a model of the zoo."),
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help=f"How long to train: {', '.join(PRESETS)}. Default: {DEFAULT.preset}.")
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads to measure with.")] = DEFAULT.threads,
    json: Annotated[
        str | None, typer.Option(help="Also write the result to this file ('-': stdout).", callback=writable)
    ] = None,
) -> None:
    """Train, build, verify and bench a small network on scikit-learn's digits; nothing is downloaded.

    Every step is shown as the command that it is. A quickstart that was cut off goes on where it was.
    """
    from bdexport.files import check_writable

    began = time.perf_counter()
    plan = training_plan(out, preset, threads) if model is None else zoo_plan(model, out, preset, threads)
    check_writable(plan.out / RESULT)
    if plan.model is not None:
        write_images(plan)
    for line in plan.lines:
        _step(line, json)
    result = summary(plan, time.perf_counter() - began)
    write_json_result(plan.out / RESULT, result)
    table_console(json).print(_table(result, plan))
    if json is not None:
        write_json_result(json, result)


@dataclass(frozen=True)
class Plan:
    """What will be done: commands without the program's name, in order, all of them writing into ``out`` only.

    ``dataset`` is measured on, its test split; ``model`` is the name in the zoo, or None where one is trained.
    """

    out: Path
    dataset: str
    lines: list[list[str]]
    model: str | None = None


def training_plan(out: Path | None, preset: str | None, threads: int) -> Plan:
    """Train a network, then build, verify and bench it."""
    out = out or Path(DEFAULT.out)
    run, bundle = str(out / "run"), str(out / "bundle")
    settings = [word for setting in DEFAULT.settings for word in ("--set", setting)]
    how = ["--arch", DEFAULT.arch, "--dataset", DATASET, "--preset", preset or DEFAULT.preset, *settings]
    lines = [
        ["train", *how, "--out", run],
        ["evaluate", run, "--dataset", DATASET, "--json", str(out / "evaluate.json")],
        ["build", run, "--out", bundle, "--overwrite"],
        ["verify", bundle, "--json", str(out / "verify.json")],
        _bench_line(out, DATASET, threads),
    ]
    return Plan(out, DATASET, lines)


def zoo_plan(model: str, out: Path | None, preset: str | None, threads: int) -> Plan:
    """Build, verify, run and bench a model of the zoo. Raises UsageError for a model that cannot be had like that."""
    from bdexport.errors import UsageError
    from bdexport.zoo import PREFIX, zoo_card, zoo_name

    if preset is not None:
        raise UsageError("--preset with --model: nothing is trained", remedy="leave one of them out")
    name = zoo_name(model)
    if name is None:
        raise UsageError(
            "--model", got=repr(model), expected="zoo:NAME", remedy="for a checkpoint of your own: bdexport build"
        )
    dataset = zoo_card(name)["data"]["name"]
    if dataset not in SAMPLES_OF:
        raise UsageError(
            f"{model}: no sample images of {dataset} are installed",
            expected=f"a model for {' or '.join(SAMPLES_OF)}",
            remedy=f"bdexport build {model}, then bdexport bench BUNDLE --dataset {dataset} --data DIR",
        )
    out = out or Path(f"{DEFAULT.out}-{name}")
    bundle, used = str(out / "bundle"), ["--threads", str(threads)]
    lines = [
        ["build", PREFIX + name, "--out", bundle, "--overwrite"],
        ["verify", bundle, "--json", str(out / "verify.json")],
        ["run", bundle, str(out / "images"), *used, "--json", str(out / "run.json")],
        _bench_line(out, SAMPLES_OF[dataset], threads),
    ]
    return Plan(out, SAMPLES_OF[dataset], lines, name)


def _bench_line(out: Path, dataset: str, threads: int) -> list[str]:
    measured = ["--dataset", dataset, "--batch", "1", "--threads", str(threads)]
    return ["bench", str(out / "bundle"), *measured, "--json", str(out / "bench.json")]


def write_images(plan: Plan) -> None:
    """The first sample images as files, named by their class, for ``bdexport run``."""
    from PIL import Image

    from bdexport.dataset import load_dataset
    from bdexport.files import making_folder

    samples = load_dataset(plan.dataset, None, "test", limit=DEFAULT.shown_images)
    with making_folder(plan.out / "images", overwrite=True) as folder:
        for index, (pixels, label) in enumerate(zip(samples.images(), samples.labels, strict=True)):
            Image.fromarray(pixels).save(folder / f"{index}-{samples.class_names[label]}.png")


def summary(plan: Plan, seconds: float) -> dict[str, Any]:
    """What the steps left in ``plan.out``, as one JSON object; ``seconds`` is what this call took."""
    made = _zoo_entry(plan.model) if plan.model is not None else {"run": plan.out / "run", "evaluate": _evaluated(plan)}
    return {
        "schema": "bdexport.quickstart/1",
        "seconds": round(seconds, 1),
        **made,
        "bundle": plan.out / "bundle",
        "verify": json_text.loads((plan.out / "verify.json").read_text()),
        "bench": json_text.loads((plan.out / "bench.json").read_text()),
    }


def _evaluated(plan: Plan) -> dict[str, Any]:
    found: dict[str, Any] = json_text.loads((plan.out / "evaluate.json").read_text())
    return found


def _zoo_entry(name: str) -> dict[str, Any]:
    from bdexport.zoo import PREFIX, zoo_card

    return {"model": PREFIX + name, "card_result": zoo_card(name)["result"]}


def _step(line: list[str], json: str | None) -> None:
    """Run one command in this process, exactly as if it had been typed; its failure is the quickstart's."""
    table_console(json).print(f"\n$ bdexport {shlex.join(line)}", style="bold", soft_wrap=True)
    with redirect_stdout(sys.stderr) if json == STDOUT else nullcontext():
        code = run_line(line)
    if code:
        raise typer.Exit(code)


def _table(result: dict[str, Any], plan: Plan) -> Table:
    bench, verified = result["bench"], result["verify"]
    full, dynamic = bench["full"], bench["dynamic"]
    used, blocks = dynamic["blocks_used"], bench["num_blocks"]
    table = FittedTable(title=f"quickstart: {bench['architecture']} on {plan.dataset}", show_header=False)
    accuracy = f"{dynamic['accuracy']:.2f} % against {full['accuracy']:.2f} %"
    base = result["evaluate"]["base"] if plan.model is None else bench["base"]
    rows = {
        **_base_row(base, dynamic["accuracy"]),
        "mean latency, batch 1": f"{dynamic['latency_ms']['mean']:.3f} ms against {full['latency_ms']['mean']:.3f} ms "
        f"of the full network: {bench['speedup']['latency_mean']:.2f} x",
        **(
            {"accuracy": f"{accuracy}, {bench['images']} held-out images"}
            if plan.model is None
            else {f"accuracy on {bench['images']} sample images only": accuracy} | _card_row(result["card_result"])
        ),
        "blocks run": f"{used['mean']:.1f} +- {used['std']:.1f} of {blocks} ({used['mean'] / blocks:.0%}), "
        f"{dynamic['unique_masks']} unique masks",
        "verified": f"largest logit difference {verified['max_logit_difference']:.1e}",
        "trained network": str(result["run"] if plan.model is None else result["model"]),
        "bundle": str(result["bundle"]),
        "result as JSON": str(plan.out / RESULT),
        "took": f"{result['seconds']:.0f} s",
    }
    for name, text in rows.items():
        table.add_row(name, text)
    return table


def _base_row(base: dict[str, Any] | None, accuracy: float) -> dict[str, str]:
    """First of all: what the base had reached before a policy was learned on it."""
    if base is None:
        return {}
    figures = BaseFigures(**base)
    if not figures.here:
        return {"against your base": figures.sentence()}
    against = f"{accuracy:.2f} % with blocks dropped: {points(accuracy, figures.accuracy)}"
    return {"against your base": f"{figures.accuracy:.2f} % on the same images; {against}"}


def _card_row(card_result: dict[str, Any]) -> dict[str, str]:
    """What the model reaches on its whole test set, which was not measured now."""
    title = f"its card, {card_result['images']} test images"
    return {title: f"{card_result['policy']['accuracy']:.2f} % against {card_result['full']['accuracy']:.2f} %"}
