"""Sliding a policy along its frontier: a shift of its logits meets a wanted mean."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import tiny_model

from bdexport.checkpoint import load_checkpoint
from bdexport.cli.main import main
from bdexport.errors import UsageError
from bdexport.retarget import policy_logits, retarget, shift_for


@pytest.mark.parametrize("target", [0.3, 1.0, 2.5, 4.99, 6.0])
def test_shift_meets_the_target(target: float) -> None:
    """Oracle: counting; at most the target, and less than one decision below it."""
    logits = np.random.default_rng(0).normal(size=(400, 6)).astype(np.float32)
    kept = (logits + shift_for(logits, target) >= 0).sum() / 400
    assert target - 1 / 400 <= kept <= target + 1e-9


def test_ties_at_the_line_are_all_dropped() -> None:
    """Oracle: by hand; half of the logits are equal, so that a mean of 1.5 of 2 can only be 1 or 2."""
    logits = np.array([[1.0, 0.0], [1.0, 0.0]], dtype=np.float32)
    assert (logits + shift_for(logits, 1.5) >= 0).tolist() == [[True, False], [True, False]]
    assert not (np.zeros((3, 2), dtype=np.float32) + shift_for(np.zeros((3, 2), dtype=np.float32), 1.0) >= 0).any()


@pytest.mark.parametrize("target", [0.0, -1.0, 6.5, float("nan")])
def test_targets_out_of_range_are_refused(target: float) -> None:
    """Oracle: the error names the range."""
    with pytest.raises(UsageError, match="at most 6"):
        shift_for(np.zeros((4, 6), dtype=np.float32), target)


def test_the_policy_itself_meets_the_target() -> None:
    """Oracle: the model's own masks after the shift."""
    model = tiny_model(stages=(2, 3))
    images = torch.randn(200, 3, 24, 32)
    logits = policy_logits(model, [(images, torch.zeros(200))])
    retarget(model, logits, 2.0)
    assert model.masks(images).float().sum(dim=1).mean().item() == pytest.approx(2.0, abs=0.01)


def test_an_existing_checkpoint_is_replaced_only_when_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: the file's bytes; with --overwrite, the validation mean that the result names."""
    out = tmp_path / "there.safetensors"
    out.write_bytes(b"precious")
    line = ["retarget", "zoo:resnet20-digits", "--target-blocks", "3", "--dataset", "digits", "--out", str(out)]
    assert main(line) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert out.read_bytes() == b"precious"
    assert main([*line, "--overwrite"]) == 0
    assert load_checkpoint(out).training["policy_statistics"]["blocks_used"]["mean"] == pytest.approx(3.0, abs=0.3)
