"""A whole run on a tiny network and real digits: learning, resuming, refusing."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from training_cases import CONFIG, CutError, Recorder, request, weights_of

from bdexport.checkpoint import load_checkpoint
from bdexport.config import (
    PretrainConfig,
    TrainConfig,
)
from bdexport.errors import DatasetError, OutputError, TrainingError, UsageError
from bdexport.files import holding
from bdexport.train import pipeline
from bdexport.train.pipeline import train
from bdexport.train.state import METRICS_FILE, STATE_FILE, RunState, load_state, save_state


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Recorder]:
    """A run from start to end."""
    out = tmp_path_factory.mktemp("straight") / "run"
    recorder = Recorder()
    train(request(out), CONFIG, recorder)
    return out, recorder


def test_it_learns(straight: tuple[Path, Recorder]) -> None:
    """Oracle: chance is 10 %; the base network learns, the policy drops blocks, and the record says so."""
    out, recorder = straight
    training = load_checkpoint(out).training
    assert [row["phase"] for row in recorder.rows] == ["pretrain"] * 5 + ["adapt"] + ["curriculum"] * 2 + [
        "finetune"
    ] * 2
    assert training["complete"]
    assert training["threads"] == torch.get_num_threads()
    assert training["validation"]["policy"]["accuracy"] > 30
    assert 0 < training["validation"]["policy"]["blocks_used"]["mean"] < 3
    assert sum(mask["count"] for mask in training["policy_statistics"]["masks"]) == 180
    rows = [json.loads(line) for line in (out / METRICS_FILE).read_text().splitlines()]
    assert rows == recorder.rows


def test_tensorboard_shows_the_same_figures(straight: tuple[Path, Recorder]) -> None:
    """Oracle: TensorBoard's own reader against the rows that were reported."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    out, recorder = straight
    events = accumulator.EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    shown = [event.value for event in events.Scalars("finetune/validation/accuracy")]
    expected = [row["validation"]["accuracy"] for row in recorder.rows if row["phase"] == "finetune"]
    assert shown == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("phase", ["pretrain", "adapt", "curriculum 2", "finetune 2"])
def test_a_run_cut_off_in_mid_epoch_ends_the_same(phase: str, straight: tuple[Path, Recorder], tmp_path: Path) -> None:
    """Oracle: the uninterrupted run's weights and metrics, bit for bit (but for the clock)."""
    out = tmp_path / "run"
    with pytest.raises(CutError):
        train(request(out), CONFIG, Recorder(cut_in=(phase, 2)))
    recorder = Recorder()
    train(request(out), CONFIG, recorder)
    assert any("resuming" in note for note in recorder.notes)
    expected, got = weights_of(straight[0]), weights_of(out)
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[name], got[name]) for name in expected)


KILLED = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
import os, signal
from training_cases import CONFIG, Recorder, request
from bdexport.train.pipeline import train
class Killer(Recorder):
    def line(self, row):
        if row["phase"] == "curriculum": os.kill(os.getpid(), signal.SIGKILL)
