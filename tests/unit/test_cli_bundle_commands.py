"""The commands verify, run and bench, as a user types them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import make_bundle, pixels
from PIL import Image
from tiny import tiny_checkpoint_file, tiny_model

import bdexport
from bdexport.backends.null import NullBackend
from bdexport.bundle import Bundle
from bdexport.cli.main import main
from bdexport.parts import path_parts


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("commands") / "bundle", tiny_model(), max_batch=8)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder per class, five images in all, of several kinds and sizes."""
    kinds = [
        ("cat/a.png", "RGB"),
        ("cat/b.jpg", "L"),
        ("dog/c.png", "RGBA"),
        ("dog/d.bmp", "RGB"),
        ("newt/e.tif", "CMYK"),
    ]
    for number, (name, mode) in enumerate(kinds):
        path = tmp_path / "pictures" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels(1, number, (20 + number, 40))[0]).convert(mode).save(path)
    return tmp_path / "pictures"


def read(path: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(path.read_text())
    return data


# ---- run ----------------------------------------------------------------------------------------------------------


def test_run_says_what_the_orchestrator_says(
    bundle: Bundle, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the orchestrator on the same images, preprocessed by the manifest's rule."""
    files = [pictures / "cat" / "a.png", pictures / "cat" / "b.jpg"]
    assert main(["run", str(bundle.path), *map(str, files), "--json", str(tmp_path / "out.json")]) == 0
    result = read(tmp_path / "out.json")
    printed = capsys.readouterr().out
    with bdexport.load(bundle) as orchestrator:
        for path, entry in zip(files, result["images"], strict=True):
            fitted = orchestrator.manifest.preprocess.fit_image(Image.open(path))
            expected = orchestrator(fitted[None])
            mask = expected.masks[0]
            assert entry["class"] == orchestrator.class_names[expected.classes[0]]
            assert entry["confidence"] == pytest.approx(float(expected.confidence[0]), abs=1e-5)
            assert entry["mask"] == "".join(str(int(keep)) for keep in mask)
            assert entry["path"] == list(path_parts(mask, orchestrator.manifest.transitions))
            assert entry["blocks_used"] == mask.sum()
            assert entry["time_ms"]["total"] > 0
            assert f"{path}: {entry['class']} (" in printed
    assert "median of 5 calls" in printed


def test_the_path_is_drawn_stage_by_stage(tmp_path: Path, capsys: pytest.CaptureFixture[str], pictures: Path) -> None:
    """Oracle: a null policy whose mask is declared: block 1 is the transition of the tiny network."""
    for mask, drawn in (("101", "■ ◇■"), ("010", "□ ◆□")):
        declared = make_bundle(tmp_path / "null", tiny_model(), NullBackend(masks=[mask]))
        assert main(["run", str(declared.path), str(pictures / "cat" / "a.png")]) == 0
        assert f"  {drawn}\n" in capsys.readouterr().out


def test_one_bad_image_does_not_stop_the_others(
    bundle: Bundle, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the contract: the bad one is reported, the others are run, the exit code is 1."""
    (pictures / "cat" / "0bad.png").write_bytes(b"no image")
    assert main(["run", str(bundle.path), str(pictures / "cat"), "--json", str(tmp_path / "out.json")]) == 1
    captured = capsys.readouterr()
    entries = read(tmp_path / "out.json")["images"]
    assert [Path(entry["image"]).name for entry in entries] == ["0bad.png", "a.png", "b.jpg"]
    assert ["error" in entry for entry in entries] == [True, False, False]
    assert "not read" in captured.err
    assert "0bad.png" in captured.err
    assert captured.err.strip().splitlines()[-1] == "bdexport: error: 1 of 3 images were not read"


def test_names_that_the_terminal_cannot_show(bundle: Bundle, tmp_path: Path) -> None:
    """Oracle: the escapes of Python's backslashreplace in an ASCII terminal, and signs of ASCII for the path."""
    picture = tmp_path / "n\u00f6.png"
    Image.fromarray(pixels(1)[0]).save(picture)
    done = subprocess.run(
        [sys.executable, "-m", "bdexport", "run", str(bundle.path), str(picture)],
        capture_output=True,
        check=False,
        env=os.environ | {"LC_ALL": "C.UTF-8", "PYTHONIOENCODING": "ascii:strict"},
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert rb"n\xf6.png: " in done.stdout
    assert b"# kept  . dropped" in done.stdout


def test_a_large_picture_is_run_without_a_warning(
    bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: exit code 0 and an empty stderr, where Pillow would warn of a bomb (and warnings are errors here)."""
    Image.new("1", (10_000, 10_000)).save(tmp_path / "large.png")
    assert main(["run", str(bundle.path), str(tmp_path / "large.png")]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", ["nowhere.png", "empty"])
def test_nothing_to_run_is_one_line_and_exit_1(
    bundle: Bundle, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the contract."""
    (tmp_path / "empty").mkdir()
    assert main(["run", str(bundle.path), str(tmp_path / name)]) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert name in lines[0]


# ---- verify -------------------------------------------------------------------------------------------------------


def test_verify_holds_for_a_right_bundle(bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: exit code 0, the table has every part, and the JSON is what was printed."""
    out = tmp_path / "verify.json"
    assert main(["verify", str(bundle.path), "--masks", "7", "--seed", "3", "--json", str(out)]) == 0
    printed, result = capsys.readouterr().out, read(out)
    assert result["ok"]
    assert all(part in printed for part in bundle.manifest.parts)
    assert f"worst part {result['worst_part']}" in printed
    assert {entry["kind"]: entry["count"] for entry in result["paths"]}["random"] == 7


def test_verify_against_the_checkpoint(bundle: Bundle, tmp_path: Path) -> None:
    """Oracle: the checkpoint that the bundle is made from holds; one with other weights does not (exit 1)."""
    right = tiny_checkpoint_file(tmp_path / "right.safetensors", tiny_model())
    wrong = tiny_checkpoint_file(tmp_path / "wrong.safetensors", tiny_model(seed=1))
    other = tiny_checkpoint_file(tmp_path / "other.safetensors", tiny_model(stages=(1, 1)))
    few = ["--masks", "5"]
    assert main(["verify", str(bundle.path), "--reference", str(right), *few]) == 0
    assert main(["verify", str(bundle.path), "--reference", str(wrong), *few]) == 1
    assert main(["verify", str(bundle.path), "--reference", str(other), *few]) == 1


def test_verify_beyond_the_tolerance_is_exit_1(bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: a tolerance that float32 cannot meet; the line names the worst, and the table is printed all the same."""
    assert main(["verify", str(bundle.path), "--tolerance", "1e-12", "--masks", "3"]) == 1
    captured = capsys.readouterr()
    assert "DIFFERS" in captured.out
    assert captured.err.strip().splitlines()[-1].startswith("bdexport: error: ")
    assert "expected at most 1.0e-12" in captured.err


@pytest.mark.parametrize("option", [["--tolerance", "-1"], ["--masks", "-1"], ["--threads", "0"]])
def test_verify_refuses_what_cannot_be(bundle: Bundle, option: list[str]) -> None:
    """Oracle: exit code 2."""
    assert main(["verify", str(bundle.path), *option]) == 2


# ---- bench --------------------------------------------------------------------------------------------------------


def test_bench_measures_a_folder(
    bundle: Bundle, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the orchestrator's own classes on the same images give the accuracies."""
    out = tmp_path / "bench.json"
    options = ["--dataset", "folder", "--data", str(pictures), "--split", "train", "--batch", "2", "--rounds", "3"]
    assert main(["bench", str(bundle.path), *options, "--json", str(out)]) == 0
    result = read(out)
    from bdexport.dataset import load_dataset

    data = load_dataset("folder", pictures, "train")
    with bdexport.load(bundle) as orchestrator:
        images = data.arrays(orchestrator.manifest.preprocess)
        for side, call in (("full", orchestrator.full), ("dynamic", orchestrator)):
            right = call(images).classes == data.labels
            assert result[side]["accuracy"] == pytest.approx(100 * np.mean(right))
    assert result["images"] == len(data)
    assert result["batch"] == 2
    assert "latency mean" in capsys.readouterr().out


def test_bench_writes_json_to_stdout(bundle: Bundle, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: a JSON parser: nothing but the result is on stdout."""
    options = ["--dataset", "folder", "--data", str(pictures), "--split", "train", "--batch", "1", "--json", "-"]
    assert main(["bench", str(bundle.path), *options]) == 0
    assert json.loads(capsys.readouterr().out)["schema"] == "bdexport.bench/1"


@pytest.mark.parametrize(
    ("options", "code", "text"),
    [
        (["--dataset", "digits"], 1, "classes"),
        (["--dataset", "cifar10"], 2, "--data"),
        (["--dataset", "mnist"], 2, "mnist"),
        (["--dataset", "folder", "--data", "nowhere"], 1, "nowhere"),
        (["--dataset", "digits", "--executor", "warp"], 2, "warp"),
        (["--dataset", "digits", "--device", "cuda"], 1, "cuda"),
        (["--dataset", "digits", "--batch", "0"], 2, "batch"),
    ],
)
def test_bench_refuses_what_cannot_be(
    bundle: Bundle, options: list[str], code: int, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the exit codes: 1 the job failed, 2 wrong usage; one line that names it."""
    assert main(["bench", str(bundle.path), *options]) == code
    lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(lines) == 1
    assert text in lines[0]
