"""The marginal estimator: what blocks are worth, levels that stay together, a price that meets the budget."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import tiny_model
from torch import nn
from training_cases import MARGINAL, CutError, Recorder, request

from bdexport.checkpoint import build_model, load_checkpoint
from bdexport.config import TrainConfig
from bdexport.errors import UsageError
from bdexport.train.loop import restore
from bdexport.train.marginal import LOGIT_LIMIT, FinetuneMargins, tie_levels, worth
from bdexport.train.phases import Setting
from bdexport.train.pipeline import train
from bdexport.train.state import load_state


def test_worth_is_points_of_accuracy_per_block() -> None:
    """Oracle: by hand; levels of 1, 3 and 4 of 5 blocks, guessing among two classes before the first."""
    success = torch.tensor([[0.6, 0.8, 0.9]])
    value = worth(success, [1, 3, 4], order=[4, 2, 0, 3, 1], chance=0.5)
    # the most important block is 1, then 3 and 0, then 2; block 4 is in no level
    assert value[0].tolist() == pytest.approx([10.0, 10.0, 10.0, 10.0, -LOGIT_LIMIT], abs=1e-4)
    steeper = worth(torch.tensor([[0.6, 0.6, 0.9]]), [1, 3, 4], [4, 2, 0, 3, 1], 0.5)
    assert steeper[0].tolist() == pytest.approx([0.0, 10.0, 30.0, 0.0, -LOGIT_LIMIT], abs=1e-4)


def test_blocks_of_a_level_share_a_row() -> None:
    """Oracle: equal outputs for any features within a level, and not between levels."""
    torch.manual_seed(0)
    last = nn.Linear(7, 5)
    tie_levels(last, [1, 3, 4], [4, 2, 0, 3, 1])
    with torch.no_grad():
        out = last(torch.randn(6, 7))
    assert torch.equal(out[:, 3], out[:, 0])
    assert len({tuple(column) for column in out.T.tolist()}) == 4


def test_the_price_brings_usage_to_the_target() -> None:
    """Oracle: counting; after steps on the same logits, greedy masks keep the target."""
    model = tiny_model(stages=(2, 2))
    config = replace(TrainConfig(), policy=replace(MARGINAL.policy, target_blocks=1.5))
    setting = Setting(model, [], None, config, "cpu", False, torch.Generator().manual_seed(0))
    phase = FinetuneMargins(setting)
    images = torch.randn(64, 3, 24, 32)
    with torch.no_grad():
        model.policy.fc.bias.fill_(5.0)
        for _ in range(200):
            phase._settle_price(model.policy.logits(images))
        used = (model.policy.logits(images) >= 0).float().sum(dim=1).mean().item()
    assert used == pytest.approx(1.5, abs=0.1)
    assert setting.price > 0  # what was taken from the logits


def test_a_run_resumes_to_the_same_end(tmp_path: Path) -> None:
    """Oracle: the uninterrupted run, bit for bit: critic, price and remembered outcomes are part of the state."""
    train(request(tmp_path / "straight"), MARGINAL, Recorder())
    with pytest.raises(CutError):
        train(request(tmp_path / "cut"), MARGINAL, Recorder(cut_in=("finetune 2", 3)))
    train(request(tmp_path / "cut"), MARGINAL, Recorder())
    expected, got = (load_checkpoint(tmp_path / name) for name in ("straight", "cut"))
    assert all(torch.equal(expected.state[name], got.state[name]) for name in expected.state)
    assert expected.training["policy_statistics"] == got.training["policy_statistics"]
    assert expected.policy is not None
    assert expected.policy.hidden == 16
    mean = expected.training["validation"]["policy"]["blocks_used"]["mean"]
    assert mean <= 2.0 + 1e-9


def test_what_was_remembered_goes_to_the_device_of_the_run(tmp_path: Path) -> None:
    """Oracle: the device that the run was given; a state is read to the CPU, and a step joins old and new outcomes."""
    train(request(tmp_path / "run"), MARGINAL, Recorder())
    state = load_state(tmp_path / "run")
    assert state is not None
    setting = Setting(
        build_model(load_checkpoint(tmp_path / "run")), [], None, MARGINAL, "cpu", False, torch.Generator()
    )
    setting.device = "meta"
    restore(state, setting)
    assert setting.memory is not None
    assert [part.device.type for part in setting.memory] == ["meta", "meta"]


HIGH = replace(MARGINAL.policy, target_blocks=3.0)


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (replace(MARGINAL, adapt=replace(MARGINAL.adapt, levels="")), "no levels"),
        (replace(MARGINAL, adapt=replace(MARGINAL.adapt, levels="2")), "two levels or more"),
        (replace(MARGINAL, policy=replace(MARGINAL.policy, target_blocks=0.5)), "a budget between them"),
        (replace(MARGINAL, adapt=replace(MARGINAL.adapt, levels="2,1"), policy=HIGH), "a budget between them"),
        (replace(MARGINAL, policy=replace(MARGINAL.policy, target_blocks=None)), "no block budget"),
    ],
)
def test_what_it_needs_is_asked_for(config: TrainConfig, text: str, tmp_path: Path) -> None:
    """Oracle: the message names what is missing, before anything is written."""
    with pytest.raises(UsageError, match=text):
        train(request(tmp_path / "run"), config, Recorder())
    assert not (tmp_path / "run").exists()
