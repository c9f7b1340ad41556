"""Runs that go astray: what stops them, what is kept of them, and what a run that ends all the same is warned of."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training_cases import CONFIG, MARGINAL, Recorder, request

from bdexport.checkpoint import load_checkpoint
from bdexport.config import (
    AdaptConfig,
    PolicyConfig,
    PretrainConfig,
)
from bdexport.errors import DivergedError
from bdexport.train.choice import good_model
from bdexport.train.pipeline import train
from bdexport.train.state import Best, RunState, load_state


def test_a_policy_that_was_not_trained_is_called_that(tmp_path: Path) -> None:
    """Oracle: no phase in which it learns has an epoch."""
    none = replace(
        CONFIG,
        pretrain=replace(CONFIG.pretrain, epochs=1),
        adapt=replace(CONFIG.adapt, epochs=0),
        curriculum=replace(CONFIG.curriculum, epochs=0),
        finetune=replace(CONFIG.finetune, epochs=0),
    )
    recorder = Recorder()
    train(request(tmp_path / "run"), none, recorder)
    assert any("was not trained" in note for note in recorder.notes)


def test_a_class_without_validation_images_is_named(tmp_path: Path) -> None:
    """Oracle: the zeros are taken out of the validation split."""
    whole = request(tmp_path / "run")
    few = whole.validation.take(np.flatnonzero(whole.validation.labels != 0))
    recorder = Recorder()
    train(replace(whole, validation=few, base_only=True), replace(CONFIG, pretrain=PretrainConfig(epochs=1)), recorder)
    assert "warning: no validation image is of 1 of the classes ('0'): choices ignore them" in recorder.notes


def test_a_budget_that_no_shift_meets_leaves_the_policy_as_it_is(tmp_path: Path) -> None:
    """Oracle: all logits of a policy without weights are its bias, so that a shift keeps all blocks or none."""
    whole = train(request(tmp_path / "base"), replace(CONFIG, pretrain=PretrainConfig(epochs=1)), Recorder())
    base = load_checkpoint(whole)
    constant = {"policy.fc.weight": torch.zeros_like(base.state["policy.fc.weight"])}
    constant["policy.fc.bias"] = torch.full_like(base.state["policy.fc.bias"], 2.0)
    initial = replace(base, state=base.state | constant)
    recorder = Recorder()
    still = replace(
        CONFIG,
        adapt=replace(CONFIG.adapt, epochs=0),
        curriculum=replace(CONFIG.curriculum, epochs=0),
        finetune=replace(CONFIG.finetune, epochs=0),
    )
    out = tmp_path / "run"
    train(request(out, network=base.network, initial=initial, base="base"), still, recorder)
    assert any("no shift of the policy's logits keeps any block" in note for note in recorder.notes)
    assert any("keeps every block for every image" in note for note in recorder.notes)
    assert load_checkpoint(out).training["validation"]["policy"]["blocks_used"]["mean"] == 3


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_model(tmp_path: Path) -> None:
    """Oracle: the error names phase, file and remedy; the file holds the epoch before, and a run can start from it."""
    out = tmp_path / "run"
    wild = replace(
        CONFIG, pretrain=PretrainConfig(epochs=1), adapt=AdaptConfig(epochs=1, learning_rate=1e30, warmup_epochs=0.0)
    )
    with pytest.raises(DivergedError) as caught:
        train(request(out), wild, Recorder())
    kept = out / "last_good.safetensors"
    assert "adapt: the loss is" in str(caught.value)
    assert f"the last good model (pretrain 1) is {kept}" in str(caught.value)
    assert "--set adapt.learning_rate=3.3e+29" in str(caught.value)
    assert not (out / "model.safetensors").exists()
    found, state = load_checkpoint(kept), load_state(out)
    assert state is not None
    assert found.policy is None
    assert found.training["complete"] is False
    assert "adapt: the loss is" in found.training["stopped"]
    assert all(torch.equal(weight, state.model[name]) for name, weight in found.state.items())
    calm = replace(CONFIG, finetune=replace(CONFIG.finetune, epochs=1))
    assert train(request(tmp_path / "calm", initial=found, base=kept.name), calm, Recorder()).is_file()


@pytest.mark.parametrize("phase", ["prime", "curriculum"])
def test_a_policy_s_phase_that_diverges_names_its_own_rate(phase: str, tmp_path: Path) -> None:
    """Oracle: the network is frozen there; lowering the rate of the phase before it would not help."""
    short = replace(MARGINAL if phase == "prime" else CONFIG, pretrain=replace(CONFIG.pretrain, epochs=1))
    wild = replace(short, **{phase: replace(getattr(short, phase), epochs=2, learning_rate=1e30)})
    with pytest.raises(DivergedError, match=rf"try --set {phase}\.learning_rate=3.3e\+29"):
        train(request(tmp_path / "run"), wild, Recorder())


def test_weights_that_the_last_step_spoiled_are_not_saved(tmp_path: Path) -> None:
    """Oracle: one step an epoch, so that no loss shows it; the step leads beyond float32."""
    out = tmp_path / "run"
    wild = replace(
        CONFIG, pretrain=PretrainConfig(epochs=2, batch=512, learning_rate=3e38, weight_decay=1e6, warmup_epochs=0.0)
    )
    with pytest.raises(DivergedError, match=r"pretrain: network\..* is not finite; no model before it"):
        train(request(out), wild, Recorder())
    assert load_state(out) is None


def test_a_policy_that_drops_everything_stops_the_run(tmp_path: Path) -> None:
    """Oracle: with no price on wrong predictions, dropping all is the optimum; resuming does not change that."""
    greedy = replace(
        CONFIG,
        policy=PolicyConfig(wrong_prediction_penalty=0.0, reward="correct", initial_keep_logit=-5.0),
        curriculum=replace(CONFIG.curriculum, epochs=0),
        finetune=replace(CONFIG.finetune, epochs=3),
    )
    for _ in range(2):
        with pytest.raises(
            DivergedError, match=r"drops every block.*no model before it is worth keeping.*raise --gamma"
        ):
            train(request(tmp_path / "run"), greedy, Recorder())
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_the_last_good_model_is_the_best_before_the_collapse() -> None:
    """Oracle: by hand; the best finetuned epoch where its policy kept some blocks, before any the last epoch's."""
    weights = {"network.x": torch.ones(1)}

    def state_of(
        *rows: tuple[str, int], best: tuple[int, float] | None, loss: float = 2.0, kept: float = 2.0
    ) -> RunState:
        history: list[dict[str, Any]] = [
            {
                "phase": name,
                "epoch": epoch,
                "train": {"loss": loss},
                "validation": {"blocks_used": {"mean": kept}},
            }
            for name, epoch in rows
        ]
        for row in history:
            if row["phase"] == "finetune":  # the phase whose epochs are scored
                row["score"] = [1.0]
        figures = None if best is None else {"epoch": best[0], "blocks_used": {"mean": best[1]}}
        chosen = None if figures is None else Best((1.0,), {"network.x": torch.zeros(1)}, figures)
        return RunState(model=weights, best=chosen, history=history)

    assert good_model(state_of(best=None), 3) is None
    learned = good_model(state_of(("pretrain", 1), ("curriculum", 1), best=None), 3)
    assert learned is not None
    assert (learned.weights, learned.has_policy, learned.figures["phase"]) == (weights, True, "curriculum")
    tuned = good_model(state_of(("finetune", 1), ("finetune", 2), best=(1, 2.0)), 3)
    assert tuned is not None
    assert (tuned.weights["network.x"].item(), tuned.figures["epoch"]) == (0.0, 1)
    assert good_model(state_of(("finetune", 1), best=(1, 0.0)), 3) is None
    assert good_model(state_of(("curriculum", 1), best=None, kept=0.0), 3) is None
    for change in ({"kept": 0.0}, {"loss": 157135.0}):  # a collapse, or a wreck, after a good epoch
        after = good_model(state_of(("finetune", 1), ("finetune", 2), best=(1, 2.0), **change), 3)
        assert after is not None
        assert after.figures["epoch"] == 1
    assert good_model(state_of(("adapt", 1), best=None, loss=157135.0), 3) is None


def test_a_short_run_that_keeps_everything_is_warned_about(tmp_path: Path) -> None:
    """Oracle: too few epochs to tell, so that the model is written; the note says what to do."""
    short = replace(
        CONFIG,
        pretrain=replace(CONFIG.pretrain, epochs=1),
        curriculum=replace(CONFIG.curriculum, epochs=0),
        finetune=replace(CONFIG.finetune, epochs=1),
        policy=replace(CONFIG.policy, initial_keep_logit=5.0),
    )
    recorder = Recorder()
    assert train(request(tmp_path / "run"), short, recorder).is_file()
    assert any("keeps every block" in note and "more epochs" in note for note in recorder.notes)
