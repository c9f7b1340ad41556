"""The residual stream of quantised graphs: no shortcut reads a rounded copy of a block's input.

Where every block's branch adds exactly zero, a network gives the same logits under every mask, to the last bit, unless
something rounds the stream on the way: the numeric oracle of this file.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from bundles import calibration_images, pixels, some_masks
from numpy.typing import NDArray
from onnx import helper
from onnx.reference import ReferenceEvaluator
from tiny import SIZE, tiny_checkpoint, tiny_model

import bdexport
from bdexport.architecture import Shortcut
from bdexport.backends import backend_class, get_backend
from bdexport.backends.onnxruntime_link import Linker
from bdexport.build import BuiltBundle, bundle_from_model
from bdexport.calibrate import Scales, calibrated
from bdexport.config import BuildConfig, CalibrationConfig, FusedConfig
from bdexport.export import export_parts
from bdexport.models.pair import BlockDropNet
from bdexport.parts import path_parts
from bdexport.precision import typed_graphs
from bdexport.preprocess import Preprocess

PREPROCESS = Preprocess(SIZE)
SHORTCUTS: tuple[Shortcut, ...] = ("option_a", "avgpool", "conv")
BACKENDS = ("onnxruntime", "openvino", "tensorrt-rtx")
CASES = [*((backend, "int8") for backend in BACKENDS), ("tensorrt-rtx", "fp8")]
PASSING = ("Pad", "Slice", "AveragePool", "Relu")  # between a block's input and its addition
COPYING = ("QuantizeLinear", "DequantizeLinear", "Transpose")  # between a tensor and a rounded copy of it


def silent(model: BlockDropNet) -> BlockDropNet:
    """The model with branches that give exactly 0: gain and bias of their last batch norm are 0."""
    with torch.no_grad():
        for block in model.network.blocks:
            norms = [
                layer
                for name, layer in block.named_modules()
                if name.startswith("branch.") and isinstance(layer, torch.nn.BatchNorm2d)
            ]
            norms[-1].weight.zero_()
            norms[-1].bias.zero_()
    return model


def exported(model: BlockDropNet, folder: Path) -> tuple[dict[str, Path], Scales]:
    """Float32 graphs of all parts and their scales, from 24 random images."""
    graphs = export_parts(model, PREPROCESS, folder)
    return graphs, calibrated(model, graphs, PREPROCESS, pixels(24), CalibrationConfig())


def rounded_stream(graph: onnx.GraphProto) -> list[str]:
    """Operands of additions that are rounded copies of anything but a convolution's output, as text."""
    makers = {output: node for node in graph.node for output in node.output}

    def origin(name: str, passing: tuple[str, ...]) -> onnx.NodeProto | None:
        node = makers.get(name)
        return origin(node.input[0], passing) if node is not None and node.op_type in passing else node

    found = []
    for add in graph.node:
        for name in add.input if add.op_type == "Add" else ():
            maker = origin(name, PASSING)
            if maker is not None and maker.op_type == "DequantizeLinear":
                source = origin(maker.input[0], COPYING)
                if source is None or source.op_type not in ("Conv", "QLinearConv"):
                    found.append(f"{add.name or add.output[0]} reads {name}")
    return found


@pytest.mark.parametrize(("backend", "precision"), CASES)
@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_additions_read_the_stream_itself(shortcut: Shortcut, backend: str, precision: str, tmp_path: Path) -> None:
    """Oracle: the graph that the backend gets: blocks, transitions, the policy and ``full``."""
    graphs, scales = exported(tiny_model(shortcut=shortcut, stages=(2, 2)), tmp_path)
    typed = typed_graphs(graphs, precision, backend, tmp_path / "typed", scales)
    for part, path in typed.items():
        graph = onnx.load(path).graph
        assert rounded_stream(graph) == [], part
        kinds = Counter(node.op_type for node in graph.node)
        assert kinds["Add"] == Counter(node.op_type for node in onnx.load(graphs[part]).graph.node)["Add"]


