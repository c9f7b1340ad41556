"""What deciding between the blocks costs: BlockDrop-seq and ACT against a one-shot policy and the full network.

    python benchmarks/sequential.py [--arch resnet32] [--kept 7] [--rounds 300] [--policy-pool 2] [--json FILE]

Batch 1, one thread, ONNX Runtime on the CPU, random weights (time does not depend on them). Policy and gates run, but
what they decide is overridden by one random mask of ``kept`` blocks, so that all variants run the same blocks. In turn,
in one process, warm-up excluded:

- ``full``: the full network's engine.
- ``one-shot``: policy, then the path as ``bdexport.load`` runs it.
- ``one-shot, part by part``: policy, then the same calls as the sequential variants, without their gates.
- ``sequential, numpy gate`` / ``engine gate``: in front of each block, a gate (pooling, linear unit, sigmoid) on the
  activations as they are in memory, in numpy or as an engine of its own; then the block, or not.
- ``act``: the graph that ``bdexport export`` writes, for an image that halts nowhere, and one that halts behind the
  first block of each stage, against ``full graph``, the exported full network in the same kind of session.

``ratio`` is to ``full`` (for ``act``: to ``full graph``), of the medians and of the minima of the calling thread's CPU
time: with one thread nothing else computes, and what other processes take of the core stays out. Wall-clock times are
beside it in the JSON. Where the machine is busy, the minima say more. Prints a table last.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from time import perf_counter_ns, thread_time_ns
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from chain import PACKAGES
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console
from rich.table import Table

import bdexport
from bdexport.architecture import GateSpec, PolicySpec, policy_spec, resnet_spec
from bdexport.build import build_bundle
from bdexport.checkpoint import Checkpoint, save_checkpoint
from bdexport.export import export_parts
from bdexport.export_gated import export_gated
from bdexport.hardware import machine, package_versions
from bdexport.models.flops import count_flops
from bdexport.models.pair import BlockDropNet
from bdexport.parts import FULL, HEAD, POLICY, STEM, block_part, shortcut_part
from bdexport.preprocess import Preprocess
from bdexport.runtime.decide import masks_from_probabilities

Step = Callable[[], Any]


def build(model: BlockDropNet, policy: PolicySpec, folder: Path) -> Path:
    """A bundle of the model."""
    spec = model.network.spec
    state = {name: value for name, value in model.state_dict().items() if not name.endswith("num_batches_tracked")}
    names = tuple(str(index) for index in range(spec.num_classes))
    save_checkpoint(folder / "model.safetensors", Checkpoint(spec, policy, Preprocess(), names, state))
    return build_bundle(folder / "model.safetensors", folder / "bundle").path


class Sequential:
    """Blocks one by one on a loaded bundle's engines, a gate in front of each, or none."""

    def __init__(self, orchestrator: Any, mask: list[bool], gate: str | None) -> None:
        self.session, self.mask = orchestrator.session, mask
        self.transitions = set(orchestrator.manifest.transitions)
        self.gates = [None if gate is None else self._gate(orchestrator, k, gate) for k in range(len(mask))]

    def _gate(self, orchestrator: Any, index: int, kind: str) -> Callable[[Any], float]:
        channels, *_ = orchestrator.manifest.parts[block_part(index)].input.shape
        # Activations are (C / block, H, W, block) in memory; only the session's own parts know the block.
        block = self.session._part(block_part(index)).input_block
        rng = np.random.default_rng(index)
        weight, bias = rng.normal(size=channels).astype(np.float32), np.float32(rng.normal())
        if kind == "numpy":
            return lambda x: float(x.reshape(channels // block, -1, block).mean(axis=1).ravel() @ weight + bias)
        session = _gate_engine(channels, block, weight, bias)
        return lambda x: session.run(None, {"x": x.reshape(channels // block, -1, block)})[0].item()

    def __call__(self, images: Any) -> Any:
        session = self.session
        x = session.run(STEM, session.put(STEM, images))
        for index, (keep, gate) in enumerate(zip(self.mask, self.gates, strict=True)):
            if gate is not None:
                _ = gate(x) >= 0.0  # the decision, overridden by the mask
            if keep:
                x = session.run(block_part(index), x)
            elif index in self.transitions:
                x = session.run(shortcut_part(index), x)
        return session.get(HEAD, session.run(HEAD, x))


def _gate_engine(channels: int, block: int, weight: Any, bias: Any) -> onnxruntime.InferenceSession:
    """Mean over the positions, linear unit, sigmoid: (C / block, positions, block) -> one number."""
    shape = [channels // block, "positions", block]
    nodes = [
        helper.make_node("ReduceMean", ["x"], ["mean"], axes=[1], keepdims=0),
        helper.make_node("Reshape", ["mean", "row"], ["pooled"]),
        helper.make_node("Gemm", ["pooled", "weight", "bias"], ["logit"]),
        helper.make_node("Sigmoid", ["logit"], ["y"]),
    ]
    weights = {"row": np.array([1, -1]), "weight": weight.reshape(-1, 1), "bias": np.array([bias])}
    ends = [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)]
    outs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 1])]
    constants = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    graph = helper.make_graph(nodes, "gate", ends, outs, constants)
    return _session(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))


def _session(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def act_steps(model: BlockDropNet, folder: Path, images: Any) -> dict[str, Step]:
    """ACT's graph for an image that halts nowhere or as early as it may, and the full network's in the same session."""
    steps: dict[str, Step] = {}
    (path,) = export_parts(model, Preprocess(), folder, [FULL]).values()
    full = _session(onnx.load(path))
    steps["full graph"] = lambda: full.run(None, {"x": images})
    for name, bias in (("act, no halt", -40.0), ("act, first blocks only", 40.0)):
        gates = model.set_gates(GateSpec("act", 0.01))
        for parameter in gates.parameters():
            torch.nn.init.zeros_(parameter)  # activations of random weights are large: the bias alone must decide
        gates.start_from(bias)
        session = _session(onnx.load(export_gated(model, Preprocess(), folder)["act"]))
        steps[name] = lambda session=session: session.run(None, {"x": images})  # type: ignore[misc]
    return steps


def steps_of(arguments: argparse.Namespace, folder: Path) -> tuple[dict[str, Step], Any]:
    """Every variant as a call without arguments, and the open bundle."""
    torch.manual_seed(0)
    spec = resnet_spec(arguments.arch)
    policy = replace(policy_spec(spec), input_pool=arguments.policy_pool)
    model = BlockDropNet(spec, policy).eval()
    orchestrator = bdexport.load(build(model, policy, folder), threads=1)
    rng = np.random.default_rng(0)
    images = orchestrator.manifest.preprocess.normalise(rng.integers(0, 256, (1, 32, 32, 3), dtype=np.uint8))
    mask = np.zeros((1, spec.num_blocks), dtype=bool)
    mask[0, rng.permutation(spec.num_blocks)[: arguments.kept]] = True
    session = orchestrator.session

    def decide() -> None:
        masks_from_probabilities(session.get(POLICY, session.run(POLICY, session.put(POLICY, images))))

    parts, numpy_gate, engine_gate = (Sequential(orchestrator, mask[0].tolist(), k) for k in (None, "numpy", "engine"))
    return {
        "full": lambda: orchestrator.full(images),
        "one-shot": lambda: (decide(), orchestrator(images, masks=mask)),
        "one-shot, part by part": lambda: (decide(), parts(images)),
        "sequential, numpy gate": lambda: numpy_gate(images),
        "sequential, engine gate": lambda: engine_gate(images),
        **act_steps(model, folder, images),
    }, orchestrator


def measure(steps: dict[str, Step], rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Times in ms of each step, CPU and wall clock, in turn; 30 rounds of warm-up are left out."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    gc.disable()
    for turn in range(-30, rounds):
        for name, step in steps.items():
            wall, cpu = perf_counter_ns(), thread_time_ns()
            step()
            spent = (thread_time_ns() - cpu) / 1e6, (perf_counter_ns() - wall) / 1e6
            if turn >= 0:
                times[name].append(spent)
    gc.enable()
    return times


def summary(values: list[float]) -> dict[str, float]:
    """Median, tails, mean and minimum in ms."""
    p50, p90, p99 = np.percentile(values, [50, 90, 99])
    return {"p50": float(p50), "p90": float(p90), "p99": float(p99)} | {
        "mean": float(np.mean(values)),
        "min": float(min(values)),
    }


def flops_of(arguments: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Policy and gates as shares of the full network's FLOPs."""
    spec = resnet_spec(arguments.arch)
    policy = replace(policy_spec(spec), input_pool=arguments.policy_pool)
    table = count_flops(BlockDropNet(spec, policy, GateSpec("sequential")), (32, 32))
    return {"policy": table.policy / table.full, "gates": sum(table.gates) / table.full}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="resnet32")
    parser.add_argument("--kept", type=int, default=7)
    parser.add_argument("--policy-pool", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        steps, orchestrator = steps_of(arguments, Path(folder))
        with orchestrator:
            times = measure(steps, arguments.rounds)
        shares = flops_of(arguments, Path(folder))
    cpu, wall = ({name: summary([pair[k] for pair in pairs]) for name, pairs in times.items()} for k in (0, 1))
    rows: list[dict[str, Any]] = []
    for name in times:
        reference = "full graph" if name.startswith("act") else "full"
        rows.append(
            {
                "variant": name,
                "reference": reference,
                "ratio": cpu[name]["p50"] / cpu[reference]["p50"],
                "ratio_of_minima": cpu[name]["min"] / cpu[reference]["min"],
                "cpu_ms": cpu[name],
                "wall_ms": wall[name],
            }
        )
    data = {
        "schema": "bdexport.benchmark.sequential/1",
        "arch": arguments.arch,
        "kept": arguments.kept,
        "batch": 1,
        "threads": 1,
        "policy_input_pool": arguments.policy_pool,
        "rounds": arguments.rounds,
        "flops_share": shares,
        "machine": machine(),
        "versions": package_versions(PACKAGES),
        "results": rows,
    }
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(data, indent=2) + "\n")
    table = Table(
        title=f"{arguments.arch}, {arguments.kept} blocks kept, batch 1, one thread, {arguments.rounds} rounds"
    )
    for column in ("variant", "CPU ms, median", "p90", "ratio", "minimum", "ratio of minima"):
        table.add_column(column, justify="left" if column == "variant" else "right")
    for row in rows:
        used = (f"{row['cpu_ms']['p50']:.3f}", f"{row['cpu_ms']['p90']:.3f}", f"{row['ratio']:.2f}")
        table.add_row(row["variant"], *used, f"{row['cpu_ms']['min']:.3f}", f"{row['ratio_of_minima']:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
