"""``bdexport report`` on a run folder, a checkpoint and results, with and without images."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from report_cases import epoch
from tiny import tiny_checkpoint, tiny_checkpoint_file, tiny_model

from bdexport.checkpoint import save_checkpoint
from bdexport.cli.main import main

SPLIT = ("--dataset", "folder", "--split", "test")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``run``: a finished run of the tiny network; ``images``: 3 classes x 6 test images of noise."""
    folder = tmp_path_factory.mktemp("report")
    rng = np.random.default_rng(0)
    for split, count in (("train", 3), ("test", 6)):
        for name in ("cat", "dog", "newt"):
            (folder / "images" / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / "images" / split / name / f"{index}.png")
    run = folder / "run"
    run.mkdir()
    (run / "run.json").write_text(json.dumps({"settings": {"finetune": {"epochs": 2}}}))
    rows = [epoch("finetune", 50.0, 2.0, [1.0, 50.0]), epoch("finetune", 40.0, 2.0, [1.0, 40.0])]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tiny_checkpoint_file(run / "model.safetensors")
    return folder


def report(folder: Path, *words: str) -> dict[str, Any]:
    out = folder / "out"
    assert main(["report", *words, "--out", str(out)]) == 0
    data: dict[str, Any] = json.loads((out / "report.json").read_text())
    return data


def test_measured_numbers_are_those_of_evaluate(workplace: Path, tmp_path: Path) -> None:
    """Oracle: `bdexport evaluate --json` on the same images; and its result given as well adds nothing."""
    run, images = str(workplace / "run"), ("--data", str(workplace / "images"))
    result = tmp_path / "evaluate.json"
    assert main(["evaluate", run, *SPLIT, *images, "--json", str(result)]) == 0
    expected = json.loads(result.read_text())
    data = report(tmp_path, run, str(result), *SPLIT, *images)
    assert [point["label"] for point in data["points"]] == ["run: full", "run"]
    full, policy = data["points"]
    assert (full["accuracy"], full["flops"]["mean"]) == (expected["full"]["accuracy"], expected["full"]["flops"])
    theirs = expected["policy"]
    for ours, name in (("flops", "flops"), ("blocks", "blocks_used")):
        assert policy[ours] == {"mean": theirs[name]["mean"], "std": theirs[name]["std"]}
    assert (policy["accuracy"], policy["unique_masks"]) == (theirs["accuracy"], theirs["unique_masks"])
    assert (policy["method"], policy["finetuned"], policy["images"]) == ("blockdrop", True, 18)
    assert data["usage"][0]["mean"] == pytest.approx(theirs["blocks_used"]["mean"])
    assert {sheet["kind"] for sheet in data["sheets"]} >= {"policies"}
    rows = [row for strip in data["sheets"][0]["strips"] for row in strip["rows"]]
    assert len(set(rows)) == len(rows) <= 18
    assert data["curves"][0]["chosen"] == 1


def test_a_network_finetuned_under_a_fixed_mask_is_measured_under_it(workplace: Path, tmp_path: Path) -> None:
    """Oracle: `bdexport evaluate --json`, whose result given as well adds nothing; the method of the settings."""
    model = tiny_model()
    found = tiny_checkpoint(model)
    state = {name: value for name, value in found.state.items() if not name.startswith("policy.")}
    settings = {"method": "fixed", "fixed": {"mask": "distribute-k"}, "finetune": {"epochs": 2}}
    training = {"settings": settings, "fixed_mask": {"mask": "distribute-k", "kept": 2}}
    checkpoint = tmp_path / "static.safetensors"
    save_checkpoint(checkpoint, replace(found, policy=None, state=state, training=training))
    images, result = ("--data", str(workplace / "images")), tmp_path / "evaluate.json"
    assert main(["evaluate", str(checkpoint), *SPLIT, *images, "--json", str(result)]) == 0
    expected = json.loads(result.read_text())["fixed"]["distribute-k 2"]
    data = report(tmp_path, str(checkpoint), str(result), *SPLIT, *images)
    assert [point["label"] for point in data["points"]] == [
        "static.safetensors: full",
        "static.safetensors: distribute-k 2",
    ]
    fixed = data["points"][1]
    assert (fixed["method"], fixed["finetuned"], fixed["note"]) == ("distribute-k", True, None)
    assert (fixed["accuracy"], fixed["flops"]["mean"]) == (expected["accuracy"], expected["flops"]["mean"])
    assert data["usage"][0]["unique_masks"] == 1
    # One mask for all images is no failure here; the record says nothing of a base.
    assert [note for note in data["notes"] if "its base's accuracy is not on record" not in note] == []
    assert data["sheets"] == []


