"""Calibration: lists, scales along the paths really taken, their cache, and int8 bundles of both CPU backends."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from tiny import SIZE, tiny_checkpoint_file, tiny_model

import bdexport
from bdexport.backends import backend_class
from bdexport.backends.onnxruntime_common import NO_TELEMETRY, import_onnxruntime
from bdexport.build import build_bundle
from bdexport.calibrate import CalibrationRequest, calibrated, scales_for, scales_key
from bdexport.calibration_list import CalibrationList, list_images, make_list, read_list, write_list
from bdexport.cli.main import main
from bdexport.config import BuildConfig, CalibrationConfig, VerifyConfig
from bdexport.dataset import load_dataset
from bdexport.errors import BundleError, CalibrationError, UsageError, VerificationError
from bdexport.export import export_parts
from bdexport.models.pair import BlockDropNet
from bdexport.preprocess import Preprocess
from bdexport.samples import samples_from_json, samples_to_json

PREPROCESS = Preprocess(SIZE)
CLASSES = ("cat", "dog", "newt")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 60 images in three classes, with train and validation among them."""
    root = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for name in CLASSES:
        (root / name).mkdir()
        for index in range(20):
            Image.fromarray(generator.integers(0, 256, (*SIZE, 3), dtype=np.uint8)).save(root / name / f"{index}.png")
    return root


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return export_parts(policy_keeping(0.0), PREPROCESS, tmp_path_factory.mktemp("graphs"))


def policy_keeping(*logits: float) -> BlockDropNet:
    """The tiny network with a policy whose logits do not depend on the image (one number: for all three blocks)."""
    model = tiny_model()
    last = [layer for layer in model.policy.modules() if isinstance(layer, torch.nn.Linear)][-1]
    with torch.no_grad():
        last.weight.zero_()
        last.bias.copy_(torch.tensor(logits if len(logits) == 3 else logits * 3))
    return model


def config(tmp_path: Path, images: int = 12) -> CalibrationConfig:
    return CalibrationConfig(images=images, batch=5, folder=str(tmp_path / "calibration"))


# ---- lists --------------------------------------------------------------------------------------------------------


def test_a_list_is_stratified_repeatable_and_survives_its_file(data: Path, tmp_path: Path) -> None:
    """Oracle: equal shares per class; the same list twice; the pixels of the files that it names."""
    made = make_list("folder", data, config(tmp_path))
    write_list(tmp_path / "list.json", made)
    assert read_list(tmp_path / "list.json") == made == make_list("folder", data, config(tmp_path))
    assert made.files is not None
    assert [sum(name.startswith(kind) for name in made.files) for kind in CLASSES] == [4, 4, 4]
    images = list_images(made, data, PREPROCESS)
    first = np.asarray(Image.open(data / made.files[0]))
    np.testing.assert_array_equal(images[0], first)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda _text: "", "no calibration list"),
        (lambda _text: "[1, 2]", "no calibration list"),
        (lambda text: text.replace("calibration-list/1", "calibration-list/9"), "schema"),
        (lambda text: json.dumps(json.loads(text) | {"rows": [], "files": []}), "the calibration list is empty"),
        (lambda text: json.dumps(json.loads(text) | {"files": ["cat/none.png"], "rows": [0]}), "cat/none.png first"),
        (lambda text: json.dumps(json.loads(text) | {"shape": [8, 8, 3]}), "another shape.*expected"),
        (lambda text: json.dumps(json.loads(text) | {"sha256": "0" * 64}), "its images have changed: got SHA-256"),
    ],
)
def test_a_list_that_is_broken_or_meets_other_images_is_refused(
    change: Callable[[str], str], text: str, data: Path, tmp_path: Path
) -> None:
    """Oracle: the contract: one sentence that names the file and the remedy."""
    path = tmp_path / "list.json"
    write_list(path, make_list("folder", data, config(tmp_path)))
    path.write_text(change(path.read_text()))
    with pytest.raises(CalibrationError, match=text) as caught:
        list_images(read_list(path), data, PREPROCESS, where=path)
    assert str(path) in str(caught.value)
    assert "bdexport calibrate" in str(caught.value)


