"""Measuring and its result."""

from __future__ import annotations

import gc
import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import make_bundle, pixels
from tiny import tiny_model

import bdexport
from bdexport.backends.null import NullBackend
from bdexport.bench import Measurement, bench_result, measure
from bdexport.bench.measure import measure_all
from bdexport.bench.results import latency_summary, path_flops, path_share
from bdexport.bundle import Bundle
from bdexport.cli.bench import known_dataset
from bdexport.cli.console import to_plain
from bdexport.dataset import Dataset, with_classes_of
from bdexport.errors import UsageError
from bdexport.models.flops import count_flops
from bdexport.runtime import Orchestrator, Result

FULL_MS, POLICY_MS, BLOCK_MS = 6.0, 1.0, 1.0


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Declared latencies: full 6 ms, policy 1 ms, every block 1 ms; the policy always keeps blocks 0 and 2."""
    latencies = {"full": FULL_MS, "policy": POLICY_MS, "block_00": BLOCK_MS, "block_01": BLOCK_MS, "block_02": BLOCK_MS}
    backend = NullBackend(latency_ms=latencies, masks=["101"])
    return make_bundle(tmp_path_factory.mktemp("bench") / "bundle", tiny_model(), backend)


def dataset(count: int) -> Dataset:
    labels = np.zeros(count, np.int64)
    return Dataset("folder", "test", ("cat", "dog", "newt"), labels, pixels(count))


def run_bench(bundle: Bundle, count: int = 12, batch: int = 1) -> tuple[Measurement, dict[str, Any]]:
    with bdexport.load(bundle) as orchestrator:
        data = dataset(count)
        assert isinstance(data.source, np.ndarray)
        measurement = measure(orchestrator, data.source, data.labels, warmup_batches=2, batch=batch)
        return measurement, bench_result(orchestrator, data, measurement)


def test_declared_latencies_are_measured(bundle: Bundle) -> None:
    """Oracle: the declaration: full 6 ms, dynamic 1 + 2 ms, policy 1 ms; what comes on top is the loop's own."""
    _, result = run_bench(bundle)
    fastest = {side: result["spread"][side]["min_ms"] for side in ("full", "dynamic")}
    declared = {"full": FULL_MS, "dynamic": POLICY_MS + 2 * BLOCK_MS}
    for side, value in declared.items():
        # The fastest call only: a busy machine adds to the others what it likes.
        assert value <= fastest[side] < value + 1.5
        assert result[side]["latency_ms"]["p50"] >= value
    assert result["dynamic"]["policy_ms"] >= POLICY_MS
    assert result["dynamic"]["blocks_used"] == {"mean": 2.0, "std": 0.0, "min": 2, "max": 2}
    assert result["dynamic"]["unique_masks"] == 1


def test_the_result_has_the_agreed_keys(bundle: Bundle) -> None:
    """Oracle: the written schema."""
    _, result = run_bench(bundle)
    agreed = {"schema", "bundle", "backend", "executor", "executor_reason", "device", "threads", "precision", "batch"}
    agreed |= {"images", "versions", "full", "dynamic", "speedup", "efficiency"}
    assert agreed <= set(result)
    assert set(result["full"]) == {"accuracy", "flops", "latency_ms", "throughput_per_s"}
    assert set(result["full"]["latency_ms"]) == {"mean", "p50", "p90", "p99"}
    assert set(result["dynamic"]) == {
        *("accuracy", "flops", "blocks_used", "unique_masks", "policy_ms", "latency_ms", "throughput_per_s"),
    }
    assert set(result["dynamic"]["flops"]) == {"mean", "std"}
    assert set(result["speedup"]) == {"latency_mean", "latency_p50", "throughput", "flops"}
    assert to_plain(result)["threads"] == 1


def test_numbers_follow_their_definitions(bundle: Bundle) -> None:
    """Oracle: the definitions, applied to the measured series."""
    measurement, result = run_bench(bundle, batch=4)
    full, dynamic, manifest = measurement.full, measurement.dynamic, bundle.manifest
    assert result["full"]["throughput_per_s"] == pytest.approx(4e3 / full.latency_ms.mean())
    assert result["speedup"]["latency_mean"] == pytest.approx(full.latency_ms.mean() / dynamic.latency_ms.mean())
    share = path_share(dynamic.masks, manifest).mean()
    ideal = dynamic.policy_ms.mean() + full.network_ms.mean() * share
    assert result["efficiency"] == pytest.approx(ideal / dynamic.latency_ms.mean())
    assert result["speedup"]["flops"] == pytest.approx(
        manifest.parts["full"].flops / path_flops(dynamic.masks, manifest).mean()
    )
    assert result["dynamic"]["accuracy"] == pytest.approx(100 * dynamic.correct.mean())


def test_flops_of_a_path_are_those_of_the_model(tmp_path: Path) -> None:
    """Oracle: the model's own table of FLOPs, for every mask."""
    model = tiny_model(shortcut="conv")
    manifest = make_bundle(tmp_path / "bundle", model, "null").manifest
    masks = np.array(list(itertools.product([False, True], repeat=3)))
    table = count_flops(model, manifest.preprocess.size)
    assert path_flops(masks, manifest).tolist() == table.of_masks(masks).tolist()
    assert path_share(masks[-1:], manifest).tolist() == [1.0]


def test_percentiles_are_of_the_samples() -> None:
    """Oracle: numbers whose percentiles are known."""
    summary = latency_summary(np.arange(101, dtype=float))
    assert summary == {"mean": 50.0, "p50": 50.0, "p90": 90.0, "p99": 99.0}


