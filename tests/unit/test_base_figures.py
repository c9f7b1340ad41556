"""Every result is held against the base that training started from, not against what training left of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training_cases import CONFIG, CutError, Recorder, request

from bdexport.base_figures import BaseFigures, known_base, was_trained
from bdexport.checkpoint import Checkpoint, build_model, load_checkpoint
from bdexport.cli.main import main
from bdexport.cli.train import summary
from bdexport.files import sha256_file
from bdexport.train.pipeline import train
from bdexport.zoo import zoo_card

SHORT = replace(
    CONFIG,
    curriculum=replace(CONFIG.curriculum, epochs=1),
    finetune=replace(CONFIG.finetune, epochs=1, network_learning_rate=0.3),
)


def accuracy_of(network: Checkpoint, out: Path) -> float:
    """The undropped network on the validation split, by plain torch."""
    asked = request(out)
    images = torch.from_numpy(asked.preprocess.normalise(asked.validation.arrays(asked.preprocess)))
    with torch.no_grad():
        predicted = build_model(network, with_policy=False).network(images).argmax(dim=1).numpy()
    return float(100 * (predicted == asked.validation.labels).mean())


@pytest.fixture(scope="module")
def run(digits_base: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy learned on a base that came as a checkpoint."""
    out = tmp_path_factory.mktemp("with-base") / "run"
    train(request(out, network=digits_base.network, initial=digits_base, base="mine.th"), SHORT, Recorder())
    return out


def test_train_measures_the_base_before_it_learns_on_it(run: Path, digits_base: Checkpoint) -> None:
    """Oracle: the base's own accuracy, by plain torch; the file beside the model holds the base's weights."""
    measured = load_checkpoint(run).training["base_measured"]
    assert measured["accuracy"] == pytest.approx(accuracy_of(digits_base, run))
    assert (measured["split"], measured["images"], measured["dataset"]) == ("validation", 180, "digits")
    assert measured["file_sha256"] == sha256_file(run / "base.safetensors")
    kept = load_checkpoint(run / "base.safetensors")
    assert kept.policy is None
    assert all(torch.equal(tensor, digits_base.state[name]) for name, tensor in kept.state.items())
    training = load_checkpoint(run).training
    assert f"{measured['accuracy']:.2f} % (your base), " in summary(training)


def test_the_base_that_the_run_trains_itself_is_measured_too(tmp_path: Path) -> None:
    """Oracle: the validation accuracy of the last pretraining epoch, as the log has it."""
    recorder = Recorder()
    path = train(request(tmp_path / "run"), SHORT, recorder)
    last = [row for row in recorder.rows if row["phase"] == "pretrain"][-1]
    assert load_checkpoint(path).training["base_measured"]["accuracy"] == last["validation"]["accuracy"]
    assert sum("the base, every block kept" in note for note in recorder.notes) == 1


def test_a_run_of_an_older_version_measures_the_base_that_it_was_given(digits_base: Checkpoint, tmp_path: Path) -> None:
    """Oracle: the base, although the run's weights are others by now."""
    asked = request(tmp_path / "run", network=digits_base.network, initial=digits_base, base="mine.th")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bdexport.train.pipeline.keep_base", lambda *_: None)
        with pytest.raises(CutError):
            train(asked, SHORT, Recorder(cut_in=("curriculum", 1)))
    path = train(asked, SHORT, Recorder())
    measured = load_checkpoint(path).training["base_measured"]
    assert measured["accuracy"] == pytest.approx(accuracy_of(digits_base, tmp_path))


def evaluated(tmp_path: Path, *words: str) -> dict[str, Any]:
    written = tmp_path / "evaluate.json"
    assert main(["evaluate", *words, "--dataset", "digits", "--json", str(written)]) == 0
    found: dict[str, Any] = json.loads(written.read_text())
    return found


