"""How long it takes is said beforehand; what was done once is not done again; smoke is short on any network."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from training_cases import CONFIG, CutError, Recorder, request, weights_of

from bdexport.architecture import resnet_spec
from bdexport.checkpoint import Checkpoint, load_checkpoint
from bdexport.cli.main import main
from bdexport.config import preset
from bdexport.models.flops import count_flops
from bdexport.preprocess import Preprocess
from bdexport.train.data_size import SMOKE_FEWEST, smoke_images
from bdexport.train.eta import RunClock, duration
from bdexport.train.methods import phases_of
from bdexport.train.pipeline import train
from bdexport.train.prepare import new_setting
from bdexport.train.request import TrainRequest
from bdexport.train.state import RunState
from bdexport.train.teacher import _read, _with_digest
from bdexport.zoo.add import training_command

SHORT = replace(
    CONFIG,
    curriculum=replace(CONFIG.curriculum, epochs=1),
    finetune=replace(CONFIG.finetune, epochs=1),
    adapt=replace(CONFIG.adapt, epochs=1),
    static_images=0,
)


class Watcher(Recorder):
    """Keeps the titles of everything that shows progress."""

    def __init__(self, cut_in: tuple[str, int] | None = None) -> None:
        super().__init__(cut_in)
        self.titles: list[str] = []

    def epoch(self, title: str, steps: int):  # type: ignore[no-untyped-def]
        self.titles.append(title)
        return super().epoch(title, steps)


def asked(out: Path, base: Checkpoint) -> TrainRequest:
    return request(out, network=base.network, initial=base, base="mine.th")


def test_the_teachers_pass_is_seen_and_not_repeated(digits_base: Checkpoint, tmp_path: Path) -> None:
    """Oracle: the uninterrupted run's weights; the file is there while the run is not complete, and gone afterwards."""
    straight = Watcher()
    train(asked(tmp_path / "straight", digits_base), SHORT, straight)
    assert sum("teacher's pass over 512 training images" in title for title in straight.titles) == 1
    out = tmp_path / "run"
    with pytest.raises(CutError):
        train(asked(out, digits_base), SHORT, Recorder(cut_in=("curriculum", 1)))
    assert (out / "teacher.safetensors").is_file()
    resumed = Watcher()
    train(asked(out, digits_base), SHORT, resumed)
    assert not any("teacher's pass" in title for title in resumed.titles)
    assert any("its answers are kept" in note for note in resumed.notes)
    assert not (out / "teacher.safetensors").exists()
    expected, got = weights_of(tmp_path / "straight"), weights_of(out)
    assert all(torch.equal(expected[name], got[name]) for name in expected)


@pytest.mark.parametrize("damage", ["cut", "other"])
def test_a_damaged_or_strange_pass_is_made_again(damage: str, digits_base: Checkpoint, tmp_path: Path) -> None:
    """Oracle: the pass is seen again; the weights are the uninterrupted run's."""
    out = tmp_path / "run"
    with pytest.raises(CutError):
        train(asked(out, digits_base), SHORT, Recorder(cut_in=("curriculum", 1)))
    kept = out / "teacher.safetensors"
    whole = kept.read_bytes()
    kept.write_bytes(whole[:100] if damage == "cut" else whole.replace(b'"key":"', b'"key":"0')[:-1])
    resumed = Watcher()
    train(asked(out, digits_base), SHORT, resumed)
    assert sum("teacher's pass" in title for title in resumed.titles) == 1


def test_a_flipped_bit_in_the_kept_pass_is_noticed(tmp_path: Path) -> None:
    """Oracle: the logits that were kept, or None; a file of a version that kept no digest of them is read."""
    path, logits = tmp_path / "teacher.safetensors", torch.randn(40, 10, generator=torch.Generator().manual_seed(1))
    for entry in ("abc", _with_digest("abc", logits)):
        path.write_bytes(safetensors.torch.save({"logits": logits}, {"key": entry}))
        found = _read(path, "abc")
        assert found is not None
        assert torch.equal(found, logits)
        assert _read(path, "abcd") is None
    whole = path.read_bytes()
    for place in range(len(whole) - logits.nbytes, len(whole), 97):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert _read(path, "abc") is None