class Calls:
    """Stands where the orchestrator does and notes the order of calls."""

    session = None  # and so no fused paths

    def __init__(self) -> None:
        self.order: list[tuple[str, int]] = []
        self.collecting: set[bool] = set()

    def _result(self, side: str, images: np.ndarray) -> Result:
        self.order.append((side, len(images)))
        self.collecting.add(gc.isenabled())
        none = np.zeros((len(images), 1), bool)
        timings = dict.fromkeys(("preprocess", "policy", "network", "total"), 0.0)
        return Result(np.eye(3, dtype=np.float32)[images[:, 0, 0, 0] % 3], none, None, timings)

    def __call__(self, images: np.ndarray) -> Result:
        return self._result("dynamic", images)

    def full(self, images: np.ndarray) -> Result:
        return self._result("full", images)


def noted(count: int, **options: Any) -> tuple[Calls, Measurement]:
    calls = Calls()
    images = np.zeros((count, 2, 2, 3), np.uint8)
    images[:, 0, 0, 0] = np.arange(count)
    stand_in: Orchestrator = calls  # type: ignore[assignment]
    return calls, measure(stand_in, images, np.arange(count) % 3, **options)


def test_sides_take_turns_and_so_does_the_order() -> None:
    """Oracle: the stated order of calls; garbage collection is off meanwhile, and on again afterwards."""
    calls, measurement = noted(5, warmup_batches=1, turn=2)
    sides = [side for side, _ in calls.order]
    assert sides[:2] == ["full", "dynamic"]
    assert sides[2:] == ["full"] * 2 + ["dynamic"] * 4 + ["full"] * 3 + ["dynamic"]
    assert calls.collecting == {False}
    assert gc.isenabled()
    assert len(measurement.full.latency_ms) == len(measurement.dynamic.latency_ms) == 5


def test_every_image_counts_once_for_accuracy() -> None:
    """Oracle: labels that all are right, seven images in batches of 3: two timed batches and a rest, three rounds."""
    calls, measurement = noted(7, batch=3, rounds=3, warmup_batches=0)
    assert len(measurement.dynamic.correct) == 7
    assert measurement.dynamic.correct.all()
    assert measurement.images_not_timed == 1
    assert len(measurement.full.latency_ms) == 6
    assert [size for side, size in calls.order if side == "full"] == [3] * 6 + [1]


@pytest.mark.parametrize("options", [{"batch": 0}, {"batch": 6}, {"rounds": 0}, {"turn": 0}])
def test_settings_that_cannot_be_are_refused(options: dict[str, int]) -> None:
    """Oracle: the contract."""
    with pytest.raises(UsageError):
        noted(5, **options)


def test_an_interrupted_measurement_collects_garbage_again() -> None:
    """Oracle: the interpreter's own switch."""

    class Interrupted(Calls):
        def full(self, images: np.ndarray) -> Result:
            raise KeyboardInterrupt

    stand_in: Orchestrator = Interrupted()  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        measure(stand_in, np.zeros((2, 2, 2, 3), np.uint8), np.zeros(2, np.int64))
    assert gc.isenabled()


def test_seconds_bound_the_rounds_and_the_time_is_said_beforehand(bundle: Bundle) -> None:
    """Oracle: the declaration: 9 ms for a call of both sides, so that 12 images fit into 0.5 s four times at most."""
    told: list[tuple[float, int]] = []
    data = dataset(12)
    images = data.source
    assert isinstance(images, np.ndarray)
    with bdexport.load(bundle) as orchestrator:

        def measured(seconds: float) -> Measurement:
            (only,) = measure_all(
                {"": orchestrator},
                images,
                data.labels,
                warmup_batches=3,
                seconds=seconds,
                estimated=lambda *said: told.append(said),
            ).values()
            return only

        several, one = measured(0.5), measured(0.001)
    call = (FULL_MS + POLICY_MS + 2 * BLOCK_MS) / 1e3
    assert 1 < several.rounds <= 0.5 / (12 * call)
    assert len(several.full.latency_ms) == 12 * several.rounds
    assert one.rounds == 1  # every image counts for accuracy
    assert [rounds for _, rounds in told] == [several.rounds, 1]
    assert all(seconds >= 12 * rounds * call for seconds, rounds in told)
    with pytest.raises(UsageError, match="seconds"), bdexport.load(bundle) as orchestrator:
        measured(0)


def test_some_of_a_models_classes_are_enough() -> None:
    """Oracle: the names: each image keeps its class, under the model's number; other names stay for the check."""
    few = Dataset("folder", "test", ("dog", "newt"), np.array([0, 1, 1], np.int64), pixels(3))
    fitted = with_classes_of(few, ("newt", "cat", "dog"))
    assert [fitted.class_names[label] for label in fitted.labels] == ["dog", "newt", "newt"]
    assert fitted.class_names == ("newt", "cat", "dog")
    for other in (("newt", "cat", "horse"), ("0", "1", "2"), ("dog", "newt")):
        assert with_classes_of(few, other) is few


def test_the_data_set_of_the_training_is_the_default(bundle: Bundle) -> None:
    """Oracle: the training's record; without one that is known, the usual data set."""
    trained = replace(bundle.manifest, training={"dataset": {"name": "digits"}})
    assert known_dataset(trained) == "digits"
    records: list[dict[str, Any]] = [{}, {"dataset": "digits"}, {"dataset": {"name": "mine"}}]
    for training in records:
        assert known_dataset(replace(bundle.manifest, training=training)) == "cifar10"
