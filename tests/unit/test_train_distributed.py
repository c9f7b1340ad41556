"""Training by two real processes over gloo against one process, and what happens when one of the two fails."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distributed_worker import CASES, LONGER, Learned, learned
from training_cases import Recorder, request

from bdexport.checkpoint import load_checkpoint
from bdexport.errors import UsageError
from bdexport.train.distributed import ALONE, World, check_batches, joined
from bdexport.train.pipeline import train
from bdexport.train.prepare import chosen_device
from bdexport.train.state import load_state

WORKER = Path(__file__).with_name("distributed_worker.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
TOLERANCE = 2e-5  # of weights, figures and remembered outcomes
PATIENCE_S = 250  # far more than any of this takes on a free machine; a hang would last for distributed.TIMEOUT_S


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}  # what this test can import
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False, env=environment)


def errors_in(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("bdexport: error:")]


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """What two processes left and said until one of them failed (see distributed_worker.py)."""
    out = tmp_path_factory.mktemp("two")
    return out, run([*TORCHRUN, str(WORKER), str(out)])


def differences(one: Learned, other: Learned) -> dict[str, float]:
    """The largest difference of every tensor that both have in one shape; infinite for another shape."""
    assert one.keys() == other.keys()
    return {name: _difference(one[name], other[name]) for name in one}


def _difference(one: torch.Tensor, other: torch.Tensor) -> float:
    if one.shape != other.shape:
        return float("inf")
    return float((one.double() - other.double()).abs().max()) if one.numel() else 0.0


Together = tuple[Path, subprocess.CompletedProcess[str]]


@pytest.mark.parametrize("name", CASES)
def test_steps_of_two_processes_are_those_of_one(name: str, together: Together) -> None:
    """Oracle: what one process has learned after three steps, to float32's rounding (batch norm in eval mode)."""
    expected = learned(CASES[name], ALONE)
    got = torch.load(together[0] / "steps.pt", weights_only=True)[name]
    beyond = {what: found for what, found in differences(expected, got).items() if not found < TOLERANCE}
    assert not beyond, f"largest differences: {beyond}"
    weights = {what: tensor for what, tensor in expected.items() if what.startswith("model.")}
    fresh = {what: tensor for what, tensor in learned(CASES[name], ALONE, steps=0).items() if what in weights}
    assert max(differences(weights, fresh).values()) > 1e-3  # it has learned anything at all


def test_a_whole_run_of_two_processes_learns_as_much(together: Together, tmp_path: Path) -> None:
    """Oracle: one process's validation accuracy; each normalises by half of the batch, which is another noise.

    One process alone ends between 83 and 89 % with three seeds.
    """
    train(request(tmp_path / "run", base_only=True), LONGER, Recorder())
    one, two = (load_checkpoint(path).training for path in (tmp_path / "run", together[0] / "base"))
    assert two["complete"]
    assert two["processes"] == 2
    assert two["validation"]["full_accuracy"] == pytest.approx(one["validation"]["full_accuracy"], abs=10)


@pytest.mark.parametrize("which", ["", "-marginal"])
def test_two_processes_resume_to_the_same_end(which: str, together: Together) -> None:
    """Oracle: the uninterrupted run of two processes, bit for bit."""
    expected, got = (load_checkpoint(together[0] / f"{name}{which}") for name in ("straight", "resumed"))
    assert all(torch.equal(expected.state[name], got.state[name]) for name in expected.state)
    assert expected.training["policy_statistics"] == got.training["policy_statistics"]
    assert sum(mask["count"] for mask in got.training["policy_statistics"]["masks"]) == 180


def test_a_process_that_fails_ends_the_run_with_one_message(together: Together) -> None:
    """Oracle: the one that failed speaks, the one that then lacks a partner does not; the last epoch is kept."""
    out, done = together
    assert done.returncode != 0
    (message,) = errors_in(done.stderr)
    assert "CutError" in message
    assert load_state(out / "failed") is not None


def test_processes_that_were_given_different_settings_are_refused(tmp_path: Path) -> None:
    """Oracle: the command line itself under torchrun: one message that names the setting, and no run folder."""
    out = tmp_path / "run"
    words = "train --arch resnet8 --dataset digits --preset smoke --device cpu --out"
    command = f'exec "{sys.executable}" -m bdexport {words} "{out}" --seed $RANK'
    done = run([*TORCHRUN, "--no-python", "bash", "-c", command])
    assert done.returncode != 0
    (message,) = errors_in(done.stderr)
    assert "rank 1 was given another run than rank 0: got settings.seed was 0, now 1" in message
    assert not out.exists()


def test_shards_are_the_batch_dealt_out() -> None:
    """Property: the shards of all processes are the whole, each row once; equal generators draw shards of one draw."""
    rows = torch.arange(12)
    worlds = [World(rank, 3) for rank in range(3)]
    assert torch.stack([world.mine(rows) for world in worlds], dim=1).flatten().tolist() == rows.tolist()
    assert all(len(world.mine(rows[:0])) == 0 for world in worlds)
    whole = torch.rand(2, 12, 5, generator=torch.Generator().manual_seed(1))
    for world in worlds:
        part = world.rand((2, 4, 5), torch.Generator().manual_seed(1), rows=1)
        assert torch.equal(part, whole[:, world.rank :: 3])


def test_a_batch_that_cannot_be_dealt_out_is_refused() -> None:
    """Oracle: the setting by name, and a batch near it that works."""
    with pytest.raises(UsageError, match=r"finetune\.batch.*multiple of 3.*--set finetune\.batch=129"):
        check_batches({"pretrain.batch": 96, "finetune.batch": 128}, World(0, 3))


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ({"WORLD_SIZE": "2"}, "there is no RANK"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE: got 'two'"),
    ],
)
def test_half_an_environment_is_refused(places: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the sentence names the variable; nothing waits for processes that nobody started."""
    for name, value in places.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=message), joined("cpu"):
        pass


def test_one_gpu_for_all_processes_is_refused() -> None:
    """Oracle: the error names device, number of processes and remedy."""
    with pytest.raises(UsageError, match=r"got cuda:0 for 2 processes, expected a GPU for each; use --device cuda"):
        chosen_device("cuda:0", World(0, 2, 0, 2))
