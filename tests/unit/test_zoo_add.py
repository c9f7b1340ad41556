"""From a finished run to a model of the zoo: the card holds what was measured, and nothing doubtful gets in."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from bdexport.checkpoint import load_checkpoint, save_checkpoint
from bdexport.cli.main import main
from bdexport.cli.train import resolved_config
from bdexport.errors import BdexportError, CheckpointError, OutputError, UsageError
from bdexport.files import sha256_file
from bdexport.train.unused import PHASES, check_used
from bdexport.zoo import add
from bdexport.zoo.add import Addition, add_to_zoo, changed_settings, standard_error, training_command

SHORT = "--pretrain-epochs 1 --adapt-epochs 0 --curriculum-epochs 1 --finetune-epochs 0 --batch 128 --gamma 2.5"
BASE_SHA = next(iter(add.KNOWN_BASES))


@dataclass(frozen=True)
class Finished:
    """A run of ``bdexport train`` and what ``bdexport evaluate`` says of it on the test set."""

    run: Path
    evaluation: Path

    def measured(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.evaluation.read_text())
        return found

    def addition(self, **changes: Any) -> Addition:
        return replace(Addition(self.run, "tiny-digits", self.evaluation), **changes)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Really trained, for two short epochs."""
    folder = tmp_path_factory.mktemp("run")
    words = [
        "train",
        "--arch",
        "resnet8",
        "--dataset",
        "digits",
        "--preset",
        "smoke",
        "--device",
        "cpu",
        *SHORT.split(),
    ]
    words += ["--set", "validation_share=0.5", "--set", "policy.input_pool=none", "--set", "recalibrate_images=0"]
    assert main([*words, "--out", str(folder / "run")]) == 0
    evaluation = folder / "evaluate.json"
    assert main(["evaluate", str(folder / "run"), "--dataset", "digits", "--json", str(evaluation)]) == 0
    return Finished(folder / "run", evaluation)


@pytest.fixture
def variant(finished: Finished, tmp_path: Path) -> Callable[..., Finished]:
    """The run with other entries in its training record, and its evaluation with other entries too."""

    def make(training: dict[str, Any] | None = None, evaluation: dict[str, Any] | None = None) -> Finished:
        run, path = tmp_path / "variant", tmp_path / "variant.json"
        shutil.copytree(finished.run, run)
        checkpoint = load_checkpoint(run)
        save_checkpoint(run / "model.safetensors", replace(checkpoint, training=checkpoint.training | (training or {})))
        same_file = {"checkpoint_sha256": sha256_file(run / "model.safetensors")}
        path.write_text(json.dumps(finished.measured() | same_file | (evaluation or {})))
        return Finished(run, path)

    return make


def test_the_card_is_what_was_measured(finished: Finished, tmp_path: Path) -> None:
    """Oracles: the evaluation's JSON, the run's own log and record; the model's file is the run's, byte for byte."""
    card = add_to_zoo(finished.addition(), tmp_path)
    measured, training = finished.measured(), load_checkpoint(finished.run).training
    assert json.loads((tmp_path / "tiny-digits.json").read_text()) == card
    model = (finished.run / "model.safetensors").read_bytes()
    assert (tmp_path / "tiny-digits.safetensors").read_bytes() == model
    assert (card["bytes"], card["sha256"]) == (len(model), measured["checkpoint_sha256"])
    for side in ("full", "policy"):
        assert card["result"][side] == measured[side]
    assert card["result"]["images"] == card["data"]["test"] == 360
    rows = [json.loads(line) for line in (finished.run / "metrics.jsonl").read_text().splitlines()]
    assert card["base"]["accuracy"] == next(row for row in rows if row["phase"] == "pretrain")["validation"]["accuracy"]
    assert (card["seconds"], card["machine"]) == (training["seconds"], training["machine"])
    text = (tmp_path / "tiny-digits.md").read_text()
    for shown in (card["command"], card["sha256"], f"{measured['policy']['accuracy']:.2f} %", *card["limits"]):
        assert shown in text
    assert {path.name.removeprefix("tiny-digits.") for path in tmp_path.iterdir()} == {
        "json",
        "md",
        "safetensors",
        "log.jsonl",
    }
    assert (tmp_path / "tiny-digits.log.jsonl").read_bytes() == (finished.run / "metrics.jsonl").read_bytes()


