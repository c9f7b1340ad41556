"""Data -> figures. Every function returns a matplotlib Figure and draws nothing that is not in its argument.

Marks that stand for data carry an id in the SVG (``mark-3``, ``bar-07``), so that what was drawn can be counted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from bdexport.report.curves import Curves, Series
from bdexport.report.frontier import Frontier, Mark
from bdexport.report.paper import architecture_name
from bdexport.report.points import method_name, method_order
from bdexport.report.style import (
    BLUE,
    COLOURS,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PURPLE,
    SKY,
    VERMILLION,
    WHITE,
    new_figure,
    whole_ticks,
)
from bdexport.report.usage import Usage, heat_map_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# ---- training curves -----------------------------------------------------------------------------------------------

PHASE_COLOURS = {
    "pretrain": SKY,
    "prime": BLUE,
    "adapt": ORANGE,
    "curriculum": PURPLE,
    "finetune": GREEN,
    "finetune_fixed": GREEN,
}
LONGEST_NAME = 40  # characters of a class, a network or a method beside a plot
FEW_EPOCHS = 40  # up to here, every epoch has a dot


def training_curves(curves: Curves) -> Figure:
    """Loss, accuracy, reward, blocks used (mean and band of one standard deviation), unique masks; by epoch."""
    figure = new_figure(10, 9)
    panels = figure.subplots(3, 2, sharex=True).ravel()
    _panel(panels[0], curves, "loss", [("loss", "train", BLUE, "-")])
    both = [("train_accuracy", "train", ORANGE, "--"), ("validation_accuracy", "validation", BLUE, "-")]
    _panel(panels[1], curves, "accuracy, %", both)
    both = [("train_reward", "train", ORANGE, "--"), ("validation_reward", "validation", BLUE, "-")]
    _panel(panels[2], curves, "reward", both)
    both = [("train_blocks", "train, mean", ORANGE, "--"), ("blocks_mean", "validation, mean ± std", BLUE, "-")]
    _panel(panels[3], curves, "blocks used", both)
    _band(panels[3], curves)
    panels[3].set_ylim(bottom=0)
    _panel(panels[4], curves, "unique masks, validation", [("unique_masks", "validation", BLUE, "-")])
    panels[4].set_ylim(bottom=0)
    whole_ticks(panels[4], "y")
    _key(panels[5], curves)
    for axes in (panels[4], panels[3]):
        axes.set_xlabel("epoch of the run")
        axes.tick_params(labelbottom=True)
    whole_ticks(panels[4])
    figure.suptitle(f"Training of {curves.name}", x=0.06, ha="left", weight="bold")
    figure.subplots_adjust(left=0.08, right=0.98, top=0.92, bottom=0.07, hspace=0.28, wspace=0.2)
    return figure


def _panel(axes: Axes, curves: Curves, title: str, lines: list[tuple[str, str, str, str]]) -> None:
    axes.set_title(title)
    for phase in curves.phases:
        axes.axvspan(phase.first - 0.5, phase.last + 0.5, color=_phase_colour(phase.name), alpha=0.14, lw=0)
    if curves.chosen is not None:
        axes.axvline(curves.chosen, color=INK, lw=1, ls=":")
    epochs = np.arange(1, curves.epochs + 1)
    for name, label, colour, dash in lines:
        values = _floats(curves.series[name])
        if np.isfinite(values).any():
            dot = "o" if curves.epochs <= FEW_EPOCHS else ""
            (line,) = axes.plot(epochs, values, ls=dash, color=colour, label=label, marker=dot, ms=3.5)
            line.set_gid(f"curve-{name}")
    axes.set_xlim(0.5, curves.epochs + 0.5)
    if len(lines) > 1 and axes.get_legend_handles_labels()[0]:
        axes.legend(loc="lower left" if "blocks" in title else "best")


def _band(axes: Axes, curves: Curves) -> None:
    mean, std = _floats(curves.series["blocks_mean"]), _floats(curves.series["blocks_std"])
    epochs = np.arange(1, curves.epochs + 1)
    axes.fill_between(epochs, mean - std, mean + std, color=BLUE, alpha=0.2, lw=0).set_gid("band-blocks")


def _key(axes: Axes, curves: Curves) -> None:
    """The sixth panel: which colour is which phase."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    axes.axis("off")
    handles: list[Any] = [
        Patch(
            color=_phase_colour(phase.name), alpha=0.35, lw=0, label=f"{phase.name}: {_epochs(phase.first, phase.last)}"
        )
        for phase in curves.phases
    ]
    if curves.chosen is not None:
        handles.append(Line2D([], [], color=INK, lw=1, ls=":", label=f"chosen model: epoch {curves.chosen}"))
    axes.legend(handles=handles, loc="upper left", title="Phases", alignment="left", fontsize=10)


