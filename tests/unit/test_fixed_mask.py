"""One mask for all images: what it gives at the policy's cost, and a bundle of it that needs no policy."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training_cases import CONFIG, Recorder, request

from bdexport.build import build_bundle, default_bundle_path
from bdexport.bundle import open_bundle
from bdexport.checkpoint import Checkpoint, build_model, load_checkpoint, save_checkpoint
from bdexport.cli.main import main
from bdexport.config import BuildConfig, FixedConfig, FusedConfig
from bdexport.errors import CheckpointError, UsageError
from bdexport.evaluate import keep_all, run_masks, same_mask
from bdexport.fixed_mask import chosen_mask
from bdexport.mask_search import drop_order, eliminated
from bdexport.models.flops import count_flops
from bdexport.parts import mask_from_text, mask_to_text
from bdexport.runtime import load
from bdexport.train.data import DeviceImages
from bdexport.train.pipeline import train
from bdexport.train.static_mask import static_text

ZOO = "zoo:resnet20-digits"
MASK = "110100101"
QUICK = BuildConfig(fused=FusedConfig(measure=False))


@pytest.mark.parametrize("backend", ["onnxruntime", "torch"])
def test_a_bundle_of_a_mask_runs_that_mask(backend: str, tmp_path: Path) -> None:
    """Oracle: the checkpoint's own network under the mask, by torch; the bundle is one like any other."""
    built = build_bundle(ZOO, tmp_path / "b", config=replace(QUICK, backend=backend), mask=MASK)
    manifest = open_bundle(tmp_path / "b").manifest
    assert manifest.extra["fixed_mask"] == MASK
    assert any(MASK in note for note in built.notes)
    found = load_checkpoint(ZOO)
    model = build_model(found)
    images = np.random.default_rng(0).integers(0, 256, (5, *found.preprocess.size, 3), dtype=np.uint8)
    with torch.no_grad():
        x = torch.from_numpy(found.preprocess(images))
        masks = torch.from_numpy(mask_from_text(MASK, 9)).expand(5, -1)
        expected = model.network.forward_masked(x, masks).numpy()
    with load(tmp_path / "b", threads=1) as orchestrator:
        result = orchestrator(images)
    assert {mask_to_text(mask) for mask in result.masks} == {MASK}
    assert np.abs(result.logits - expected).max() < 1e-4