def test_without_images_the_page_says_what_is_missing(
    workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the reasons on stderr, in the data and on the page."""
    unfinished = tmp_path / "cut-off"
    unfinished.mkdir()
    (unfinished / "run.json").write_text('{"base": "resnet32.th"}')
    (unfinished / "metrics.jsonl").write_text(json.dumps(epoch("pretrain", 10.0)) + "\n")
    data = report(tmp_path, str(workplace / "run"), str(unfinished))
    assert [curves["name"] for curves in data["curves"]] == ["run", "cut-off"]
    assert data["points"] == []
    assert data["sheets"] == []
    assert len(data["notes"]) == 1  # of the run that has a base
    assert data["notes"][0].startswith("cut-off started from a base network (resnet32.th)")
    skipped = "\n".join(data["skipped"])
    assert "cut-off: no results: the run is not finished" in skipped
    assert "run: no results" in skipped  # the tiny checkpoint's record has no validation figures
    assert "contact sheets and keep-rates per class: no images were given" in skipped
    err = "".join(capsys.readouterr().err.split())  # wherever its lines are broken
    assert all("".join(f"not shown: {line}".split()) in err for line in data["skipped"])
    assert "no images were given" in (tmp_path / "out" / "report.html").read_text()


def test_json_on_stdout_is_nothing_but_json(
    repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: json.loads takes the whole of stdout; it is what the folder holds."""
    results = repository / "benchmarks" / "results"
    words = [str(path) for path in sorted(results.glob("resnet32_cpu_*.json"))]
    assert main(["report", *words, "--out", str(tmp_path / "out"), "--json", "-"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data == json.loads((tmp_path / "out" / "report.json").read_text())
    assert data["schema"] == "bdexport.report/1"
    titles = [table["title"] for table in data["tables"]["cifar10"]]
    assert [bool(re.search(f"Table {n}", title)) for n, title in zip((1, 2, 3), titles[1:], strict=True)] == [True] * 3


@pytest.mark.parametrize(
    ("words", "message", "code"),
    [
        (["nowhere"], "nowhere: no such file", 1),
        (["nowhere.json"], "nowhere.json: No such file", 1),
        (["{run}", "--data", "x"], "--dataset", 2),
        (["{run}", "--dataset", "digits"], "its classes are not the model's", 1),
        (["{run}", "--dataset", "nothing"], "unknown data set", 2),
    ],
)
def test_a_wrong_request_is_one_line_and_leaves_nothing(
    words: list[str], message: str, code: int, workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: exit code, one line of error, no folder."""
    words = [word.replace("{run}", str(workplace / "run")) for word in words]
    assert main(["report", *words, "--out", str(tmp_path / "out")]) == code
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("bdexport: error")]
    assert len(errors) == 1
    assert message in errors[0]
    assert list(tmp_path.iterdir()) == []


def test_without_matplotlib_the_line_that_installs_it(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the extra of pyproject.toml; nothing is measured first."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["report", str(workplace / "run"), "--out", str(tmp_path / "out")]) == 1
    assert 'pip install "matplotlib>=' in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_refused_before_anything_is_measured(
    workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the file that was there."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    assert main(["report", str(workplace / "run"), "--out", str(tmp_path / "out")]) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert (tmp_path / "out" / "mine").read_text() == "x"