def test_the_command_trains_with_the_recorded_settings(finished: Finished) -> None:
    """Oracle: the record, from the command's words by way of the command line's own functions.

    Settings of a phase that the run did not have are not in the command, which would be refused with them.
    """
    checkpoint = load_checkpoint(finished.run)
    words = shlex.split(training_command(checkpoint))
    assert words[:6] == ["bdexport", "train", "--arch", "resnet8", "--dataset", "digits"]
    assert "--data" not in words
    assignments = [words[index + 1] for index, word in enumerate(words) if word == "--set"]
    assert "policy.wrong_prediction_penalty=2.5" in assignments
    config = resolved_config(words[words.index("--preset") + 1], checkpoint.network.num_blocks, {}, assignments)
    check_used({}, assignments, config, with_base=False, base_only=False, goes_on=False)
    again, recorded = config.to_json(), checkpoint.training["settings"]
    absent = {name for name in PHASES if recorded[name]["epochs"] == 0}
    assert absent == {name for name in PHASES if again[name]["epochs"] == 0}
    assert {name: again[name] for name in recorded if name not in absent} == {
        name: recorded[name] for name in recorded if name not in absent
    }
    assert set(again) == set(recorded)


def test_settings_younger_than_the_run_were_off(finished: Finished) -> None:
    """Oracle: a preset with a setting that the record lacks gets the setting's default, so that it stays off."""
    recorded = load_checkpoint(finished.run).training["settings"]
    older = recorded | {"policy": {name: value for name, value in recorded["policy"].items() if name != "reward"}}
    assert dict(changed_settings(older, 3))["policy.reward"] == "correct"
    with pytest.raises(UsageError, match=r"policy\.magic"):
        list(changed_settings(recorded | {"policy": recorded["policy"] | {"magic": 1}}, 3))


def test_a_name_is_taken_once(finished: Finished, tmp_path: Path) -> None:
    """Oracle: OutputError, the old files untouched; ``overwrite`` replaces them."""
    add_to_zoo(finished.addition(), tmp_path)
    with pytest.raises(OutputError, match="exists already"):
        add_to_zoo(finished.addition(licence="MIT"), tmp_path)
    assert json.loads((tmp_path / "tiny-digits.json").read_text())["licence"] == "Apache-2.0"
    add_to_zoo(finished.addition(licence="MIT"), tmp_path, overwrite=True)
    assert json.loads((tmp_path / "tiny-digits.json").read_text())["licence"] == "MIT"