def test_an_unreadable_list_and_rows_outside_are_named(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"none\.json: cannot be read"):
        read_list(tmp_path / "none.json")
    made = make_list("digits", None, config(tmp_path))
    with pytest.raises(CalibrationError, match="names an image that is not there: got row 99999"):
        list_images(replace(made, rows=(99999,)), None, PREPROCESS)
    with pytest.raises(UsageError, match="number of calibration images: got 0"):
        make_list("digits", None, config(tmp_path, images=0))


# ---- scales -------------------------------------------------------------------------------------------------------


def test_scales_are_those_of_the_paths_taken(graphs: dict[str, Path]) -> None:
    """Oracle: torch on the path by hand: block 0 kept, block 1 (a transition) and block 2 dropped."""
    model = policy_keeping(5.0, -5.0, -5.0)
    images = np.random.default_rng(0).integers(0, 256, (7, *SIZE, 3), dtype=np.uint8)
    scales = calibrated(model, graphs, PREPROCESS, images, CalibrationConfig(batch=3))
    with torch.no_grad():
        stem = model.network.stem(torch.tensor(PREPROCESS(images)))
        after = model.network.blocks[0](stem)
    assert scales.images["block_00"] == scales.images["shortcut_01"] == scales.images["full"] == 7
    assert scales.images["block_01"] == scales.images["block_02"] == 0
    assert scales.ranges["block_00"]["x"] == pytest.approx((float(stem.min()), float(stem.max())), abs=1e-5)
    # Blocks that no image keeps are shown all of them, and say so.
    assert scales.ranges["block_01"]["x"] == pytest.approx((float(after.min()), float(after.max())), abs=1e-5)
    assert [note for note in scales.notes if "none of the 7 images runs block_01" in note]
    assert scales.ranges["shortcut_01"] == {}


def test_scales_are_kept_by_content(graphs: dict[str, Path], data: Path, tmp_path: Path) -> None:
    """Oracle: a second call without the images gives the same; another network or list does not find them."""
    model, request = policy_keeping(1.0), CalibrationRequest(config(tmp_path), "folder", data)
    first, chosen = scales_for(model, graphs, PREPROCESS, request)
    assert chosen is not None
    write_list(tmp_path / "list.json", chosen)
    bare = CalibrationRequest(config(tmp_path))
    for again in (bare, replace(bare, list_file=tmp_path / "list.json")):
        assert scales_for(model, graphs, PREPROCESS, again)[0].ranges == first.ranges
    (cache,) = (tmp_path / "calibration").glob("*.cache")
    fewer = replace(request, config=config(tmp_path, images=6))
    assert scales_for(model, graphs, PREPROCESS, fewer)[0].ranges != first.ranges
    other = graphs | {"stem": graphs["head"]}
    with pytest.raises(UsageError, match="none are kept for this network; run `bdexport calibrate CKPT"):
        scales_for(model, other, PREPROCESS, bare)
    cache.write_text("{")
    with pytest.raises(CalibrationError, match=r"no scales that can be read.*delete it"):
        scales_for(model, graphs, PREPROCESS, request)


# ---- bundles ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_an_int8_bundle_is_verified_and_judged(backend: str, data: Path, tmp_path: Path) -> None:
    """Oracle: torch, by the build's own verification and accuracy; the manifest names what it was calibrated on."""
    availability = backend_class(backend)().available()
    if not availability.ok:
        pytest.skip(availability.reason)
    judged = load_dataset("folder", data, "validation")
    request = CalibrationRequest(config(tmp_path), "folder", data)
    built = build_bundle(
        tiny_checkpoint_file(tmp_path / "tiny.safetensors"),
        tmp_path / "bundle",
        config=BuildConfig(backend=backend, precision="int8"),
        calibration=request,
        judged=judged,
        verify=VerifyConfig(max_accuracy_drop=100.0, random_masks=5),
    )
    manifest = built.manifest
    assert manifest.precision == "int8"
    assert manifest.verification is not None
    assert manifest.verification["accuracy"]["images"] == len(judged)
    assert {entry["held"] for entry in manifest.verification["parts"]} == {"mean_abs"}
    assert manifest.extra["calibration"]["images"] == 12
    graph = onnx.load(built.path / "graphs" / "block_00.onnx")  # the reference stays float32
    assert "QuantizeLinear" not in {node.op_type for node in graph.graph.node}
    with bdexport.load(built) as orchestrator:
        assert orchestrator(judged.arrays(manifest.preprocess)).logits.shape == (len(judged), 3)
        if backend == "openvino":
            assert "int8, in 0 of" not in " ".join(orchestrator.session.notes)


