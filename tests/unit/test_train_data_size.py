"""Settings follow the size of the data set; every image is seen; what is few is said to be few."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from training_cases import CONFIG, CutError, Recorder, request

from bdexport.checkpoint import load_checkpoint
from bdexport.cli.main import main
from bdexport.config import AugmentConfig, preset
from bdexport.preprocess import Preprocess
from bdexport.train.data import Augmentation, DeviceImages, augmentation_for, steps_per_epoch
from bdexport.train.data_size import AS_THEY_ARE, FEWEST_STEPS, SMALLEST_BATCH, fitted_to_data, following_settings
from bdexport.train.pipeline import train
from bdexport.train.settings import with_assignments

SIZES = [20, 100, 160, 339, 420, 1257, 5000, 12_000, 22_499]


@pytest.mark.parametrize("name", ["smoke", "cpu", "marginal"])
@pytest.mark.parametrize("images", SIZES)
def test_small_data_sets_get_enough_steps(name: str, images: int) -> None:
    """Property: 20 steps an epoch in every phase, or the smallest batch; never a higher rate than the preset's."""
    usual = preset(name, 15)
    fitted = fitted_to_data(usual, usual, images, ())
    for phase in ("pretrain", "prime", "adapt", "curriculum", "finetune"):
        before, after = getattr(usual, phase), getattr(fitted, phase)
        share = getattr(after, "epoch_share", 1.0)
        steps = steps_per_epoch(images, after.batch, share, fitted.whole_epochs)
        assert steps >= FEWEST_STEPS or after.batch == SMALLEST_BATCH, phase
        assert after.batch <= before.batch
        for rate in ("learning_rate", "network_learning_rate", "policy_learning_rate"):
            if hasattr(after, rate):
                assert 0 < getattr(after, rate) <= getattr(before, rate)
        assert before.epochs <= after.epochs <= 3 * before.epochs
        # No data set is trained on for longer than one of CIFAR's size.
        assert images * after.epochs <= AS_THEY_ARE * max(1, before.epochs)


@pytest.mark.parametrize("name", ["smoke", "cpu", "marginal", "paper"])
def test_presets_are_what_they_were_at_the_size_of_cifar(name: str) -> None:
    """Oracle: the preset itself."""
    for images in (AS_THEY_ARE, 45_000, 1_281_167):
        assert fitted_to_data(preset(name, 15), preset(name, 15), images, ()) == preset(name, 15)
    assert fitted_to_data(preset("paper", 15), preset("paper", 15), 100, ()) == preset("paper", 15)


def test_what_the_user_sets_stays() -> None:
    """Oracle: the assignments; a rate that is left to the preset follows the batch that was given."""
    assignments = ["finetune.batch=64", "finetune.epochs=7", "adapt.learning_rate=0.5", "whole_epochs=false"]
    config = with_assignments(preset("cpu", 15), assignments)
    given = {assignment.partition("=")[0] for assignment in assignments}
    fitted = fitted_to_data(config, preset("cpu", 15), 340, given)
    assert (fitted.finetune.batch, fitted.finetune.epochs, fitted.adapt.learning_rate) == (64, 7, 0.5)
    assert fitted.whole_epochs is False
    assert fitted.finetune.network_learning_rate == pytest.approx(0.05 * 64 / 256)
    assert fitted.adapt.batch == 16
    everything = set(following_settings())
    assert fitted_to_data(config, preset("cpu", 15), 340, everything) == config


@pytest.mark.parametrize(("images", "batch"), [(10, 4), (339, 16), (17, 16), (5, 8), (33, 32)])
def test_a_whole_epoch_shows_every_image_once(images: int, batch: int) -> None:
    """Oracle: the rows are a permutation; no batch is larger than asked for, none smaller than half of it."""
    pixels = np.zeros((images, 4, 4, 3), np.uint8)
    data = DeviceImages(pixels, np.arange(images), Preprocess(size=(4, 4)), "cpu")
    generator = torch.Generator().manual_seed(1)
    batches = list(data.epoch(batch, 1.0, Augmentation(), generator, whole=True))
    assert sorted(row for one in batches for row in one.rows.tolist()) == list(range(images))
    assert len(batches) == steps_per_epoch(images, batch, 1.0, whole=True)
    sizes = [len(one.rows) for one in batches]
    assert max(sizes) <= batch
    assert min(sizes) >= min(images, batch) // 2


