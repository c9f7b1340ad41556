"""The result as Markdown: for each model and number of threads one table over batches; then what belongs to all."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

Cells = list[dict[str, Any]]
USAGE = {"trained": "blocks as the trained policy decides", "random": "random masks"}
MARK = " (auto)"
LEGEND = (
    "Times are medians in ms of calls that alternate with all the others of their model, batch and threads, on the "
    "same images: `ms`; `x` how many times as fast as the best full network of the same precision, whoever's it is (in "
    "bold); `eff.` (policy's own time + the paths' share of FLOPs x the same engine's full time) / time. `[a, b]`: "
    "95 % bootstrap interval over the rounds. `(auto)`: what `auto` means for that bundle. More: benchmarks/README.md."
)
RANDOM_INT8 = "The weights are random: times count, and int8's accuracy means nothing."


def markdown(result: dict[str, Any]) -> str:
    """The whole page. ``result`` is what ``suite.json`` holds."""
    machine = result["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in sorted(result["versions"].items()))
    lines = [
        "# Benchmark suite",
        "",
        f"{machine['cpu']}, {machine['cores']} cores, {result['date']}; {versions}. `{result['command']}`",
        "",
        LEGEND,
    ]
    for model, threads in _groups(result["cells"]):
        own = [cell for cell in result["cells"] if (cell["cell"]["model"], cell["cell"]["threads"]) == (model, threads)]
        lines += ["", *_model(model, threads, own)] if any(_is_timed(cell) for cell in own) else []
    lines += _footprints(_of(result["cells"], "footprint"))
    lines += _missing(result)
    return "\n".join(lines) + "\n"


def _groups(cells: Cells) -> list[tuple[str, int]]:
    return list(dict.fromkeys((cell["cell"]["model"], cell["cell"]["threads"]) for cell in cells))


def _of(cells: Cells, *usages: str) -> Cells:
    return sorted(
        (cell for cell in cells if cell["cell"]["usage"] in usages), key=lambda cell: int(cell["cell"]["batch"])
    )


def _is_timed(cell: dict[str, Any]) -> bool:
    return bool(cell["cell"]["usage"] != "footprint")


def _model(model: str, threads: int, cells: Cells) -> list[str]:
    lines = [f"## {model}, {threads} thread{'s' * (threads != 1)}"]
    usual = _of(cells, "trained", "random")
    if usual:
        lines += ["", *_usual(usual), "", *_policy_shares(usual)]
    for cell in _of(cells, "sweep"):
        lines += ["", *_sweep(cell)]
    return lines


# ---- one table over batches ---------------------------------------------------------------------------------------


def _usual(cells: Cells) -> list[str]:
    first = cells[0]
    rounds = ", ".join(f"{cell['rounds']} rounds at batch {cell['cell']['batch']}" for cell in cells)
    most = max(cells, key=lambda cell: int(cell["rounds"] * cell["cell"]["batch"]))  # saw the most images
    about = f"{USAGE[first['cell']['usage']]} ({first['checkpoint']['name']}): {_blocks(most)}; {rounds}."
    if first["checkpoint"]["name"] == "random weights":
        about += f" {RANDOM_INT8}"
    heads = [f"batch {cell['cell']['batch']}" for cell in cells]
    rows = [
        f"| {name}{_auto(name, cells)} | {' | '.join(_entry(name, cell) for cell in cells)} |" for name in _names(cells)
    ]
    return [about[0].upper() + about[1:], "", f"| who | {' | '.join(heads)} |", f"|---|{'---:|' * len(heads)}", *rows]


def _names(cells: Cells) -> list[str]:
    """Contestants of any of the cells but policies, in the first's order."""
    return list(dict.fromkeys(one["name"] for cell in cells for one in cell["contestants"] if one["group"] != "policy"))


def _auto(name: str, cells: Cells) -> str:
    found = [one for cell in cells if (one := _contestant(name, cell)) is not None]
    return MARK if any(one.get("auto") for one in found) else ""


def _contestant(name: str, cell: dict[str, Any]) -> dict[str, Any] | None:
    return next((one for one in cell["contestants"] if one["name"] == name), None)


def _entry(name: str, cell: dict[str, Any]) -> str:
    """``0.804 ms, 1.80 x [1.75, 1.84], eff. 0.94 [0.93, 0.96]``; the best full network of its precision in bold."""
    one = _contestant(name, cell)
    if one is None:
        return "-"
    ms = f"{_ms(one['ms']['p50'])} ms"
    best = one["speedup_over"].get("best_full")
    if best is None:
        return f"**{ms}**" if one["group"] == "full" else ms
    efficiency = one.get("efficiency")
    return ", ".join(
        [ms, f"{best['value']:.2f} x {_interval(best)}"]
        + ([f"eff. {efficiency['value']:.2f} {_interval(efficiency)}{_hits(efficiency)}"] if efficiency else [])
    )


def _hits(efficiency: dict[str, Any]) -> str:
    """Efficiency over the images that ran as one engine, where those are not all or none."""
    own = efficiency.get("fused_hits")
    if own is None:
        return ""
    return f" (hits {own['value']:.2f}, {100 * efficiency['fused_images']:.0f} % of images)"


def _blocks(cell: dict[str, Any]) -> str:
    used = next((one["blocks"] for one in cell["contestants"] if one.get("blocks")), None)
    if used is None:
        return f"of {cell['num_blocks']} blocks"
    text = f"{used['mean']:.1f} +- {used['std']:.1f}" if used["std"] else f"{used['mean']:.0f}"
    return f"{text} of {cell['num_blocks']} blocks"