def test_wrong_scales_do_not_pass(data: Path, tmp_path: Path) -> None:
    """Oracle: scales of another size than the activations': a broken engine must fail verification."""
    checkpoint = tiny_checkpoint_file(tmp_path / "tiny.safetensors")
    request = CalibrationRequest(config(tmp_path), "folder", data)
    int8 = BuildConfig(precision="int8")
    build_bundle(checkpoint, tmp_path / "bundle", config=int8, calibration=request)
    (cache,) = (tmp_path / "calibration").glob("*.cache")
    scales = json.loads(cache.read_text())
    scales["ranges"]["block_02"] = {
        name: [low / 20, high / 20] for name, (low, high) in scales["ranges"]["block_02"].items()
    }
    cache.write_text(json.dumps(scales))
    with pytest.raises(VerificationError, match=r"block_02 \[onnxruntime\].*in the mean"):
        build_bundle(checkpoint, tmp_path / "other", config=int8, calibration=request)
    assert not (tmp_path / "other").exists()


def test_a_drop_of_accuracy_fails(data: Path, tmp_path: Path) -> None:
    """Oracle: a reference that is better by construction: labels are its own answers."""
    from bdexport.verify_accuracy import accuracy_report, require_accuracy

    built = build_bundle(tiny_checkpoint_file(tmp_path / "a.safetensors"), tmp_path / "good")
    worse = build_bundle(tiny_checkpoint_file(tmp_path / "b.safetensors", tiny_model(seed=5)), tmp_path / "bad")
    judged = load_dataset("folder", data, "train")
    with bdexport.load(built) as good, bdexport.load(worse) as bad:
        right = good(judged.arrays(PREPROCESS)).classes
        relabelled = replace(judged, labels=right)
        same = accuracy_report(good.session, good.session, good.manifest, relabelled, 0.0)
        other = accuracy_report(bad.session, good.session, good.manifest, relabelled, 1.0)
    assert same["ok"]
    assert same["dynamic"] == {"accuracy": 100.0, "reference": 100.0, "drop": 0.0}
    assert not other["ok"]
    with pytest.raises(VerificationError, match=r"accuracy \(.*\) on .* falls too far.*--max-drop"):
        require_accuracy(other, "onnxruntime int8")


