"""Verification: it passes what is right and finds what is wrong, down to the part."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from bundles import make_bundle
from tiny import tiny_model

from bdexport.backends import get_backend
from bdexport.backends.base import RunOptions
from bdexport.backends.torch import session_from_model
from bdexport.bundle import Bundle
from bdexport.config import VerifyConfig
from bdexport.errors import UsageError, VerificationError
from bdexport.models.pair import BlockDropNet
from bdexport.parts import part_names
from bdexport.verify import (
    compare,
    require,
    verify_against_graphs,
    verify_against_model,
    with_tolerance,
)
from bdexport.verify_comparison import difference, random_images

FEW = VerifyConfig(random_masks=10, images=4)
FUSED_PATHS = {"fused paths": 3, "fused paths, as batches": 3}  # all dropped, all kept, all dropped again


@pytest.fixture(scope="module")
def model() -> BlockDropNet:
    return tiny_model(shortcut="conv")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, model: BlockDropNet) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("verify") / "bundle", model)


def test_a_largest_batch_of_one_is_verified_on_every_image(tmp_path: Path, model: BlockDropNet) -> None:
    """Oracle: the report of a bundle without a largest batch: as many images, the same differences."""
    single = make_bundle(tmp_path / "single", model, max_batch=1)
    free = make_bundle(tmp_path / "free", model)
    reports = [verify_against_model(each, model, config=FEW) for each in (single, free)]
    assert [report["policy"]["images"] for report in reports] == [4, 4]
    assert [entry["count"] for entry in reports[0]["paths"]] == [entry["count"] for entry in reports[1]["paths"]]
    assert all(report["ok"] for report in reports)


@pytest.mark.parametrize("reference", ["torch", "graphs"])
def test_a_right_bundle_holds(bundle: Bundle, model: BlockDropNet, reference: str) -> None:
    """Oracle: the issue's kinds of paths and the list of parts; all within the tolerance."""
    if reference == "torch":
        report = verify_against_model(bundle, model, config=FEW)
    else:
        report = verify_against_graphs(bundle, config=FEW)
    assert report["ok"]
    assert report["reference"] == reference
    assert tuple(entry["part"] for entry in report["parts"]) == part_names(3, bundle.manifest.transitions)
    counts = {entry["kind"]: entry["count"] for entry in report["paths"]}
    assert counts == {
        "all kept": 1,
        "all dropped": 1,
        "most frequent": 2,
        "random": 10,
        "random, as batches": 10,
        "policy's own": 4,
    } | ({} if bundle.manifest.fused is None else FUSED_PATHS)
    assert report["max_logit_difference"] <= 1e-4
    assert report["policy"]["masks_equal"] == 4
    require(report)


def changed(model: BlockDropNet, name: str) -> BlockDropNet:
    other = tiny_model(shortcut="conv")
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        dict(other.named_parameters())[name].view(-1)[0] += 0.05
    return other


@pytest.mark.parametrize(
    ("weight", "part"),
    [
        ("network.stem.conv.weight", "stem"),
        ("network.blocks.0.branch.conv2.weight", "block_00"),
        ("network.blocks.1.branch.conv1.weight", "block_01"),
        ("network.blocks.1.shortcut.conv.weight", "shortcut_01"),
        ("network.head.fc.bias", "head"),
        ("policy.fc.bias", "policy"),
    ],
)
def test_one_wrong_weight_is_found_in_its_part(bundle: Bundle, model: BlockDropNet, weight: str, part: str) -> None:
    """Oracle: the weight that was changed; parts are compared on the reference's inputs, so others hold."""
    report = verify_against_model(bundle, changed(model, weight), config=FEW)
    assert not report["ok"]
    wrong = {entry["part"] for entry in report["parts"] if not entry["ok"]} - {"full"}
    assert part in wrong
    assert wrong <= {part, "block_01"}
    if part != "policy":
        assert not {entry["kind"]: entry["ok"] for entry in report["paths"]}["all kept"] or part == "shortcut_01"
    with pytest.raises(VerificationError, match=r"differs from torch.*expected at most"):
        require(report)


def test_batches_are_compared_too(bundle: Bundle, model: BlockDropNet) -> None:
    """Oracle: a session whose rows come back in the wrong order: single images hold, batches do not."""
    candidate = get_backend("onnxruntime").open(bundle, RunOptions())
    original = candidate.merge
    candidate.merge = lambda pieces, batch: original(pieces, batch)[::-1].copy()  # type: ignore[method-assign]
    report = compare(candidate, session_from_model(bundle.manifest, model), bundle.manifest, config=FEW)
    held = {entry["kind"]: entry["ok"] for entry in report["paths"]}
    assert held["random"]
    assert not held["random, as batches"]


def test_numbers_that_are_not_finite_never_hold() -> None:
    """Oracle: NaN compares as false with everything."""
    expected = np.ones((2, 3), np.float32)
    got = expected.copy()
    got[1, 1] = np.nan
    assert difference(got, expected).max_abs == np.inf
    assert difference(expected, expected).max_abs == 0


def test_a_tighter_tolerance_fails(bundle: Bundle) -> None:
    """Oracle: float32: two ways of summing do not agree to 1e-12."""
    config = with_tolerance(FEW, "fp32", 1e-12)
    assert FEW.tolerances["fp32"].logits == 1e-4
    assert not verify_against_graphs(bundle, config=config)["ok"]


def test_what_cannot_be_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    """Oracle: the contract: a negative tolerance, an unknown precision, a backend that computes nothing."""
    with pytest.raises(UsageError, match="positive"):
        with_tolerance(FEW, "fp32", 0.0)
    manifest = replace(bundle.manifest, precision="fp1")
    session = get_backend("onnxruntime").open(bundle, RunOptions())
    with pytest.raises(UsageError, match="fp1"):
        compare(session, session, manifest, config=FEW)
    with pytest.raises(UsageError, match="computes nothing"):
        verify_against_graphs(make_bundle(tmp_path / "null", tiny_model(), "null"))


def test_random_images_are_the_same_for_a_seed() -> None:
    """Property: seeded, of the size asked for, and using the range of pixels."""
    images = random_images(3, (10, 17), 5)
    assert images.shape == (3, 10, 17, 3)
    assert images.dtype == np.uint8
    assert np.array_equal(images, random_images(3, (10, 17), 5))
    assert not np.array_equal(images, random_images(3, (10, 17), 6))
    assert images.max() > 200
    assert images.min() < 50