train(request(Path({out!r})), CONFIG, Killer())
"""


def test_kill_minus_nine(straight: tuple[Path, Recorder], tmp_path: Path) -> None:
    """Oracle: the uninterrupted run's weights, after a real SIGKILL of a real process."""
    out = tmp_path / "run"
    script = KILLED.format(tests=str(Path(__file__).parents[1]), out=str(out))
    killed = subprocess.run([sys.executable, "-c", script], env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not (out / "model.safetensors").exists()
    train(request(out), CONFIG, Recorder())
    expected, got = weights_of(straight[0]), weights_of(out)
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_a_complete_run_is_left_alone(straight: tuple[Path, Recorder]) -> None:
    """Oracle: the file does not change, and the note says why."""
    out, _ = straight
    before = (out / "model.safetensors").read_bytes()
    recorder = Recorder()
    train(request(out), CONFIG, recorder)
    assert (out / "model.safetensors").read_bytes() == before
    assert any("complete already" in note for note in recorder.notes)


def test_other_settings_are_named(straight: tuple[Path, Recorder]) -> None:
    """Oracle: the error says which setting differs, and both values."""
    changed = replace(CONFIG, finetune=replace(CONFIG.finetune, batch=32))
    with pytest.raises(TrainingError, match=r"finetune\.batch was 64, now 32"):
        train(request(straight[0]), changed, Recorder())


def test_another_base_or_teacher_of_the_same_name_is_noticed(straight: tuple[Path, Recorder], tmp_path: Path) -> None:
    """Oracle: a hash differs; a run of a version that did not record it goes on, once with any."""
    out = tmp_path / "run"
    shutil.copytree(straight[0], out)
    with pytest.raises(TrainingError, match="base_sha256 was None, now 'abc'"):
        train(request(out, base_sha256="abc"), CONFIG, Recorder())
    description = json.loads((out / "run.json").read_text())
    del description["base_sha256"]
    (out / "run.json").write_text(json.dumps(description))
    recorder = Recorder()
    train(request(out, base_sha256="abc"), CONFIG, recorder)
    assert any("complete already" in note for note in recorder.notes)
    with pytest.raises(TrainingError, match="base_sha256 was 'abc', now 'def'"):  # from then on it is known
        train(request(out, base_sha256="def"), CONFIG, Recorder())
    with pytest.raises(TrainingError, match=r"teachers_sha256 was \[\], now \['123'\]"):
        train(request(out, base_sha256="abc", teachers_sha256=("123",)), CONFIG, Recorder())


def test_other_data_of_the_same_size_are_noticed(straight: tuple[Path, Recorder], tmp_path: Path) -> None:
    """Oracle: one pixel, one label and one class name more or less; the run is as it was."""
    out = tmp_path / "run"
    shutil.copytree(straight[0], out)
    same = request(out)
    pixels = np.array(same.train.source)
    pixels[7, 3, 3] ^= 1
    labels = same.train.labels.copy()
    labels[[0, 1]] = labels[[1, 0]] if labels[0] != labels[1] else (labels[0] + 1) % 10
    names = (*same.train.class_names[:-1], "nine")
    changes = [{"source": pixels}, {"labels": labels}, {"class_names": names}]
    for other in (replace(same.train, **change) for change in changes):  # type: ignore[arg-type]
        with pytest.raises(TrainingError, match=r"dataset\.sha256 was"):
            train(request(out, train=other), CONFIG, Recorder())
    assert train(same, CONFIG, Recorder()).is_file()


def test_a_run_of_an_older_version_without_the_data_s_hash_goes_on(
    straight: tuple[Path, Recorder], tmp_path: Path
) -> None:
    """Oracle: the hash is there afterwards."""
    out = tmp_path / "run"
    shutil.copytree(straight[0], out)
    record = json.loads((out / "run.json").read_text())
    digests = record["dataset"].pop("sha256")
    (out / "run.json").write_text(json.dumps(record))
    assert train(request(out), CONFIG, Recorder()).is_file()
    assert json.loads((out / "run.json").read_text())["dataset"]["sha256"] == digests


def test_a_base_or_teacher_of_other_classes_is_refused(straight: tuple[Path, Recorder], tmp_path: Path) -> None:
    """Oracle: one class is called something else; the message names both, and nothing is written."""
    base = load_checkpoint(straight[0])
    other = replace(base, class_names=(*base.class_names[:-1], "nine"))
    named = request(tmp_path / "run", network=base.network, initial=other, base="base")
    data = [replace(split, class_names=(*base.class_names[:-1], "IX")) for split in (named.train, named.validation)]
    with pytest.raises(DatasetError, match=r"label 9 is 'IX', expected 'nine'"):
        train(replace(named, train=data[0], validation=data[1]), CONFIG, Recorder())
    taught = request(tmp_path / "run", network=base.network, initial=base, teachers=(("its teacher", other),))
    with pytest.raises(UsageError, match=r"teacher its teacher: .*label 9 is '9', expected 'nine'"):
        train(taught, CONFIG, Recorder())
    assert not (tmp_path / "run").exists()


def test_a_model_without_the_state_that_made_it_is_not_trained_over(
    straight: tuple[Path, Recorder], tmp_path: Path
) -> None:
    """Oracle: the model's bytes."""
    out = tmp_path / "run"
    shutil.copytree(straight[0], out)
    (out / STATE_FILE).unlink()
    before = (out / "model.safetensors").read_bytes()
    with pytest.raises(TrainingError, match=r"holds a model, but not the state\.pt"):
        train(request(out), CONFIG, Recorder())
    assert (out / "model.safetensors").read_bytes() == before


def test_a_complete_run_mends_its_metrics(straight: tuple[Path, Recorder], tmp_path: Path) -> None:
    """Oracle: the file as the run had left it."""
    out = tmp_path / "run"
    shutil.copytree(straight[0], out)
    before = (out / METRICS_FILE).read_bytes()
    (out / METRICS_FILE).write_bytes(b"\xff\x00")
    train(request(out), CONFIG, Recorder())
    assert (out / METRICS_FILE).read_bytes() == before


def test_a_run_that_goes_on_in_another_precision_says_so(tmp_path: Path) -> None:
    """Oracle: the note on resuming, and both precisions in the model's record."""
    out = tmp_path / "run"
    config = replace(CONFIG, precision="auto", pretrain=replace(CONFIG.pretrain, epochs=1))
    chosen = iter([(True, "bf16 units"), (False, "none here")])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "chosen_precision", lambda _config, _device: next(chosen))
        with pytest.raises(CutError):
            train(request(out), config, Recorder(cut_in=("adapt", 1)))
        recorder = Recorder()
        train(request(out), config, recorder)
    assert "note: the run was in bf16 so far, and goes on in fp32" in recorder.notes
    assert load_checkpoint(out).training["precision"] == "bf16 and fp32"


