"""Which model of a run is worth keeping, and what is done about a policy that collapses or never varies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from bdexport.errors import DivergedError
from bdexport.evaluate import Outcome
from bdexport.train.advice import against_collapse, against_one_mask
from bdexport.train.phases import Phase, PolicyPhase, Setting
from bdexport.train.reporter import Reporter
from bdexport.train.state import Best, RunState, Weights, weights_of

COLLAPSED_EPOCHS = 3  # so many finetuning epochs in a row end a run whose policy has collapsed
WRECKED_LOSS = 1e4  # beyond what a loss that can still be learned from comes to, a teacher's share included
BUDGET_TOLERANCE = 0.02  # of K: a model this little above the target still meets it


def choose(phase: Phase, setting: Setting, state: RunState, row: dict[str, Any]) -> None:
    """Keep the best finetuned model: within the block budget first, then by accuracy (without one: by reward)."""
    if not phase.decisive:
        return
    figures = row["validation"]
    target = setting.config.policy.target_blocks
    if phase.takes_last:
        score: tuple[float, ...] = (float(row["epoch"]),)
    elif not phase.uses_policy:
        score = (figures["accuracy"],)
    elif target is None:
        score = (figures["reward"],)
    else:
        excess = figures["blocks_used"]["mean"] - target - BUDGET_TOLERANCE * setting.num_blocks
        score = (1.0, figures["accuracy"]) if excess <= 0 else (0.0, -excess)
    if phase.uses_policy:  # a pruned network is chosen only if the run gave nothing else
        score = (float(figures["unique_masks"] > 1), *score)
    row["score"] = list(score)
    if state.best is None or score > state.best.score:
        state.best = Best(score, weights_of(setting.model), {"epoch": row["epoch"], **figures})


def mean_reward(outcome: Outcome, setting: Setting) -> float:
    """Eqn. 3 with the configured gamma, mean over the split."""
    usage = outcome.blocks_used / setting.num_blocks
    penalty = setting.config.policy.wrong_prediction_penalty
    return float(np.where(outcome.correct, 1 - usage**2, -penalty).mean())


def stop_on_collapse(phase: Phase, state: RunState, reporter: Reporter) -> None:
    """A policy that keeps everything saves nothing, one that keeps nothing is no network: end the run if it stays so.

    One mask for all images is another matter (:func:`keep_diverse`).
    """
    if not (phase.decisive and phase.uses_policy):
        return
    num_blocks = phase.setting.num_blocks
    rows = [row for row in state.history if row["phase"] == phase.name][-COLLAPSED_EPOCHS:]
    means = [row["validation"]["blocks_used"]["mean"] for row in rows]
    for extreme, what in ((num_blocks, "keeps"), (0, "drops")):
        if means[-1] != extreme:
            continue
        text = f"the policy {what} every block for every image"
        remedy = against_collapse(phase.setting.config, keeps=extreme > 0)
        if len(rows) == COLLAPSED_EPOCHS and set(means) == {extreme}:
            raise DivergedError(f"{text}: it has collapsed", remedy=remedy)
        reporter.note(f"warning: {text}; {remedy} if it stays so")
        return


def keep_diverse(phase: Phase, state: RunState, reporter: Reporter) -> None:
    """Against one mask for all images: say so, and let the policy explore again from the next epoch on."""
    rows = [row for row in state.history if row["phase"] == phase.name]
    if not (phase.decisive and isinstance(phase, PolicyPhase) and rows):
        return
    if rows[-1]["validation"]["unique_masks"] == 1 and rows[-1]["validation"]["blocks_used"]["mean"] > 0:
        opens = "; exploration is raised from here on" if phase.explores else ""
        rows[-1]["reopened"] = phase.explores
        if rows[-1]["validation"]["blocks_used"]["mean"] < phase.setting.num_blocks:  # or the collapse is told of
            reporter.note(f"warning: {against_one_mask(phase.setting.config)}{opens}")
    if any(row.get("reopened") for row in rows) and not phase.reopened:
        phase.reopen()


@dataclass(frozen=True)
class GoodModel:
    """Weights worth keeping, and the row of the epoch that they are from."""

    weights: Weights
    figures: dict[str, Any]
    has_policy: bool  # or gates: whatever decides has learned


def decision_trained(row: dict[str, Any]) -> bool:
    """Whether policy or gates had learned by this epoch of a run that has them."""
    return row["phase"] in ("curriculum", "finetune", "finetune_halting")


def good_model(state: RunState, num_blocks: int) -> GoodModel | None:
    """The best finetuned model, or before any the last epoch's; None where there is none or its policy is collapsed."""
    if not state.history:
        return None
    row = state.history[-1]
    has_policy = decision_trained(row)
    if "score" not in row:
        wrecked = row["train"]["loss"] > WRECKED_LOSS
        collapsed = has_policy and row["validation"]["blocks_used"]["mean"] == 0
        return None if wrecked or collapsed else GoodModel(state.model, row, has_policy)
    if state.best is None:
        return None
    # Halting stages that run every block have not collapsed: at first, they all do.
    if row["phase"] == "finetune" and state.best.figures["blocks_used"]["mean"] in (0, num_blocks):
        return None
    row = next(r for r in state.history if "score" in r and r["epoch"] == state.best.figures["epoch"])
    return GoodModel(state.best.weights, row, has_policy)
