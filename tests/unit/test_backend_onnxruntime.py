"""The ONNX Runtime backend: engines, their layout, linking, and what they are bound to."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from bundles import assert_close, make_bundle, pixels, some_masks, with_engine
from manifests import change_manifest
from onnx import TensorProto, helper, numpy_helper

import bdexport
from bdexport.architecture import PolicySpec, ResNetSpec
from bdexport.backends import get_backend
from bdexport.backends import onnx_wire as wire
from bdexport.backends.arrays import chosen_threads
from bdexport.backends.base import BuildOptions, RunOptions
from bdexport.backends.onnx_model import Model
from bdexport.backends.onnx_rewrite import conv_from_pad
from bdexport.backends.onnxruntime import open_graphs
from bdexport.backends.onnxruntime_build import NotBlockedError, _without_guards, build_engine
from bdexport.backends.onnxruntime_common import NCHWC_DOMAIN, Reported, channel_block
from bdexport.backends.onnxruntime_session import OnnxRuntimeSession, _from_blocked, _to_blocked
from bdexport.bundle import Bundle
from bdexport.errors import BackendError, BdexportError, BuildError, BundleError
from bdexport.hardware import usable_cores
from bdexport.models.pair import BlockDropNet
from bdexport.parts import part_names, path_parts

BLOCK = channel_block()
needs_blocks = pytest.mark.skipif(BLOCK == 1, reason="this processor has no blocked layout in ONNX Runtime")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    torch.manual_seed(0)
    network = ResNetSpec("cifar", "basic", (2, 2), (32, 64), "avgpool", num_classes=3)
    model = BlockDropNet(network, PolicySpec("cifar", (1,), (16,), network.num_blocks)).eval()
    return make_bundle(tmp_path_factory.mktemp("ort") / "bundle", model)


def one_part(
    nodes: list[onnx.NodeProto], weights: dict[str, np.ndarray], channels: int, out: int, size: int = 8
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "part",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", channels, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", out, size, size])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def run_model(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    result: np.ndarray = session.run(None, {session.get_inputs()[0].name: x})[0]
    return result


# ---- the blocked layout -------------------------------------------------------------------------------------------


def test_layouts_convert_into_each_other() -> None:
    """Property: the inverse undoes it, and channel c of a pixel lies c % block after its block's first."""
    x = np.arange(2 * 32 * 3 * 5, dtype=np.float32).reshape(2, 32, 3, 5)
    blocked = _to_blocked(x, 16)
    assert np.array_equal(_from_blocked(blocked, 16), x)
    assert np.array_equal(blocked.ravel()[:16], x[0, :16, 0, 0])


@needs_blocks
def test_the_channel_block_is_the_one_that_onnxruntime_uses() -> None:
    """Oracle: ONNX Runtime's own conversion of a random tensor, undone with the block that was found."""
    x = np.random.default_rng(0).standard_normal((2, 64, 8, 8)).astype(np.float32)
    model = one_part([helper.make_node("ReorderInput", ["x"], ["y"], domain=NCHWC_DOMAIN)], {}, 64, 64)
    model.opset_import.append(helper.make_opsetid(NCHWC_DOMAIN, 1))
    assert np.array_equal(_from_blocked(run_model(model, x), BLOCK), x)


@needs_blocks
def test_no_conversion_is_left_between_parts(bundle: Bundle) -> None:
    """Oracle: the engines' own nodes: images go in as NCHW and logits come out; nothing converts in between."""
    for part in bundle.manifest.parts:
        ops = [node.op_type for node in onnx.load(bundle.engine(part)).graph.node]
        if part.startswith(("block", "shortcut", "stem")):
            assert not {"ReorderInput", "ReorderOutput"} & set(ops), f"{part}: {ops}"


