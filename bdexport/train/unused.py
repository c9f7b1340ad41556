"""Settings that a run would not use: whoever sets one, by an option or by ``--set``, expects an effect."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from bdexport.config import TrainConfig
from bdexport.errors import UsageError
from bdexport.train.methods import phases_of
from bdexport.train.settings import OPTION_OF

PHASES = ("pretrain", "prime", "adapt", "curriculum", "finetune")
NETS = ("hidden", "input_pool", "stem_stride", "stages", "widths")  # what the policy network is
STARTS = ("initial_keep_logit", "order_images", "order_spread")  # .. and where a fresh one starts
SAMPLED = ("exploration_bound", "finetune_bound_start", "finetune_bound_end", "samples")
OWN = {  # of the estimators: what each alone reads
    "nested": ("cuts", "softness"),
    "gumbel": ("temperature",),
    "marginal": ("memory", "lessons"),
}
IGNORED = {  # .. and what each has no use for
    "nested": SAMPLED,
    "marginal": (
        *SAMPLED,
        *("wrong_prediction_penalty", "reward", "entropy_bonus", "budget_weight", "learns", "order_images"),
        "order_spread",
    ),
}
OF_LEVELS = ("full_share", "order_images")  # of adapt: with levels only ..
OF_CHANCE = ("keep_low", "keep_high")  # .. and only without
SHARES = ("policy_share", "full_share", "level_share", "policy_learning_rate")
TEACHING = ("distillation", "distillation_temperature", "mirrored_teacher")
BATCH = "--batch"
OF_ANY_RUN = (
    *("seed", "precision", "validation_share", "evaluation_batch", "whole_epochs"),
    *("augment.mirror", "augment.shift"),
)


def check_used(
    options: Mapping[str, Any],
    assignments: Iterable[str],
    config: TrainConfig,
    *,
    with_base: bool,
    base_only: bool,
    goes_on: bool,
) -> None:
    """Raise :class:`UsageError` for the first setting that was asked for and that this run does not use.

    ``options``: settings by their names, as options of ``bdexport train`` gave them (None: not given); ``assignments``:
    ``NAME=VALUE`` of ``--set``; ``goes_on``: with the policy, or the gates, of the base
    (:func:`bdexport.train.request.goes_on`).
    """
    asked = [(OPTION_OF[path], path, str(value)) for path, value in options.items() if value is not None]
    for assignment in assignments:
        path, _, value = (part.strip() for part in assignment.partition("="))
        asked.append((f"--set {path}", path, value))
    for flag, path, value in asked:
        if flag == BATCH:  # of every phase, whichever the run has
            continue
        why = why_unused(path, value, config, with_base=with_base, base_only=base_only, goes_on=goes_on)
        if why is not None:
            raise UsageError(f"{flag} has no effect {why}", remedy="leave it out")


def why_unused(
    path: str, value: str, config: TrainConfig, *, with_base: bool, base_only: bool, goes_on: bool
) -> str | None:
    """In which run the setting has no effect, as in "with method fixed"; None where it has one."""
    if path.endswith(".epochs") and not value.strip("0"):  # none at all is what such a run gives
        return None
    group, _, name = path.rpartition(".")
    if base_only and group != "pretrain" and path not in OF_ANY_RUN:
        return "with --base-only, which trains the base network and nothing else"
    if with_base and group == "pretrain":
        return "with --base, which is trained already"
    if path in TEACHING and config.distillation_weight == 0:
        return "without distillation"
    why = _why_unused_by_method(group, name, config) or _why_unused_by_others(group, name, config)
    fresh_only = group == "prime" or path == "halting.initial_logit" or (group == "policy" and name in NETS + STARTS)
    if why is None and goes_on and fresh_only:
        why = "on what decides in the base already (--fresh-policy leaves that aside)"
    return why


def _why_unused_by_method(group: str, name: str, config: TrainConfig) -> str | None:
    phases = phases_of(config)
    has = {phase.settings or phase.name for phase in phases}
    method = f"with method {config.method}"
    if group in PHASES and group not in has:
        return f"{method}, which has no such phase"
    if group == "halting" and config.method not in ("act", "sact"):
        return method
    if group == "fixed":
        return method if config.method != "fixed" else _why_unused_by_mask(name, config.fixed.mask)
    if not any(phase.uses_policy for phase in phases):
        if group == "policy":
            return f"{method}, which has no policy to learn"
        return method if group == "finetune" and name in SHARES else None
    if group == "policy":
        return _why_unused_by_policy(name, config)
    if (group, name) == ("finetune", "optimiser") and _estimator(config) == "marginal":
        return "with estimator marginal, which has SGD"
    return None


def _why_unused_by_others(group: str, name: str, config: TrainConfig) -> str | None:
    """Settings that mean something only beside another one."""
    levels = bool(config.adapt.levels)
    of_the_estimator = levels and _estimator(config) == "marginal" and name in ("levels", "order_images")
    if group in PHASES and getattr(config, group).epochs == 0 and not (group == "adapt" and of_the_estimator):
        return f"without epochs of {group} (--{group}-epochs)"
    if group == "adapt" and name in (OF_CHANCE if levels else OF_LEVELS):
        return f"{'with' if levels else 'without'} adapt.levels"
    if group == "policy" and name == "budget_weight" and config.policy.target_blocks is None:
        return "without a budget (--target-blocks)"
    if group == "policy" and name == "order_spread" and config.policy.order_images == 0:
        return "without policy.order_images"
    return None


def _why_unused_by_mask(name: str, mask: str) -> str | None:
    if name == "kept" and not set(mask) - {"0", "1"}:
        return "with a mask that says itself what it keeps"
    return f"with the mask {mask}" if name == "search_images" and mask != "search" else None


def _why_unused_by_policy(name: str, config: TrainConfig) -> str | None:
    if config.method == "sequential" and name in NETS:
        return "with method sequential, which has no policy network"
    estimator = config.policy.estimator
    if name in IGNORED.get(estimator, ()) or any(name in own and who != estimator for who, own in OWN.items()):
        return f"with estimator {estimator}"
    return None


def _estimator(config: TrainConfig) -> str | None:
    return config.policy.estimator if config.method == "blockdrop" else None
