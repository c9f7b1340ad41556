"""Networks and bundles that are small enough to be built in every test."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from bdexport.architecture import BlockKind, DroppedTransition, Family, PolicySpec, ResNetSpec, Shortcut
from bdexport.checkpoint import Checkpoint
from bdexport.models.pair import BlockDropNet
from bdexport.preprocess import Preprocess

SIZE = (24, 32)  # height and width differ, so that no test passes with the two exchanged


def tiny_model(
    family: Family = "cifar",
    block: BlockKind = "basic",
    shortcut: Shortcut = "option_a",
    rule: DroppedTransition = "shortcut",
    stages: tuple[int, ...] = (1, 2),
    seed: int = 0,
    classes: int = 3,
) -> BlockDropNet:
    """A network of a few narrow blocks with batch-norm statistics as a trained one has them, in eval mode."""
    widths = (4, 8, 12)[: len(stages)]
    network = ResNetSpec(family, block, stages, widths, shortcut, num_classes=classes, dropped_transition=rule)
    pooled = family == "imagenet"
    policy = PolicySpec(family, (1, 1), (4, 8), network.num_blocks, "conv" if pooled else "avgpool", 2 if pooled else 1)
    torch.manual_seed(seed)
    return with_statistics(BlockDropNet(network, policy).eval())


def with_statistics(model: BlockDropNet) -> BlockDropNet:
    """``model`` with batch-norm statistics and scales as a trained one may have them, drawn from torch's generator."""
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, nn.BatchNorm2d):
                assert layer.running_mean is not None
                assert layer.running_var is not None
                layer.weight.uniform_(0.5, 1.5)
                layer.bias.uniform_(-0.5, 0.5)
                layer.running_mean.uniform_(-0.5, 0.5)
                layer.running_var.uniform_(0.5, 2.0)
    return model


def tiny_checkpoint(model: BlockDropNet) -> Checkpoint:
    """A checkpoint of ``model`` with a training record."""
    num_blocks = model.network.spec.num_blocks
    masks = [
        {"mask": "1" * num_blocks, "count": 60, "share": 0.6},
        {"mask": "0" * num_blocks, "count": 30, "share": 0.3},
    ]
    return Checkpoint(
        network=model.network.spec,
        policy=model.policy.spec,
        preprocess=Preprocess(size=SIZE),
        class_names=("cat", "dog", "newt"),
        state={name: value for name, value in model.state_dict().items() if not name.endswith("num_batches_tracked")},
        training={
            "accuracy": 0.9,
            "policy_statistics": {"split": "validation", "images": 100, "masks": masks},
        },
    )


def tiny_checkpoint_file(path: Path, model: BlockDropNet | None = None) -> Path:
    """Save :func:`tiny_checkpoint` and return its path."""
    from bdexport.checkpoint import save_checkpoint

    save_checkpoint(path, tiny_checkpoint(model or tiny_model()))
    return path