@needs_blocks
def test_a_part_that_does_not_block_is_wrapped(tmp_path: Path) -> None:
    """Oracle: the graph itself, not optimised; an operator that ORT has no blocked kernel for stands at both ends."""
    weight = np.random.default_rng(0).standard_normal((BLOCK, BLOCK, 3, 3)).astype(np.float32)
    nodes = [
        helper.make_node("Softsign", ["x"], ["a"]),
        helper.make_node("Conv", ["a", "w"], ["b"], kernel_shape=[3, 3], pads=[1] * 4),
        helper.make_node("Softsign", ["b"], ["y"]),
    ]
    model = one_part(nodes, {"w": weight}, BLOCK, BLOCK)
    onnx.save(model, tmp_path / "graph.onnx")
    build_engine("block_00", tmp_path / "graph.onnx", tmp_path / "engine.onnx", BLOCK)
    x = np.random.default_rng(1).standard_normal((3, BLOCK, 8, 8)).astype(np.float32)
    got = _from_blocked(run_model(onnx.load(tmp_path / "engine.onnx"), _to_blocked(x, BLOCK)), BLOCK)
    assert_close(got, run_model(model, x))


def test_guards_that_were_not_blocked_are_not_cut() -> None:
    """Oracle: the contract: an exception that the caller answers with conversions, never a wrong graph."""
    model = one_part([helper.make_node("Relu", ["x"], ["y"])], {}, 16, 16)
    with pytest.raises(NotBlockedError):
        _without_guards(Model(model.SerializeToString()), cut_in=True, cut_out=False)


# ---- shortcuts as convolutions ------------------------------------------------------------------------------------


def pads(before: int, after: int) -> np.ndarray:
    return np.array([0, before, 0, 0, 0, after, 0, 0], np.int64)


SLICE = {
    "s": np.array([0, 0], np.int64),
    "e": np.array([np.iinfo(np.int64).max] * 2, np.int64),
    "ax": np.array([2, 3], np.int64),
    "st": np.array([2, 2], np.int64),
}


def rewritten_pads(model: onnx.ModelProto) -> onnx.ModelProto:
    """What the onnx package reads of the model after the rewriting, which does without it."""
    taken_apart = Model(model.SerializeToString())
    conv_from_pad(taken_apart)
    result: onnx.ModelProto = onnx.load_from_string(taken_apart.to_bytes())
    onnx.checker.check_model(result)
    return result


@pytest.mark.parametrize(("before", "after"), [(0, 4), (2, 2), (3, 0)])
@pytest.mark.parametrize("down", ["slice", "pool", "none"])
def test_padded_shortcuts_become_convolutions_of_the_same_values(down: str, before: int, after: int) -> None:
    """Oracle: the graph before the rewriting, both run without optimisation."""
    weights = {"p": pads(before, after)}
    nodes = [helper.make_node("Pad", ["t" if down != "none" else "x", "p"], ["y"], name="pad")]
    if down == "slice":
        weights |= SLICE
        nodes.insert(0, helper.make_node("Slice", ["x", "s", "e", "ax", "st"], ["t"]))
    elif down == "pool":
        nodes.insert(0, helper.make_node("AveragePool", ["x"], ["t"], kernel_shape=[2, 2], strides=[2, 2]))
    model = one_part(nodes, weights, 4, 4 + before + after, 8 if down == "none" else 4)
    x = np.random.default_rng(0).standard_normal((2, 4, 8, 8)).astype(np.float32)
    expected = run_model(model, x)
    rewritten = rewritten_pads(model)
    assert [node.op_type for node in rewritten.graph.node] == ["Conv"]
    assert_close(run_model(rewritten, x), expected, 1e-6)


@pytest.mark.parametrize("change", ["spatial", "wide", "mode"])
def test_other_pads_are_left_alone(change: str) -> None:
    """Oracle: the graph before: nothing may be rewritten that is no padded shortcut, or too wide to pay."""
    channels = 160 if change == "wide" else 4
    values = pads(0, channels)
    if change == "spatial":
        values[[2, 6]] = 1
    inputs = ["x", "p", "v"] if change == "mode" else ["x", "p"]
    weights = {"p": values} | ({"v": np.array(1.0, np.float32)} if change == "mode" else {})
    model = one_part([helper.make_node("Pad", inputs, ["y"])], weights, channels, 2 * channels)
    assert rewritten_pads(model) == model