def test_the_time_that_a_run_takes_is_said_before_and_while_it_runs(digits_base: Checkpoint, tmp_path: Path) -> None:
    """Oracle: the note comes before the first epoch; every epoch's title has what is left."""
    watcher = Watcher()
    train(asked(tmp_path / "run", digits_base), SHORT, watcher)
    assert sum(note.startswith("the run: about ") for note in watcher.notes) == 1
    epochs = [title for title in watcher.titles if title.startswith(("adapt", "curriculum", "finetune"))]
    assert len(epochs) == 3
    assert all(" left of the run" in title for title in epochs)


def test_the_estimate_follows_the_epochs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Oracle: by hand: epochs of 10 seconds each leave 10 for each that is left of their phase."""
    now = [0.0]
    monkeypatch.setattr("bdexport.train.eta.time.perf_counter", lambda: now[0])
    config = replace(SHORT, finetune=replace(SHORT.finetune, epochs=5), recalibrate_images=0, distillation_weight=0.0)
    wanted = request(tmp_path / "run")
    setting = new_setting(wanted, config, "cpu", False)
    phases = [phase(setting) for phase in phases_of(config)]
    table = count_flops(setting.model, wanted.preprocess.size)
    clock = RunClock(setting, phases, table, len(wanted.train), 0)
    last = len(phases) - 1
    assert clock.left(RunState(phase=last, epoch=1), taught=True) is None
    for _ in range(2):
        clock.begin_epoch()
        now[0] += 10.0
        clock.end_epoch(last)
    assert clock.left(RunState(phase=last, epoch=2), taught=True) == pytest.approx(30.0)
    assert clock.left(RunState(phase=last, epoch=5), taught=True) == pytest.approx(0.0)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "1 s"), (42, "42 s"), (100, "2 min"), (3000, "50 min"), (9000, "2.5 h")]
)
def test_durations_are_short(seconds: float, text: str) -> None:
    """Oracle: by hand."""
    assert duration(seconds) == text


# ---- fewer images --------------------------------------------------------------------------------------------------


def test_images_limits_the_training_images_and_is_part_of_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the record, and the command that is made from it; smoke says what it is for."""
    line = ["train", "--arch", "resnet8", "--dataset", "digits", "--preset", "smoke", "--device", "cpu"]
    line += ["--images", "200", "--pretrain-epochs", "1", "--adapt-epochs", "0", "--curriculum-epochs", "1"]
    assert main([*line, "--finetune-epochs", "0", "--out", str(tmp_path / "run")]) == 0
    assert "preset smoke only shows that training runs" in " ".join(capsys.readouterr().out.split())
    found = load_checkpoint(tmp_path / "run")
    expected = {"name": "digits", "train": 200, "validation": 50, "skipped": 0, "limit": 200}
    assert found.training["dataset"] == expected
    words = training_command(found).split()
    assert words[words.index("--images") + 1] == "200"
    description = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (description["dataset"]["train"], description["dataset"]["validation"]) == (200, 50)


def test_smoke_takes_few_images_where_the_network_is_large(tmp_path: Path) -> None:
    """Oracle: FLOPs: a ResNet-50 on photographs gets few, a ResNet-8 on digits as many as there are."""
    small = request(tmp_path / "run")
    assert smoke_images(small, preset("smoke", 3)) > 1257
    large = replace(small, network=resnet_spec("resnet50"), preprocess=Preprocess((224, 224), resize_short=256))
    few = smoke_images(large, preset("smoke", 16))
    assert SMOKE_FEWEST <= few < 100


def test_smoke_says_that_it_takes_fewer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: a machine so slow that 120 images are all there is time for; --images overrides it."""
    monkeypatch.setattr("bdexport.train.data_size.smoke_images", lambda *_: 120)
    line = ["train", "--arch", "resnet8", "--dataset", "digits", "--preset", "smoke", "--base-only", "--device", "cpu"]
    assert main([*line, "--pretrain-epochs", "1", "--out", str(tmp_path / "a")]) == 0
    assert "preset smoke: the first 120 of 1257 training images" in capsys.readouterr().err
    assert load_checkpoint(tmp_path / "a").training["dataset"]["train"] == 120
    assert main([*line, "--pretrain-epochs", "1", "--images", "300", "--out", str(tmp_path / "b")]) == 0
    assert load_checkpoint(tmp_path / "b").training["dataset"]["train"] == 300
