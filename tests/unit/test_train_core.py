"""A core path that stays as it is while other blocks learn on top of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_train_marginal import MARGINAL
from test_train_run import CONFIG, Recorder, request
from tiny import tiny_model

from bdexport.checkpoint import build_model, load_checkpoint
from bdexport.config import FixedConfig, PretrainConfig, TrainConfig
from bdexport.errors import UsageError
from bdexport.mask_search import drop_order
from bdexport.train.pipeline import train

CORE = "101"
FIXED = replace(
    CONFIG,
    method="fixed",
    core=CORE,
    adapt=replace(CONFIG.adapt, epochs=0),
    pretrain=PretrainConfig(epochs=0),
    fixed=FixedConfig(mask="111"),
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network trained with every block kept."""
    out = tmp_path_factory.mktemp("core") / "base"
    train(request(out, base_only=True), replace(CONFIG, pretrain=replace(CONFIG.pretrain, epochs=2)), Recorder())
    return out


def logits_under(path: Path, mask: str) -> torch.Tensor:
    """What the network gives for the same random images under ``mask``."""
    network = build_model(load_checkpoint(path), with_policy=False).network.eval()
    images = torch.randn(32, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    masks = torch.tensor([keep == "1" for keep in mask]).expand(len(images), -1)
    with torch.no_grad():
        return network.forward_masked(images, masks)


def test_the_core_path_gives_what_it_gave_and_the_deeper_one_learns(base: Path, tmp_path: Path) -> None:
    """Oracle: the base's own logits, bit for bit, under the core's mask; under the deeper one a higher accuracy."""
    recorder = Recorder()
    train(request(tmp_path / "run", initial=load_checkpoint(base), base="base"), FIXED, recorder)
    assert torch.equal(logits_under(tmp_path / "run", CORE), logits_under(base, CORE))
    assert not torch.equal(logits_under(tmp_path / "run", "111"), logits_under(base, "111"))
    losses = [row["train"]["loss"] for row in recorder.rows]
    assert losses[-1] < losses[0]
    before, after = load_checkpoint(base).state, load_checkpoint(tmp_path / "run").state
    changed = {name.removeprefix("network.blocks.")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"1"}  # the block beside the core


def test_the_core_is_dropped_last() -> None:
    """Oracle: the same elimination without a core puts another block last."""
    model = tiny_model(stages=(2, 2)).network.eval()
    batches = [(torch.randn(16, 3, 24, 32), torch.randint(0, 3, (16,)))]
    free = drop_order(model, batches)
    core = frozenset(free[:2])  # those that it would drop first
    order = drop_order(model, batches, core)
    assert sorted(order) == [0, 1, 2, 3]
    assert set(order[2:]) == core


def test_the_policy_chooses_between_the_core_and_more(base: Path, tmp_path: Path) -> None:
    """Oracle: every image runs the core's blocks or all, and the frozen network is the base's, bit for bit."""
    config = replace(
        MARGINAL,
        core="011",
        pretrain=PretrainConfig(epochs=0),
        adapt=replace(MARGINAL.adapt, epochs=0, levels="3,2"),
        finetune=replace(MARGINAL.finetune, epochs=0),
        policy=replace(MARGINAL.policy, target_blocks=2.5),
        recalibrate_images=0,
        distillation_weight=0.0,
    )
    initial = load_checkpoint(base)
    train(request(tmp_path / "run", initial=initial, base="base", fresh_policy=True), config, Recorder())
    trained = load_checkpoint(tmp_path / "run")
    masks = {entry["mask"] for entry in trained.training["policy_statistics"]["masks"]}
    assert masks <= {"011", "111"}
    assert "111" in masks
    network = {name for name in initial.state if name.startswith("network.")}
    assert all(torch.equal(initial.state[name], trained.state[name]) for name in network)


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (replace(FIXED, core="10"), "a mask of 3 characters"),
        (replace(FIXED, core="111"), "some 0 and some 1"),
        (replace(FIXED, fixed=FixedConfig(mask="101")), "others to train"),
        (replace(FIXED, fixed=FixedConfig(mask="011")), "the core's blocks"),
        (replace(FIXED, fixed=FixedConfig(mask="distribute-k", kept=3)), "search, or a text of 0 and 1"),
        (replace(FIXED, fixed=FixedConfig(mask="search", kept=2)), "more than the core's 2 blocks"),
        (replace(FIXED, adapt=replace(FIXED.adapt, epochs=2)), "2 epochs of adapt"),
        (replace(CONFIG, core=CORE), "estimator self_critical"),
        (replace(MARGINAL, core=CORE, adapt=replace(MARGINAL.adapt, levels="3,1")), "2 among them, like 3,2"),
    ],
)
def test_a_core_that_cannot_work_is_refused(config: TrainConfig, text: str, base: Path, tmp_path: Path) -> None:
    """Oracle: the message says what is expected, before anything is written."""
    with pytest.raises(UsageError, match=text):
        train(request(tmp_path / "run", initial=load_checkpoint(base), base="base"), config, Recorder())
    assert not (tmp_path / "run").exists()