def test_evaluate_measures_the_base_that_stands_beside_the_model(
    run: Path, digits_base: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the base evaluated as a checkpoint of its own; elsewhere, the record of other images, named as such."""
    result = evaluated(tmp_path, str(run))
    own = evaluated(tmp_path, str(run / "base.safetensors"))
    assert result["base"]["accuracy"] == own["full"]["accuracy"]
    assert (result["base"]["here"], result["base"]["how"]) == (True, "measured now")
    assert own["base"] is None
    assert "your base" in capsys.readouterr().out
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes((run / "model.safetensors").read_bytes())
    recorded = evaluated(tmp_path, str(alone))["base"]
    assert (recorded["here"], recorded["split"]) == (False, "validation")
    assert "--base CKPT measures it" in capsys.readouterr().out
    assert evaluated(tmp_path, str(alone), "--base", str(run / "base.safetensors"))["base"] == result["base"] | {
        "name": "base.safetensors"
    }
    assert evaluated(tmp_path, str(alone), "--split", "validation")["base"]["how"] == "recorded by train"


def test_another_file_beside_the_model_is_not_taken_for_its_base(run: Path, tmp_path: Path) -> None:
    """Oracle: its hash is not the recorded one."""
    for name in ("model", "base"):
        (tmp_path / f"{name}.safetensors").write_bytes((run / "model.safetensors").read_bytes())
    assert evaluated(tmp_path, str(tmp_path / "model.safetensors"))["base"]["how"] == "recorded by train"


def test_a_model_of_the_zoo_is_held_against_the_network_that_it_goes_back_to() -> None:
    """Oracle: the card; -1.22 points are what the public network's 92.63 % make of it."""
    card = zoo_card("resnet32-cifar10")
    base = known_base({}, card["sha256"], "cifar10", "test", 10_000)
    assert base is not None
    assert base.here
    assert base.accuracy == card["base"]["origin"]["accuracy"]
    assert "92.63 %" in base.sentence()
    assert "(-1.22 points)" in base.sentence()
    samples = known_base({}, card["sha256"], "cifar10-samples", "test", 200)
    assert samples is not None
    assert not samples.here


@pytest.mark.parametrize(
    "training",
    [
        {},
        {"base_measured": None},
        {"base_measured": "good"},
        {"base_measured": {"accuracy": "high", "images": 3}},
        {"base_measured": {"accuracy": 90.0}},
        {"base_measured": {"accuracy": 90.0, "images": 5}, "validation": {"full_accuracy": "x"}},
    ],
)
def test_a_record_that_says_nothing_of_a_base_shows_nothing(training: dict[str, Any]) -> None:
    """Property: nothing is made up from a record that others may have written."""
    assert known_base(training, None, "digits", "test", 5) is None
    assert not was_trained(training)


def test_bench_says_first_what_the_base_had(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: the record in the bundle; on the validation split it is of the very images that bench runs."""
    assert main(["build", str(run), "--out", str(tmp_path / "b"), "--no-measure"]) == 0
    capsys.readouterr()
    line = ["bench", str(tmp_path / "b"), "--dataset", "digits", "--json", str(tmp_path / "bench.json")]
    assert main([*line, "--images", "20"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("your base (mine.th): ")
    assert json.loads((tmp_path / "bench.json").read_text())["base"]["here"] is False
    assert main([*line, "--split", "validation"]) == 0
    found = json.loads((tmp_path / "bench.json").read_text())
    measured = load_checkpoint(run).training["base_measured"]
    assert found["base"]["here"] is True
    assert found["base"]["accuracy"] == measured["accuracy"]
    assert np.isclose(found["full"]["accuracy"], found["base"]["full"], atol=100 / 180 + 0.01)
    assert BaseFigures(**found["base"]).how == "recorded by train"


def test_what_a_policy_reached_is_not_said_of_a_fixed_mask() -> None:
    """Oracle: the record by hand: it knows the policy's accuracy, or that of the one mask it was trained under."""
    validation = {"full_accuracy": 88.0, "policy": {"accuracy": 87.0}}
    training = {"base_measured": {"accuracy": 90.0, "images": 5}, "validation": validation}
    of_policy = known_base(training, None, "digits", "test", 5)
    of_mask = known_base(training, None, "digits", "test", 5, "101")
    assert of_policy is not None
    assert of_mask is not None
    assert (of_policy.full, of_policy.dynamic) == (88.0, 87.0)
    assert (of_mask.full, of_mask.dynamic) == (88.0, None)
    fixed = {"full_accuracy": 88.0, "fixed": {"mask 101": {"accuracy": 86.0}}}
    trained = training | {"validation": fixed, "fixed_mask": {"mask": "101", "kept": None}}
    for mask, expected in (("101", 86.0), ("110", None)):
        base = known_base(trained, None, "digits", "test", 5, mask)
        assert base is not None
        assert base.dynamic == expected