def test_the_check_sees_a_rounded_copy(tmp_path: Path) -> None:
    """Oracle: the copy put back by hand, as the quantiser had left it."""
    graphs, scales = exported(tiny_model(), tmp_path)
    path = typed_graphs({"block_00": graphs["block_00"]}, "int8", "openvino", tmp_path / "typed", scales)["block_00"]
    graph = onnx.load(path).graph
    (add,) = [node for node in graph.node if node.op_type == "Add"]
    (copy,) = [
        node.output[0] for node in graph.node if node.op_type == "DequantizeLinear" and node.input[1] == "x_scale"
    ]
    add.input[:] = [copy if name == "x" else name for name in add.input]
    assert rounded_stream(graph) == [f"{add.name} reads {copy}"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_blocks_that_add_nothing_round_nothing(shortcut: Shortcut, backend: str, tmp_path: Path) -> None:
    """Oracle: numpy's ``relu(x)`` to the last bit; for a transition the float32 graph of its shortcut part."""
    graphs, scales = exported(silent(tiny_model(shortcut=shortcut)), tmp_path)
    typed = typed_graphs(graphs, "int8", backend, tmp_path / "typed", scales)
    x = np.random.default_rng(1).normal(size=(3, 4, *SIZE)).astype(np.float32)
    np.testing.assert_array_equal(evaluated(typed["block_00"], x), np.maximum(x, 0))
    if shortcut != "conv":  # a projection is a convolution: its input is quantised like any other's
        passed = evaluated(graphs["shortcut_01"], x)
        np.testing.assert_array_equal(evaluated(typed["block_01"], x), np.maximum(passed, 0))


@pytest.mark.parametrize("backend", BACKENDS)
def test_full_carries_the_stream_to_the_head(backend: str, tmp_path: Path) -> None:
    """Oracle: without branches, what reaches the pooling is what left the first ReLU, padded and thinned by numpy."""
    graphs, scales = exported(silent(tiny_model()), tmp_path)
    model = onnx.load(typed_graphs({"full": graphs["full"]}, "int8", backend, tmp_path / "typed", scales)["full"])
    first = next(node for node in model.graph.node if node.op_type == "Relu")
    pool = next(node for node in model.graph.node if node.op_type == "GlobalAveragePool")
    for name in (first.output[0], pool.input[0]):
        model.graph.output.append(helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    x = PREPROCESS(pixels(2, seed=5))
    _, stem, last = (np.asarray(tensor) for tensor in evaluator(model).run(None, {"x": x}))
    np.testing.assert_array_equal(last, np.pad(stem[:, :, ::2, ::2], ((0, 0), (2, 2), (0, 0), (0, 0))))


def evaluator(model: onnx.ModelProto) -> ReferenceEvaluator:
    """ONNX's own reference implementation, which has DequantizeLinear from opset 19 on."""
    return ReferenceEvaluator(onnx.version_converter.convert_version(model, 19))


def evaluated(path: Path, x: NDArray[np.float32]) -> NDArray[np.float32]:
    (y,) = evaluator(onnx.load(path)).run(None, {"x": x})
    return np.asarray(y)


# ---- engines ------------------------------------------------------------------------------------------------------


def built(model: BlockDropNet, backend: str, folder: Path) -> BuiltBundle:
    """An int8 bundle with fused paths; skipped where the backend is not installed."""
    here = backend_class(backend)().available()
    if not here.ok:
        pytest.skip(f"{backend}: {here.reason}")
    return bundle_from_model(
        model,
        tiny_checkpoint(model),
        folder / "bundle",
        get_backend(backend),
        config=BuildConfig(backend=backend, precision="int8", fused=FusedConfig(paths=2, measure=False)),
        checkpoint_sha256="0" * 64,
        calibration=calibration_images(folder),
    )


@pytest.mark.parametrize("executor", ["chain", "fused"])
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_engines_give_the_same_logits_under_every_mask(backend: str, executor: str, tmp_path: Path) -> None:
    """Oracle: the mask that drops everything, to rounding of the last bits; the stream is rounded nowhere."""
    bundle = built(silent(tiny_model()), backend, tmp_path)
    assert bundle.manifest.fused is not None
    masks = np.concatenate([bundle.manifest.fused.masks(3), some_masks(6, 3)])
    images = pixels(1, seed=9).repeat(len(masks), axis=0)
    with bdexport.load(bundle, executor=executor) as orchestrator:
        dropped = orchestrator(images[:1], masks=np.zeros((1, 3), bool)).logits
        kept = np.concatenate([orchestrator(images[:1], masks=mask[None]).logits for mask in masks])
    gap = np.abs(kept - dropped)
    assert gap.max() <= 1e-6 * np.abs(dropped).max(), f"largest {gap.max():.1e}, mean {gap.mean():.1e}"


@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_onnxruntime_fuses_every_convolution(shortcut: Shortcut, tmp_path: Path) -> None:
    """Oracle: the engines as ONNX Runtime optimised them, and linked as a fused path: QLinearConv for each Conv.

    Shortcuts that pad or pool may be float convolutions (``conv_from_pad``), exact ones, where a part is nothing else.
    """
    bundle = built(tiny_model(shortcut=shortcut), "onnxruntime", tmp_path)
    manifest = bundle.manifest
    engines = {part: bundle.engine(part).read_bytes() for part in manifest.parts}
    path = path_parts([True, True, False], manifest.transitions)
    linked = Linker(engines).path(path)
    graphs = [("fused", linked, path), *((part, engines[part], (part,)) for part in manifest.parts)]
    for name, data, parts in graphs:
        graph = onnx.load_from_string(data).graph
        kinds = Counter(node.op_type for node in graph.node)
        exact = Counter(node.op_type for part in parts for node in onnx.load(bundle.graph(part)).graph.node)
        assert kinds["QLinearConv"] == exact["Conv"], (name, kinds)
        assert kinds["Conv"] + kinds["FusedConv"] <= exact["Pad"] + exact["AveragePool"], (name, kinds)
        assert rounded_stream(graph) == [], name