def test_mirroring_and_moving_are_switched_apart() -> None:
    """Oracle: the settings; without them, digits are not mirrored and photographs are."""
    assert augmentation_for("digits", AugmentConfig()) == Augmentation(2, False)
    assert augmentation_for("folder", AugmentConfig()) == Augmentation(4, True)
    assert augmentation_for("folder", AugmentConfig(mirror=False)) == Augmentation(4, False)
    assert augmentation_for("folder", AugmentConfig(shift=0)) == Augmentation(0, True)
    assert augmentation_for("digits", AugmentConfig(mirror=True, shift=9)) == Augmentation(9, True)


def test_few_steps_an_epoch_are_warned_of(tmp_path: Path) -> None:
    """Oracle: 512 images at batch 256 are two steps; the remedy has at least 20."""
    config = replace(CONFIG, pretrain=replace(CONFIG.pretrain, epochs=1, batch=256), whole_epochs=True)
    recorder = Recorder()
    train(request(tmp_path / "run", base_only=True), config, recorder)
    warned = [
        note
        for note in recorder.notes
        if note.startswith("warning: fewer than 20 steps") and "pretrain 2 (batch 256), from 512" in note
    ]
    assert len(warned) == 1
    batch = int(warned[0].rpartition("pretrain.batch=")[2])
    assert 512 // batch >= FEWEST_STEPS
    assert any("not mirrored (--mirror)" in note for note in recorder.notes)
    assert load_checkpoint(tmp_path / "run").training["augmentation"] == {"shift": 2, "flip": False}
    quiet = Recorder()
    config = replace(config, pretrain=replace(config.pretrain, batch=batch))
    train(request(tmp_path / "other", base_only=True), config, quiet)
    assert not [note for note in quiet.notes if "steps an epoch" in note]


TINY = ["train", "--arch", "resnet8", "--dataset", "digits", "--preset", "cpu", "--base-only", "--device", "cpu"]


def test_the_command_follows_the_data_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: what :func:`fitted_to_data` gives for 1,257 digits; the options switch augmentation."""
    line = [*TINY, "--pretrain-epochs", "1", "--mirror", "--shift", "0", "--out", str(tmp_path / "run")]
    assert main(line) == 0
    settings = load_checkpoint(tmp_path / "run").training["settings"]
    usual = preset("cpu", 3)
    expected = fitted_to_data(usual, usual, 1257, ()).pretrain
    assert settings["pretrain"]["batch"] == expected.batch < usual.pretrain.batch
    assert settings["pretrain"]["learning_rate"] == expected.learning_rate
    assert settings["pretrain"]["epochs"] == 1
    assert settings["augment"] == {"mirror": True, "shift": 0}
    err = " ".join(capsys.readouterr().err.split())  # wherever its lines are broken
    assert "settings follow the 1257 training images" in err
    assert "not moved (--shift N), every second one mirrored (--no-mirror)" in err


def test_a_run_that_an_older_version_began_goes_on_with_its_settings(tmp_path: Path) -> None:
    """Oracle: run.json as that version wrote it, without the setting; the run is resumed and keeps its batch."""
    out = tmp_path / "run"
    usual = preset("cpu", 3)
    epochs = replace(usual.pretrain, epochs=2)
    config = replace(usual, pretrain=epochs)
    asked = request(out, base_only=True)
    with pytest.raises(CutError):
        train(asked, config, Recorder(cut_in=("pretrain 2", 1)))
    description = json.loads((out / "run.json").read_text())
    for name in ("whole_epochs", "augment"):
        del description["settings"][name]
    (out / "run.json").write_text(json.dumps(description))
    recorder = Recorder()
    train(asked, config, recorder)
    assert [row["epoch"] for row in recorder.rows] == [2]
