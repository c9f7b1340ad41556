"""Exported graphs compute what the torch modules compute, and are the same bytes every time."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from tiny import SIZE, tiny_model
from torch import Tensor, nn
from torch.nn import functional as F

from bdexport.architecture import BlockKind, DroppedTransition, Family, Shortcut
from bdexport.errors import ExportError, UsageError
from bdexport.export import OPSET, PART_PROPERTY, export_parts, onnx_from_module
from bdexport.files import sha256_file
from bdexport.models.pair import BlockDropNet
from bdexport.partition import model_parts, part_module, part_specs
from bdexport.preprocess import Preprocess
from bdexport.tensors import TensorSpec

FAMILIES: tuple[Family, ...] = ("cifar", "imagenet")
BLOCKS: tuple[BlockKind, ...] = ("basic", "bottleneck")
SHORTCUTS: tuple[Shortcut, ...] = ("avgpool", "option_a", "zeros_last", "conv")
RULES: tuple[DroppedTransition, ...] = ("shortcut", "shortcut_relu")
PREPROCESS = Preprocess(size=SIZE)
TOLERANCE = 1e-5  # of the largest output: float32 in another order of summation


def plain_session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize(
    ("family", "block", "shortcut", "rule"), list(itertools.product(FAMILIES, BLOCKS, SHORTCUTS, RULES))
)
def test_graphs_equal_modules(
    tmp_path: Path, family: Family, block: BlockKind, shortcut: Shortcut, rule: DroppedTransition
) -> None:
    """Oracle: torch, on batches of 1 and 3, with ONNX Runtime's graph optimisations off."""
    model = tiny_model(family, block, shortcut, rule)
    specs = part_specs(model, PREPROCESS)
    for part, path in export_parts(model, PREPROCESS, tmp_path).items():
        session = plain_session(path)
        for batch in (1, 3):
            x = torch.randn(batch, *specs[part][0].shape)
            with torch.no_grad():
                expected = part_module(model, part)(x).numpy()
            (got,) = session.run(["y"], {"x": x.numpy()})
            error = np.abs(got - expected)
            bound = TOLERANCE * max(1.0, float(np.abs(expected).max()))
            assert error.max() <= bound, f"{part}: largest {error.max():.2e}, mean {error.mean():.2e}"


def test_form_of_the_graphs(tmp_path: Path) -> None:
    """Oracle: the written format: names, dtypes, free batch, opset, no batch norm or external data, the part's name."""
    model = tiny_model()
    specs = part_specs(model, PREPROCESS)
    files = export_parts(model, PREPROCESS, tmp_path)
    assert tuple(files) == model_parts(model)
    assert sorted(tmp_path.iterdir()) == sorted(files.values())
    for part, path in files.items():
        graph = onnx.load(path)
        onnx.checker.check_model(graph, full_check=True)
        assert [item.version for item in graph.opset_import] == [OPSET]
        assert {item.key: item.value for item in graph.metadata_props} == {PART_PROPERTY: part}
        assert "BatchNormalization" not in {node.op_type for node in graph.graph.node}
        assert all(tensor.data_location == onnx.TensorProto.DEFAULT for tensor in graph.graph.initializer)
        for values, name, spec in ((graph.graph.input, "x", specs[part][0]), (graph.graph.output, "y", specs[part][1])):
            (value,) = values
            tensor = value.type.tensor_type
            assert value.name == name
            assert tensor.elem_type == onnx.TensorProto.FLOAT
            assert [dim.dim_param or dim.dim_value for dim in tensor.shape.dim] == ["N", *spec.shape]
        assert re.search(rb"/(home|root|work|usr|tmp)/|\.py", path.read_bytes()) is None


def test_same_bytes_in_another_process(tmp_path: Path) -> None:
    """Oracle: the hashes that a fresh interpreter with another hash seed gets; cache keys rest on this."""
    files = export_parts(tiny_model(), PREPROCESS, tmp_path / "here")
    code = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1]);"
        "from tiny import *; from bdexport.export import export_parts;"
        "export_parts(tiny_model(), Preprocess(size=SIZE), Path(sys.argv[2]))"
    )
    tests = Path(__file__).parents[1]
    subprocess.run([sys.executable, "-c", code, tests, tmp_path / "there"], check=True, env={"PYTHONHASHSEED": "7"})
    for part, path in files.items():
        assert sha256_file(path) == sha256_file(tmp_path / "there" / path.name), part


