"""What the contract suite runs over: every backend, with networks that its kernels treat differently."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
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
    model: BlockDropNet
    bundle: Bundle
    orchestrator: Orchestrator


CASES = [(backend, network, threads) for backend in BACKENDS for network in NETWORKS for threads in (1,)]
CASES += [("onnxruntime", "wide", 2), ("onnxruntime", "narrow", 2)]