def test_it_needs_no_policy_and_bench_compares_it(
    tmp_path: Path, digits_base: Checkpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: FLOPs by hand (no policy network's); without --mask the same checkpoint is refused."""
    save_checkpoint(tmp_path / "base.safetensors", digits_base)
    bundle, written = tmp_path / "b", tmp_path / "bench.json"
    line = ["build", str(tmp_path / "base.safetensors"), "--out", str(bundle), "--no-measure"]
    assert main(line) == 1
    assert "has no policy network" in capsys.readouterr().err
    assert main([*line, "--mask", "101", "--json", str(tmp_path / "build.json")]) == 0
    assert json.loads((tmp_path / "build.json").read_text())["fixed_mask"] == "101"
    assert main(["bench", str(bundle), "--dataset", "digits", "--images", "20", "--json", str(written)]) == 0
    result = json.loads(written.read_text())
    assert (result["fixed_mask"], result["dynamic"]["unique_masks"]) == ("101", 1)
    table = count_flops(build_model(digits_base, with_policy=False), digits_base.preprocess.size)
    own = table.of_masks(mask_from_text("101", 3)[None], with_policy=False)[0]
    assert result["dynamic"]["flops"]["mean"] == own + 2 * 3 * 3  # a layer from 3 channels to 3 blocks
    assert main(["inspect", str(bundle)]) == 0
    assert "101" in capsys.readouterr().out
    capsys.readouterr()
    assert main(["verify", str(bundle), "--reference", str(tmp_path / "base.safetensors")]) == 0
    printed = capsys.readouterr().out
    assert "fixed mask: the same mask for " in printed
    assert "threshold" not in printed


def test_int8_quantises_a_bundle_of_a_mask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Property: every image still draws the mask, in integers too."""
    monkeypatch.chdir(tmp_path)
    line = ["build", ZOO, "--mask", MASK, "--precision", "int8", "--dataset", "digits", "--calibration-images", "16"]
    assert main([*line, "--images", "50", "--mask-images", "16", "--no-measure", "--out", "b"]) == 2
    assert main([*line, "--images", "50", "--no-measure", "--max-drop", "20", "--out", "b"]) == 0
    with load(tmp_path / "b") as orchestrator:
        masks = orchestrator(np.zeros((3, 32, 32, 3), np.uint8)).masks
    assert {mask_to_text(mask) for mask in masks} == {MASK}


@pytest.mark.parametrize("mask", ["", "1101", "11010010x", "000000000", "1" * 10])
def test_what_is_no_mask_of_the_network_is_refused(mask: str, tmp_path: Path) -> None:
    """Oracle: UsageError with the number of blocks, and no bundle."""
    with pytest.raises(UsageError, match="9 characters"):
        build_bundle(ZOO, tmp_path / "b", config=QUICK, mask=mask)
    assert not list(tmp_path.iterdir())


def test_mapping_masks_makes_no_sense_with_one(tmp_path: Path) -> None:
    """Oracle: UsageError before the work."""
    config = replace(QUICK, fused=replace(QUICK.fused, quantise="cover"))
    with pytest.raises(UsageError, match="one fixed mask"):
        build_bundle(ZOO, tmp_path / "b", config=config, mask=MASK)


@pytest.mark.parametrize(
    ("trained", "expected"),
    [
        ({"mask": "101", "kept": None}, "101"),
        ({"mask": "first-k", "kept": 2}, "110"),
        ({"mask": "distribute-k", "kept": 2}, "110"),
        ({"mask": "random-k", "kept": 2}, None),
        ({"mask": 3}, None),
        ("x", None),
        (None, None),
    ],
)
def test_a_network_that_was_finetuned_under_a_mask_is_built_for_it(
    trained: Any, expected: str | None, digits_base: Checkpoint
) -> None:
    """Oracle: the definitions of FirstK and DistributeK for three stages of one block."""
    checkpoint = replace(digits_base, training={"fixed_mask": trained})
    assert chosen_mask(None, checkpoint) == expected
    assert chosen_mask("011", checkpoint) == "011"


def test_a_run_with_a_fixed_mask_builds_without_being_told(tmp_path: Path, digits_base: Checkpoint) -> None:
    """Oracle: before, 'has no policy network'; now the mask that the network was finetuned under."""
    config = replace(
        CONFIG,
        method="fixed",
        fixed=FixedConfig(mask="first-k", kept=2),
        adapt=replace(CONFIG.adapt, epochs=0),
        finetune=replace(CONFIG.finetune, epochs=1),
    )
    asked = request(tmp_path / "run", network=digits_base.network, initial=digits_base, base="mine.th")
    train(asked, config, Recorder())
    build_bundle(tmp_path / "run", tmp_path / "b", config=QUICK)
    assert open_bundle(tmp_path / "b").manifest.extra["fixed_mask"] == "110"
    random = replace(load_checkpoint(tmp_path / "run"), training={"fixed_mask": {"mask": "random-k", "kept": 2}})
    save_checkpoint(tmp_path / "random.safetensors", random)
    with pytest.raises(CheckpointError, match="no policy"):
        build_bundle(tmp_path / "random.safetensors", tmp_path / "c", config=QUICK)


def test_the_default_place_is_not_the_policy_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Property: both bundles of one checkpoint stand beside each other."""
    monkeypatch.chdir(tmp_path)
    built = build_bundle(ZOO, config=QUICK, mask=MASK)
    assert built.path.name == f"resnet20-digits-{MASK}"
    assert default_bundle_path(Path(ZOO)) != built.path


# ---- at the end of training ----------------------------------------------------------------------------------------


def test_training_ends_with_the_best_static_mask_of_the_policy_s_cost(tmp_path: Path, digits_base: Checkpoint) -> None:
    """Oracle: every mask of three blocks, by enumeration; the one that is found is among those that are as cheap.

    With three blocks, the candidates are nearly all there are: no dearer mask, and no more accurate one.
    """
    asked = request(tmp_path / "run", network=digits_base.network, initial=digits_base, base="mine.th")
    path = train(asked, replace(CONFIG, curriculum=replace(CONFIG.curriculum, epochs=1)), Recorder())
    found = load_checkpoint(path)
    validation = found.training["validation"]
    static, policy = validation["static"], validation["policy"]
    model = build_model(found)
    table = count_flops(model, found.preprocess.size)
    images = DeviceImages(asked.validation.arrays(found.preprocess), asked.validation.labels, found.preprocess, "cpu")
    assert static["flops"] <= policy["flops"]["mean"]
    mask = mask_from_text(static["mask"], 3)
    assert static["flops"] == table.of_masks(mask[None], with_policy=False)[0]
    outcome = run_masks(model, images.batches(500), same_mask(mask))
    assert static["accuracy"] == pytest.approx(outcome.accuracy)
    assert "static" not in (load_checkpoint(tmp_path / "run" / "base.safetensors").training.get("validation") or {})


def test_the_line_says_which_is_better_and_how_to_build_it() -> None:
    """Oracle: the standard error of 90 % of 100 images is 3 points; the command is one that exists."""
    static = {"mask": "101", "blocks": 2, "flops": 1e6, "accuracy": 90.0, "images": 100, "tried": 3}
    as_good = static_text(static, 92.0, 3, "runs/mine")
    assert "as good, within the standard error of 3.00 points" in as_good
    assert "bdexport build runs/mine --mask 101" in as_good
    assert "the policy is 5.00 points better" in static_text(static, 95.0, 3, "runs/mine")
    assert "it is better and needs no policy" in static_text(static, 80.0, 3, "runs/mine")


@pytest.mark.parametrize(("static_accuracy", "policy_accuracy"), [(100.0, 600 / 7), (600 / 7, 100.0)])
def test_one_image_of_few_makes_nothing_better(static_accuracy: float, policy_accuracy: float) -> None:
    """Oracle: one of seven images is what they differ by; the formula gives 100 % no error at all."""
    static = {"mask": "101", "blocks": 2, "flops": 1e6, "accuracy": static_accuracy, "images": 7, "tried": 3}
    assert "it is as good" in static_text(static, policy_accuracy, 3, "runs/mine")


def test_it_can_be_switched_off(tmp_path: Path, digits_base: Checkpoint) -> None:
    """Oracle: the record."""
    asked = request(tmp_path / "run", network=digits_base.network, initial=digits_base, base="mine.th")
    none = replace(CONFIG.adapt, epochs=0)
    short = replace(CONFIG, adapt=none, curriculum=replace(CONFIG.curriculum, epochs=1), static_images=0)
    path = train(asked, replace(short, finetune=replace(CONFIG.finetune, epochs=1)), Recorder())
    assert "static" not in load_checkpoint(path).training["validation"]


def test_elimination_from_a_mask_is_the_order_s_beginning(digits_base: Checkpoint, tmp_path: Path) -> None:
    """Oracle: the whole order, of which elimination from every block is the beginning."""
    model, asked = build_model(digits_base, with_policy=False), request(tmp_path / "run")
    images = DeviceImages(
        asked.validation.arrays(digits_base.preprocess), asked.validation.labels, digits_base.preprocess, "cpu"
    )
    batches = list(images.batches(60, 60))
    order = drop_order(model.network, batches)
    assert sorted(order) == [0, 1, 2]
    assert eliminated(model.network, batches, [True] * 3, lambda mask: sum(mask) == 1) == order[:2]
    assert run_masks(model, batches, keep_all(3)).accuracy > 50
