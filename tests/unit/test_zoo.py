"""The zoo: its models are what their cards say, and zoo:NAME is a checkpoint wherever one is taken."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import bdexport.zoo
from bdexport.build import default_bundle_path
from bdexport.checkpoint import load_checkpoint
from bdexport.cli import quickstart
from bdexport.cli.main import main
from bdexport.config import preset
from bdexport.dataset import load_dataset
from bdexport.errors import CheckpointError, UsageError
from bdexport.files import sha256_file
from bdexport.train.settings import with_assignments
from bdexport.zoo import zoo_card, zoo_folder, zoo_model, zoo_name, zoo_names
from bdexport.zoo.add import standard_error
from bdexport.zoo.card import card_to_markdown
from bdexport.zoo.refresh import refresh

MODEL = "resnet20-digits"
ZOO = f"zoo:{MODEL}"
MANY_STANDARD_ERRORS = 4.5


@pytest.fixture
def copy_of_zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One model of the zoo in a folder that a test may change, taken for the zoo."""
    folder = tmp_path / "zoo"
    folder.mkdir()
    for suffix in ("json", "md", "safetensors"):
        shutil.copy(zoo_folder() / f"{MODEL}.{suffix}", folder)
    monkeypatch.setattr(bdexport.zoo, "zoo_folder", lambda: folder)
    return folder


# ---- what ships ----------------------------------------------------------------------------------------------------