# ---- linking ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2])
def test_every_way_of_running_a_path_agrees(bundle: Bundle, threads: int) -> None:
    """Oracle: the graphs run part by part: fused or not, part by part or switched, single images and batches."""
    graphs = open_graphs(bundle)
    with bdexport.load(bundle, threads=threads) as orchestrator:
        session, manifest = orchestrator.session, bundle.manifest
        inputs = manifest.preprocess(pixels(3))
        assert isinstance(session, OnnxRuntimeSession)
        frequent = [[digit == "1" for digit in item["mask"]] for item in manifest.policy_statistics["masks"]]
        for mask in [*frequent, *some_masks(5, manifest.num_blocks).tolist()]:
            parts = path_parts(mask, manifest.transitions)
            for x in (inputs[:1], inputs):
                got = session.get("head", session.run_path(parts, session.put("stem", x)))
                expected = graphs.get("head", graphs.run_path(parts, graphs.put("stem", x)))
                assert_close(got, expected)
                if parts in session.fused:
                    assert_close(session.get("head", session.run_fused(parts, session.put("stem", x))), expected)


def test_one_thread_means_no_pool(bundle: Bundle) -> None:
    """Oracle: the operating system's list of this process's threads, before and after loading and running."""
    if not Path("/proc/self/task").is_dir():
        pytest.skip("needs /proc")
    code = f"""
import os, bdexport, numpy, onnxruntime
def count():
    return len(os.listdir("/proc/self/task"))
before = count()
orchestrator = bdexport.load({str(bundle.path)!r}, threads=1)
orchestrator(numpy.zeros((4, 24, 32, 3), numpy.uint8))
print(count() - before)
"""
    environment = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == "0"


def test_default_threads_depend_on_the_networks_size() -> None:
    """Oracle: the rule in words: small networks get one thread, large ones every core, a request is obeyed."""
    assert chosen_threads(None, 10**8)[0] == 1
    assert chosen_threads(None, 10**10)[0] == usable_cores()
    assert chosen_threads(3, 10**8)[0] == 3


# ---- what engines are bound to ------------------------------------------------------------------------------------


def changed_manifest(bundle: Bundle, folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    import shutil

    copy = folder / "bundle"
    shutil.copytree(bundle.path, copy)
    change_manifest(copy, change)
    return copy


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (lambda data: data.update(fingerprint="z80 nchwc4"), ("z80 nchwc4", get_backend("onnxruntime").fingerprint())),
        (lambda data: data["versions"].update(onnxruntime="1.2.3"), ("1.2.3", ort.__version__)),
        (lambda data: data["versions"].pop("onnxruntime-engine"), ("onnxruntime-engine",)),
    ],
)
def test_engines_for_another_machine_or_version_are_refused(
    bundle: Bundle, tmp_path: Path, change: Callable[[dict[str, Any]], object], names: tuple[str, ...]
) -> None:
    """Oracle: the contract: both sides are named, and the line that rebuilds."""
    with pytest.raises(BackendError) as caught:
        bdexport.load(changed_manifest(bundle, tmp_path, change))
    assert all(name in str(caught.value) for name in (*names, "bdexport rebuild"))


def test_one_parts_engine_under_anothers_name_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    """Oracle: the contract: the part that an engine was built for is in it, whatever the file is called."""
    import shutil

    from bdexport.files import sha256_file

    def swap(data: dict[str, object]) -> None:
        parts = {part["name"]: part for part in data["parts"]}  # type: ignore[attr-defined]
        parts["block_01"]["engine"] |= {key: parts["block_00"]["engine"][key] for key in ("sha256", "bytes")}

    copy = changed_manifest(bundle, tmp_path, swap)
    shutil.copy(copy / "engines" / "block_00.onnx", copy / "engines" / "block_01.onnx")
    assert sha256_file(copy / "engines" / "block_01.onnx")
    with pytest.raises(BackendError, match=r"block_01.*another part's engine.*block_00"):
        bdexport.load(copy)


def test_engines_of_other_shapes_than_the_manifest_says_are_refused(bundle: Bundle) -> None:
    """Oracle: a manifest that is consistent in itself but speaks of a fourth class."""
    manifest = bundle.manifest
    parts = dict(manifest.parts)
    for name in ("head", "full"):
        parts[name] = replace(parts[name], output=replace(parts[name].output, shape=(4,)))
    other = replace(manifest, class_names=("a", "b", "c", "d"), parts=parts)
    with pytest.raises(
        BackendError, match=r"(head|full) \[onnxruntime\].*got \[\(3,\)\], expected \[\(4,\)\]; rebuild"
    ):
        bdexport.load(Bundle(bundle.path, other))