def _ms(value: float) -> str:
    """Four digits that matter."""
    return f"{value:.3f}" if value < 10 else f"{value:.2f}" if value < 100 else f"{value:.0f}"


def _interval(value: dict[str, Any]) -> str:
    return f"[{value['low']:.2f}, {value['high']:.2f}]"


# ---- the policy's share of the time -------------------------------------------------------------------------------


def _policy_shares(cells: Cells) -> list[str]:
    rows = {
        one["engine"]: [_share(f"{one['engine']}, policy", cell) for cell in cells]
        for cell in cells
        for one in cell["contestants"]
        if one["group"] == "policy"
    }
    if not rows:
        return []
    heads = [f"batch {cell['cell']['batch']}" for cell in cells]
    return [
        "The policy alone: ms, its share of the same engine's full network, and of the dynamic call (auto).",
        "",
        f"| policy | {' | '.join(heads)} |",
        f"|---|{'---:|' * len(heads)}",
        *(f"| {engine} | {' | '.join(entries)} |" for engine, entries in rows.items()),
    ]


def _share(name: str, cell: dict[str, Any]) -> str:
    one = _contestant(name, cell)
    if one is None:
        return "-"
    shares = [
        f"{100 * share['value']:.1f} % [{100 * share['low']:.1f}, {100 * share['high']:.1f}] of {what}"
        for key, what in (("of_full", "full"), ("of_dynamic", "dynamic"))
        if (share := one["share"].get(key)) is not None
    ]
    return ", ".join([f"{_ms(one['ms']['p50'])} ms", *shares])


# ---- the sweep ----------------------------------------------------------------------------------------------------


def _sweep(cell: dict[str, Any]) -> list[str]:
    """Medians over kept blocks, and the straight line through them."""
    from benchmarks.suite.results import lines_of

    lines = lines_of(cell)
    kept = sorted({point["kept"] for points in lines.values() for point in points})
    if not kept:
        return []
    full = [
        f"{one['name']} {_ms(one['ms']['p50'])}"
        for one in cell["contestants"]
        if one["group"] == "full" and not one["name"].startswith("bdexport")
    ]
    heads = [*(f"{count}" for count in kept), "at no block", "should be", "per block", "r2"]
    return [
        f"Median ms at batch 1 by kept blocks of {cell['num_blocks']} (random masks; `fused` has an engine for each; "
        f"{cell['rounds']} rounds), and the line through them. Full: {'; '.join(full) or 'none'}.",
        "",
        f"| who | {' | '.join(heads)} |",
        f"|---|{'---:|' * len(heads)}",
        *(_sweep_row(label, points, kept, cell["lines"].get(label)) for label, points in lines.items()),
    ]


def _sweep_row(label: str, points: Cells, kept: Iterable[int], line: dict[str, Any] | None) -> str:
    by_kept = {point["kept"]: _ms(point["ms"]["p50"]) for point in points}
    entries = [by_kept.get(count, "-") for count in kept]
    if line is None:
        return f"| {label} | {' | '.join([*entries, '', '', '', ''])} |"
    fixed = "" if line["fixed_ms"] is None else f"{line['fixed_ms']:.3f}"
    numbers = f"{line['intercept']:.3f}", fixed, f"{line['slope']:.4f}", f"{line['r2']:.3f}"
    return f"| {label} | {' | '.join([*entries, *numbers])} |"


# ---- load time, memory, and what is not there ---------------------------------------------------------------------


def _footprints(cells: Cells) -> list[str]:
    if not cells:
        return []
    threads = cells[0]["cell"]["threads"]
    lines = [
        *("", f"## Load time and memory, {threads} thread{'s' * (threads != 1)}", ""),
        "| model | engine | load bundle, s | load full alone, s | RSS bundle, MB | RSS full, MB | bundle / full |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for cell in cells:
        for engine, found in cell["engines"].items():
            bundle, full = found["bundle"], found["full"]
            lines.append(
                f"| {cell['cell']['model']} | {engine} | {bundle['load_s']:.2f} | {full['load_s']:.2f} | "
                f"{bundle['rss_run']:.0f} | {full['rss_run']:.0f} | {found['ratio']['rss_run']:.2f} |"
            )
    return lines


def _missing(result: dict[str, Any]) -> list[str]:
    """Who is missing for which reason, each said once; and the cells that were not measured."""
    where: dict[tuple[str, str], list[str]] = {}
    for cell in result["cells"]:
        about = cell["cell"]
        place = f"{about['model']} {about['usage']}, batch {about['batch']}, {about['threads']} thread(s)"
        for name, why in cell["missing"].items():
            where.setdefault((name, why), []).append(place)
    everywhere = len(result["cells"])
    for name, why in list(where):  # of a backend that is missing as a whole, its precisions too
        if any(name != other and name.startswith(other) and why == reason for other, reason in where):
            del where[name, why]
    lines = [
        f"- {name}{'' if len(places) >= everywhere - 1 else ' (' + '; '.join(places) + ')'}: {why}"
        for (name, why), places in where.items()
    ]
    lines += [f"- {name}: {reason}" for name, reason in result["not_measured"].items()]
    return ["", "## Not measured", "", *lines] if lines else []