def test_one_image_is_no_drop_that_is_too_large(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: of 24 images one is 4.2 points: within a limit of 1 point, not of 0; two images are beyond both."""
    from bdexport import verify_accuracy

    judged = load_dataset("folder", data, "train", limit=24)
    built = build_bundle(tiny_checkpoint_file(tmp_path / "a.safetensors"), tmp_path / "bundle")
    masks = np.ones((len(judged), 3), bool)
    for wrong, limit, ok in ((1, 1.0, True), (1, 0.0, False), (2, 1.0, False)):
        got = judged.labels.copy()
        got[:wrong] = (got[:wrong] + 1) % 3
        sides = iter([(got, got, masks), (judged.labels, judged.labels, masks)])
        monkeypatch.setattr(verify_accuracy, "_classified", lambda *_, sides=sides: next(sides))
        with bdexport.load(built) as orchestrator:
            session, manifest = orchestrator.session, orchestrator.manifest
            assert verify_accuracy.accuracy_report(session, session, manifest, judged, limit)["ok"] == ok


FILES = ("a/1.png", "a/2.png", "b/1.png")
LISTED = CalibrationList("folder", "train", None, (3, 5, 8), FILES, "0" * 64)
OTHERS = {
    "nothing": replace(LISTED),
    "one row": replace(LISTED, rows=(3, 5, 9)),
    "the rows' order": replace(LISTED, rows=(5, 3, 8)),
    "a row more": replace(LISTED, rows=(3, 5, 8, 9)),
    "a row less": replace(LISTED, rows=(3, 5)),
    "one name": replace(LISTED, files=("a/1.png", "a/2.png", "b/2.png")),
    "the names' order": replace(LISTED, files=FILES[::-1]),
    "a name more": replace(LISTED, files=(*FILES, "b/2.png")),
    "no names": replace(LISTED, files=None),
    "the pixels": replace(LISTED, sha256="1" * 64),
    "the data set": replace(LISTED, dataset="cifar10"),
    "the split": replace(LISTED, split="validation"),
    "the shape": replace(LISTED, shape=(32, 32, 3)),
}


def test_a_key_covers_the_whole_list(tmp_path: Path) -> None:
    """Property: lists that differ in anything, order included, have different keys; so have different networks."""
    keys = {what: scales_key("a" * 64, chosen) for what, chosen in OTHERS.items()}
    keys["the network"] = scales_key("b" * 64, LISTED)
    assert len(set(keys.values())) == len(keys)
    write_list(tmp_path / "list.json", LISTED)
    assert scales_key("a" * 64, read_list(tmp_path / "list.json")) == keys["nothing"]  # by content, not by file
    assert {field.name for field in fields(CalibrationList)} == {
        *("dataset", "split", "shape", "rows", "files", "sha256")  # a field more belongs into the table above
    }


# ---- the command line ---------------------------------------------------------------------------------------------


def test_calibrate_then_build(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the files; an error with the command to run before, a bundle afterwards without naming the images."""
    monkeypatch.chdir(tmp_path)
    checkpoint = str(tiny_checkpoint_file(tmp_path / "tiny.safetensors"))
    build = ["build", checkpoint, "--precision", "int8", "--out", "bundle"]
    assert main(build) == 2
    assert "bdexport calibrate CKPT" in capsys.readouterr().err
    line = ["calibrate", checkpoint, "--dataset", "folder", "--data", str(data), "--images", "9", "--json", "out.json"]
    assert main(line) == 0
    result = json.loads(Path("out.json").read_text())
    assert result["images"] == len(read_list(Path("calibration/folder.json"))) == 9
    assert {entry["part"] for entry in result["parts"]} >= {"policy", "block_02", "full"}
    assert main(build) == 0
    assert main([*build[:-1], "fp32", "--precision", "fp32", "--calibration", "calibration/folder.json"]) == 2
    assert main(["calibrate", checkpoint]) == 2
    assert main([*build, "--overwrite", "--calibration", "calibration/folder.json", "--data", str(data)]) == 0
    capsys.readouterr()
    verify = ["verify", "bundle", "--masks", "3", "--dataset", "folder", "--data", str(data), "--split", "train"]
    assert main([*verify, "--max-drop", "100", "--json", "verify.json"]) == 0
    assert json.loads(Path("verify.json").read_text())["accuracy"]["ok"]


def test_onnxruntime_is_told_not_to_report() -> None:
    """Oracle: the variable that its client reads; the module is the real one."""
    import os

    assert import_onnxruntime().__name__ == "onnxruntime"
    assert os.environ[NO_TELEMETRY]


def test_samples_survive_json_and_refuse_what_they_are_not() -> None:
    """Oracle: the pixels themselves; the size that a manifest states."""
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 6, 3), dtype=np.uint8)
    kept = json.loads(json.dumps(samples_to_json(images)))
    assert np.array_equal(samples_from_json(kept, (8, 6)), images[:16])
    assert len(samples_from_json(samples_to_json(np.zeros((2, 400, 400, 3), np.uint8)), (400, 400))) == 1
    for broken in ({**kept, "shape": [16, 6, 8, 3]}, {**kept, "base64": "?"}, {"shape": kept["shape"]}, None):
        with pytest.raises(BundleError, match="samples"):
            samples_from_json(broken, (8, 6))
