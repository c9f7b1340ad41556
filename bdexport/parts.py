"""Part names, masks and the path that a mask runs. Shared by the build half and the run-time half; numpy only.

A *part* is an exportable piece of the network: ``policy``, ``stem``, ``block_00``.., ``shortcut_05``.. (transitions
only), ``head`` and ``full`` (the undropped network, the reference for every speed-up). A *mask* is K booleans.
The *path* of a mask is the sequence of parts that it runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from bdexport.errors import InputError

POLICY, STEM, HEAD, FULL = "policy", "stem", "head", "full"
KEEP_THRESHOLD = 0.5  # greedy decision at inference: keep when p >= 0.5 (no exploration)

Masks = NDArray[np.bool_]


def block_part(index: int) -> str:
    """``block_07``."""
    return f"block_{index:02d}"


def shortcut_part(index: int) -> str:
    """``shortcut_07``: what the transition ``block_07`` still runs when it is dropped."""
    return f"shortcut_{index:02d}"


def gate_part(index: int) -> str:
    """``gate_07``: what decides on ``block_07`` in a network with gates in front of its blocks; in no bundle."""
    return f"gate_{index:02d}"


def part_names(num_blocks: int, transitions: Iterable[int]) -> tuple[str, ...]:
    """Every part of a network with K blocks, in order of execution; ``full`` last."""
    crossing = set(transitions)
    names = [POLICY, STEM]
    for index in range(num_blocks):
        names.append(block_part(index))
        if index in crossing:
            names.append(shortcut_part(index))
    return (*names, HEAD, FULL)


def path_parts(mask: Sequence[bool] | Masks, transitions: Iterable[int]) -> tuple[str, ...]:
    """The parts that one mask (K booleans) runs after the policy, stem and head included."""
    crossing = set(transitions)
    names = [STEM]
    for index, keep in enumerate(mask):
        if keep:
            names.append(block_part(index))
        elif index in crossing:
            names.append(shortcut_part(index))
    return (*names, HEAD)


def mask_to_text(mask: Sequence[bool] | Masks) -> str:
    """``1`` for a kept block, ``0`` for a dropped one: ``110...``; block 0 first."""
    return "".join("1" if keep else "0" for keep in mask)


def mask_from_text(text: str, num_blocks: int) -> Masks:
    """Inverse of :func:`mask_to_text`: bool (K,). Raises :class:`InputError` on another length or character."""
    if len(text) != num_blocks or set(text) - {"0", "1"}:
        raise InputError("mask", got=repr(text), expected=f"{num_blocks} characters, each 0 or 1")
    return np.array([character == "1" for character in text], dtype=bool)


def frequent_masks(masks: Masks) -> list[tuple[str, int]]:
    """Distinct masks of bool (N, K) as text with their counts, most frequent first (ties: more kept blocks first)."""
    rows, counts = np.unique(masks, axis=0, return_counts=True)
    pairs = [(mask_to_text(row), int(count)) for row, count in zip(rows, counts, strict=True)]
    return sorted(pairs, key=lambda pair: (-pair[1], -pair[0].count("1"), pair[0]))
