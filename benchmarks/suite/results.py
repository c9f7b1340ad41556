"""Times -> a cell's result as data."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from bdexport.bench.results import path_share
from bdexport.parts import mask_to_text
from benchmarks.suite.contestants import Contestant, Field
from benchmarks.suite.measuring import Rounds
from benchmarks.suite.networks import Inputs, Network
from benchmarks.suite.plan import Cell
from benchmarks.suite.statistics import Times, efficiency, ratio, straight_line, summary

CELL_SCHEMA = "bdexport.suite.cell/1"
ORT_FULL = "onnxruntime_full"
CHECKED_ROUNDS = 8  # of single images, whose classes are compared with PyTorch's
References = dict[str, str]  # what it is called in the result -> the contestant


def cell_result(cell: Cell, network: Network, inputs: Inputs, found: Field, rounds: Rounds) -> dict[str, Any]:
    """The cell as a JSON object: every contestant's times, and the ratios between them."""
    here = [one for one in found.contestants if one.name in rounds.times]
    count = len(next(iter(rounds.times.values()))) if rounds.times else 0
    result = {
        "schema": CELL_SCHEMA,
        "cell": {"model": cell.model, "usage": cell.usage, "batch": cell.batch, "threads": cell.threads},
        "num_blocks": network.checkpoint.network.num_blocks,
        "checkpoint": {"name": str(network.path) if network.trained else "random weights", "sha256": network.sha256},
        "rounds": count,
        "contestants": [_contestant(one, here, network, inputs, found, rounds) for one in here],
        "missing": found.missing | rounds.missing,
    }
    return result | ({"lines": straight_lines(result, found)} if cell.usage == "sweep" else {})