def test_what_bound_buffers_raise_is_mapped() -> None:
    """Oracle: ONNX Runtime's own plain RuntimeError, provoked by an output buffer that is too small."""
    model = one_part([helper.make_node("Relu", ["x"], ["y"])], {}, 4, 4, size=2)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    binding.bind_ortvalue_input("x", ort.OrtValue.ortvalue_from_numpy(np.zeros((1, 4, 2, 2), np.float32)))
    binding.bind_ortvalue_output("y", ort.OrtValue.ortvalue_from_numpy(np.zeros((1, 4, 1, 1), np.float32)))
    with pytest.raises(BackendError, match=r"^part \[onnxruntime\]: failed \("), Reported("part", "failed"):
        session.run_with_iobinding(binding)


@pytest.mark.parametrize("content", [b"", b"not onnx", b"\x08\x08:\x00"])
def test_a_graph_that_is_none_cannot_be_built(tmp_path: Path, content: bytes) -> None:
    """Oracle: the contract: BuildError naming the part, and no engine left behind."""
    (tmp_path / "graph.onnx").write_bytes(content)
    with pytest.raises(BuildError, match="block_03"):
        get_backend("onnxruntime").build_part(
            "block_03", tmp_path / "graph.onnx", tmp_path / "engine.onnx", BuildOptions()
        )
    assert not (tmp_path / "engine.onnx").exists()


def test_a_precision_that_is_not_offered_is_refused(tmp_path: Path) -> None:
    """Oracle: the contract."""
    with pytest.raises(BuildError, match="int3"):
        get_backend("onnxruntime").build_part("stem", tmp_path / "g", tmp_path / "e", BuildOptions(precision="int3"))


def test_the_reference_holds_every_part(bundle: Bundle) -> None:
    """Oracle: the list of parts."""
    graphs, manifest = open_graphs(bundle), bundle.manifest
    for part in part_names(manifest.num_blocks, manifest.transitions):
        x = np.zeros((2, *manifest.parts[part].input.shape), np.float32)
        manifest.parts[part].output.check(graphs.run(part, graphs.put(part, x)), part)
    get_backend("onnxruntime").open(bundle, RunOptions()).close()


def test_graphs_on_a_gpu_do_not_pass_for_engines_of_another_precision(bundle: Bundle) -> None:
    """Oracle: the GPU would run the float32 graphs; asked of an int8 bundle, that is refused before any provider is."""
    int8 = replace(bundle, manifest=replace(bundle.manifest, precision="int8"))
    with pytest.raises(BackendError, match=r"float32.*got int8"):
        get_backend("onnxruntime").open(int8, RunOptions("cuda"))


# ---- engines whose hashes fit, and whose contents do not ----------------------------------------------------------


def with_metadata(bundle: Bundle, part: str, change: Callable[[dict[bytes, bytes | int]], object]) -> bytes:
    """The engine of ``part`` with other metadata; an integer is written as a number where protobuf has a text."""
    model = wire.read_fields(bundle.engine(part).read_bytes())
    properties: dict[bytes, bytes | int] = {}
    for number, value in model:
        if number == wire.MODEL_PROPERTIES and isinstance(value, bytes):
            entry = wire.read_fields(value)
            properties[wire.only(entry, 1)] = wire.only(entry, 2)
    change(properties)
    kept = [field for field in model if field[0] != wire.MODEL_PROPERTIES]
    added = [(wire.MODEL_PROPERTIES, wire.message([(1, key), (2, value)])) for key, value in properties.items()]
    return wire.message([*kept, *added])