def _epochs(first: int, last: int) -> str:
    return f"epoch {first}" if first == last else f"epochs {first} to {last}"


def _phase_colour(name: str) -> str:
    return PHASE_COLOURS.get(name, GREY)


def _short(name: str) -> str:
    """A name that leaves room for the plot beside it."""
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 2]}.."


def _floats(series: Series) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.array([np.nan if value is None else value for value in series], dtype=np.float64)


# ---- the frontier --------------------------------------------------------------------------------------------------

SHAPES = {
    "full": "s",
    "blockdrop": "o",
    "first-k": "<",
    "random-k": "^",
    "distribute-k": "D",
    "fixed": "d",
    "searched": "p",
    "blockdrop-seq": "h",
    "act": "v",
    "sact": ">",
    "pfec": "P",
    "blockdrop-pfec": "*",
    "lccl": "X",
}
OTHER_SHAPE = "8"
BELOW_NAMED = 6  # so many marks on the lower edge are listed with their accuracy


def frontier_plot(frontier: Frontier, dataset: str) -> Figure:
    """Accuracy against FLOPs or blocks per image; colour: network, shape: method, filled: measured, open: the paper."""
    figure = new_figure(10, 6)
    axes = figure.subplots()
    colours = _network_colours(frontier)
    unit = _unit(frontier)
    _limits(axes, frontier, unit)
    for group in frontier.lines():
        dash = ":" if group[0].point.source == "paper" else "-"
        colour = colours[group[0].point.architecture]
        x, y = [mark.x / unit for mark in group], [mark.point.accuracy for mark in group]
        axes.plot(x, y, color=colour, lw=1.2, alpha=0.7, ls=dash, zorder=1)
    for mark in frontier.marks:
        _draw_mark(axes, mark, unit, colours[mark.point.architecture])
    axes.set_xlabel(_cost(frontier, unit))
    axes.set_ylabel("accuracy, %")
    axes.set_title(f"Accuracy against {'FLOPs' if frontier.axis == 'flops' else 'blocks'}, {dataset}")
    figure.subplots_adjust(left=0.07, right=0.73, top=0.93, bottom=0.11)
    _number_marks(axes, frontier, unit)
    _frontier_legend(axes, frontier, colours)
    return figure


def _unit(frontier: Frontier) -> float:
    """What the axis counts in: the power of ten of the largest number of FLOPs, or single blocks."""
    largest = max(mark.x for mark in frontier.marks)
    return float(10 ** np.floor(np.log10(largest))) if frontier.axis == "flops" and largest > 0 else 1.0


def _cost(frontier: Frontier, unit: float) -> str:
    if frontier.axis == "blocks":
        return "blocks used per image, mean ± std"
    return f"{unit:.0e} FLOPs per image (2 x multiply-accumulates), mean ± std".replace("e+0", "e").replace("e+", "e")


def _network_colours(frontier: Frontier) -> dict[str | None, str]:
    names = sorted({mark.point.architecture for mark in frontier.marks}, key=lambda name: (len(name or ""), name or ""))
    return {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(names)}


def _y(axes: Axes, mark: Mark) -> float:
    low, high = axes.get_ylim()
    return low + 0.02 * (high - low) if mark.below else mark.point.accuracy


def _limits(axes: Axes, frontier: Frontier, unit: float) -> None:
    scale = [mark.point.accuracy for mark in frontier.marks if not mark.below]
    low, high = min(scale), max(scale)
    pad = max(0.08 * (high - low), 0.3)
    axes.set_ylim(low - pad * (3 if frontier.floor is not None else 1), high + pad)
    if frontier.floor is not None:
        axes.axhline(low - pad, color=GREY, lw=1, ls=(0, (6, 4)), zorder=0)
    right = max(mark.x + mark.x_std for mark in frontier.marks) / unit
    left = min(mark.x - mark.x_std for mark in frontier.marks) / unit
    pad = 0.06 * (right - left or right)
    axes.set_xlim(max(0.0, left - pad), right + pad)