@pytest.mark.parametrize("name", ["Big", "a/b", "../a", "a b", "-a", "a..b", ""])
def test_a_name_is_simple(name: str, finished: Finished, tmp_path: Path) -> None:
    """Oracle: UsageError before anything is read or written."""
    with pytest.raises(UsageError, match="name"):
        add_to_zoo(finished.addition(name=name), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("end", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_what_ends_half_way_leaves_nothing(
    end: BaseException, finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Property: after Ctrl-C or a full disk in the last of the three files, none is there."""

    def fail(*_paths: Path) -> None:
        raise end

    monkeypatch.setattr(shutil, "copyfile", fail)
    with pytest.raises((KeyboardInterrupt, OutputError)):
        add_to_zoo(finished.addition(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_zoo_stays_small(finished: Finished, tmp_path: Path) -> None:
    """Oracle: what lies in the folder already counts; the model that would pass 12 MB stays out."""
    (tmp_path / "other.safetensors").write_bytes(bytes(11_900_000))
    with pytest.raises(OutputError, match="at most 12000000"):
        add_to_zoo(finished.addition(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["other.safetensors"]


@pytest.mark.parametrize(
    ("evaluation", "message"),
    [
        ({"checkpoint_sha256": "0" * 64}, "measured on another file"),
        ({"schema": "bdexport.bench/1"}, "not the JSON of this version"),
        ({"architecture": "resnet20"}, "got resnet20"),
        ({"dataset": {"name": "digits", "split": "validation", "images": 360}}, "digits validation"),
        (
            {"dataset": {"name": "digits", "split": "test", "images": 100}},
            "100 images, expected resnet8, digits test, 360",
        ),
        ({"dataset": {"name": "cifar10-samples", "split": "test", "images": 200}}, "cifar10-samples"),
    ],
)
def test_an_evaluation_of_something_else_is_refused(
    evaluation: dict[str, Any], message: str, variant: Callable[..., Finished], tmp_path: Path
) -> None:
    """Oracle: CheckpointError that names what does not fit."""
    with pytest.raises(CheckpointError, match=message):
        add_to_zoo(variant(evaluation=evaluation).addition(), tmp_path / "zoo")
    assert not (tmp_path / "zoo").exists()


def test_an_unfinished_run_is_refused(variant: Callable[..., Finished], tmp_path: Path) -> None:
    """Oracle: the record's own word."""
    with pytest.raises(CheckpointError, match="finished run"):
        add_to_zoo(variant(training={"complete": False}).addition(), tmp_path / "zoo")


def test_a_base_comes_with_its_accuracy_and_its_licence(variant: Callable[..., Finished], tmp_path: Path) -> None:
    """Oracles: the base's own evaluation; a base known by its hash brings its licence; another is asked for."""
    one = variant(training={"base": "base.th"})

    def base_evaluation(**changes: Any) -> Path:
        path = tmp_path / "base.json"
        path.write_text(json.dumps(one.measured() | {"checkpoint": "x/base.th", "full": {"accuracy": 12.5}} | changes))
        return path

    def card(**changes: Any) -> dict[str, Any]:
        return add_to_zoo(one.addition(**changes), tmp_path / "zoo", overwrite=True)

    for changes, message in (
        ({}, "--base-evaluation"),
        ({"base_evaluation": base_evaluation(checkpoint="x/other.th")}, "of another base"),
    ):
        with pytest.raises(BdexportError, match=message):
            card(**changes)
    with pytest.raises(UsageError, match="--base-licence"):
        card(base_evaluation=base_evaluation())
    given = card(base_evaluation=base_evaluation(), base_source="a friend", base_licence="MIT")
    assert (given["base"]["accuracy"], given["base"]["measured_on"]) == (12.5, "360 test images")
    assert (given["base"]["source"], given["base"]["licence"]) == ("a friend", "MIT")
    known = card(base_evaluation=base_evaluation(checkpoint_sha256=BASE_SHA))
    assert known["base"]["licence"].startswith("BSD-2-Clause")
    assert known["limits"][-1].startswith("The base was trained by its author on all 50,000")
    assert "--base base.th --dataset" in known["command"]
    assert "pretrain.epochs" not in known["command"]


def test_a_base_is_known_by_its_bytes(variant: Callable[..., Finished], tmp_path: Path) -> None:
    """Oracle: an evaluation of another file under the base's name is refused, with both hashes."""
    one = variant(training={"base": "base.th", "base_sha256": BASE_SHA, "fresh_policy": True})
    path = tmp_path / "base.json"
    measured = one.measured() | {"checkpoint": "base.th", "full": {"accuracy": 12.5}}
    path.write_text(json.dumps(measured))
    with pytest.raises(CheckpointError, match="of another file than the run's base") as caught:
        add_to_zoo(one.addition(base_evaluation=path), tmp_path / "zoo")
    assert BASE_SHA in str(caught.value)
    assert measured["checkpoint_sha256"] in str(caught.value)
    path.write_text(json.dumps(measured | {"checkpoint_sha256": BASE_SHA}))
    card = add_to_zoo(one.addition(base_evaluation=path), tmp_path / "zoo")
    assert "--base base.th --fresh-policy" in card["command"]


@pytest.mark.parametrize("name", ["resnet32-d509ac18.th", "resnet56-4bfd9763.th"])
def test_public_bases_are_known(name: str, shared: Path) -> None:
    """Oracle: the files themselves."""
    assert sha256_file(shared / "checkpoints" / name) in add.KNOWN_BASES


def test_standard_error() -> None:
    """Oracle: by hand: sqrt(0.9 x 0.1 / 10,000) = 0.3 %."""
    assert standard_error(90.0, 10_000) == pytest.approx(0.3)


def test_command_line(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the card on stdout; an error is one line and its exit code."""
    monkeypatch.setattr(add, "zoo_folder", lambda: tmp_path)
    words = [str(finished.run), "tiny-digits", "--evaluation", str(finished.evaluation)]
    assert add.main(words) == 0
    assert (tmp_path / "tiny-digits.md").read_text() in capsys.readouterr().out
    assert add.main(words) == 1
    assert capsys.readouterr().err.startswith("error: ")
