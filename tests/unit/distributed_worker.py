"""What the processes of test_train_distributed.py run: ``python distributed_worker.py OUT``."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, cast, get_args

import torch
from training_cases import CONFIG, CutError, Recorder, request

from bdexport.architecture import GateKind, GateSpec, ResNetSpec, policy_spec
from bdexport.cli.failures import explain
from bdexport.config import Estimator, FixedConfig, HaltingConfig, Method, TrainConfig
from bdexport.models.pair import BlockDropNet
from bdexport.train.data import Augmentation, DeviceImages, TrainingData
from bdexport.train.distributed import World, joined
from bdexport.train.halting import FinetuneHalting
from bdexport.train.loop import validation_outcome
from bdexport.train.marginal import FinetuneMargins
from bdexport.train.methods import phases_of
from bdexport.train.phases import Adapt, Finetune, FinetuneFixed, Phase, Pretrain, Prime, Setting
from bdexport.train.pipeline import train
from bdexport.train.sequential import SequentialCurriculum, SequentialFinetune
from bdexport.train.state import generator_for

STEPS = 3
LONGER = replace(CONFIG, pretrain=replace(CONFIG.pretrain, epochs=10))
SHORT = replace(CONFIG, pretrain=replace(CONFIG.pretrain, epochs=1), curriculum=replace(CONFIG.curriculum, epochs=1))
Learned = dict[str, torch.Tensor]
Case = tuple[TrainConfig, type[Phase]]

# Shares of a batch of 64 that are whole numbers of images in both shards.
SHARED = replace(
    CONFIG,
    adapt=replace(CONFIG.adapt, full_share=0.25, order_images=64),
    finetune=replace(CONFIG.finetune, full_share=0.25, policy_share=0.5),
    policy=replace(CONFIG.policy, hidden=8, lessons=2, memory=96, entropy_bonus=0.01, softness=0.01),
)
LEVELS = replace(SHARED, adapt=replace(SHARED.adapt, levels="4,3,1"))
SAMPLES: dict[Estimator, int] = {"self_critical": 1, "leave_one_out": 3, "nested": 1, "gumbel": 2, "marginal": 1}


def _estimating(estimator: Estimator, level_share: float = 0.0, **policy: Any) -> TrainConfig:
    policy = {"estimator": estimator, "samples": SAMPLES[estimator], **policy}
    finetune = replace(SHARED.finetune, level_share=level_share)
    return replace(LEVELS, finetune=finetune, policy=replace(SHARED.policy, **policy))


def _method(method: Method, **changes: Any) -> TrainConfig:
    return replace(SHARED, method=method, **changes)


def _cases() -> dict[str, Case]:
    """Every method and estimator x phase."""
    cases: dict[str, Case] = {
        "pretrain": (SHARED, Pretrain),
        "prime": (SHARED, Prime),
        "adapt at random": (SHARED, Adapt),
        "adapt to levels": (LEVELS, Adapt),
    }
    for estimator in get_args(Estimator):
        config = _estimating(estimator)
        _, _, _, curriculum, finetune = phases_of(config)
        cases |= {f"{estimator} curriculum": (config, curriculum), f"{estimator} finetune": (config, finetune)}
    cases["marginal finetune with levels"] = (_estimating("marginal", level_share=0.25), FinetuneMargins)
    cases["nested finetune of a head with levels"] = (_estimating("nested", level_share=0.25, learns="head"), Finetune)
    for mask in ("first-k", "random-k", "search"):
        cases[f"fixed {mask}"] = (_method("fixed", fixed=FixedConfig(mask, kept=2, search_images=64)), FinetuneFixed)
    walking: tuple[Estimator, ...] = ("self_critical", "leave_one_out")
    for estimator in walking:
        config = _method("sequential", policy=_estimating(estimator).policy)
        cases[f"sequential {estimator} curriculum"] = (config, SequentialCurriculum)
        cases[f"sequential {estimator} finetune"] = (config, SequentialFinetune)
    halting: tuple[Method, ...] = ("act", "sact")
    for method in halting:
        cases[method] = (_method(method, halting=HaltingConfig(initial_logit=-0.5)), FinetuneHalting)
    return cases


CASES = _cases()
SHORT_MARGINAL = replace(
    _estimating("marginal", level_share=0.25),
    adapt=replace(LEVELS.adapt, levels="3,2,1"),
    pretrain=SHORT.pretrain,
    curriculum=SHORT.curriculum,
)


@cache
def _data() -> TrainingData:
    asked = request(Path("unused"))
    train, validation = (
        DeviceImages(split.arrays(asked.preprocess), split.labels, asked.preprocess, "cpu")
        for split in (asked.train, asked.validation)
    )
    return TrainingData(train, validation, Augmentation())


def _setting(config: TrainConfig, world: World) -> Setting:
    torch.manual_seed(0)
    spec = ResNetSpec("cifar", "basic", (1, 2, 1), (8, 8, 16), "option_a", 10)
    model = BlockDropNet(spec, replace(policy_spec(spec), hidden=config.policy.hidden))
    if config.method in get_args(GateKind):
        sequential = config.method == "sequential"
        kind = cast(GateKind, config.method)
        gates = model.set_gates(GateSpec(kind, None if sequential else config.halting.margin))
        gates.start_from(0.0 if sequential else config.halting.initial_logit)
    return Setting(model, [], None, config, "cpu", False, generator_for(0, 0, 0, "cpu"), world)


def learned(case: Case, world: World, steps: int = STEPS) -> Learned:
    """What a phase has learned after three steps with batch norm in eval mode, and its figures of the last step.

    Figures are means over the processes, and so is the accuracy of a validation at the end.
    """
    config, phase_class = case
    setting = _setting(config, world)
    phase = phase_class(setting)
    data = _data()
    phase.begin(data, lambda _text: None)
    phase.start()
    setting.model.eval()  # each process has batch statistics of its own
    batches = data.train.epoch(phase.batch, 1.0, data.augmentation, setting.generator, world)
    figures: dict[str, float] = {}
    for step, batch in zip(range(steps), batches, strict=False):
        phase.at(0.5 + 0.1 * step)
        figures = phase.step(batch)
    modules = {"model": setting.model, "classifier": setting.classifier, "critic": setting.critic}
    learned = {f"{name}.{key}": t for name, module in modules.items() for key, t in module.state_dict().items()}
    if steps == 0:
        return learned
    means = world.mean(torch.tensor([*figures.values(), setting.price], dtype=torch.float64))
    outcome = validation_outcome(setting, data.validation, phase.strategy())
    return learned | {"figures": means, "masks": torch.tensor(outcome.masks), "remembered": _memory(setting)}


def _memory(setting: Setting) -> torch.Tensor:
    return torch.cat(setting.memory, dim=1) if setting.memory else torch.zeros(0)


def together(out: Path, world: World) -> None:
    """Steps of every phase; runs from start to end; one that is cut off in all processes, and resumed."""
    found = {name: learned(case, world) for name, case in CASES.items()}
    if world.leads:
        torch.save(found, out / "steps.pt")
    train(request(out / "base", base_only=True), LONGER, Recorder(), world)
    for name, config in (("", SHORT), ("-marginal", SHORT_MARGINAL)):
        train(request(out / f"straight{name}"), config, Recorder(), world)
        try:
            train(request(out / f"resumed{name}"), config, Recorder(cut_in=("finetune 2", 2)), world)
        except CutError:
            train(request(out / f"resumed{name}"), config, Recorder(), world)


def fail(out: Path, world: World) -> None:
    """The second process alone fails, in the middle of an epoch."""
    reporter = Recorder() if world.leads else Recorder(cut_in=("adapt", 2))
    train(request(out / "failed"), SHORT, reporter, world)


if __name__ == "__main__":
    try:
        with joined("cpu") as both:
            together(Path(sys.argv[1]), both)
            fail(Path(sys.argv[1]), both)
    except BaseException as error:
        text, code = explain(error)
        if text:
            print(text, file=sys.stderr)
        sys.exit(code)
