"""Training on a GPU: runs of every estimator and method come to their end, resume, and say what they ran on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args

import pytest
import torch
from gpu_cases import DEVICE, DRY_RUN
from training_cases import CONFIG, MARGINAL, CutError, Recorder, request

from bdexport.checkpoint import load_checkpoint
from bdexport.config import Estimator, Method, TrainConfig
from bdexport.train.pipeline import train

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", autouse=True)
def torch_with_cuda() -> None:
    """A torch that is built with CUDA; the driver alone is not enough."""
    if not torch.cuda.is_available() and not DRY_RUN:
        pytest.skip("this torch has no CUDA")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("estimator", get_args(Estimator))
def test_a_run_learns(estimator: Estimator, precision: Literal["fp32", "bf16"], tmp_path: Path) -> None:
    """Oracle: chance is 10 %; the record names the GPU."""
    samples = 3 if estimator == "leave_one_out" else 1
    sampled = replace(CONFIG, policy=replace(CONFIG.policy, estimator=estimator, samples=samples))
    config = MARGINAL if estimator == "marginal" else sampled
    train(request(tmp_path / "run", device=DEVICE), replace(config, precision=precision), Recorder())
    training = load_checkpoint(tmp_path / "run").training
    assert training["validation"]["full_accuracy"] > 30
    device = "cpu" if DRY_RUN else torch.cuda.get_device_name(DEVICE)
    assert (training["device"], training["precision"]) == (device, precision)


@pytest.mark.parametrize("method", [method for method in get_args(Method) if method != "blockdrop"])
def test_what_blockdrop_is_compared_with_learns(method: Method, tmp_path: Path) -> None:
    """Oracle: chance is 10 %."""
    config = replace(CONFIG, method=method, policy=replace(CONFIG.policy, target_blocks=None))
    config = replace(config, fixed=replace(CONFIG.fixed, kept=3))
    network = replace(request(tmp_path).network, stages=(2, 2, 2))  # a stage of one block cannot halt
    train(request(tmp_path / "run", device=DEVICE, network=network), config, Recorder())
    assert load_checkpoint(tmp_path / "run").training["validation"]["full_accuracy"] > 20


@pytest.mark.parametrize("phase", ["curriculum 1", "finetune 2"])
@pytest.mark.parametrize("config", [CONFIG, MARGINAL], ids=["self_critical", "marginal"])
def test_a_run_resumes(config: TrainConfig, phase: str, tmp_path: Path) -> None:
    """Oracle: the same call ends the run; bits may differ on a GPU, whose sums have no fixed order."""
    with pytest.raises(CutError):
        train(request(tmp_path / "run", device=DEVICE), config, Recorder(cut_in=(phase, 2)))
    recorder = Recorder()
    train(request(tmp_path / "run", device=DEVICE), config, recorder)
    assert any("resuming" in note for note in recorder.notes)
    assert load_checkpoint(tmp_path / "run").training["complete"]
