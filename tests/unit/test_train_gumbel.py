"""The Gumbel-sigmoid estimator: gated networks, straight-through gates, and training with them."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from training_cases import Recorder, request

from bdexport.architecture import PolicySpec, ResNetSpec
from bdexport.checkpoint import load_checkpoint
from bdexport.config import (
    AdaptConfig,
    CurriculumConfig,
    FinetuneConfig,
    PolicyConfig,
    PretrainConfig,
    TrainConfig,
)
from bdexport.errors import UsageError
from bdexport.models.pair import BlockDropNet
from bdexport.models.resnet import ResNet
from bdexport.train.data import Batch
from bdexport.train.gumbel import relaxed_gates, sample_gates, straight_through
from bdexport.train.phases import Curriculum, Finetune, PolicyPhase, Setting
from bdexport.train.pipeline import train
from bdexport.train.settings import with_assignments

TINY = ResNetSpec("cifar", "basic", (1, 1, 1), (4, 4, 8), "option_a", 10)
POLICY = PolicySpec("cifar", (1, 1), (4, 8), TINY.num_blocks)


# ---- the gated network ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shortcut", ["avgpool", "option_a", "conv"])
@pytest.mark.parametrize("rule", ["shortcut", "shortcut_relu"])
@pytest.mark.parametrize("kind", ["basic", "bottleneck"])
def test_gates_of_zero_and_one_are_masks(shortcut: str, rule: str, kind: str) -> None:
    """Oracle: forward_masked in eval mode, for random masks and for all kept and all dropped."""
    torch.manual_seed(0)
    spec = ResNetSpec("cifar", kind, (1, 2, 1), (8, 8, 16), shortcut, 10, rule)  # type: ignore[arg-type]
    network = ResNet(spec).eval()
    images, masks = torch.randn(9, 3, 16, 16), torch.rand(9, spec.num_blocks) < 0.5
    masks[0], masks[1] = True, False
    with torch.no_grad():
        got, expected = network.forward_gated(images, masks.float()), network.forward_masked(images, masks)
    assert torch.allclose(got, expected, atol=1e-5), (got - expected).abs().max()


@pytest.mark.parametrize("rule", ["shortcut", "shortcut_relu"])
def test_gradient_of_soft_gates_is_the_slope(rule: str) -> None:
    """Oracle: finite differences in float64 (torch.autograd.gradcheck), for gates inside 0..1."""
    torch.manual_seed(0)
    spec = ResNetSpec("cifar", "basic", (1, 1), (4, 8), "conv", 3, rule)  # type: ignore[arg-type]
    network = ResNet(spec).double().eval().requires_grad_(False)
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    gates = (0.1 + 0.8 * torch.rand(2, 2, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(lambda g: network.forward_gated(images, g), gates, eps=1e-6, atol=1e-6)


def test_bfloat16_keeps_gates_of_zero_and_one() -> None:
    """Oracle: forward_masked under the same autocast."""
    torch.manual_seed(0)
    network = ResNet(TINY).eval()
    images, masks = torch.randn(5, 3, 16, 16), torch.rand(5, 3) < 0.5
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        got, expected = network.forward_gated(images, masks.float()), network.forward_masked(images, masks)
    assert torch.allclose(got.float(), expected.float(), atol=2e-2 * expected.float().abs().max().item())


# ---- the gates -----------------------------------------------------------------------------------------------------


def test_gates_are_bernoulli_draws() -> None:
    """Oracle: exactly 0 and 1; rates within five standard errors, whatever the temperature; closed ones are 1."""
    probabilities = torch.tensor([[0.3, 0.1, 0.6, 0.95]]).expand(2000, -1)
    for temperature in (0.3, 3.0):
        gates = sample_gates(probabilities, 3, 2, temperature, torch.Generator().manual_seed(0))
        assert gates.shape == (2, 2000, 4)
        assert set(gates.flatten().tolist()) == {0.0, 1.0}
        assert (gates[..., 0] == 1).all()
        for rate, p in zip(gates.mean(dim=(0, 1))[1:].tolist(), (0.1, 0.6, 0.95), strict=True):
            assert abs(rate - p) < 5 * math.sqrt(p * (1 - p) / 4000)


def test_straight_through_is_hard_forward_and_soft_backward() -> None:
    """Oracle: the threshold, and finite differences of the relaxation itself, in float64."""
    p = torch.tensor([0.2, 0.5, 0.5, 0.9], dtype=torch.float64, requires_grad=True)
    u = torch.tensor([0.9, 0.5, 0.4, 0.02], dtype=torch.float64)
    gates = straight_through(relaxed_gates(p, u, 0.7))
    assert gates.tolist() == [float(q > 1 - v or q == 1 - v) for q, v in zip(p.tolist(), u.tolist(), strict=True)]
    (got,) = torch.autograd.grad(gates.sum(), p)
    h = 1e-6
    slope = (relaxed_gates(p.detach() + h, u, 0.7) - relaxed_gates(p.detach() - h, u, 0.7)) / (2 * h)
    assert torch.allclose(got, slope, atol=1e-6)


def test_low_temperatures_are_nearly_hard() -> None:
    """Oracle: the relaxed gate comes close to the hard one as the temperature goes to 0 (Maddison et al. 2017)."""
    p, u = torch.full((1000,), 0.4), torch.rand(1000, generator=torch.Generator().manual_seed(0))
    gaps = [
        (relaxed - (relaxed >= 0.5).float()).abs().mean().item()
        for relaxed in (relaxed_gates(p, u, temperature) for temperature in (2.0, 0.5, 0.05))
    ]
    assert gaps[0] > gaps[1] > gaps[2]
    assert gaps[2] < 0.02


def test_closed_blocks_get_no_gradient() -> None:
    """Oracle: zero for the blocks that the curriculum holds open, not zero for the others."""
    probabilities = torch.full((4, 5), 0.4, requires_grad=True)
    sample_gates(probabilities, 2, 1, 1.0, torch.Generator().manual_seed(0)).sum().backward()  # type: ignore[no-untyped-call]
    assert probabilities.grad is not None
    assert probabilities.grad[:, :3].abs().sum() == 0
    assert (probabilities.grad[:, 3:] > 0).all()


# ---- training ------------------------------------------------------------------------------------------------------

CONFIG = TrainConfig(
    precision="fp32",
    recalibrate_images=0,
    pretrain=PretrainConfig(epochs=4, batch=32, learning_rate=0.1),
    adapt=AdaptConfig(epochs=1, batch=64),
    curriculum=CurriculumConfig(epochs=2, batch=64, blocks_per_epoch=2, epoch_share=0.5, learning_rate=3e-3),
    finetune=FinetuneConfig(epochs=2, batch=64, policy_learning_rate=1e-3, full_share=0.1),
    policy=PolicyConfig(estimator="gumbel", reward="probability", target_blocks=2.0, wrong_prediction_penalty=1.0),
)


def setting(config: TrainConfig = CONFIG) -> Setting:
    torch.manual_seed(0)
    return Setting(BlockDropNet(TINY, POLICY), [], None, config, "cpu", False, torch.Generator().manual_seed(0))


def batch(count: int = 8) -> Batch:
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, 10, (count,), generator=generator)
    return Batch(torch.randn(count, 3, 16, 16, generator=generator), labels, torch.arange(count))


def test_policy_loss_teaches_the_policy_alone() -> None:
    """Oracle: gradients of the policy and of nothing else; the network's mode, statistics and parameters untouched."""
    found = setting()
    phase = Finetune(found)
    phase.start()
    phase.at(0.0)
    images, labels, _ = batch()
    before = {name: tensor.clone() for name, tensor in found.model.network.state_dict().items()}
    probabilities = phase._probabilities(images)
    rewards, loss = phase._gated(images, labels, probabilities, phase._gates(probabilities))
    loss.backward()  # type: ignore[no-untyped-call]
    assert rewards.shape == (1, 8)
    assert all(parameter.grad is None for parameter in found.model.network.parameters())
    assert found.model.policy.fc.weight.grad is not None
    assert found.model.policy.fc.weight.grad.abs().sum() > 0
    assert found.model.network.training
    assert all(parameter.requires_grad for parameter in found.model.network.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in found.model.network.state_dict().items())


