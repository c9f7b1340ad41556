"""What a run that went astray leaves, for every method, at once and when it is resumed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from training_cases import CONFIG, CutError, Recorder, request

from bdexport.architecture import ResNetSpec
from bdexport.checkpoint import load_checkpoint
from bdexport.config import Estimator, FinetuneConfig, FixedConfig, Method, PretrainConfig, TrainConfig
from bdexport.errors import DivergedError
from bdexport.train.pipeline import train
from bdexport.train.request import TrainRequest
from bdexport.train.state import LAST_GOOD_FILE, STATE_FILE, load_state

SHORT = replace(
    CONFIG,
    distillation_weight=0.0,
    pretrain=PretrainConfig(epochs=1, batch=64),
    adapt=replace(CONFIG.adapt, epochs=0, levels="4,2", order_images=64),
    curriculum=replace(CONFIG.curriculum, epochs=1),
    finetune=FinetuneConfig(epochs=3, batch=64),
    fixed=FixedConfig("search", kept=2, search_images=64),
)


def config_of(method: Method, estimator: Estimator) -> TrainConfig:
    return replace(SHORT, method=method, policy=replace(SHORT.policy, estimator=estimator))


def asked(out: Path) -> TrainRequest:
    """Stages of two blocks, which ACT needs."""
    return request(out, network=ResNetSpec("cifar", "basic", (1, 2, 1), (8, 8, 16), "option_a", 10))


def spoil(out: Path) -> None:
    """Weights that are finite and whose loss is not, in what the run will go on with."""
    blob = torch.load(out / STATE_FILE, weights_only=True)
    blob["model"]["network.stem.conv.weight"].fill_(1e38)
    blob["model"]["network.head.fc.weight"].fill_(1e38)
    torch.save(blob, out / STATE_FILE)


DECISIVE = {"fixed": "finetune_fixed", "act": "finetune_halting", "sact": "finetune_halting"}


@pytest.mark.parametrize(
    ("method", "estimator"),
    [
        ("blockdrop", "self_critical"),
        ("blockdrop", "marginal"),
        ("fixed", "self_critical"),
        ("sequential", "self_critical"),
        ("act", "self_critical"),
    ],
)
def test_every_method_leaves_its_best_finetuned_model(method: Method, estimator: Estimator, tmp_path: Path) -> None:
    """Oracle: the best weights of the state before; what decides is in the file; a second try writes it again."""
    out, config, phase = tmp_path / "run", config_of(method, estimator), DECISIVE.get(method, "finetune")
    with pytest.raises(CutError):
        train(asked(out), config, Recorder(cut_in=(f"{phase} 2", 1)))
    state = load_state(out)
    assert state is not None
    assert state.best is not None
    spoil(out)
    for _ in range(2):
        with pytest.raises(DivergedError, match=rf"{phase}: the loss is .*last good model \({phase} 1\)") as caught:
            train(asked(out), config, Recorder())
        assert "--set finetune.network_learning_rate=0.0067" in str(caught.value)
        found = load_checkpoint(out / LAST_GOOD_FILE)
        assert all(torch.equal(weight, state.best.weights[name]) for name, weight in found.state.items())
        assert (found.policy is not None) == (method == "blockdrop")
        assert (found.gates is not None) == (method in ("sequential", "act"))
        assert ("fixed_mask" in found.training) == (method == "fixed")
        assert found.training["complete"] is False
        (out / LAST_GOOD_FILE).unlink()


@pytest.mark.parametrize("method", ["blockdrop", "fixed"])
def test_the_policy_that_came_with_the_base_is_kept(method: Method, tmp_path: Path) -> None:
    """Oracle: the base's policy, weight for weight, where the network goes astray before the policy learns again.

    A network under a fixed mask has none, whatever its base had.
    """
    path = train(asked(tmp_path / "base"), replace(SHORT, finetune=FinetuneConfig(epochs=1, batch=64)), Recorder())
    base = load_checkpoint(path)
    out = tmp_path / "run"
    config = replace(SHORT, method=method, adapt=replace(SHORT.adapt, epochs=3))
    with pytest.raises(CutError):
        train(replace(asked(out), initial=base, base="base"), config, Recorder(cut_in=("adapt 2", 1)))
    spoil(out)
    with pytest.raises(DivergedError, match=r"last good model \(adapt 1\)"):
        train(replace(asked(out), initial=base, base="base"), config, Recorder())
    found = load_checkpoint(out / LAST_GOOD_FILE)
    if method == "fixed":
        assert found.policy is None
        return
    assert found.policy == base.policy
    own = [name for name in base.state if name.startswith("policy.")]
    assert own
    assert all(torch.equal(found.state[name], base.state[name]) for name in own)


def test_a_run_that_goes_on_with_another_batch_leaves_none(tmp_path: Path) -> None:
    """Oracle: the run diverges in a phase's first epoch, its batch may change, and then the model alone is there."""
    out = tmp_path / "run"
    with pytest.raises(CutError):
        train(asked(out), SHORT, Recorder(cut_in=("finetune 1", 1)))
    whole = (out / STATE_FILE).read_bytes()
    spoil(out)
    with pytest.raises(DivergedError, match=r"last good model \(curriculum 1\)"):
        train(asked(out), SHORT, Recorder())
    assert (out / LAST_GOOD_FILE).is_file()
    (out / STATE_FILE).write_bytes(whole)
    train(asked(out), replace(SHORT, finetune=replace(SHORT.finetune, batch=32)), Recorder())
    assert (out / "model.safetensors").is_file()
    assert not (out / LAST_GOOD_FILE).exists()