def test_a_run_without_a_finished_epoch_takes_other_settings(tmp_path: Path) -> None:
    """Oracle: what out-of-memory advises, the same line with a smaller batch; nothing is lost by it."""
    out = tmp_path / "run"
    with pytest.raises(CutError):
        train(request(out), CONFIG, Recorder(cut_in=("pretrain", 1)))
    smaller = replace(CONFIG, finetune=replace(CONFIG.finetune, batch=32))
    with pytest.raises(CutError):
        train(request(out), smaller, Recorder(cut_in=("adapt", 1)))
    assert json.loads((out / "run.json").read_text())["settings"]["finetune"]["batch"] == 32
    other = replace(smaller, pretrain=replace(smaller.pretrain, batch=64), finetune=CONFIG.finetune)
    with pytest.raises(TrainingError, match=r"settings: settings\.pretrain\.batch was 32, now 64;"):
        train(request(out), other, Recorder())


def test_a_phase_that_has_not_begun_takes_another_batch(tmp_path: Path) -> None:
    """Oracle: what running out of memory in a late phase advises; run.json says what the run goes on with."""
    out = tmp_path / "run"
    with pytest.raises(CutError):
        train(request(out), CONFIG, Recorder(cut_in=("adapt", 1)))
    smaller = replace(CONFIG, adapt=replace(CONFIG.adapt, batch=32), evaluation_batch=100)
    recorder = Recorder(cut_in=("curriculum 2", 1))
    with pytest.raises(CutError):
        train(request(out), smaller, recorder)
    assert [row["phase"] for row in recorder.rows] == ["adapt", "curriculum"]
    assert json.loads((out / "run.json").read_text())["settings"]["adapt"]["batch"] == 32
    with pytest.raises(TrainingError, match=r"adapt\.batch was 32, now 64"):
        train(request(out), CONFIG, Recorder())


def test_a_folder_in_which_another_run_is_at_work_is_left_alone(tmp_path: Path) -> None:
    """Oracle: two runs would write the same files in turn; the second one is refused, and changes nothing."""
    with holding(tmp_path), pytest.raises(OutputError, match="another process is at work"):
        train(request(tmp_path), CONFIG, Recorder())
    assert list(tmp_path.iterdir()) == []


def test_what_a_kill_left_of_the_first_file_is_no_stranger(tmp_path: Path) -> None:
    """Oracle: a kill while run.json was being written leaves only its partial file; the same line goes on."""
    (tmp_path / ".run.json.x1y2.partial").write_text("{")
    with pytest.raises(CutError):
        train(request(tmp_path), CONFIG, Recorder(cut_in=("pretrain", 1)))


