"""What to change when a run goes astray: the settings that matter to the method and the estimator that ran."""

from __future__ import annotations

from dataclasses import fields

from bdexport.config import TrainConfig

HEAVY = 100.0  # a loss weight beyond that is as likely at fault as a rate


def calmer(config: TrainConfig, group: str, part: str, bf16: bool) -> str:
    """Against a loss or a weight that is not finite.

    ``group``: of the settings that the phase takes its learning rates from; ``part``: ``network``, ``policy`` or
    ``gates``, whichever diverged.
    """
    rates = getattr(config, group)
    names = [field.name for field in fields(rates) if field.name.endswith("learning_rate")]
    own = "network_learning_rate" if part == "network" else "policy_learning_rate"
    name = own if own in names else names[0]
    others = ["--precision fp32"] if bf16 else []
    if config.distillation_weight > HEAVY:
        others.append("--distillation 1")
    if config.method in ("act", "sact") and config.halting.ponder_weight > HEAVY:
        others.append("--set halting.ponder_weight=0.01")
    return ", or ".join([f"in another --out, try --set {group}.{name}={getattr(rates, name) / 3:.2g}", *others])


def last_learned(config: TrainConfig, frozen: str) -> str:
    """The group of the phase that trained the network before the phase ``frozen``, which only runs it.

    Without one, what the base gives is at fault, and lowering no rate helps: the phase's own group.
    """
    if config.adapt.epochs:
        return "adapt"
    return "pretrain" if config.pretrain.epochs else frozen


def against_collapse(config: TrainConfig, keeps: bool) -> str:
    """Against a policy that ``keeps`` every block for every image, or else drops every block."""
    way = "lower" if keeps else "raise"
    policy = config.policy
    slower = f"--set finetune.policy_learning_rate={config.finetune.policy_learning_rate / 3:.2g}"
    if config.method == "blockdrop" and policy.estimator == "marginal":  # gamma is no part of it, the price is
        return f"{way} --target-blocks, or {slower}"
    if policy.target_blocks is None:
        return f"{way} --gamma or set --target-blocks"
    # The mean usage is the budget's; gamma only says which images get the blocks.
    return f"--set policy.budget_weight={3 * policy.budget_weight or 20:g}, {slower}, or learn for more epochs"


def against_one_mask(config: TrainConfig) -> str:
    """What to say of one mask for all images, and what helps."""
    who, name, why = "the policy gives", "BlockDrop", ", or the budget leaves no choice"
    remedy = "--preset marginal, a longer curriculum or another --target-blocks help"
    if config.method == "sequential":
        who, name, why = "the gates give", "BlockDrop-seq", ""
        remedy = "a longer curriculum or a higher --set curriculum.learning_rate help"
    elif config.policy.estimator == "marginal":
        remedy = "more --prime-epochs, --set adapt.levels further apart or another --target-blocks help"
    return (
        f"{who} every image the same mask, which is a pruned network, not {name}: the network has learned that mask "
        f"alone, so that no other one pays{why}; {remedy}"
    )
