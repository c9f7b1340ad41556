"""Times -> a cell's result as data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from bdexport.bench.results import path_share
from bdexport.parts import mask_to_text
from bdexport.zoo import zoo_name
from benchmarks.suite.contestants import Contestant, Field
from benchmarks.suite.measuring import Rounds
from benchmarks.suite.networks import Inputs, Network
from benchmarks.suite.plan import Cell
from benchmarks.suite.statistics import Times, efficiency, ratio, straight_line, summary

CELL_SCHEMA = "bdexport.suite.cell/1"
ORT_FULL = "onnxruntime_full"
CHECKED_ROUNDS = 8  # of single images, whose classes are compared with PyTorch's
CHECKED_IMAGES = 32  # of a batch, likewise
References = dict[str, str]  # what it is called in the result -> the contestant


def cell_result(cell: Cell, network: Network, inputs: Inputs, found: Field, rounds: Rounds) -> dict[str, Any]:
    """The cell as a JSON object: every contestant's times, and the ratios between them."""
    here = [one for one in found.contestants if one.name in rounds.times]
    references_of = Classes(network, inputs)
    count = len(next(iter(rounds.times.values()))) if rounds.times else 0
    result = {
        "schema": CELL_SCHEMA,
        "cell": {"model": cell.model, "usage": cell.usage, "batch": cell.batch, "threads": cell.threads},
        "num_blocks": network.checkpoint.network.num_blocks,
        "checkpoint": {"name": checkpoint_name(network), "sha256": network.sha256},
        "rounds": count,
        "contestants": [_contestant(one, here, references_of, inputs, found, rounds) for one in here],
        "missing": found.missing,
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
    one: Contestant, here: list[Contestant], classes: Classes, inputs: Inputs, found: Field, rounds: Rounds
) -> dict[str, Any]:
    times = rounds.times[one.name]
    data: dict[str, Any] = {
        "name": one.name,
        "group": one.group,
        "engine": one.engine,
        "precision": one.precision,
        "executor": one.executor,
        "auto": one.auto,
        "kept": one.kept,
        "ms": summary(times),
        "images_per_s": inputs.batch * 1e3 / float(np.median(times)),
    }
    if one.group == "policy":
        return data | {"share": policy_share(one, here, rounds)}
    data["speedup_over"] = {
        what: {"name": name} | ratio(rounds.times[name], times)
        for what, name in references(one, here, rounds).items()
        if name != one.name
    }
    data["agreement"] = agreement(one, classes, inputs, found)
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


def _blocks(one: Contestant, found: Field, inputs: Inputs, rounds: int) -> dict[str, float] | None:
    masks = _masks(one, found, inputs)
    if masks is None:  # the policy decides, and nobody here can be asked what
        return None
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


def policy_share(one: Contestant, here: list[Contestant], rounds: Rounds) -> dict[str, Any]:
    """The policy's own time over that of its engine's full network (``of_full``), and over the whole call's of its
    ``auto`` executor (``of_dynamic``); without what was not measured.
    """
    own = [other for other in here if other.engine == one.engine]
    sides = {"of_full": [other for other in own if other.group == "full"]}
    dynamic = [other for other in own if other.auto is not None]
    if len(dynamic) == 1:  # a sweep has one for every number of kept blocks
        sides["of_dynamic"] = dynamic
    times = rounds.times
    return {what: {"name": of[0].name} | ratio(times[one.name], times[of[0].name]) for what, of in sides.items() if of}


def checkpoint_name(network: Network) -> str:
    """Without the folder, which is one machine's own."""
    if not network.trained:
        return "random weights"
    return zoo_text(network) or Path(network.path).name


def zoo_text(network: Network) -> str | None:
    """``zoo:NAME`` where the checkpoint is of the zoo."""
    name = zoo_name(Path(network.path))
    return None if name is None else f"zoo:{name}"


class Classes:
    """The classes that PyTorch gives, on the same blocks; each computed once for all contestants."""

    def __init__(self, network: Network, inputs: Inputs) -> None:
        self._model, self._inputs = network.model, inputs
        self._known: dict[tuple[bool, int | None, int], Any] = {}

    def of(self, one: Contestant, number: int) -> Any:
        """Of the first images of a round, int64 (n,)."""
        key = one.group == "full", one.kept, number
        if key not in self._known:
            x = torch.from_numpy(self._inputs.batch_of(number)[:CHECKED_IMAGES])
            with torch.inference_mode():
                self._known[key] = self._logits(one, x, number).argmax(dim=1).numpy()
        return self._known[key]

    def _logits(self, one: Contestant, x: torch.Tensor, number: int) -> torch.Tensor:
        model = self._model
        if one.group == "full":
            logits: torch.Tensor = model.network(x)
            return logits
        if one.kept is None:
            return model.network.forward_masked(x, model.masks(x))
        masks = self._inputs.masks_of(one.kept, number)[: len(x)]
        return model.network.forward_masked(x, torch.from_numpy(masks))


def agreement(one: Contestant, classes: Classes, inputs: Inputs, found: Field) -> float:
    """The share of images that get the class which PyTorch gives them on the same blocks; of the first rounds."""
    same: list[Any] = []
    for number in range(CHECKED_ROUNDS if inputs.batch == 1 else 1):
        expected = classes.of(one, number)
        logits = found.logits[one.name] if number == 0 else one.step(number)
        same.append(expected == np.asarray(logits)[: len(expected)].argmax(axis=1))
    return float(np.concatenate(same).mean())