def lines_of(cell: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The dynamic contestants of a sweep's result by engine and executor, ascending in kept blocks."""
    lines: dict[str, list[dict[str, Any]]] = {}
    for one in cell["contestants"]:
        if one["group"] == "dynamic" and one["kept"] is not None:
            label = one["engine"] + (f", {one['executor']}" if one["executor"] else "")
            lines.setdefault(label, []).append(one)
    return {label: sorted(points, key=lambda point: point["kept"]) for label, points in lines.items()}


def straight_lines(cell: dict[str, Any], found: Field) -> dict[str, dict[str, float | None]]:
    """Of each line of a sweep: what :func:`straight_line` finds in ms against kept blocks, and ``fixed_ms``.

    ``fixed_ms``: what the line should begin with: policy, and the share of stem, head and shortcuts
    of the same engine's full network. None for baselines.
    """
    medians = {one["name"]: one["ms"]["p50"] for one in cell["contestants"]}
    lines: dict[str, dict[str, float | None]] = {}
    for label, points in lines_of(cell).items():
        if len(points) < 2:
            continue
        kept, ms = (
            np.array(values, float) for values in zip(*((p["kept"], p["ms"]["p50"]) for p in points), strict=True)
        )
        engine = points[0]["engine"]
        policy, full = (medians.get(f"{engine}, {what}") for what in ("policy", "full"))
        fixed = None
        if policy is not None and full is not None and engine in found.manifests:
            nothing = np.zeros((1, cell["num_blocks"]), bool)
            fixed = policy + full * float(path_share(nothing, found.manifests[engine])[0])
        lines[label] = {**straight_line(kept, ms), "fixed_ms": fixed}
    return lines


def _contestant(
    one: Contestant, here: list[Contestant], network: Network, inputs: Inputs, found: Field, rounds: Rounds
) -> dict[str, Any]:
    times = rounds.times[one.name]
    data: dict[str, Any] = {
        "name": one.name,
        "group": one.group,
        "engine": one.engine,
        "precision": one.precision,
        "executor": one.executor,
        "auto_is": found.executors.get(one.name) if one.executor == "auto" else None,
        "kept": one.kept,
        "ms": summary(times),
        "images_per_s": inputs.batch * 1e3 / float(np.median(times)),
    }
    if one.group == "policy":
        return data
    data["speedup_over"] = {
        what: {"name": name} | ratio(rounds.times[name], times)
        for what, name in references(one, here, rounds).items()
        if name != one.name
    }
    data["agreement"] = agreement(one, network, inputs)
    data["blocks"] = _blocks(one, found, inputs, len(times)) if one.group == "dynamic" else None
    data["efficiency"] = _efficiency(one, found, rounds) if one.group == "dynamic" else None
    return data


def references(one: Contestant, here: list[Contestant], rounds: Rounds) -> References:
    """What a contestant is compared with: ONNX Runtime full, PyTorch eager full, its own engine's full network, and
    the fastest full network of its precision, whoever's it is.
    """
    from benchmarks.suite import baselines

    names = {ORT_FULL: baselines.ORT_FULL, "torch_full": baselines.TORCH_FULL, "own_full": f"{one.engine}, full"}
    found = {what: name for what, name in names.items() if name in rounds.times}
    rivals = [other.name for other in here if other.group == "full" and other.precision == one.precision]
    if rivals:
        found["best_full"] = min(rivals, key=lambda name: float(np.median(rounds.times[name])))
    return found


def _blocks(one: Contestant, found: Field, inputs: Inputs, rounds: int) -> dict[str, float]:
    masks = _masks(one, found, inputs)
    if masks is None:
        return {"mean": float(one.kept or 0), "std": 0.0}
    used = np.concatenate([masks(one.kept, number).sum(axis=1) for number in range(_distinct(inputs, rounds))])
    return {"mean": float(used.mean()), "std": float(used.std())}


def _masks(one: Contestant, found: Field, inputs: Inputs) -> Any:
    """What runs in a round, as a function; baselines decide as the first bundle's policy does."""
    known = found.masks_of.get(one.engine) or next(iter(found.masks_of.values()), None)
    if known is None and one.kept is not None:
        return lambda level, number: inputs.masks_of(level, number)
    return known


def _distinct(inputs: Inputs, rounds: int) -> int:
    """Rounds until they repeat."""
    choices = [len(masks) for masks in inputs.masks.values()] or [len(inputs.images) // inputs.batch]
    return max(1, min(rounds, max(choices)))


def _efficiency(one: Contestant, found: Field, rounds: Rounds) -> dict[str, Any] | None:
    """Only of bdexport's own: policy plus the path's share of the same engine's full network, over its time."""
    policy, full = (rounds.times.get(f"{one.engine}, {what}") for what in ("policy", "full"))
    if policy is None or full is None or one.engine not in found.masks_of:
        return None
    own, share = rounds.times[one.name], round_shares(one, found, len(policy))
    result: dict[str, Any] = efficiency(own, policy, full, share) | {"share": float(share.mean())}
    hits = fused_rounds(one, found, len(policy))
    result["fused_images"] = float(hits.mean())
    whole = hits == 1.0
    if 0 < whole.sum() < len(hits):
        result["fused_hits"] = efficiency(own[whole], policy[whole], full[whole], share[whole])
    return result


def round_shares(one: Contestant, found: Field, rounds: int) -> Times:
    """The share of the full network's FLOPs that each round's paths run, the mean over its images, (rounds,)."""
    masks_of, manifest = found.masks_of[one.engine], found.manifests[one.engine]
    return np.array([path_share(masks_of(one.kept, number), manifest).mean() for number in range(rounds)])


def fused_rounds(one: Contestant, found: Field, rounds: int) -> Times:
    """The share of each round's images whose mask the bundle has an engine of its own for, (rounds,)."""
    masks_of, fused = found.masks_of[one.engine], getattr(found.manifests[one.engine], "fused", None)
    known = set() if fused is None else {path.mask for path in fused.paths}
    if not known:
        return np.zeros(rounds)
    return np.array([np.mean([mask_to_text(mask) in known for mask in masks_of(one.kept, n)]) for n in range(rounds)])


def agreement(one: Contestant, network: Network, inputs: Inputs) -> float:
    """The share of images that get the class which PyTorch gives them on the same blocks; of the first rounds."""
    model = network.model
    same: list[Any] = []
    for number in range(CHECKED_ROUNDS if inputs.batch == 1 else 1):
        x = torch.from_numpy(inputs.batch_of(number))
        with torch.inference_mode():
            if one.group == "full":
                expected = model.network(x)
            elif one.kept is None:
                expected = model.network.forward_masked(x, model.masks(x))
            else:
                expected = model.network.forward_masked(x, torch.from_numpy(inputs.masks_of(one.kept, number)))
        same.append(expected.argmax(dim=1).numpy() == np.asarray(one.step(number)).argmax(axis=1))
    return float(np.concatenate(same).mean())
