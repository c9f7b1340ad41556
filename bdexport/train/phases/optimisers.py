"""SGD and Adam with weight decay on convolutions and linear weights only."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.optim import SGD, Adam, Optimizer

from bdexport.config import Optimiser


def sgd(module: nn.Module, learning_rate: float, weight_decay: float) -> Optimizer:
    return SGD(_decayed(module), learning_rate, momentum=0.9, nesterov=True, weight_decay=weight_decay)


def make_optimiser(kind: Optimiser, module: nn.Module, learning_rate: float, weight_decay: float) -> Optimizer:
    if kind == "sgd":
        return sgd(module, learning_rate, weight_decay)
    return Adam(_decayed(module), learning_rate, weight_decay=weight_decay)


def _decayed(module: nn.Module) -> Iterable[dict[str, object]]:
    """Weight decay on convolutions and linear weights only: batch norm and biases are not shrunk."""
    matrices = [p for p in module.parameters() if p.ndim > 1]
    vectors = [p for p in module.parameters() if p.ndim <= 1]
    return [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
