"""FLOPs as the BlockDrop paper counts them: 2 x multiply-accumulates of convolutions and linear layers.

Deviation from the authors' released counter: a grouped convolution is divided by its groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bdexport.models.gates import Gates
from bdexport.models.pair import BlockDropNet
from bdexport.models.resnet import Block, dtype_device


@dataclass(frozen=True)
class FlopsTable:
    """FLOPs of one image, part by part. ``branches[k]`` is what dropping block k saves; shortcuts always run.

    With gates, ``gates[k]`` is what asking the one of block k costs an image; ``gate_positions[k]`` comes on top where
    it decides for each position, and is in proportion to the positions that it is asked for.
    """

    policy: int
    stem: int
    branches: tuple[int, ...]
    shortcuts: tuple[int, ...]
    head: int
    gates: tuple[int, ...] = ()
    gate_positions: tuple[int, ...] = ()

    @property
    def full(self) -> int:
        """The undropped network, without a policy."""
        return self.stem + sum(self.branches) + sum(self.shortcuts) + self.head

    def of_masks(self, masks: NDArray[np.bool_], with_policy: bool = True) -> NDArray[np.float64]:
        """FLOPs per image, (N,), for masks (N, K); the policy is included unless told otherwise."""
        fixed = self.stem + sum(self.shortcuts) + self.head + (self.policy if with_policy else 0)
        return fixed + np.asarray(masks, dtype=np.float64) @ np.asarray(self.branches, dtype=np.float64)

    def of_shares(
        self, work: NDArray[np.float32], gated: NDArray[np.float32], positions: NDArray[np.float32]
    ) -> NDArray[np.float64]:
        """FLOPs per image, (N,), of a network with gates, for the shares (N, K) that :class:`Decided` describes."""
        fixed = self.stem + sum(self.shortcuts) + self.head
        pairs = ((work, self.branches), (gated, self.gates), (gated * positions, self.gate_positions))
        total = np.full(len(work), fixed, dtype=np.float64)
        for share, flops in pairs:
            total += share.astype(np.float64) @ np.asarray(flops, dtype=np.float64)
        return total

    def parts(self) -> dict[str, int]:
        """FLOPs by part name as the bundle uses them; a block's own part includes its shortcut."""
        table = {"policy": self.policy, "stem": self.stem, "head": self.head, "full": self.full}
        for index, (branch, shortcut) in enumerate(zip(self.branches, self.shortcuts, strict=True)):
            table[f"block_{index:02d}"] = branch + shortcut
            table[f"shortcut_{index:02d}"] = shortcut
        if self.gates:
            table["act"] = self.full + sum(self.gates)  # at most: of an image that halts nowhere
        for index, gate in enumerate(self.gates):
            table[f"gate_{index:02d}"] = gate
        return table


def count_flops(model: BlockDropNet, image_size: tuple[int, int]) -> FlopsTable:
    """Count by running one blank image of ``image_size`` (height, width) through every layer of ``model``."""
    tally: dict[nn.Module, int] = {}

    def record(layer: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if isinstance(layer, nn.Conv2d):
            kernel = layer.kernel_size[0] * layer.kernel_size[1]
            macs = output[0].numel() * kernel * layer.in_channels // layer.groups
        else:
            assert isinstance(layer, nn.Linear)
            macs = layer.in_features * layer.out_features
        tally[layer] = 2 * macs

    layers = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    hooks = [layer.register_forward_hook(record) for layer in layers]
    was_training = model.training
    dtype, device = dtype_device(model)
    try:
        with torch.no_grad():
            image = torch.zeros(1, 3, *image_size, dtype=dtype, device=device)
            model.eval()
            model.network(image)
            model.policy(image)
            if model.gates is not None:
                model.gates.probe(model.network, image)
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()

    def total(module: nn.Module) -> int:
        return sum(tally.get(layer, 0) for layer in module.modules())

    blocks = [block for block in model.network.blocks if isinstance(block, Block)]
    units = [] if model.gates is None else [_counted_layers(model.gates, index) for index in range(len(blocks))]
    return FlopsTable(
        policy=total(model.policy),
        stem=total(model.network.stem),
        branches=tuple(total(block.branch) for block in blocks),
        shortcuts=tuple(total(block.shortcut) for block in blocks),
        head=total(model.network.head),
        gates=tuple(sum(tally[layer] for layer in unit if isinstance(layer, nn.Linear)) for unit in units),
        gate_positions=tuple(sum(tally[layer] for layer in unit if isinstance(layer, nn.Conv2d)) for unit in units),
    )


def _counted_layers(gates: Gates, index: int) -> list[nn.Module]:
    """The layers of block ``index``'s gate; none where it has no gate."""
    key = str(index)
    return list(gates.units[key].modules()) if key in gates.units else []
