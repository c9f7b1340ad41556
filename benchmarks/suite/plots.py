"""How cost grows: latency against kept blocks, throughput against batch, overhead against depth; SVG and PNG."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bdexport.report import style
from benchmarks.suite.results import lines_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Cells = list[dict[str, Any]]


def write_plots(data: dict[str, Any], out: Path) -> list[Path]:
    """Every plot that the cells give, as ``out/NAME.svg`` and ``.png``; the stems."""
    written = []
    for threads in sorted({cell["cell"]["threads"] for cell in data["cells"]}):
        cells = [cell for cell in data["cells"] if cell["cell"]["threads"] == threads]
        for cell in _of(cells, "sweep"):
            written += _plot(out / f"kept-{cell['cell']['model']}-t{threads}", _latency, cell)
        for model in dict.fromkeys(cell["cell"]["model"] for cell in cells):
            own = [cell for cell in _of(cells, "trained", "random") if cell["cell"]["model"] == model]
            if len(own) > 1:
                written += _plot(out / f"batch-{model}-t{threads}", _throughput, own)
        if len(_of(cells, "sweep")) > 1:
            written += _plot(out / f"depth-t{threads}", _overhead, _of(cells, "sweep"))
    return written


def _of(cells: Cells, *usages: str) -> Cells:
    return [cell for cell in cells if cell["cell"]["usage"] in usages]


def _plot(stem: Path, draw: Any, what: Any) -> list[Path]:
    with style.styled():
        figure = style.new_figure(7.0, 4.2)
        draw(figure.subplots(), what)
        figure.tight_layout()
        style.save(figure, stem)
    return [stem]


def _latency(axes: Axes, cell: dict[str, Any]) -> None:
    for colour, (label, points) in zip(style.COLOURS * 3, lines_of(cell).items(), strict=False):
        kept = np.array([point["kept"] for point in points], float)
        ms = np.array([point["ms"]["p50"] for point in points])
        line = cell["lines"].get(label)
        text = label if line is None else f"{label}: {line['intercept']:.2f} + {line['slope']:.3f} per block"
        axes.plot(kept, ms, "o", color=colour, label=text, markersize=4)
        if line is not None:
            ends = np.array([0.0, kept.max()])
            axes.plot(ends, line["intercept"] + line["slope"] * ends, "-", color=colour, linewidth=1.2)
            if line["fixed_ms"] is not None:
                axes.plot([0.0], [line["fixed_ms"]], "x", color=colour, markersize=6)
    full = _median(cell, "ONNX Runtime, full")
    if full is not None:
        axes.axhline(full, color=style.GREY, linestyle="--", linewidth=1.2, label="ONNX Runtime, full")
    axes.set_title(f"{cell['cell']['model']}: latency against kept blocks (x: policy, stem, head)")
    axes.set_xlabel(f"blocks kept of {cell['num_blocks']}")
    axes.set_ylabel("median ms, batch 1")
    axes.set_ylim(bottom=0)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), fontsize=8)


def _throughput(axes: Axes, cells: Cells) -> None:
    series: dict[str, list[tuple[int, float]]] = {}
    for cell in sorted(cells, key=lambda cell: cell["cell"]["batch"]):
        for one in cell["contestants"]:
            if one["group"] != "policy" and not (one["group"] == "full" and one["name"].startswith("bdexport")):
                series.setdefault(one["name"], []).append((cell["cell"]["batch"], one["images_per_s"]))
    for number, (name, points) in enumerate(series.items()):
        batches, rates = zip(*points, strict=True)
        own = name.startswith("bdexport")
        colour = style.COLOURS[number % len(style.COLOURS)]
        axes.plot(batches, rates, "o-" if own else "o--", color=colour, label=name, markersize=4)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_title(f"{cells[0]['cell']['model']}: throughput against batch")
    axes.set_xlabel("images per call")
    axes.set_ylabel("images per second (median)")
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=7)


def _overhead(axes: Axes, cells: Cells) -> None:
    """With every block kept: what is left of the time without the policy, over the full network of the same engine."""
    series: dict[str, list[tuple[int, float]]] = {}
    for cell in sorted(cells, key=lambda cell: cell["num_blocks"]):
        for label, points in lines_of(cell).items():
            engine, last = points[-1]["engine"], points[-1]
            policy, full = _median(cell, f"{engine}, policy"), _median(cell, f"{engine}, full")
            if policy is not None and full is not None and last["kept"] == cell["num_blocks"]:
                over = 1e3 * (last["ms"]["p50"] - policy - full) / cell["num_blocks"]
                series.setdefault(label, []).append((cell["num_blocks"], over))
    for colour, (label, found) in zip(style.COLOURS * 3, series.items(), strict=False):
        depth, over_us = zip(*found, strict=True)
        axes.plot(depth, over_us, "o-", color=colour, label=label, markersize=4)
    axes.axhline(0.0, color=style.GREY, linewidth=1.0)
    axes.set_title("overhead with every block kept: (time - policy - full) / blocks")
    axes.set_xlabel("blocks of the network")
    axes.set_ylabel("us per block, batch 1")
    if series:
        axes.legend(loc="best")


def _median(cell: dict[str, Any], name: str) -> float | None:
    found = [one["ms"]["p50"] for one in cell["contestants"] if one["name"] == name]
    return found[0] if found else None
