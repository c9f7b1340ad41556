"""Settings that a run would not use are refused, whatever their value."""

from __future__ import annotations

import pytest

from bdexport.config import TrainConfig, preset
from bdexport.errors import UsageError
from bdexport.train.settings import with_assignments
from bdexport.train.unused import check_used

NO_BASE = {"with_base": False, "base_only": False, "goes_on": False}
ONLY_BASE = NO_BASE | {"with_base": True}


def config_of(name: str, *assignments: str) -> TrainConfig:
    return with_assignments(preset(name, 15), list(assignments))


@pytest.mark.parametrize(
    ("name", "given", "situation", "why"),
    [
        ("cpu", ["pretrain.epochs=7"], {"with_base": True}, "trained already"),
        ("cpu", ["policy.widths=8,8,8"], {"with_base": True, "goes_on": True}, "what decides in the base"),
        ("cpu", ["policy.initial_keep_logit=3"], {"with_base": True, "goes_on": True}, "what decides in the base"),
        ("cpu", ["finetune.epochs=2"], {"base_only": True}, "--base-only"),
        ("cpu", ["halting.margin=0.4"], {}, "method blockdrop"),
        ("cpu", ["fixed.mask=search"], {}, "method blockdrop"),
        ("cpu", ["policy.cuts=17"], {}, "estimator self_critical"),
        ("cpu", ["policy.memory=17"], {}, "estimator self_critical"),
        ("cpu", ["distillation_weight=0", "distillation=cached"], {}, "without distillation"),
        ("marginal", ["finetune.optimiser=adam"], {}, "SGD"),
        ("marginal", ["policy.entropy_bonus=3"], {}, "estimator marginal"),
        ("marginal", ["policy.wrong_prediction_penalty=7"], {}, "estimator marginal"),
        ("cpu", ["method=fixed", "policy.target_blocks=1"], {}, "no policy to learn"),
        ("cpu", ["method=fixed", "finetune.full_share=0.5"], {}, "method fixed"),
        ("cpu", ["method=fixed", "curriculum.epochs=5"], {}, "no such phase"),
        ("cpu", ["method=fixed", "fixed.mask=111111100000000", "fixed.kept=3"], {}, "says itself what it keeps"),
        ("cpu", ["method=fixed", "fixed.mask=first-k", "fixed.search_images=3"], {}, "the mask first-k"),
        ("cpu", ["method=act", "adapt.epochs=5"], {}, "no such phase"),
        ("marginal", ["method=act", "adapt.levels=15,7"], {}, "no such phase"),
        ("cpu", ["method=act", "halting.initial_logit=1"], {"with_base": True, "goes_on": True}, "what decides"),
        ("cpu", ["method=sequential", "policy.cuts=3"], {}, "estimator self_critical"),
        ("cpu", ["method=fixed", "policy.widths=8,8,8"], {"with_base": True}, "no policy to learn"),
        ("cpu", ["retarget=false"], {"base_only": True}, "--base-only"),
        ("cpu", ["method=sequential", "policy.hidden=7"], {}, "no policy network"),
        ("cpu", ["adapt.epochs=0", "adapt.batch=7"], {}, "without epochs of adapt"),
        ("marginal", ["adapt.epochs=0", "adapt.full_share=0.5"], {}, "without epochs of adapt"),
        ("cpu", ["adapt.epochs=0", "adapt.levels=15,7"], {}, "without epochs of adapt"),
        ("cpu", ["finetune.epochs=0", "finetune.schedule=step"], {}, "without epochs of finetune"),
        ("cpu", ["adapt.full_share=0.5"], {}, "without adapt.levels"),
        ("marginal", ["adapt.keep_low=0.5"], {}, "with adapt.levels"),
        ("paper", ["policy.budget_weight=7"], {}, "without a budget"),
        ("cpu", ["policy.order_spread=2"], {}, "without policy.order_images"),
    ],
)
def test_they_are_refused(name: str, given: list[str], situation: dict[str, bool], why: str) -> None:
    """Oracle: by hand, from what each phase reads; the last one given is at fault, the others are not."""
    with pytest.raises(UsageError, match=rf"--set {given[-1].partition('=')[0]} has no effect .*{why}"):
        check_used({}, given, config_of(name, *given), **(NO_BASE | situation))


@pytest.mark.parametrize(
    ("name", "given", "situation"),
    [
        ("marginal", ["adapt.epochs=0", "adapt.levels=15,7", "adapt.order_images=64"], {"with_base": True}),
        ("cpu", ["policy.target_blocks=7", "policy.budget_weight=7"], {}),
        ("cpu", ["policy.order_images=50", "policy.order_spread=2"], {}),
        ("cpu", ["adapt.levels=15,7", "adapt.full_share=0.5", "adapt.order_images=64"], {}),
        ("cpu", ["adapt.keep_low=0.5", "adapt.keep_high=0.8"], {}),
        ("marginal", ["prime.epochs=0"], {"with_base": True, "goes_on": True}),
        ("cpu", ["method=sequential", "policy.learns=all", "finetune.level_share=0"], {}),
        ("cpu", ["method=sequential", "policy.order_images=50", "policy.initial_keep_logit=2"], {"with_base": True}),
        ("cpu", ["seed=3", "pretrain.epochs=2", "validation_share=0.2"], {"base_only": True}),
        ("cpu", ["method=act", "halting.ponder_weight=0.05", "finetune.network_learning_rate=0.1"], {}),
        ("cpu", ["method=fixed", "fixed.mask=search", "fixed.kept=7", "fixed.search_images=30"], {}),
        ("cpu", ["policy.estimator=gumbel", "policy.temperature=0.5", "policy.samples=2"], {}),
        ("cpu", ["policy.estimator=nested", "policy.cuts=3", "policy.softness=0.1"], {}),
        ("cpu", ["policy.widths=8,8,8", "policy.stem_stride=2"], {"with_base": True}),
        ("cpu", ["retarget=false", "recalibrate_images=0", "seed=3"], {"with_base": True, "goes_on": True}),
    ],
)
def test_others_pass(name: str, given: list[str], situation: dict[str, bool]) -> None:
    """Oracle: what the documents and benchmarks of this project set."""
    check_used({}, given, config_of(name, *given), **(NO_BASE | situation))


def test_options_are_judged_like_settings() -> None:
    """Oracle: the option's own name in the message; a batch is every phase's, whichever the run has."""
    config = config_of("marginal")
    check_used({"pretrain.batch": 64, "finetune.batch": 64, "policy.reward": None}, [], config, **ONLY_BASE)
    with pytest.raises(UsageError, match=r"^--gamma has no effect with estimator marginal; leave it out"):
        check_used({"policy.wrong_prediction_penalty": 7.0}, [], config, **ONLY_BASE)
    with pytest.raises(UsageError, match=r"^--pretrain-epochs has no effect with --base"):
        check_used({"pretrain.epochs": 3}, [], config, **ONLY_BASE)
