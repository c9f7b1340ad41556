"""What the contract suite runs over: every backend, with networks that its kernels treat differently."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from bundles import assert_close
from numpy.typing import NDArray
from tiny import tiny_model

from bdexport.architecture import PolicySpec, ResNetSpec
from bdexport.backends import BACKENDS
from bdexport.bundle import Bundle
from bdexport.models.pair import BlockDropNet
from bdexport.runtime import Orchestrator


def wide_model() -> BlockDropNet:
    """Channels that fill the blocks of ONNX Runtime's blocked layout (16), unlike those of ``tiny_model``."""
    torch.manual_seed(1)
    network = ResNetSpec("cifar", "basic", (2, 2), (16, 32), "option_a", num_classes=3)
    return BlockDropNet(network, PolicySpec("cifar", (1, 1), (16, 32), network.num_blocks)).eval()


NETWORKS: dict[str, Callable[[], BlockDropNet]] = {
    "narrow": tiny_model,
    "wide": wide_model,
    "bottleneck": lambda: tiny_model("imagenet", "bottleneck", "conv", "shortcut_relu"),
}


@dataclass(frozen=True)
class Case:
    """A loaded bundle and the model that it was built from."""

    backend: str
    precision: str
    model: BlockDropNet
    bundle: Bundle
    orchestrator: Orchestrator

    def assert_close(
        self, got: NDArray[np.float32], expected: NDArray[np.float32], tolerance: float = 1e-5, scale: float = 0.0
    ) -> None:
        """Equal within ``tolerance``; at a lower precision, within its share of the largest value or of ``scale``."""
        share = SHARES[self.precision]
        assert_close(got, expected, max(tolerance, share * max(scale, float(np.abs(expected).max()))))


ON_GPU = {"tensorrt", "tensorrt-rtx"}  # their cases are tests for `make test-gpu`
# Backends of extras that a checkout may lack; where they are missing, their cases are skipped.
OPTIONAL = {"openvino", *ON_GPU}
# Several roundings to 8 significant bits in a row, of values that partly cancel: what the tiny networks here need.
SHARES = {"fp32": 0.0, "bf16": 0.03}
CASES = [(backend, network, 1, "fp32") for backend in BACKENDS for network in NETWORKS]
CASES += [("onnxruntime", "wide", 2, "fp32"), ("onnxruntime", "narrow", 2, "fp32")]
CASES += [("openvino", "wide", 2, "fp32"), *(("openvino", network, 1, "bf16") for network in NETWORKS)]
