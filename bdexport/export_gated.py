"""Networks with gates as ONNX graphs: what is exported of a comparison system depends on how it decides.

- ``sequential``: the parts of the network, as for any other, and a part for each gate: whoever runs them asks
  ``gate_07`` (activations in front of the block -> probability of keeping it) and then runs ``block_07`` or not.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from torch import Tensor, nn

from bdexport.bundle import DTYPE, OUTPUT_NAME
from bdexport.export import Progress, chosen_parts, export_modules
from bdexport.models.gates import Gates
from bdexport.models.pair import BlockDropNet
from bdexport.partition import model_parts, part_module, part_specs
from bdexport.parts import POLICY, block_part, gate_part
from bdexport.preprocess import Preprocess
from bdexport.tensors import TensorSpec


class GatePart(nn.Module):
    """(N, C, H, W) in front of a block -> the probability of keeping it, (N, 1)."""

    def __init__(self, unit: nn.Module) -> None:
        super().__init__()
        self.unit = unit

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.unit(x).sigmoid()
        return out


def export_gated(
    model: BlockDropNet,
    preprocess: Preprocess,
    folder: Path,
    parts: Iterable[str] | None = None,
    *,
    progress: Progress | None = None,
) -> dict[str, Path]:
    """As :func:`bdexport.export.export_parts`, for a model with gates. Raises :class:`UsageError` or ExportError."""
    assert model.gates is not None
    return _sequential_parts(model, model.gates, preprocess, folder, parts, progress)


def _sequential_parts(
    model: BlockDropNet,
    gates: Gates,
    preprocess: Preprocess,
    folder: Path,
    parts: Iterable[str] | None,
    progress: Progress | None,
) -> dict[str, Path]:
    specs = dict(part_specs(model, preprocess))
    blocks = {block_part(index): index for index in range(model.network.spec.num_blocks)}
    modules: dict[str, nn.Module] = {}
    for part in model_parts(model):
        if part in blocks:
            gate = gate_part(blocks[part])
            modules[gate] = GatePart(gates.units[str(blocks[part])])
            specs[gate] = (specs[part][0], TensorSpec(OUTPUT_NAME, DTYPE, (1,)))
        if part != POLICY:
            modules[part] = part_module(model, part)
    return export_modules(
        {part: modules[part] for part in chosen_parts(parts, tuple(modules))}, specs, folder, progress
    )
