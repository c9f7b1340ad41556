"""The result as Markdown: a summary against the targets' references, one table per cell, load time and memory."""

from __future__ import annotations

from typing import Any

USAGE = {
    "trained": "blocks as the trained policy decides",
    "random": "random masks",
    "sweep": "random masks, from few blocks to all",
}


def markdown(result: dict[str, Any]) -> str:
    """The whole page. ``result`` is what ``suite.json`` holds."""
    machine = result["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in sorted(result["versions"].items()))
    lines = [
        "# Benchmark suite",
        "",
        f"{machine['cpu']}, {machine['cores']} cores, {result['date']}; {versions}.",
        "",
        "Times are medians in ms of calls that alternate with all the others of their table, on the same images. "
        "`[a, b]` is the 95 % bootstrap interval over the rounds. How to read the columns: `benchmarks/README.md`.",
    ]
    for cell in result["cells"]:
        lines += ["", *(_footprint(cell) if cell["cell"]["usage"] == "footprint" else _cell(cell))]
    if result["not_measured"]:
        lines += ["", "## Not measured", ""]
        lines += [f"- {name}: {reason}" for name, reason in result["not_measured"].items()]
    return "\n".join(lines) + "\n"


def heading(cell: dict[str, Any]) -> str:
    """What a table is about, in one line."""
    where, threads = cell["cell"], cell["cell"]["threads"]
    how = f"batch {where['batch']}, {threads} thread{'s' * (threads != 1)}"
    return f"{where['model']}, {how}: {USAGE[where['usage']]} ({cell['checkpoint']['name']}), {cell['rounds']} rounds"


def _cell(cell: dict[str, Any]) -> list[str]:
    lines = [
        f"## {heading(cell)}",
        "",
        f"| who | blocks of {cell['num_blocks']} | ms | p90 | images/s | x ONNX Runtime full | x best full "
        "| efficiency | fused hits |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    lines += [_row(one) for one in cell["contestants"]]
    best = {
        one["precision"]: one["speedup_over"]["best_full"]["name"]
        for one in cell["contestants"]
        if "best_full" in one.get("speedup_over", {})
    }
    if cell.get("lines"):
        lines += ["", "| line | ms at no block | should be | ms per block | r2 |", "|---|---:|---:|---:|---:|"]
        for label, line in cell["lines"].items():
            fixed = "" if line["fixed_ms"] is None else f"{line['fixed_ms']:.3f}"
            numbers = f"{line['intercept']:.3f}", fixed, f"{line['slope']:.4f}", f"{line['r2']:.3f}"
            lines.append(f"| {label} | {' | '.join(numbers)} |")
    if best:
        names = "; ".join(f"{precision}: {name}" for precision, name in best.items())
        lines += ["", f"Best full network by precision: {names}."]
    if cell["missing"]:
        lines += ["", "Missing: " + "; ".join(f"**{name}** ({why})" for name, why in cell["missing"].items()) + "."]
    return lines


def _row(one: dict[str, Any]) -> str:
    over, used = one.get("speedup_over", {}), one.get("blocks")
    blocks = "" if not used else f"{used['mean']:.1f} +- {used['std']:.1f}" if used["std"] else f"{used['mean']:.0f}"
    ms = one["ms"]
    columns = [
        *(one["name"], blocks, f"{ms['p50']:.3f}", f"{ms['p90']:.3f}", f"{one['images_per_s']:.0f}"),
        *(_ratio(over.get("onnxruntime_full")), _ratio(over.get("best_full")), _ratio(one.get("efficiency"))),
        _hits(one.get("efficiency")),
    ]
    return f"| {' | '.join(columns)} |"


def _ratio(value: dict[str, Any] | None) -> str:
    return "" if value is None else f"{value['value']:.2f} [{value['low']:.2f}, {value['high']:.2f}]"


def _hits(value: dict[str, Any] | None) -> str:
    """Efficiency over the images that ran as one engine, and their share."""
    if not value or not value["fused_images"]:
        return ""
    return f"{_ratio(value.get('fused_hits', value))}, {100 * value['fused_images']:.0f} % of images"


def _footprint(cell: dict[str, Any]) -> list[str]:
    where = cell["cell"]
    lines = [
        f"## {where['model']}, {where['threads']} thread{'s' * (where['threads'] != 1)}: load time and memory",
        "",
        "| engine | load bundle, s | load full alone, s | RSS of bundle, MB | RSS of full, MB | bundle / full |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for engine, found in cell["engines"].items():
        bundle, full = found["bundle"], found["full"]
        lines.append(
            f"| {engine} | {bundle['load_s']:.2f} | {full['load_s']:.2f} | {bundle['rss_run']:.0f} | "
            f"{full['rss_run']:.0f} | {found['ratio']['rss_run']:.2f} |"
        )
    if cell["missing"]:
        lines += ["", "Missing: " + "; ".join(f"**{name}** ({why})" for name, why in cell["missing"].items()) + "."]
    return lines
