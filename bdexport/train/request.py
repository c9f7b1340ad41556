"""What to train on what, and what decides about the blocks of the result."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast, get_args

from bdexport.architecture import GateKind, GateSpec, PolicySpec, ResNetSpec, policy_spec
from bdexport.checkpoint import Checkpoint
from bdexport.config import TrainConfig
from bdexport.dataset import Dataset
from bdexport.preprocess import Preprocess
from bdexport.train.settings import per_stage


@dataclass(frozen=True)
class TrainRequest:
    """What to train on what. ``initial`` holds the base's weights (and its policy, if it has one), or is None."""

    network: ResNetSpec
    preprocess: Preprocess
    train: Dataset
    validation: Dataset
    out: Path
    initial: Checkpoint | None = None
    base: str | None = None  # what to call the base in the record
    base_sha256: str | None = None  # .. and which file it was
    teachers: tuple[tuple[str, Checkpoint], ...] = ()  # names and networks to distil from; none: the base
    teachers_sha256: tuple[str, ...] = ()  # .. and which files they were
    base_only: bool = False
    fresh_policy: bool = False  # leave the base's policy aside and learn a new one
    device: str = "auto"
    limit: int | None = None  # only the first so many training images of the data set are these
    notes: tuple[str, ...] = ()  # what was chosen on the way to this request, said when the run begins


def just_pruned(request: TrainRequest) -> bool:
    """A base that has lost filters and has not been finetuned since."""
    return request.initial is not None and "pruned" in request.initial.training


def learns_decisions(request: TrainRequest, config: TrainConfig) -> bool:
    """Whether what the run makes decides about blocks, by a policy or by gates."""
    return config.method != "fixed" and not request.base_only


def kept_policy(request: TrainRequest) -> PolicySpec | None:
    """The base's policy, where training goes on with it."""
    return None if request.initial is None or request.fresh_policy else request.initial.policy


def kept_gates(request: TrainRequest, config: TrainConfig) -> GateSpec | None:
    """The base's gates, where the method trains such ones and goes on with them."""
    spec = wanted_gates(config)
    if request.initial is None or request.fresh_policy or request.initial.gates != spec:
        return None
    return spec


def goes_on(request: TrainRequest, config: TrainConfig) -> bool:
    """Whether what the method lets decide comes with the base."""
    kept = kept_policy(request) if wanted_gates(config) is None else kept_gates(request, config)
    return kept is not None


def wanted_policy(request: TrainRequest, config: TrainConfig) -> PolicySpec:
    """The policy of the checkpoint that training starts from, or the paper's, with its input pooled as configured."""
    kept = kept_policy(request)
    if kept is not None:
        return kept
    wanted = config.policy
    spec = replace(policy_spec(request.network), hidden=wanted.hidden, stem_stride=wanted.stem_stride)
    if wanted.stages:
        spec = replace(spec, stages=per_stage("policy.stages", wanted.stages, len(spec.stages)))
    if wanted.widths:
        spec = replace(spec, widths=per_stage("policy.widths", wanted.widths, len(spec.stages)))
    return spec if wanted.input_pool is None else replace(spec, input_pool=wanted.input_pool)


def wanted_gates(config: TrainConfig) -> GateSpec | None:
    """The gates that the method trains, or None."""
    if config.method not in get_args(GateKind):
        return None
    return GateSpec(cast(GateKind, config.method), None if config.method == "sequential" else config.halting.margin)


def description(request: TrainRequest, config: TrainConfig) -> dict[str, Any]:
    """What a resumed run must agree with."""
    return {
        "schema": "bdexport.run/1",
        "settings": config.to_json(),
        "network": request.network.to_json(),
        "policy": wanted_policy(request, config).to_json(),
        "gates": None if (gates := wanted_gates(config)) is None else gates.to_json(),
        "preprocess": request.preprocess.to_json(),
        "dataset": {
            "name": request.train.name,
            "train": len(request.train),
            "validation": len(request.validation),
            "sha256": [request.train.digest, request.validation.digest],
        },
        "base": request.base,
        "base_sha256": request.base_sha256,
        "teachers": [name for name, _ in request.teachers],
        "teachers_sha256": list(request.teachers_sha256),
        "base_only": request.base_only,
        "fresh_policy": request.fresh_policy,
    }
