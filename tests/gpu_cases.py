"""Every GPU backend with every precision it has here, and bundles for them.

``BDEXPORT_GPU_BACKENDS=torch,onnxruntime`` leaves the other backends out. With ``BDEXPORT_GPU_DRY_RUN=1`` the CPU
stands in for the GPU, so that the tests themselves are tried where there is none.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from bundles import calibration_images, make_bundle
from contract_cases import NETWORKS

import bdexport
from bdexport.backends import BACKENDS, backend_class, get_backend
from bdexport.bundle import Bundle
from bdexport.config import CALIBRATED
from bdexport.errors import BdexportError
from bdexport.models.pair import BlockDropNet
from bdexport.runtime import Orchestrator

DRY_RUN = os.environ.get("BDEXPORT_GPU_DRY_RUN") == "1"
DEVICE = "cpu" if DRY_RUN else "cuda"
WANTED = os.environ.get("BDEXPORT_GPU_BACKENDS", "torch,onnxruntime,tensorrt,tensorrt-rtx").split(",")
GPU_BACKENDS = tuple(name for name in WANTED if name in BACKENDS)
EXECUTORS = ("chain", "graph")
# Largest difference from torch in FP32 (TF32 off), as a share of the largest value.
# int8 and fp8: from another executor of the same engines; a kernel that adds in another order may round another way.
SHARES = {"fp32": 1e-4, "fp16": 0.02, "bf16": 0.06, "int8": 0.02, "fp8": 0.1}
MAX_BATCH = 16
EVERY_CASE = [(backend, precision) for backend in GPU_BACKENDS for precision in backend_class(backend).precisions]
CASES = [(backend, precision) for backend, precision in EVERY_CASE if precision not in CALIBRATED]
# Scales hold for images like those that they come from: verified on these, not on random activations. ONNX Runtime's
# INT8 is in its engines for the CPU.
CALIBRATED_CASES = [case for case in EVERY_CASE if case[1] in CALIBRATED and case[0] != "onnxruntime"]


def network(name: str) -> BlockDropNet:
    """A small network by its name in the contract suite."""
    return NETWORKS[name]()


# What was built, or why it cannot be built here, by backend, network and precision: a failure is not tried again.
Known = dict[tuple[str, str, str], Bundle | str]


def bundle_of(known: Known, folder: Path, backend: str, name: str = "wide", precision: str = "fp32") -> Bundle:
    """The bundle, built once per run; the test is skipped where the backend cannot build here."""
    key = (backend, name, precision)
    if key not in known:
        try:
            get_backend(backend)
            request = calibration_images(folder) if precision in CALIBRATED else None
            known[key] = make_bundle(folder / "bundle", network(name), backend, MAX_BATCH, precision, request)
        except BdexportError as error:
            known[key] = f"{backend} {precision}: {error}"
    found = known[key]
    if isinstance(found, str):
        pytest.skip(found)
    return found


def opened(bundle: Bundle, executor: str = "chain", stream: object = None) -> Orchestrator:
    """The bundle on the first GPU; skipped where its backend has none here or the executor is not to be had."""
    try:
        orchestrator = bdexport.load(bundle, device=DEVICE, executor=executor, stream=stream)
    except BdexportError as error:
        pytest.skip(f"{bundle.manifest.backend}: {error}")
    if "runs as chain" in orchestrator.executor_reason:
        orchestrator.close()
        pytest.skip(f"{bundle.manifest.backend}: {orchestrator.executor_reason}")
    return orchestrator
