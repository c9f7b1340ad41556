"""How figures look and how they are saved. The one place, with :mod:`~bdexport.report.plots`, that needs matplotlib.

Colours are Okabe and Ito's (https://jfly.uni-koeln.de/color/), which people with any colour vision tell apart; the heat
map's are cividis. Figures have a white ground of their own, so that they read the same on a dark page. Nothing here
touches matplotlib's global state, and the same data give the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
COLOURS = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY)
INK, GREY, PALE = "#222222", "#767676", "#E6E6E6"
WHITE = "#FFFFFF"

_STYLE = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same on every machine
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": PALE,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.8,
    "hatch.linewidth": 0.8,
    "figure.facecolor": WHITE,
    "savefig.dpi": 144,
    "text.parse_math": False,  # a dollar in a name is a dollar
    "svg.hashsalt": "bdexport",  # ids in the file are the same every time
}


@contextmanager
def styled() -> Iterator[None]:
    """Around making and saving a figure: our style, whatever the user's own matplotlib settings are."""
    from matplotlib import style

    with style.context(["default", _STYLE]):
        yield


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height))


def save(figure: Figure, stem: Path) -> None:
    """Write ``stem``.svg and ``stem``.png without a date in them."""
    figure.savefig(stem.with_name(f"{stem.name}.svg"), metadata={"Date": None, "Creator": "bdexport"})
    figure.savefig(stem.with_name(f"{stem.name}.png"), metadata={"Software": None})


def whole_ticks(axes: Axes, axis: str = "x") -> None:
    """Ticks at whole numbers only: epochs, blocks."""
    from matplotlib.ticker import MaxNLocator

    getattr(axes, f"{axis}axis").set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