def test_network_learns_the_same_as_with_the_other_estimators() -> None:
    """Oracle: its gradient after a step is that of the cross-entropy under the same masks, and nothing more."""
    config = replace(CONFIG, finetune=replace(CONFIG.finetune, full_share=0.0, network_learning_rate=0.0))
    found = setting(config)
    phase = Finetune(found)
    phase.start()
    phase.at(0.0)
    drawn: list[torch.Tensor] = []
    run = found.model.network.forward_masked
    found.model.network.forward_masked = lambda x, masks: (drawn.append(masks), run(x, masks))[1]  # type: ignore[method-assign,func-returns-value]
    phase.step(batch())
    got = {name: p.grad.clone() for name, p in found.model.network.named_parameters() if p.grad is not None}
    found.model.zero_grad()
    images, labels, _ = batch()
    torch.nn.functional.cross_entropy(run(images, drawn[0]), labels).backward()  # type: ignore[no-untyped-call]
    for name, parameter in found.model.network.named_parameters():
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        assert torch.allclose(got.get(name, torch.zeros_like(parameter)), expected, atol=1e-5), name


@pytest.mark.parametrize("phase_type", [Curriculum, Finetune])
def test_gradient_points_the_way_of_reinforce(phase_type: type[PolicyPhase]) -> None:
    """Oracle: the exact gradient of E[R] by the last layer's bias, summed over all eight masks of three blocks.

    Straight-through gates are biased: the direction is asked for, not the value.
    """
    config = replace(CONFIG, policy=replace(CONFIG.policy, samples=150, target_blocks=None, exploration_bound=1.0))
    config = replace(config, policy=replace(config.policy, finetune_bound_start=1.0, finetune_bound_end=1.0))
    found = setting(config)
    phase = phase_type(found)
    phase.start()
    phase.at(2.0)
    found.model.eval()
    images, labels, _ = batch(4)
    bias = found.model.policy.fc.bias
    probabilities = phase._probabilities(images)
    estimate = torch.autograd.grad(phase._gated(images, labels, probabilities, phase._gates(probabilities))[1], bias)[0]
    probabilities = phase._probabilities(images)
    expected = torch.zeros(())
    for number in range(8):
        mask = torch.tensor([[number >> block & 1 == 1 for block in range(3)]]).expand(4, -1)
        chance = torch.where(mask, probabilities, 1 - probabilities).prod(dim=1)
        with torch.no_grad():
            rewards = phase._rewards(found.model.network.forward_masked(images, mask), labels, mask)
        expected = expected - (chance * rewards).mean()
    exact = torch.autograd.grad(expected, bias)[0]
    assert torch.nn.functional.cosine_similarity(estimate, exact, dim=0) > 0.8


def test_a_run_with_gates_learns_and_meets_its_budget(tmp_path: Path) -> None:
    """Oracle: chance is 10 %, the budget 2 of 3 blocks."""
    rows = Recorder()
    train(request(tmp_path / "run"), CONFIG, rows)
    result = load_checkpoint(tmp_path / "run").training["validation"]["policy"]
    assert result["accuracy"] > 30
    assert 0 < result["blocks_used"]["mean"] < 2.5
    assert [row["phase"] for row in rows.rows if "reward" in row["train"]] == ["curriculum"] * 2 + ["finetune"] * 2


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        (
            ["policy.reward=correct"],
            "estimator gumbel: got reward correct, which has no gradient, expected --reward prob",
        ),
        (["policy.temperature=0"], "policy.temperature: got 0.0, expected 0.01 to 100"),
    ],
)
def test_settings_without_a_gradient_are_refused(assignments: list[str], message: str, tmp_path: Path) -> None:
    """Oracle: the sentence, and no folder."""
    with pytest.raises(UsageError, match=message):
        train(request(tmp_path / "run"), with_assignments(CONFIG, assignments), Recorder())
    assert not (tmp_path / "run").exists()