def _draw_mark(axes: Axes, mark: Mark, unit: float, colour: str) -> None:
    x, std, y = mark.x / unit, mark.x_std / unit, _y(axes, mark)
    if std and not mark.below:
        axes.plot([x - std, x + std], [y, y], color=colour, lw=1, alpha=0.45, zorder=2)
    (drawn,) = axes.plot(
        [x],
        [y],
        ls="",
        marker=SHAPES.get(mark.point.method, OTHER_SHAPE),
        ms=8,
        mfc=WHITE if mark.point.source == "paper" else colour,
        mec=colour,
        mew=1.5,
        zorder=3,
        clip_on=False,
    )
    drawn.set_gid(f"mark-{mark.number}")


# Pixels from a mark to its number, the preferred places first.
NUMBER_PLACES = ((0, 12), (12, 9), (-12, 9), (14, 0), (-14, 0), (12, -9), (-12, -9), (0, -13), (0, 24), (0, -25))
UPPER_PLACES = ((0, 12), (12, 9), (-12, 9), (0, 24), (13, 22), (-13, 22), (0, 36), (13, 35), (-13, 35))


def _number_marks(axes: Axes, frontier: Frontier, unit: float) -> None:
    """The number of each mark beside it, where it covers the fewest others."""
    from matplotlib.patheffects import withStroke

    at = [axes.transData.transform((mark.x / unit, _y(axes, mark))) for mark in frontier.marks]
    taken = [np.asarray(place) for place in at]
    for mark, place in zip(frontier.marks, at, strict=True):
        places = UPPER_PLACES if mark.below else NUMBER_PLACES
        wider = 1 + 0.2 * (len(mark.number) - 1)  # longer numbers stand further to the side
        spots = [np.asarray(place) + np.asarray((x * wider, y)) for x, y in places]
        distances = np.abs(np.stack(spots)[:, None] - np.stack(taken)).max(axis=2)  # of each spot to what is there
        spot = spots[int(np.argmin(np.maximum(0.0, 14 - distances).sum(axis=1)))]
        taken.append(spot)
        x, y = axes.transData.inverted().transform(spot)
        text = axes.text(x, y, mark.number, ha="center", va="center", fontsize=8, color=INK, zorder=4)
        text.set_path_effects([withStroke(linewidth=2, foreground=WHITE)])


def _frontier_legend(axes: Axes, frontier: Frontier, colours: dict[str | None, str]) -> None:
    from matplotlib.legend import Legend
    from matplotlib.lines import Line2D

    def sample(shape: str, fill: str, edge: str) -> Line2D:
        return Line2D([], [], ls="", marker=shape, ms=8, mfc=fill, mec=edge, mew=1.5)

    present = sorted({mark.point.method for mark in frontier.marks}, key=method_order)
    groups = {
        "Source": [("filled: measured", sample("o", GREY, GREY))] if frontier.measured else [],
        "Network": [(architecture_name(name), sample("s", colour, colour)) for name, colour in colours.items()],
        "Method": [(method_name(name), sample(SHAPES.get(name, OTHER_SHAPE), GREY, GREY)) for name in present],
    }
    if frontier.published:
        groups["Source"].append(("open: published, Wu et al. 2018", sample("o", WHITE, GREY)))
    top = 1.0
    for title, entries in groups.items():
        place: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1.02, top), "borderaxespad": 0}
        labels, handles = [_short(label) for label, _ in entries], [handle for _, handle in entries]
        axes.add_artist(Legend(axes, handles, labels, title=title, alignment="left", **place))
        top -= 0.075 + 0.049 * len(entries)
    below = [mark for mark in frontier.marks if mark.below]
    if below:
        lines = [f"{mark.number}: {mark.point.accuracy:.1f} %" for mark in below[:BELOW_NAMED]]
        lines += [f"and {len(below) - BELOW_NAMED} more"] if len(below) > BELOW_NAMED else []
        text = "\n".join(["Below the broken line, not to scale:", *lines])
        axes.text(1.03, 0, text, transform=axes.transAxes, fontsize=9, color=INK, va="bottom", linespacing=1.4)


# ---- block usage ---------------------------------------------------------------------------------------------------

STAGE_COLOURS = (BLUE, ORANGE, GREEN, PURPLE)


def usage_histogram(usage: Usage) -> Figure:
    """Share of the images by the number of blocks that they keep."""
    figure = new_figure(8, 4)
    axes = figure.subplots()
    counts = np.arange(usage.num_blocks + 1)
    for count, bar in zip(counts, axes.bar(counts, 100 * usage.histogram, width=0.85, color=BLUE), strict=True):
        bar.set_gid(f"bar-{count:02d}")
    axes.axvline(usage.mean, color=VERMILLION, ls="--", lw=1.5, label=f"mean {usage.mean:.2f} ± {usage.std:.2f}")
    axes.set_xlim(-0.6, usage.num_blocks + 0.6)
    axes.set_xlabel(f"blocks kept, of {usage.num_blocks}")
    axes.set_ylabel("images, %")
    axes.set_title(f"Block usage of {usage.name}")
    axes.grid(axis="x", visible=False)
    axes.legend(loc="best")
    whole_ticks(axes)
    figure.subplots_adjust(left=0.09, right=0.98, top=0.9, bottom=0.14)
    return figure


