"""A model cut into its parts: one module per part, and what each takes and gives."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bdexport.bundle import DTYPE, INPUT_NAME, OUTPUT_NAME
from bdexport.errors import ExportError, UsageError
from bdexport.models.pair import BlockDropNet
from bdexport.models.resnet import Block, dtype_device
from bdexport.parts import FULL, HEAD, POLICY, STEM, block_part, part_names, path_parts, shortcut_part
from bdexport.preprocess import Preprocess
from bdexport.tensors import TensorSpec

PROBE_BATCH = 2  # shapes are read off a small batch; 1 would hide a part that squeezes the batch away


class ShortcutPart(nn.Module):
    """What a dropped transition still runs: its shortcut, with the ReLU that the checkpoint's rule asks for."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.shortcut = block.shortcut
        self.relu = block.relu_when_dropped

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.shortcut(x)
        return F.relu(out) if self.relu else out


def transitions(model: BlockDropNet) -> tuple[int, ...]:
    """The numbers of the blocks whose shortcut is not the identity."""
    return tuple(block.index for block in model.network.spec.blocks() if block.transition)


def model_parts(model: BlockDropNet) -> tuple[str, ...]:
    """The names of a model's parts, in path order."""
    return part_names(model.network.spec.num_blocks, transitions(model))


def part_module(model: BlockDropNet, part: str) -> nn.Module:
    """The module of one part, sharing the model's weights, in evaluation mode, batch norm as trained (not folded).

    ``policy`` ends in the sigmoid; ``head`` and ``full`` end in the logits. Raises :class:`UsageError` for a part that
    the model does not have.
    """
    network = model.network
    modules: dict[str, nn.Module] = {POLICY: model.policy, STEM: network.stem, HEAD: network.head, FULL: network}
    for index, block in enumerate(network.blocks):
        assert isinstance(block, Block)
        modules[block_part(index)] = block
        if block.spec.transition:
            modules[shortcut_part(index)] = ShortcutPart(block)
    if part not in modules:
        raise UsageError("unknown part", got=repr(part), expected=f"one of {', '.join(model_parts(model))}")
    return modules[part].eval()


def part_specs(model: BlockDropNet, preprocess: Preprocess) -> dict[str, tuple[TensorSpec, TensorSpec]]:
    """Input and output of every part, found by running a blank batch of 2 of the preprocessing's size.

    Raises :class:`ExportError` where a part does not fit the one before it, loses the batch dimension, or gets inputs
    of two shapes.
    """
    dtype, device = dtype_device(model)
    image = torch.zeros(PROBE_BATCH, 3, *preprocess.size, dtype=dtype, device=device)
    keep_all, drop_all = ([keep] * model.network.spec.num_blocks for keep in (True, False))
    specs: dict[str, tuple[TensorSpec, TensorSpec]] = {}
    with torch.no_grad():
        # Between them, these paths run every part: kept blocks, and what is left of dropped ones.
        for path in ((POLICY,), (FULL,), path_parts(keep_all, ()), path_parts(drop_all, transitions(model))):
            x = image
            for part in path:
                found, x = _probe(model, part, x)
                before = specs.setdefault(part, found)
                if before != found:  # PyTorch would add a shortcut of another size to its branch by broadcasting
                    raise ExportError(
                        f"{part}: its input has another shape after a dropped block than after a kept one",
                        got=f"{found[0].shape} and {before[0].shape}",
                        expected="one shape",
                        remedy="choose a --size that every stage can halve: this network's shortcuts round down",
                    )
    return {part: specs[part] for part in model_parts(model)}


def _probe(model: BlockDropNet, part: str, x: Tensor) -> tuple[tuple[TensorSpec, TensorSpec], Tensor]:
    try:
        y = part_module(model, part)(x)
    except RuntimeError as error:
        raise ExportError(f"{part}: does not run on {tuple(x.shape)} ({str(error).splitlines()[0]})") from error
    if y.shape[0] != PROBE_BATCH:
        raise ExportError(f"{part}: changes the batch", got=tuple(y.shape), expected=f"({PROBE_BATCH}, ..)")
    return (_spec(INPUT_NAME, x), _spec(OUTPUT_NAME, y)), y


def _spec(name: str, tensor: Tensor) -> TensorSpec:
    return TensorSpec(name, DTYPE, tuple(tensor.shape[1:]))