def test_a_model_that_is_gone_is_written_again(straight: tuple[Path, Recorder], tmp_path: Path) -> None:
    """Oracle: the bytes that were there before."""
    out = tmp_path / "run"
    shutil.copytree(straight[0], out)
    before = weights_of(out)
    (out / "model.safetensors").unlink()
    train(request(out), CONFIG, Recorder())
    assert all(torch.equal(before[name], weight) for name, weight in weights_of(out).items())


def test_a_full_disk_is_called_that_and_loses_nothing(tmp_path: Path) -> None:
    """Oracle: OutputError, the run goes on from the epoch before, and no partial file stays."""
    out = tmp_path / "run"
    with pytest.raises(CutError):
        train(request(out), CONFIG, Recorder(cut_in=("pretrain 3", 1)))
    before = (out / STATE_FILE).read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "write_bytes", _full)
        with pytest.raises(OutputError, match="no space left"):
            train(request(out), CONFIG, Recorder())
    assert (out / STATE_FILE).read_bytes() == before
    assert not list(out.glob(".*"))


def _full(path: Path, _data: bytes) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def test_a_state_of_another_network_is_reported(straight: tuple[Path, Recorder], tmp_path: Path) -> None:
    """Oracle: TrainingError that names the file, not torch's RuntimeError."""
    out = tmp_path / "run"
    shutil.copytree(straight[0], out)
    blob = torch.load(out / STATE_FILE, weights_only=True)
    blob["model"].pop("network.head.fc.bias")
    torch.save(blob, out / STATE_FILE)
    with pytest.raises(TrainingError, match=r"state\.pt does not fit"):
        train(request(out), CONFIG, Recorder())


