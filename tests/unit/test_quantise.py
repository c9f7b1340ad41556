"""Mask quantisation: the rules by hand and by brute force, and that the run time follows the manifest."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from bundles import assert_close, pixels
from test_fused import build, calibration

import bdexport
from bdexport.mask_map import MaskMapper, MaskMapping
from bdexport.parts import mask_from_text, mask_to_text
from bdexport.quantise import Observed, quantised, table_row, unquantised_row

BLOCKS = 5


def observed(seed: int, images: int = 60, paths: int = 6) -> Observed:
    """Random masks and answers; a target's FLOPs are its blocks."""
    generator = np.random.default_rng(seed)
    every = np.array(list(itertools.product([False, True], repeat=BLOCKS)))[:-1]
    targets = np.concatenate([every[generator.permutation(len(every))[:paths]], np.ones((1, BLOCKS), bool)])
    masks = every[generator.integers(0, len(every), images)]
    correct = generator.random((images, paths + 1)) < 0.5 + 0.08 * targets.sum(axis=1)
    own = generator.random(images) < 0.8
    return Observed(masks, own, targets, correct, targets.sum(axis=1).astype(float), masks.sum(axis=1).astype(float))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("paths", [1, 3, 6])
def test_cover_is_the_cheapest_target_that_keeps_as_much(seed: int, paths: int) -> None:
    """Oracle: brute force over the most frequent targets and the full network."""
    data = observed(seed)
    _, target = quantised(data, paths, "cover", 0.0)
    allowed = [*range(paths), len(data.targets) - 1]
    for mask, chosen in zip(data.masks, target, strict=True):
        covers = [number for number in allowed if not (mask & ~data.targets[number]).any()]
        assert chosen in covers
        assert data.target_flops[chosen] == min(data.target_flops[number] for number in covers)


@pytest.mark.parametrize("seed", range(4))
def test_budget_keeps_within_the_budget_and_costs_no_more_than_cover(seed: int) -> None:
    """Property: never dearer than cover; accuracy at least the own masks' less the budget, where cover has that."""
    data = observed(seed)
    for budget in (0.0, 2.0, 10.0, 100.0):
        cover, row = table_row(data, 6, "cover", budget), table_row(data, 6, "budget", budget)
        assert row["flops"] <= cover["flops"]
        limit = min(100 * data.own.mean() - budget, cover["accuracy"])
        assert row["accuracy"] >= limit - 1e-9
    assert row["blocks"] == pytest.approx(data.targets.sum(axis=1).min())  # a budget of 100 takes the cheapest


def test_more_paths_cover_more() -> None:
    """Invariant: coverage and FLOPs saved by cover do not fall as paths are added; unquantised blocks stay."""
    data = observed(1)
    rows = [table_row(data, paths, "cover", 0.0) for paths in (1, 2, 4, 6)]
    for few, more in itertools.pairwise(rows):
        assert few["coverage"] <= more["coverage"]
        assert few["flops"] >= more["flops"]
    assert unquantised_row(data, 2)["blocks"] == unquantised_row(data, 6)["blocks"]


def test_the_mapper_does_what_the_mapping_says() -> None:
    """Oracle: by hand: seen masks as listed, others the first target that covers them, in any batch."""
    mapping = MaskMapping("budget", ("001", "110", "111"), seen={"010": "001"})
    mapper = MaskMapper(mapping, 3)
    masks = np.array([mask_from_text(text, 3) for text in ("010", "100", "101", "000", "110", "010")])
    expected = ["001", "110", "111", "001", "110", "001"]
    assert [mask_to_text(mask) for mask in mapper(masks)] == expected
    assert [mask_to_text(mapper(masks[[row]])[0]) for row in range(6)] == expected


@pytest.mark.parametrize("rule", ["cover", "budget"])
def test_a_quantised_bundle_runs_the_mapped_masks(tmp_path: Path, rule: str) -> None:
    """Oracle: the manifest's mapping applied to p >= 0.5; logits of the same masks forced; every image is a hit."""
    bundle = build(tmp_path, calibration=calibration(), quantise=rule, paths=2, table=(1, 2, 4))
    mapping = bundle.manifest.mask_mapping
    assert mapping is not None
    assert mapping.rule == rule
    images = pixels(20, seed=5)
    with bdexport.load(bundle.path, executor="fused") as loaded:
        result = loaded(images)
        assert loaded.hit_rate == 1.0
        assert result.probabilities is not None
        drawn = result.probabilities >= 0.5
        assert np.array_equal(result.masks, MaskMapper(mapping, 3)(drawn))
        if rule == "cover":
            assert (result.masks | ~drawn).all()
        assert_close(loaded(images, masks=result.masks).logits, result.logits)
    assert {row["rule"] for row in bundle.quantisation} == {"off", "cover", rule}
    assert all(row["latency_ms"] > 0 for row in bundle.quantisation)
    assert mapping.facts["accuracy"] == next(
        row["accuracy"]
        for row in bundle.quantisation
        if (row["rule"], row["paths"]) == (rule, len(mapping.targets) - 1)
    )