def test_all_of_it_is_small() -> None:
    """Oracle: the 12 MB that the models and their cards may take in every install; and nothing is without a card."""
    files = [path for path in zoo_folder().iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 12_000_000
    assert MODEL in zoo_names()
    for suffix in ("safetensors", "md"):
        found = {path.name for path in files if path.suffix == f".{suffix}"}
        assert found == {f"{name}.{suffix}" for name in zoo_names()}


@pytest.mark.parametrize("name", zoo_names())
def test_a_card_is_of_its_model(name: str) -> None:
    """Oracle: the checkpoint itself: its file, its network, its training record; the .md is the same card."""
    card, checkpoint = zoo_card(name), load_checkpoint(f"zoo:{name}")
    training = checkpoint.training
    assert card["name"] == name
    assert (card["sha256"], card["bytes"]) == (sha256_file(zoo_model(name)), zoo_model(name).stat().st_size)
    assert (card["architecture"], card["num_blocks"]) == (checkpoint.network.name, checkpoint.network.num_blocks)
    assert card["weights"] == sum(tensor.numel() for tensor in checkpoint.state.values())
    assert card["class_names"] == list(checkpoint.class_names)
    assert card["data"] | training["dataset"] == card["data"]
    assert (card["seed"], card["seconds"]) == (training["settings"]["seed"], training["seconds"])
    assert card["machine"] == training["machine"]
    assert (zoo_folder() / f"{name}.md").read_text() == card_to_markdown(card)
    for field in ("command", "licence", "intended_use", "limits"):
        assert card[field], field
    licence_files = [word for word in card["base"]["licence"].split() if word.startswith("LICENSE-")]
    assert all((zoo_folder() / file).is_file() for file in licence_files)


@pytest.mark.parametrize("name", [name for name in zoo_names() if not zoo_card(name)["command_given"]])
def test_the_command_of_a_card_gives_the_recorded_settings(name: str) -> None:
    """Oracle: the settings in the checkpoint, from the words of the command by way of ``train``'s own parser.

    A preset has changed since the training: ``python -m bdexport.zoo.refresh``.
    """
    checkpoint = load_checkpoint(f"zoo:{name}")
    words = zoo_card(name)["command"].split()
    assignments = [words[index + 1] for index, word in enumerate(words) if word == "--set"]
    config = preset(words[words.index("--preset") + 1], checkpoint.network.num_blocks)
    recorded = checkpoint.training["settings"]
    if checkpoint.training["base"] is not None:  # then nothing is pretrained, whatever the preset says
        config = replace(config, pretrain=replace(config.pretrain, epochs=0))
    resolved = with_assignments(config, assignments).to_json()
    assert _common(resolved, recorded) == recorded


def test_the_cards_are_up_to_date(tmp_path: Path) -> None:
    """Property: ``python -m bdexport.zoo.refresh`` changes nothing."""
    refresh(tmp_path)
    for name in zoo_names():
        for suffix in ("json", "md"):
            assert (tmp_path / f"{name}.{suffix}").read_text() == (zoo_folder() / f"{name}.{suffix}").read_text()


def _common(settings: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """``settings`` without what ``other`` has not: a version after the training may have more of them."""
    return {
        name: _common(value, other[name]) if isinstance(value, dict) else value
        for name, value in settings.items()
        if name in other
    }


@pytest.mark.parametrize(
    "name", [name for name in zoo_names() if zoo_card(name)["data"]["name"] in ("digits", "cifar10")]
)
def test_a_model_reaches_what_its_card_says(name: str, tmp_path: Path) -> None:
    """Oracle: the card. Digits are the whole test set (to within an image, for other processors); the CIFAR-10 samples
    are a part of it, for which the card's accuracy holds to within its standard error.
    """
    card, written = zoo_card(name), tmp_path / "evaluate.json"
    dataset = quickstart.SAMPLES_OF[card["data"]["name"]]
    assert main(["evaluate", f"zoo:{name}", "--dataset", dataset, "--json", str(written)]) == 0
    found, result = json.loads(written.read_text()), card["result"]
    assert found["checkpoint"] == f"zoo:{name}"
    assert found["checkpoint_sha256"] == card["sha256"]
    images = found["dataset"]["images"]
    for side in ("full", "policy"):
        expected = result[side]["accuracy"]
        allowed = 100.5 / images if images == result["images"] else MANY_STANDARD_ERRORS * standard_error(90.0, images)
        assert abs(found[side]["accuracy"] - expected) <= allowed, (side, found[side]["accuracy"], expected)
    used = found["policy"]["blocks_used"]["mean"] - result["policy"]["blocks_used"]["mean"]
    assert abs(used) <= MANY_STANDARD_ERRORS * max(result["policy"]["blocks_used"]["std"], 0.1) / images**0.5
    assert found["full"]["flops"] == result["full"]["flops"]


# ---- names ---------------------------------------------------------------------------------------------------------


def test_only_the_prefix_makes_a_name() -> None:
    """Oracle: the documented form."""
    assert zoo_name(Path(ZOO)) == MODEL
    assert zoo_name(f"folder/{ZOO}") is None
    assert zoo_name(Path("runs/zoo")) is None
    assert default_bundle_path(Path(ZOO)) == Path("engines") / MODEL


@pytest.mark.parametrize(
    "line",
    [
        "evaluate zoo:X --dataset digits",
        "export zoo:X --out o",
        "build zoo:X",
        "train --base zoo:X --dataset digits --out o",
        "quickstart --model zoo:X",
        "zoo X",
    ],
)
def test_an_unknown_name_is_wrong_usage_everywhere(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: exit code 2, one line with the close match, and nothing written."""
    monkeypatch.chdir(tmp_path)
    assert main(line.replace("X", "resnet20-digit").split()) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "got 'zoo:resnet20-digit'" in error
    assert f"did you mean {ZOO}" in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["", "../zoo/resnet20-digits", "nothing-like-it"])
def test_a_name_is_no_path(name: str) -> None:
    """Oracle: UsageError that lists what there is, without a guess where nothing is close."""
    with pytest.raises(UsageError, match=ZOO):
        zoo_model(name)


def test_export_takes_the_name(tmp_path: Path) -> None:
    """Oracle: the same graph as from the file itself."""
    for source, out in ((ZOO, "zoo"), (str(zoo_model(MODEL)), "file")):
        assert main(["export", source, "--out", str(tmp_path / out), "--parts", "stem"]) == 0
    assert (tmp_path / "zoo" / "stem.onnx").read_bytes() == (tmp_path / "file" / "stem.onnx").read_bytes()


def test_train_takes_the_name_as_its_base(tmp_path: Path) -> None:
    """Oracle: run.json names the base, and with no epoch trained the network is the zoo's."""
    none = [word for phase in ("adapt", "curriculum", "finetune") for word in (f"--{phase}-epochs", "0")]
    words = ["train", "--base", ZOO, "--dataset", "digits", "--preset", "smoke", "--set", "recalibrate_images=0", *none]
    words += ["--set", "retarget=false"]
    assert main([*words, "--device", "cpu", "--out", str(tmp_path / "run")]) == 0
    assert json.loads((tmp_path / "run" / "run.json").read_text())["base"] == ZOO
    trained, base = load_checkpoint(tmp_path / "run"), load_checkpoint(ZOO)
    assert all(np.array_equal(tensor, base.state[name]) for name, tensor in trained.state.items())


# ---- damage --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["byte", "missing", "json", "schema"])
def test_a_damaged_zoo_is_said_to_be_so(damage: str, copy_of_zoo: Path) -> None:
    """Oracle: CheckpointError naming the file: an altered model is never used under the card of another."""
    model, card = copy_of_zoo / f"{MODEL}.safetensors", copy_of_zoo / f"{MODEL}.json"
    assert zoo_model(MODEL) == model
    if damage == "byte":
        data = bytearray(model.read_bytes())
        data[-1] ^= 1
        model.write_bytes(data)
    elif damage == "missing":
        model.unlink()
    else:
        card.write_text("{" if damage == "json" else "{}")
    with pytest.raises(CheckpointError, match="resnet20-digits"):
        load_checkpoint(ZOO)


# ---- commands ------------------------------------------------------------------------------------------------------


def test_zoo_lists_and_shows(capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: the cards; ``--json -`` leaves stdout to JSON."""
    assert main(["zoo"]) == 0
    shown = capsys.readouterr().out
    for name in zoo_names():
        assert f"zoo:{name}" in shown
        assert f"{zoo_card(name)['result']['policy']['accuracy']:.2f} %" in shown
    assert main(["zoo", "--json", "-"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert listed == {"schema": "bdexport.zoo/1", "models": [zoo_card(name) for name in zoo_names()]}
    for name in (MODEL, ZOO):
        assert main(["zoo", name]) == 0
        assert capsys.readouterr().out == card_to_markdown(zoo_card(MODEL))
    assert main(["zoo", MODEL, "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out) == zoo_card(MODEL)


def test_listing_imports_nothing_heavy() -> None:
    """Oracle: sys.modules after ``bdexport zoo`` in a fresh interpreter."""
    code = (
        "import sys; from bdexport.cli.main import main; code = main(['zoo', 'resnet20-digits']); "
        "print(code, sorted({'torch', 'numpy', 'onnx', 'safetensors'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert done.stdout.splitlines()[-1] == "0 []", done.stderr


@pytest.mark.slow
def test_quickstart_runs_a_model_without_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the card's figures from the bundle, which runs another backend; the table says what was measured on."""
    monkeypatch.chdir(tmp_path)
    assert main(["quickstart", "--model", ZOO]) == 0
    shown = capsys.readouterr().out
    out = Path("engines") / f"quickstart-{MODEL}"
    for line in quickstart.zoo_plan(ZOO, None, None, 1).lines:
        assert f"$ bdexport {line[0]} " in shown
    assert "accuracy on 360 sample images only" in shown
    result, card = json.loads((out / "result.json").read_text()), zoo_card(MODEL)["result"]
    assert result["model"] == ZOO
    assert "run" not in result
    assert result["verify"]["ok"] is True
    assert abs(result["bench"]["dynamic"]["accuracy"] - card["policy"]["accuracy"]) < 0.3
    assert main(["verify", str(out / "bundle"), "--reference", ZOO]) == 0
    assert len(json.loads((out / "run.json").read_text())["images"]) == quickstart.DEFAULT.shown_images


def test_quickstart_measures_a_cifar10_model_on_the_samples(tmp_path: Path, copy_of_zoo: Path) -> None:
    """Oracle: the commands themselves; the images to run are the first samples, named by their classes."""
    card = json.loads((copy_of_zoo / f"{MODEL}.json").read_text())
    (copy_of_zoo / f"{MODEL}.json").write_text(json.dumps(card | {"data": card["data"] | {"name": "cifar10"}}))
    plan = quickstart.zoo_plan(ZOO, tmp_path / "out", None, 1)
    assert [line[0] for line in plan.lines] == ["build", "verify", "run", "bench"]
    bench = plan.lines[-1]
    assert bench[bench.index("--dataset") + 1] == "cifar10-samples"
    quickstart.write_images(plan)
    files = sorted((tmp_path / "out" / "images").iterdir())
    assert [file.name for file in files[:2]] == ["0-airplane.png", "1-automobile.png"]
    samples = load_dataset("cifar10-samples").images()
    for file, pixels in zip(files, samples, strict=False):
        with Image.open(file) as image:
            assert np.array_equal(np.asarray(image), pixels)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", ZOO, "--preset", "smoke"], "nothing is trained"),
        (["--model", "runs/mine"], "expected zoo:NAME"),
    ],
)
def test_quickstart_refuses_what_makes_no_sense(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: wrong usage, one line, nothing written."""
    monkeypatch.chdir(tmp_path)
    assert main(["quickstart", *words]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_quickstart_says_where_samples_are_missing(copy_of_zoo: Path) -> None:
    """Oracle: UsageError with the commands that work instead."""
    card = json.loads((copy_of_zoo / f"{MODEL}.json").read_text())
    (copy_of_zoo / f"{MODEL}.json").write_text(json.dumps(card | {"data": card["data"] | {"name": "cifar100"}}))
    with pytest.raises(UsageError, match="bdexport bench BUNDLE --dataset cifar100"):
        quickstart.zoo_plan(ZOO, None, None, 1)