def keep_rates(usage: Usage) -> Figure:
    """How often each block is kept; stages by colour, transitions hatched."""
    from matplotlib.patches import Patch

    figure = new_figure(max(8.0, min(14.0, 0.24 * usage.num_blocks + 2)), 4)
    axes = figure.subplots()
    stage_of = np.repeat(np.arange(len(usage.stages)), usage.stages)
    for block, rate in enumerate(usage.keep_rate):
        hatch = "///" if block in usage.transitions else None
        colour = STAGE_COLOURS[stage_of[block] % len(STAGE_COLOURS)]
        (bar,) = axes.bar([block], [100 * rate], width=0.85, color=colour, hatch=hatch, edgecolor=WHITE, lw=0)
        bar.set_gid(f"bar-{block:02d}")
    for edge in np.cumsum(usage.stages)[:-1]:
        axes.axvline(edge - 0.5, color=GREY, lw=1)
    handles = [
        Patch(color=STAGE_COLOURS[stage % len(STAGE_COLOURS)], label=f"stage {stage + 1}")
        for stage in range(len(usage.stages))
    ]
    if usage.transitions:
        handles.append(
            Patch(facecolor=GREY, hatch="///", edgecolor=WHITE, label="transition (its shortcut always runs)")
        )
    axes.set_xlim(-0.6, usage.num_blocks - 0.4)
    axes.set_ylim(0, 100)
    axes.set_xlabel("block")
    axes.set_ylabel("images that keep it, %")
    axes.set_title(f"Keep-rate per block of {usage.name}", pad=24)
    axes.grid(axis="x", visible=False)
    axes.legend(handles=handles, loc="lower left", bbox_to_anchor=(0, 1.0), ncols=len(handles), borderaxespad=0.2)
    whole_ticks(axes)
    figure.subplots_adjust(left=0.09, right=0.98, top=0.84, bottom=0.14)
    return figure


def class_keep_rates(usage: Usage, most: int) -> Figure:
    """Keep-rate per block and class as a heat map; stages parted by lines, transitions marked T."""
    assert usage.class_keep_rate is not None
    rows = heat_map_rows(usage, most)
    rates = 100 * usage.class_keep_rate[rows]
    height = 1.6 + max(0.3 if len(rows) <= 30 else 0.17, 0.17) * len(rows)
    figure = new_figure(max(8.0, min(14.0, 0.26 * usage.num_blocks + 3)), height)
    axes = figure.subplots()
    image = axes.imshow(rates, cmap="cividis", vmin=0, vmax=100, aspect="auto", interpolation="nearest")
    image.set_gid("heat-map")
    for edge in np.cumsum(usage.stages)[:-1]:
        axes.axvline(edge - 0.5, color=WHITE, lw=2.5)
    names = [_short(usage.class_names[row]) for row in rows]
    axes.set_yticks(range(len(rows)), names, fontsize=9 if len(rows) <= 30 else 7)
    step = 1 if usage.num_blocks <= 30 else 2
    ticks = [block for block in range(usage.num_blocks) if block % step == 0 or block in usage.transitions]
    labels = [f"{block}\nT" if block in usage.transitions else str(block) for block in ticks]
    axes.set_xticks(ticks, labels, fontsize=8)
    if usage.num_blocks <= 30 and len(rows) <= 30:
        for (row, block), rate in np.ndenumerate(rates):
            axes.text(
                block, row, f"{rate:.0f}", ha="center", va="center", fontsize=7, color=INK if rate > 55 else WHITE
            )
    axes.set_xlabel("block (T: transition)")
    axes.set_title(f"Keep-rate per class of {usage.name}")
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    longest = max(len(name) for name in names)
    width = float(figure.get_figwidth())
    figure.subplots_adjust(
        left=(0.35 + 0.085 * longest) / width, right=1 - 0.15 / width, top=1 - 0.45 / height, bottom=0.65 / height
    )
    bar = figure.colorbar(image, ax=axes, fraction=0.1, pad=0.02, aspect=30, shrink=0.9)
    bar.set_label("images that keep it, %")
    bar.outline.set_visible(False)
    return figure
