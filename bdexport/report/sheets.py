"""Contact sheets: strips of images with what they share beside them (the paper's Figures 4 and 5)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from bdexport.report.collect import Sheet
from bdexport.report.style import BLUE, GREY, PALE, WHITE, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TILE, GAP = 96, 6  # pixels of the mosaic
TEXT_TILES = 3.4  # width of the text beside the images, in tiles
TILE_INCHES = 0.62
TITLES = {
    "policies": "Images of one class that share a policy",
    "difficulty": "Images of one class that take the fewest and the most blocks",
}
Mosaic = NDArray[np.uint8]


def contact_sheet(sheet: Sheet) -> Figure:
    """One line per strip: class, caption, the mask where there is one, and the images."""
    columns = max(len(strip.rows) for strip in sheet.strips)
    pitch = TILE + GAP
    image = mosaic(sheet.pixels, columns)
    left = TEXT_TILES * pitch
    height = TILE_INCHES * len(sheet.strips) + 0.5
    figure = new_figure(TILE_INCHES * (TEXT_TILES + columns) + 0.1, height)
    axes = figure.add_axes((0, 0, 1, 1 - 0.45 / height))
    axes.imshow(image, extent=(left, left + image.shape[1], image.shape[0], 0), interpolation="nearest").set_gid(
        "images"
    )
    axes.set_xlim(0, left + image.shape[1])
    axes.set_ylim(image.shape[0], 0)
    axes.axis("off")
    for index, strip in enumerate(sheet.strips):
        top = index * pitch
        first = index == 0 or sheet.strips[index - 1].class_name != strip.class_name
        if first:
            axes.axhline(top, color=GREY, lw=0.8)
            axes.text(8, top + 8, strip.class_name, va="top", weight="bold", fontsize=9)
        axes.text(8, top + 50, strip.caption, va="center", fontsize=8)
        if strip.mask is not None:
            _draw_mask(axes, strip.mask, top + 80, left - 24)
        else:
            _draw_counts(axes, strip.blocks, left, top)
    figure.suptitle(
        f"{TITLES[sheet.kind]}: {sheet.name}",
        x=0.01,
        y=1 - 0.1 / height,
        ha="left",
        va="top",
        weight="bold",
        fontsize=10,
    )
    return figure


def mosaic(pixels: tuple[Mosaic, ...], columns: int) -> Mosaic:
    """Images (n, H, W, 3) of every strip as one picture: a strip a line, a tile an image, white between them."""
    pitch = TILE + GAP
    canvas = np.full((len(pixels) * pitch, columns * pitch, 3), 255, dtype=np.uint8)
    for row, strip in enumerate(pixels):
        for column, image in enumerate(strip):
            top, left = row * pitch + GAP // 2, column * pitch + GAP // 2
            tile = _tile(image)
            canvas[top : top + tile.shape[0], left : left + tile.shape[1]] = tile
    return canvas


def _tile(image: Mosaic) -> Mosaic:
    """An image scaled to fit a tile: small ones keep hard pixels, large ones are averaged."""
    height, width = image.shape[:2]
    scale = TILE / max(height, width)
    resampling = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.BOX
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.asarray(Image.fromarray(image).resize(size, resampling), dtype=np.uint8)


def _draw_mask(axes: Axes, mask: str, y: float, width: float) -> None:
    """A square for each block, filled where it is kept."""
    step = min(14.0, width / len(mask))
    points_per_unit = 72 * TILE_INCHES / (TILE + GAP)
    places = 14 + step * np.arange(len(mask))
    faces = [BLUE if kept == "1" else WHITE for kept in mask]
    size = (0.78 * step * points_per_unit) ** 2
    style: dict[str, Any] = {"marker": "s", "s": size, "facecolors": faces, "edgecolors": BLUE, "linewidths": 0.6}
    axes.scatter(places, np.full(len(mask), y), **style).set_gid(f"mask-{mask}")


def _draw_counts(axes: Axes, blocks: tuple[int, ...], left: float, top: float) -> None:
    for column, count in enumerate(blocks):
        box = {"boxstyle": "round,pad=0.15", "facecolor": WHITE, "edgecolor": PALE, "alpha": 0.85, "linewidth": 0.5}
        axes.text(left + column * (TILE + GAP) + 9, top + 10, str(count), fontsize=6, va="top", bbox=box)