def test_other_weights_other_bytes(tmp_path: Path) -> None:
    """Oracle: two networks of equal shape; no part of one may be taken for the other's."""
    first = export_parts(tiny_model(shortcut="conv", seed=0), PREPROCESS, tmp_path / "first")
    second = export_parts(tiny_model(shortcut="conv", seed=1), PREPROCESS, tmp_path / "second")
    assert all(sha256_file(first[part]) != sha256_file(second[part]) for part in first)


def test_the_model_is_left_alone(tmp_path: Path) -> None:
    """Oracle: the state before, bit by bit."""
    model = tiny_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    export_parts(model, PREPROCESS, tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model.training


def test_chosen_parts_and_progress(tmp_path: Path) -> None:
    """Oracle: path order, whatever the order asked for; progress runs from 0 to the number of parts."""
    calls: list[tuple[str, int, int]] = []
    files = export_parts(
        tiny_model(), PREPROCESS, tmp_path, ["head", "stem"], progress=lambda *call: calls.append(call)
    )
    assert list(files) == ["stem", "head"]
    assert calls == [("export", 0, 2), ("export", 1, 2), ("export", 2, 2)]


@pytest.mark.parametrize("parts", [["stem", "block_77"], []])
def test_unknown_or_no_parts(tmp_path: Path, parts: list[str]) -> None:
    """Oracle: nothing is written."""
    with pytest.raises(UsageError, match="parts to export"):
        export_parts(tiny_model(), PREPROCESS, tmp_path, parts)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_weights_are_refused(tmp_path: Path, value: float) -> None:
    """Oracle: the part and the weight are named."""
    model = tiny_model()
    with torch.no_grad():
        next(model.network.blocks[2].parameters()).view(-1)[3] = value
    with pytest.raises(ExportError, match=r"block_02: branch.conv1.weight holds NaN or infinity"):
        export_parts(model, PREPROCESS, tmp_path, ["stem", "block_02"])


class Odd(nn.Module):
    """Layers that the tables do not carry over as they are, one at a time."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.bn = nn.BatchNorm2d(3)
        self.reflect = nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect")
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "bare batch norm":
            return F.relu(self.bn(x))
        if self.kind == "shared convolution":
            x = self.conv(x)
            y: Tensor = self.bn(x) + x
            return y
        if self.kind == "reflecting padding":
            return F.relu(self.reflect(x))
        if self.kind == "other pooling":
            return F.avg_pool2d(x, 2, stride=1)
        if self.kind == "other mean":
            return x.mean(dim=1)
        if self.kind == "ceiling":
            return F.max_pool2d(x, 2, stride=2, padding=0, ceil_mode=True)
        if self.kind == "crop":
            return x[:, :, 1:, :]
        if self.kind == "constant":
            return x + 1
        if self.kind == "padding by ones":
            return F.pad(x, (1, 1), value=1.0)
        if self.kind == "no operation":
            return x
        return torch.tanh(x)


@pytest.mark.parametrize(
    "kind",
    [
        "bare batch norm", "shared convolution", "reflecting padding", "other pooling", "other mean", "ceiling",
        "crop", "constant", "padding by ones", "no operation", "tanh",
    ],
)  # fmt: skip
def test_what_is_not_understood_is_refused(kind: str) -> None:
    """Oracle: an error that names the part, never a graph that computes something else."""
    spec = TensorSpec("x", "float32", (3, 8, 8))
    with pytest.raises(ExportError, match="odd_part: "):
        onnx_from_module(Odd(kind).eval(), "odd_part", spec, TensorSpec("y", "float32", (3, 8, 8)))


def test_a_wrong_output_shape_is_refused() -> None:
    """Oracle: ONNX's own shape inference, started from the input alone."""
    model: BlockDropNet = tiny_model()
    x, _ = part_specs(model, PREPROCESS)["stem"]
    with pytest.raises(ExportError, match="stem"):
        onnx_from_module(part_module(model, "stem"), "stem", x, TensorSpec("y", "float32", (4, 8, 8)))