@pytest.mark.parametrize(
    ("part", "change", "text"),
    [
        ("stem", lambda found: found.clear(), "does not say whose engine it is"),
        ("policy", lambda found: found.pop(b"bdexport.part"), "does not say whose engine it is"),
        ("stem", lambda found: found.update({b"bdexport.channel_block": b"sixteen"}), 'got "sixteen", expected 1'),
        ("stem", lambda found: found.update({b"bdexport.channel_block": b"9" * 5000}), "expected 1"),
        ("full", lambda found: found.update({b"bdexport.channel_block": b"-16"}), 'got "-16", expected 1'),
        ("stem", lambda found: found.update({b"bdexport.channel_block": b"0"}), 'got "0", expected 1'),
        ("stem", lambda found: found.update({b"bdexport.channel_block": b""}), 'got "", expected 1'),
        ("stem", lambda found: found.update({b"bdexport.channel_block": 16}), "expected 1"),
        ("head", lambda found: found.update({b"bdexport.input": b"sideways"}), 'got "sideways", expected plain or bl'),
        ("head", lambda found: found.update({b"bdexport.input": b"\xff\xfe"}), ""),
        ("head", lambda found: found.update({b"\xff": b"\xff"}), ""),
        ("head", lambda found: found.update({b"bdexport.output": b"b" * 2_000_000}), "expected plain or blocked"),
        ("policy", lambda found: found.update({b"bdexport.part": b"p" * 2_000_000}), "another part's engine"),
    ],
)
def test_metadata_that_no_build_writes_is_refused(
    bundle: Bundle, tmp_path: Path, part: str, change: Callable[[dict[bytes, bytes | int]], object], text: str
) -> None:
    """Oracle: the contract: one short line that names the part, for an engine whose hash fits."""
    copy = with_engine(bundle, tmp_path / "copy", part, with_metadata(bundle, part, change))
    with pytest.raises((BundleError, BackendError)) as caught:
        bdexport.load(copy)
    said = str(caught.value)
    assert said.startswith(f"{part} [onnxruntime]: ")
    assert text in said
    assert len(said) < 1000


@needs_blocks
def test_a_layout_that_the_channels_do_not_have_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    """Oracle: three channels are no multiple of a block; taken at its word, the image could not be reshaped."""
    data = with_metadata(bundle, "stem", lambda found: found.update({b"bdexport.input": b"blocked"}))
    copy = with_engine(bundle, tmp_path / "copy", "stem", data)
    with pytest.raises(BundleError, match=r"stem .* its metadata: bdexport.input: got blocked for \(3, .*multiple of"):
        bdexport.load(copy)


def test_an_engine_with_other_ends_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    """Oracle: the contract: the name or the type of an input is not the manifest's."""
    model = onnx.load_from_string(bundle.engine("policy").read_bytes())
    for node in model.graph.node:
        node.input[:] = ["other" if name == "x" else name for name in node.input]
    model.graph.input[0].name = "other"
    copy = with_engine(bundle, tmp_path / "copy", "policy", model.SerializeToString())
    with pytest.raises(BundleError, match=r"policy \[onnxruntime\].*does not have the manifest's x: got .*other"):
        bdexport.load(copy)


def test_flipped_and_cut_engines_with_fitting_hashes_end_in_our_errors(bundle: Bundle, tmp_path: Path) -> None:
    """Oracle: an answer of the right shape, or an error of ours; weights are left alone, as nobody could tell those."""
    generator = np.random.default_rng(0)
    outcomes, said = Counter[str](), list[str]()
    for number in range(60):
        part = generator.choice(["policy", "stem", "block_00", "head", "full"])
        data = bytearray(bundle.engine(part).read_bytes())
        if number % 4 == 0:
            data = data[: generator.integers(len(data))]
        for _ in range(1 + number % 3):
            if data:  # the graph stands before the weights, the metadata after them
                place = generator.integers(min(len(data), 600))
                data[place if number % 2 else len(data) - 1 - place] ^= 1 << generator.integers(8)
        copy = with_engine(bundle, tmp_path / str(number), part, bytes(data))
        try:
            with bdexport.load(copy, threads=1) as orchestrator:
                masks = some_masks(3, bundle.manifest.num_blocks)
                assert orchestrator(pixels(3), masks=masks).logits.shape == (3, 3)
                assert orchestrator(pixels(1)).logits.shape == orchestrator.full(pixels(1)).logits.shape == (1, 3)
            outcomes["answered"] += 1
        except BdexportError as error:
            said.append(str(error))
            outcomes["refused"] += 1
    assert outcomes["refused"] > 20, outcomes
    assert not [text for text in said if "\n" in text]


def test_a_thread_that_cannot_be_had_is_not_called_closed(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the text: Python raises the same RuntimeError for a pool that was shut down."""

    def submit(*_arguments: object) -> None:
        raise RuntimeError("can't start new thread")

    with bdexport.load(bundle, threads=2, executor="chain") as orchestrator:
        monkeypatch.setattr(orchestrator.session._pool, "submit", submit)  # type: ignore[attr-defined]
        with pytest.raises(BackendError, match=r"no thread for a share of the batch .*threads=1"):
            orchestrator(pixels(4), masks=some_masks(4, bundle.manifest.num_blocks))
