"""What a run that goes astray says: settings that exist, and that matter to the method and the estimator."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
from training_cases import CONFIG, Recorder, request

from bdexport.config import Estimator, FinetuneConfig, Method, PolicyConfig, TrainConfig, preset
from bdexport.errors import DivergedError
from bdexport.train.advice import against_collapse, against_one_mask, calmer, last_learned
from bdexport.train.pipeline import train
from bdexport.train.settings import with_assignments


def settings_in(text: str) -> list[str]:
    """NAME=VALUE of every --set in an advice that has a value."""
    return re.findall(r"--set (\S+=[^ ,)]+)", text)


def config_of(estimator: Estimator, target: float | None) -> TrainConfig:
    return replace(preset("cpu", 15), policy=PolicyConfig(estimator=estimator, target_blocks=target))


@pytest.mark.parametrize("keeps", [True, False])
@pytest.mark.parametrize(
    ("estimator", "target"),
    [(name, target) for name in get_args(Estimator) for target in (None, 7.0) if (name, target) != ("marginal", None)],
)
def test_gamma_is_named_where_it_decides(estimator: Estimator, target: float | None, keeps: bool) -> None:
    """Oracle: the losses: with a budget, or with values for logits, gamma does not set the mean usage.

    Marginal without a budget is refused.
    """
    config = config_of(estimator, target)
    text = against_collapse(config, keeps)
    assert ("--gamma" in text) == (target is None)
    assert ("policy.budget_weight=60" in text) == (target is not None and estimator != "marginal")
    assert text.startswith("lower" if keeps else "raise") or "budget_weight" in text
    changed = with_assignments(config, settings_in(text))
    assert (changed != config) == (target is not None)


@pytest.mark.parametrize(
    ("group", "part", "bf16", "expected"),
    [
        ("finetune", "network", False, "--set finetune.network_learning_rate=0.017"),
        ("finetune", "policy", False, "--set finetune.policy_learning_rate=0.00017"),
        ("finetune", "gates", True, "--set finetune.policy_learning_rate=0.00017, or --precision fp32"),
        ("curriculum", "policy", True, "--set curriculum.learning_rate=0.00033, or --precision fp32"),
    ],
)
def test_a_third_of_the_learning_rate_that_diverged(group: str, part: str, bf16: bool, expected: str) -> None:
    """Oracle: by hand, of the preset cpu; fp32 is advised only where it is not what ran."""
    assert calmer(preset("cpu", 15), group, part, bf16) == f"in another --out, try {expected}"


def test_a_heavy_loss_is_named_beside_the_rate() -> None:
    """Oracle: by hand; a weight of 1e30 needs no high rate to diverge."""
    heavy = with_assignments(preset("cpu", 15), ["distillation_weight=1e30"])
    assert calmer(heavy, "finetune", "network", bf16=False).endswith(", or --distillation 1")
    heavy = with_assignments(preset("cpu", 15), ["method=act", "halting.ponder_weight=1e30"])
    assert calmer(heavy, "finetune", "network", bf16=False).endswith(", or --set halting.ponder_weight=0.01")


def test_a_frozen_network_was_spoiled_by_the_phase_before() -> None:
    """Oracle: by hand, of the preset cpu."""
    assert last_learned(preset("cpu", 15), "curriculum") == "adapt"
    none = with_assignments(preset("cpu", 15), ["adapt.epochs=0"])
    assert last_learned(none, "curriculum") == "pretrain"
    assert last_learned(with_assignments(none, ["pretrain.epochs=0"]), "curriculum") == "curriculum"


@pytest.mark.parametrize(
    ("method", "estimator", "there", "missing"),
    [
        ("blockdrop", "self_critical", "--preset marginal", "--prime-epochs"),
        ("blockdrop", "marginal", "--prime-epochs", "--preset marginal"),
        ("sequential", "self_critical", "the gates give", "--target-blocks"),
    ],
)
def test_one_mask_for_all_images(method: Method, estimator: Estimator, there: str, missing: str) -> None:
    """Oracle: nobody is sent to where he is; gates do not know the marginal estimator."""
    text = against_one_mask(replace(config_of(estimator, 7.0), method=method))
    assert there in text
    assert missing not in text
    assert "the same mask" in text


@pytest.mark.parametrize("estimator", ["marginal", "self_critical"])
@pytest.mark.parametrize("part", ["network", "policy"])
def test_a_policy_that_diverges_is_told_from_the_network(tmp_path: Path, part: str, estimator: Estimator) -> None:
    """Oracle: one learning rate is the wild one; the message names it and not the other."""
    wild = replace(
        CONFIG,
        pretrain=replace(CONFIG.pretrain, epochs=1),
        adapt=replace(CONFIG.adapt, epochs=0, levels="3,1", order_images=64),
        curriculum=replace(CONFIG.curriculum, epochs=0),
        finetune=FinetuneConfig(epochs=1, batch=64),
        policy=PolicyConfig(estimator=estimator, target_blocks=2.0),
    )
    wild = with_assignments(wild, [f"finetune.{part}_learning_rate=1e30"])
    with pytest.raises(DivergedError, match=r"finetune: the .*loss is") as caught:
        train(request(tmp_path / "run"), wild, Recorder())
    assert f"--set finetune.{part}_learning_rate=3.3e+29" in str(caught.value)
