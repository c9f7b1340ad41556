"""Settings that a run would not use: whoever sets one expects an effect, so that ``--set`` refuses it."""

from __future__ import annotations

from collections.abc import Iterable

from bdexport.config import TrainConfig
from bdexport.errors import UsageError
from bdexport.train.methods import phases_of

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
LEVELS = ("levels", "order_images")  # of the settings adapt: the marginal estimator has them, too
SHARES = ("policy_share", "full_share", "level_share", "policy_learning_rate")
TEACHING = ("distillation", "distillation_temperature", "mirrored_teacher")


def check_used(
    assignments: Iterable[str], config: TrainConfig, *, with_base: bool, base_only: bool, keeps_policy: bool
) -> None:
    """Raise :class:`UsageError` for the first ``NAME=VALUE`` whose setting this run does not use.

    ``keeps_policy``: the run goes on with the base's policy.
    """
    for assignment in assignments:
        path, _, value = (part.strip() for part in assignment.partition("="))
        if path.endswith(".epochs") and value == "0":  # none at all is what such a run gives
            continue
        why = _why_unused(path, config, with_base=with_base, base_only=base_only, keeps_policy=keeps_policy)
        if why is not None:
            raise UsageError(f"--set {path} has no effect {why}", remedy="leave it out")


def _why_unused(path: str, config: TrainConfig, *, with_base: bool, base_only: bool, keeps_policy: bool) -> str | None:
    group, _, name = path.rpartition(".")
    if base_only and group and group != "pretrain":
        return "with --base-only, which trains the base network and nothing else"
    if with_base and group == "pretrain":
        return "with --base, which is trained already"
    if keeps_policy and (group == "prime" or (group == "policy" and name in NETS + STARTS)):
        return "on the base's own policy (--fresh-policy leaves that aside)"
    if path in TEACHING and config.distillation_weight == 0:
        return "without distillation"
    return _why_unused_by_method(group, name, config)


def _why_unused_by_method(group: str, name: str, config: TrainConfig) -> str | None:
    phases = phases_of(config)
    has = {phase.settings or phase.name for phase in phases}
    method = f"with method {config.method}"
    if group in PHASES and group not in has and not (group == "adapt" and name in LEVELS):
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


def _why_unused_by_mask(name: str, mask: str) -> str | None:
    if name == "kept" and not set(mask) - {"0", "1"}:
        return "with a mask that says itself what it keeps"
    return f"with the mask {mask}" if name == "search_images" and mask != "search" else None


def _why_unused_by_policy(name: str, config: TrainConfig) -> str | None:
    if config.method == "sequential":
        return "with method sequential, which has no policy network" if name in NETS else None
    estimator = config.policy.estimator
    if name in IGNORED.get(estimator, ()) or any(name in own and who != estimator for who, own in OWN.items()):
        return f"with estimator {estimator}"
    return None


def _estimator(config: TrainConfig) -> str | None:
    return config.policy.estimator if config.method == "blockdrop" else None
