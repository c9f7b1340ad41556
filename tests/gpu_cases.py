"""Every GPU backend with every precision it has here, and bundles for them."""

from __future__ import annotations

from pathlib import Path

import pytest
from bundles import calibration_images
from contract_cases import NETWORKS
from tiny import tiny_checkpoint

import bdexport
from bdexport.backends import BACKENDS, backend_class, get_backend
from bdexport.backends.base import Backend
from bdexport.build import bundle_from_model
from bdexport.bundle import Bundle
from bdexport.config import BuildConfig, FusedConfig
from bdexport.errors import BdexportError
from bdexport.models.pair import BlockDropNet
from bdexport.runtime import Orchestrator

GPU_BACKENDS = tuple(name for name in ("torch", "onnxruntime", "tensorrt", "tensorrt-rtx") if name in BACKENDS)
EXECUTORS = ("chain", "graph")
# Largest difference from torch in FP32 (TF32 off), as a share of the largest value.
SHARES = {"fp32": 1e-4, "fp16": 0.02, "bf16": 0.06, "int8": 0.25, "fp8": 0.25}
MAX_BATCH = 16


CALIBRATED = ("int8", "fp8")  # precisions that need scales
CASES = [(backend, precision) for backend in GPU_BACKENDS for precision in backend_class(backend).precisions]
# Parts on random values: scales are for values that occur, and the build has verified the parts on those.
UNSCALED_CASES = [case for case in CASES if case[1] not in CALIBRATED]


def network(name: str) -> BlockDropNet:
    """A small network by its name in the contract suite."""
    return NETWORKS[name]()


def bundle_of(
    known: dict[tuple[str, str, str], Bundle], folder: Path, backend: str, name: str = "wide", precision: str = "fp32"
) -> Bundle:
    """The bundle, built once per run; the test is skipped where the backend cannot build here."""
    key = (backend, name, precision)
    if key not in known:
        try:
            known[key] = _built(folder, network(name), get_backend(backend), precision)
        except BdexportError as error:
            pytest.skip(f"{backend} {precision}: {error}")
    return known[key]


def _built(folder: Path, model: BlockDropNet, backend: Backend, precision: str) -> Bundle:
    """The bundle, and what the build has verified on this GPU; scales come from random images."""
    built = bundle_from_model(
        *(model, tiny_checkpoint(model), folder / "bundle", backend),
        config=BuildConfig(backend.name, precision, MAX_BATCH, fused=FusedConfig(measure=False)),
        checkpoint_sha256="0" * 64,
        calibration=calibration_images(folder) if precision in CALIBRATED else None,
    )
    return Bundle(built.path, built.manifest)


def opened(bundle: Bundle, executor: str = "chain", stream: object = None) -> Orchestrator:
    """The bundle on the first GPU; skipped where its backend has none here or the executor is not to be had."""
    try:
        orchestrator = bdexport.load(bundle, device="cuda", executor=executor, stream=stream)
    except BdexportError as error:
        pytest.skip(f"{bundle.manifest.backend}: {error}")
    if "runs as chain" in orchestrator.executor_reason:
        orchestrator.close()
        pytest.skip(f"{bundle.manifest.backend}: {orchestrator.executor_reason}")
    return orchestrator