def test_a_crash_before_the_state_is_saved_leaves_no_epoch_twice_or_out_of_tensorboard(tmp_path: Path) -> None:
    """Oracle: TensorBoard's own reader shows each epoch of metrics.jsonl once, after two crashes around the save."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    out = tmp_path / "run"
    config = replace(CONFIG, pretrain=replace(CONFIG.pretrain, epochs=3))
    for name in ("write_text", "write_bytes"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(f"bdexport.train.state.{name}", _crash)
            with pytest.raises(CutError):
                train(request(out, base_only=True), config, Recorder())
    train(request(out, base_only=True), config, Recorder())
    events = accumulator.EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    shown = [(event.step, event.value) for event in events.Scalars("pretrain/validation/accuracy")]
    rows = [json.loads(line) for line in (out / METRICS_FILE).read_text().splitlines()]
    expected = [(step, pytest.approx(row["validation"]["accuracy"])) for step, row in enumerate(rows, 1)]
    assert shown == expected
    assert len(rows) == 3


def _crash(*_: object) -> None:
    raise CutError


def test_flipped_bits_in_the_state_change_no_weight(tmp_path: Path) -> None:
    """Oracle: TrainingError, or exactly the state that was saved (a bit of a time stamp), for 150 bits of the file."""
    generator = torch.Generator().manual_seed(3)
    saved = RunState(model={f"w{i}": torch.randn(30, 30, generator=generator) for i in range(8)}, price=0.25)
    save_state(tmp_path, saved)
    whole, refused = (tmp_path / STATE_FILE).read_bytes(), 0
    for bit in torch.randint(8 * len(whole), (150,), generator=generator).tolist():
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        (tmp_path / STATE_FILE).write_bytes(damaged)
        try:
            found = load_state(tmp_path)
        except TrainingError:
            refused += 1
            continue
        assert found is not None
        assert all(torch.equal(found.model[name], weight) for name, weight in saved.model.items())
        assert found.model.keys() == saved.model.keys()
        assert replace(found, model={}) == replace(saved, model={})
    assert refused > 100


def test_a_damaged_state_is_reported(straight: tuple[Path, Recorder], tmp_path: Path) -> None:
    """Oracle: TrainingError with the file's name, no traceback of torch."""
    out = tmp_path / "run"
    with pytest.raises(CutError):
        train(request(out), CONFIG, Recorder(cut_in=("adapt", 1)))
    state = out / STATE_FILE
    whole = state.read_bytes()
    for damaged in (whole[:1000], whole[:5000], whole[: len(whole) // 2], b""):  # torch's error depends on the length
        state.write_bytes(damaged)
        with pytest.raises(TrainingError, match=r"state\.pt: the run's state cannot be read"):
            train(request(out), CONFIG, Recorder())
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
    middle = largest.header_offset + largest.file_size // 2 + 100  # a weight: the pickle does not notice
    state.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    with pytest.raises(TrainingError, match=r"cannot be read \(truncated or damaged .* another checksum"):
        train(request(out), CONFIG, Recorder())
    blob = torch.load(io.BytesIO(whole), weights_only=True)
    for wrong in ({"epoch": "x"}, {"phase": 1.5}, {"phase": -1}):
        torch.save(blob | wrong, state)
        with pytest.raises(TrainingError, match=r"phase and epoch are no counts"):
            train(request(out), CONFIG, Recorder())
    torch.save(blob | {"epoch": 3, "optimisers": [{"state": {}, "param_groups": []}]}, state)
    with pytest.raises(TrainingError, match=r"holds other optimisers than pretrain's"):
        train(request(out), CONFIG, Recorder())
    torch.save(blob | {"precisions": [3]}, state)
    with pytest.raises(TrainingError, match=r"its precisions are none"):
        train(request(out), CONFIG, Recorder())
    torch.save(blob | {"phase": 99}, state)
    with pytest.raises(TrainingError, match=r"beyond its last epoch"):
        train(request(out), CONFIG, Recorder())
    torch.save(blob | {"history": [{}]}, state)
    with pytest.raises(TrainingError, match=r"cannot be read \(an epoch of its history names no phase\)"):
        train(request(out), CONFIG, Recorder())


def test_a_folder_of_something_else_is_not_touched(tmp_path: Path) -> None:
    """Oracle: the stranger's file is still there alone."""
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(TrainingError, match="holds no run"):
        train(request(tmp_path), CONFIG, Recorder())
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]


def test_base_only_gives_a_checkpoint_without_policy(tmp_path: Path) -> None:
    """Oracle: the loaded checkpoint, which then serves as a base."""
    base = train(request(tmp_path / "base", base_only=True), CONFIG, Recorder())
    found = load_checkpoint(base)
    assert found.policy is None
    recorder = Recorder()
    with pytest.raises(UsageError, match="nothing to train"):
        train(request(tmp_path / "run", initial=found, base="base", base_only=True), CONFIG, recorder)
    second = train(request(tmp_path / "run", initial=found, base="base"), CONFIG, recorder)
    assert recorder.rows[0]["phase"] == "adapt"
    assert load_checkpoint(second).policy is not None


@pytest.mark.parametrize(
    "config",
    [
        replace(CONFIG, pretrain=PretrainConfig(epochs=0)),
        replace(CONFIG, policy=replace(CONFIG.policy, estimator="leave_one_out", samples=1)),
        replace(CONFIG, policy=replace(CONFIG.policy, target_blocks=4.0)),
        replace(CONFIG, policy=replace(CONFIG.policy, exploration_bound=0.4)),
        replace(CONFIG, policy=replace(CONFIG.policy, input_pool=5)),
        replace(CONFIG, evaluation_batch=0),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(config: TrainConfig, tmp_path: Path) -> None:
    """Oracle: UsageError, and no run folder."""
    with pytest.raises(UsageError):
        train(request(tmp_path / "run"), config, Recorder())
    assert not (tmp_path / "run").exists()


def test_leave_one_out_runs(tmp_path: Path) -> None:
    """Oracle: the run completes with two samples an image, no greedy baseline, and a teacher that sees every batch."""
    config = replace(
        CONFIG,
        distillation="live",
        finetune=replace(CONFIG.finetune, policy_share=0.5, full_share=0.2),
        policy=replace(CONFIG.policy, estimator="leave_one_out", samples=2, entropy_bonus=0.01),
        pretrain=replace(CONFIG.pretrain, epochs=1),
    )
    path = train(request(tmp_path / "run"), config, Recorder())
    assert load_checkpoint(path).training["complete"]
