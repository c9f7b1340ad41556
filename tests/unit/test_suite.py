"""The benchmark suite: its statistics, its rounds, its table, and that a run goes on where it was cut off."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from bundles import assert_close, pixels, some_masks, torch_logits
from tiny import tiny_checkpoint, tiny_checkpoint_file, tiny_model

from benchmarks.suite import contestants, preparing, run, suite
from benchmarks.suite.__main__ import _parser, config_of, public_command
from benchmarks.suite.estimate import Pilots, estimated, plan_table
from benchmarks.suite.footprint import footprints
from benchmarks.suite.graphs import graph_with_ifs
from benchmarks.suite.measuring import call_seconds, measure
from benchmarks.suite.networks import network, random_masks, sweep_masks
from benchmarks.suite.plan import Cell, Cost, SuiteConfig, cells, least_rounds, share_out
from benchmarks.suite.results import lines_of
from benchmarks.suite.statistics import efficiency, ratio, straight_line, summary
from benchmarks.suite.store import Store
from benchmarks.suite.tables import markdown

TINY = SuiteConfig(
    models=("resnet32",),
    batches=(1,),
    minutes=1.0,
    images=4,
    masks=2,
    least_rounds=2,
    most_rounds=3,
    compile_batches=(),
)


def test_ratio_of_proportional_times_is_exact_whatever_the_rounds_were_like() -> None:
    """Oracle: a = 2 b round by round, so every draw of rounds has the same ratio: pairing removes the noise."""
    b = np.random.default_rng(0).lognormal(0.0, 2.0, 51)
    assert ratio(2 * b, b) == pytest.approx({"value": 2.0, "low": 2.0, "high": 2.0, "means": 2.0})


def test_the_interval_covers_the_true_ratio_about_as_often_as_it_says() -> None:
    """Oracle: 95 % intervals of 100 samples with a known ratio of medians, 1.5."""
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(100):
        found = ratio(1.5 * rng.lognormal(0.0, 0.3, 60), rng.lognormal(0.0, 0.3, 60))
        covered += found["low"] <= 1.5 <= found["high"]
    assert covered >= 85


def test_efficiency_is_one_where_time_follows_flops() -> None:
    """Oracle: own = policy + share * full gives 1; twice that time gives 0.5."""
    rng = np.random.default_rng(0)
    policy, full, share = rng.random(20), 5 * rng.random(20), rng.random(20)
    own = policy + share * full
    assert efficiency(own, policy, full, share)["value"] == pytest.approx(1.0)
    assert efficiency(2 * own, policy, full, share)["means"] == pytest.approx(0.5)


def test_straight_line_and_summary() -> None:
    """Oracle: the line that the points were made from; numpy's own percentiles of 1..101."""
    x = np.arange(5.0)
    assert straight_line(x, 3 + 0.5 * x) == pytest.approx({"intercept": 3.0, "slope": 0.5, "r2": 1.0})
    found = summary(np.arange(1.0, 102.0))
    assert (found["p50"], found["p90"], found["min"], found["mean"]) == (51.0, 91.0, 1.0, 51.0)


def test_small_networks_and_single_images_come_first() -> None:
    """Oracle: the order that the brief of the suite names; ImageNet sizes only at batch 1 unless asked for."""
    plan = cells(SuiteConfig())
    assert [cell.model for cell in plan[:3]] == ["resnet32", "resnet56", "resnet110"]
    assert plan[0].usage == "trained"
    assert plan[1].usage == "random"
    large = [cell for cell in plan if cell.model in ("resnet50", "resnet101")]
    assert plan[-len(large) :] == large
    assert {cell.batch for cell in large} == {1}
    assert len({cell.name for cell in plan}) == len(plan)


def test_cells_are_left_out_where_nothing_needs_them() -> None:
    """Oracle: counting: sweep and load time have the first number of threads only; no load time without bdexport."""
    config = SuiteConfig(models=("resnet32",), threads=(1, 2))
    for usage, threads in (("trained", 4 * [1, 2]), ("sweep", [1]), ("footprint", [1])):
        assert [cell.threads for cell in cells(config) if cell.usage == usage] == threads
    for other in (replace(config, kinds=("torch",)), replace(config, footprint=False)):
        assert not [cell for cell in cells(other) if cell.usage == "footprint"]


def test_every_cell_gets_the_least_rounds_and_the_rest_is_shared_out() -> None:
    """Oracle: by hand: 100 s for rounds of 1 and 4 s; 5 of each take 25; of the other 75, a third goes to the first."""
    quick, slow = Cost(0.0, 1.0, "pilot"), Cost(0.0, 4.0, "pilot")
    first, second = share_out([quick, slow], 100.0, [5, 5], 1000)
    assert (first.rounds, second.rounds) == (5 + 25, 5 + 12)
    assert first.seconds + second.seconds <= 100.0


def test_smaller_batches_have_more_rounds_at_least() -> None:
    """Oracle: the numbers that benchmarks/README.md states."""
    config = SuiteConfig()
    found = [least_rounds(Cell("resnet32", "random", batch, 1), config) for batch in (1, 8, 64, 256)]
    assert found == [100, 10, 5, 5]
    assert least_rounds(Cell("resnet32", "sweep", 1, 1), config) == 10
    assert [least_rounds(Cell("resnet50", "random", batch, 1), config) for batch in (1, 8)] == [20, 5]


def test_what_does_not_fit_gets_nothing_and_the_others_do() -> None:
    """Oracle: by hand: 20 s hold 5 rounds of 1 s and 3 of 2 s (fixed), and not those of 10 s between them."""
    costs = [Cost(1.0, 1.0, "pilot"), Cost(0.0, 10.0, "pilot"), Cost(0.0, 2.0, "pilot", rounds=3)]
    shares = share_out(costs, 20.0, [5, 5, 5], 10)
    assert [share.rounds for share in shares] == [10, 0, 3]
    assert [share.rounds for share in share_out(costs, -1.0, [5, 5, 5], 10)] == [0, 0, 0]
    table = plan_table([Cell("resnet32", "random", batch, 1) for batch in (1, 8, 64)], costs, shares, TINY)
    assert "no time for resnet32-random-b8-t1" in table[-1]


def test_sharing_never_exceeds_the_time_nor_the_most_rounds() -> None:
    """Oracle: invariants on random costs; more rounds where a round is shorter."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        costs = [Cost(float(rng.uniform(0, 5)), float(rng.lognormal(0, 2)), "pilot") for _ in range(8)]
        seconds = float(rng.uniform(0, 500))
        shares = share_out(costs, seconds, 8 * [5], 100)
        assert sum(share.seconds for share in shares) <= seconds + 1e-3
        measured = sorted(
            (cost.round_s, -share.rounds) for cost, share in zip(costs, shares, strict=True) if share.rounds
        )
        assert all(5 <= -rounds <= 100 for _, rounds in measured)
        assert [rounds for _, rounds in measured] == sorted(rounds for _, rounds in measured)


def test_a_pilot_counts_only_under_its_key(tmp_path: Path) -> None:
    """Oracle: the cost that was saved; none under another key, or from a torn file."""
    cell, cost = Cell("resnet32", "sweep", 1, 1), Cost(2.0, 0.5, "pilot")
    pilots = Pilots(tmp_path)
    assert pilots.load(cell, {"a": 1}) is None
    pilots.save(cell, {"a": 1}, cost, 0.25)
    assert pilots.load(cell, {"a": 1}) == (cost, 0.25)
    assert pilots.load(cell, {"a": 2}) is None
    (tmp_path / "pilots" / f"{cell.name}.json").write_text("{")
    assert pilots.load(cell, {"a": 1}) is None


def test_larger_batches_and_more_contestants_are_estimated_to_take_longer(tmp_path: Path) -> None:
    """Oracle: proportions, from one pilot: 256 images take four times as long as 64; fewer kinds take less."""
    config = replace(TINY, checkpoints={"resnet32": str(tiny_checkpoint_file(tmp_path / "tiny.safetensors"))})
    # so slow that no cell's calls are short enough for warm ones
    known = {("resnet32", images, 1): 10.0 for images in (1, 8)}
    costs = []
    for batch in (64, 256):
        cell = Cell("resnet32", "trained", batch, 1)
        costs.append(estimated(cell, network(cell, config, tmp_path), config, known))
    assert costs[1].round_s == pytest.approx(4 * costs[0].round_s)
    few = replace(config, kinds=("onnxruntime",))
    assert estimated(cell, network(cell, few, tmp_path), few, known).round_s < costs[1].round_s
    assert {cost.source for cost in costs} == {"estimate"}


class Clock:
    """Seconds that only the steps of a test let go by."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[tuple[str, int]] = []

    def step(self, name: str, seconds: float) -> Any:
        def run(number: int) -> None:
            self.now += seconds
            self.calls.append((name, number))

        return run

    def __call__(self) -> float:
        return self.now


def test_everybody_makes_as_many_rounds_on_the_same_images_in_changing_order() -> None:
    """Oracle: the log of calls: each round calls each once (and warms once), and the order is not always the same."""
    clock = Clock()
    steps = {name: clock.step(name, 0.01) for name in "abc"}
    found = measure(steps, 10.0, least=5, most=20, warm_calls=dict.fromkeys("abc", 1), clock=clock)
    assert {len(times) for times in found.times.values()} == {20}
    rounds = clock.calls[-20 * 6 :]
    orders = set()
    for number in range(20):
        calls = rounds[6 * number : 6 * number + 6]
        assert sorted(calls) == sorted(2 * [("a", number), ("b", number), ("c", number)])
        orders.add("".join(name for name, _ in calls[::2]))
    assert len(orders) > 1


def test_rounds_stop_with_the_time_but_not_before_the_least() -> None:
    """Oracle: a clock of the test's own: rounds of 1.1 s in 11 s, and in no time at all."""
    clock = Clock()
    steps = {"quick": clock.step("quick", 0.1), "middle": clock.step("middle", 1.0)}
    found = measure(steps, 11.0, least=3, most=100, clock=clock)
    assert len(found.times["quick"]) == pytest.approx(10, abs=1)
    assert found.seconds == pytest.approx(1.1 * len(found.times["quick"]))
    assert len(measure(steps, 0.0, least=3, most=100, clock=clock).times["middle"]) == 3


def test_warm_calls_are_each_contestants_own() -> None:
    """Oracle: the log of calls: two of whom a warm call is wanted, one of the other."""
    clock = Clock()
    measure({"a": clock.step("a", 1), "b": clock.step("b", 1)}, 0.0, least=1, most=1, warm_calls={"a": 1}, clock=clock)
    assert sorted(clock.calls) == [("a", 0), ("a", 0), ("b", 0)]


def test_a_short_call_is_made_twice_to_know_what_it_takes() -> None:
    """Oracle: calls counted: the first of a kind may make kernels, a long one is not worth a second."""
    for seconds, calls in ((0.1, 2), (2.0, 1)):
        clock = Clock()
        assert call_seconds(clock.step("a", seconds), clock=clock)[1] == pytest.approx(seconds)
        assert len(clock.calls) == calls


def test_random_masks_keep_as_many_as_asked_for() -> None:
    """Oracle: counting; and the sweep's masks are the same every time, since bundles name them."""
    masks = random_masks(np.random.default_rng(0), (4, 7), 15, 6)
    assert masks.shape == (4, 7, 15)
    assert (masks.sum(axis=-1) == 6).all()
    for kept, choices in sweep_masks(15, (0.2, 1.0)).items():
        assert (choices.sum(axis=1) == kept).all()
        np.testing.assert_array_equal(choices, sweep_masks(15, (0.2, 1.0))[kept])


@pytest.mark.parametrize("forced", [False, True])
def test_the_graph_with_ifs_computes_what_torch_does(forced: bool) -> None:
    """Oracle: ``forward_masked`` of the model, under the policy's own masks and under forced ones."""
    model = tiny_model(shortcut="conv", rule="shortcut_relu")
    preprocess = tiny_checkpoint(model).preprocess
    session = onnxruntime.InferenceSession(graph_with_ifs(model, preprocess, forced))
    inputs = preprocess.normalise(pixels(4))
    with torch.no_grad():
        masks = some_masks(4, 3) if forced else model.masks(torch.from_numpy(inputs)).numpy()
    rows = []
    for index in range(4):
        feeds = {"x": inputs[index : index + 1]}
        if forced:
            feeds["keep"] = masks[index : index + 1].astype(np.float32)
        rows.append(session.run(["logits"], feeds)[0])
    assert_close(np.concatenate(rows), torch_logits(model, inputs, masks), 1e-4)


def test_a_stored_cell_counts_only_under_the_key_it_was_measured_with(tmp_path: Path) -> None:
    """Oracle: the same key gives the result back; another checkpoint, version or setting, or a torn file, does not."""
    cell, result = Cell("resnet32", "sweep", 1, 1), {"rounds": 3}
    store = Store(tmp_path, {"torch": "1"}, "cpu")
    key = store.key(TINY, "abc")
    assert store.load(cell, key) is None
    store.save(cell, key, result)
    assert store.load(cell, key) == result
    assert store.load(cell, store.key(replace(TINY, minutes=5.0), "abc")) == result
    others = [store.key(TINY, "other"), store.key(replace(TINY, warm_calls=0), "abc")]
    others.append(Store(tmp_path, {"torch": "2"}, "cpu").key(TINY, "abc"))
    assert [store.load(cell, other) for other in others] == [None, None, None]
    (tmp_path / "cells" / f"{cell.name}.json").write_text('{"key": ')
    assert store.load(cell, key) is None


def test_options_take_the_place_of_defaults() -> None:
    """Oracle: what was asked for, and the defaults' own values where nothing was."""
    given = ["--models", "resnet56", "--checkpoint", "resnet56=x.safetensors", "--batches", "4", "--data", "d"]
    config = config_of(_parser().parse_args(given))
    assert (config.models, config.batches, config.minutes) == (("resnet56",), (4,), SuiteConfig.minutes)
    assert config.checkpoints["resnet56"] == "x.safetensors"
    assert config.dataset == "cifar10"
    again = config_of(_parser().parse_args(["--data-dir", "d", "--kinds", "torch", "--threads", "1", "2"]))
    assert (again.data, again.kinds, again.threads) == (Path("d"), ("torch",), (1, 2))
    for wrong in (["--checkpoint", "vgg16=x"], ["--kinds", "tvm"], ["--plan", "--prepare"], ["--batches", "0"]):
        with pytest.raises(SystemExit):
            _parser().parse_args(wrong)


def test_the_command_in_a_result_names_no_folder() -> None:
    """Oracle: the same words by hand, of paths the last component; a name of the zoo stays."""
    given = ["--data-dir", "/a/b", "--out=/c/d", "--checkpoint", "resnet56=/e/f.safetensors", "--threads", "1", "2"]
    given += ["--checkpoint", "resnet32=zoo:resnet32-cifar10"]
    expected = "--data-dir b --out=d --checkpoint resnet56=f.safetensors --threads 1 2 "
    expected += "--checkpoint resnet32=zoo:resnet32-cifar10"
    assert public_command(given) == f"python -m benchmarks.suite {expected}"


@pytest.fixture
def one_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines of one backend: the others' own tests are elsewhere."""
    for module in (contestants, preparing, run):
        monkeypatch.setattr(module, "variants", lambda: [("onnxruntime", "fp32")])


def test_a_run_measures_a_cell_and_the_next_run_finds_it(
    tmp_path: Path, one_backend: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: invariants of the result; and the second run leaves the cell's file as it is, and gives the same."""
    cell = Cell("resnet32", "trained", 1, 1)
    monkeypatch.setattr(run, "cells", lambda _config: [cell])
    checkpoint = tiny_checkpoint_file(tmp_path / "tiny.safetensors")
    config = replace(TINY, checkpoints={"resnet32": str(checkpoint)})
    first = suite.run_suite(config, tmp_path / "out", tmp_path / "work")
    file = tmp_path / "out" / "cells" / f"{cell.name}.json"
    written = file.stat().st_mtime_ns
    (result,) = first["cells"]
    by_name = {one["name"]: one for one in result["contestants"]}
    chain = by_name["bdexport onnxruntime fp32, chain"]
    assert result["rounds"] >= TINY.least_rounds
    exact = [one for one in result["contestants"] if one["group"] != "policy" and one["precision"] == "fp32"]
    assert {one["agreement"] for one in exact} == {1.0}
    full = by_name["ONNX Runtime, full"]["ms"]["p50"]
    assert chain["speedup_over"]["onnxruntime_full"]["value"] == pytest.approx(full / chain["ms"]["p50"])
    assert 0 < chain["efficiency"]["share"] <= 1
    assert "TensorRT, full" in result["missing"]
    int8 = by_name["ONNX Runtime INT8, full"]
    assert int8["precision"] == "int8"
    assert "best_full" not in int8["speedup_over"] or int8["speedup_over"]["best_full"]["name"] == "OpenVINO INT8, full"
    page = (tmp_path / "out" / "suite.md").read_text()
    assert all(page.count(f"| {name}") == 1 for name, one in by_name.items() if one["group"] != "policy")
    policy = by_name["bdexport onnxruntime fp32, policy"]
    assert policy["share"]["of_full"]["value"] == pytest.approx(
        policy["ms"]["p50"] / by_name["bdexport onnxruntime fp32, full"]["ms"]["p50"]
    )
    assert str(tmp_path) not in (tmp_path / "out" / "suite.json").read_text()
    assert result["checkpoint"]["name"] == "tiny.safetensors"
    again = suite.run_suite(config, tmp_path / "out", tmp_path / "work")
    assert file.stat().st_mtime_ns == written
    assert again["cells"] == first["cells"]
    saved = json.loads((tmp_path / "out" / "suite.json").read_text())
    assert saved["cells"] == first["cells"]


def test_what_was_prepared_is_what_the_plan_and_the_run_count_on(
    tmp_path: Path, one_backend: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: preparing measures nothing but leaves bundle and pilot; the run builds nothing; fresh forgets them."""
    cell = Cell("resnet32", "random", 8, 1)
    monkeypatch.setattr(run, "cells", lambda _config: [cell])
    checkpoint = tiny_checkpoint_file(tmp_path / "tiny.safetensors")
    config = replace(TINY, checkpoints={"resnet32": str(checkpoint)}, kinds=("bdexport", "onnxruntime"))
    out, work = tmp_path / "out", tmp_path / "work"
    preparing.prepare(config, out, work)
    said = capsys.readouterr().err
    assert "pilot" in said
    assert not list((out / "cells").glob("*"))
    (manifest,) = work.glob("resnet32-*/manifest.json")
    built = manifest.stat().st_mtime_ns
    preparing.show_plan(config, out, work)
    assert "1 cells, with the least rounds" in capsys.readouterr().err
    result = suite.run_suite(config, out, work)["cells"][0]
    assert manifest.stat().st_mtime_ns == built
    names = {one["name"] for one in result["contestants"]}
    assert "PyTorch eager, full" not in names
    # none of the random masks has an engine of its own
    assert {one["executor"] for one in result["contestants"]} == {None, "chain"}
    preparing.prepare(config, tmp_path / "other", work, fresh=True)
    assert manifest.stat().st_mtime_ns > built


def test_a_cell_that_seemed_not_to_fit_is_tried_when_the_others_are_done(
    tmp_path: Path, one_backend: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: a pilot of 10^6 s a round, as a busy machine might leave one, in a minute: the cell is measured."""
    cell = Cell("resnet32", "random", 1, 1)
    monkeypatch.setattr(run, "cells", lambda _config: [cell])
    checkpoint = tiny_checkpoint_file(tmp_path / "tiny.safetensors")
    config = replace(TINY, checkpoints={"resnet32": str(checkpoint)}, kinds=("onnxruntime",))
    prepared = run.Run(config, tmp_path / "out", tmp_path / "work")
    prepared.pilots.save(cell, prepared.keys[cell], Cost(0.0, 1e6, "pilot"), 1e-3)
    assert prepared.cost(cell).round_s > 60
    found = suite.run_suite(config, tmp_path / "out", tmp_path / "work")
    assert [one["cell"]["usage"] for one in found["cells"]] == ["random"]
    assert found["not_measured"] == {}


def test_no_time_left_is_said_and_nothing_is_lost(tmp_path: Path, one_backend: None) -> None:
    """Oracle: every cell of the plan is named as not measured."""
    config = replace(TINY, minutes=0.0, checkpoints={"resnet32": str(tiny_checkpoint_file(tmp_path / "t.safetensors"))})
    found = suite.run_suite(config, tmp_path / "out", tmp_path / "work")
    assert set(found["not_measured"]) == {cell.name for cell in cells(config)}
    assert all(name in markdown(found) for name in found["not_measured"])


def test_footprints_are_of_processes_of_their_own(tmp_path: Path) -> None:
    """Oracle: a process holds what it held before loading, and its peak is no less than what it holds at the end."""
    from bundles import make_bundle

    bundle = make_bundle(tmp_path / "bundle", tiny_model())
    found = footprints(bundle.path, threads=1, repeats=1)
    for kind in ("bundle", "full"):
        one = found[kind]
        assert one["load_s"] > 0
        assert 0 < one["rss_imported"] <= one["rss_loaded"] * 1.01
        assert one["peak"] >= one["rss_run"] * 0.95
    assert found["ratio"]["rss_run"] == pytest.approx(found["bundle"]["rss_run"] / found["full"]["rss_run"])


def test_the_page_has_one_table_with_a_column_for_each_batch() -> None:
    """Oracle: two cells by hand: an entry for each, a dash for who is missing, the best full network in bold."""
    interval = {"value": 2.0, "low": 1.5, "high": 2.5, "means": 2.0}

    def cell(batch: int, *contestants: dict[str, Any]) -> dict[str, Any]:
        about = {"model": "resnet32", "usage": "trained", "batch": batch, "threads": 1}
        checkpoint = {"name": "zoo:r", "sha256": "0"}
        return {
            "cell": about,
            "checkpoint": checkpoint,
            "num_blocks": 15,
            "rounds": 7,
            "contestants": list(contestants),
            "missing": {"torch.compile": "no compiler"},
        }

    full: dict[str, Any] = {"name": "F", "group": "full", "ms": {"p50": 2.0}, "speedup_over": {}}
    own: dict[str, Any] = {
        "name": "D",
        "group": "dynamic",
        "ms": {"p50": 1.0},
        "speedup_over": {"best_full": interval},
        "efficiency": interval | {"fused_images": 1.0},
        "auto": "faster",
        "blocks": {"mean": 7.0, "std": 1.0},
    }
    policy = {"name": "E, policy", "engine": "E", "group": "policy", "ms": {"p50": 0.1}, "share": {"of_full": interval}}
    machine = {"cpu": "cpu", "cores": 2}
    data = {"machine": machine, "versions": {"torch": "2"}, "date": "d", "command": "c", "not_measured": {"x": "late"}}
    page = markdown(data | {"cells": [cell(8, full), cell(1, full, own, policy)]})
    assert "| who | batch 1 | batch 8 |" in page
    assert "| F | **2.000 ms** | **2.000 ms** |" in page
    assert "| D (auto) | 1.000 ms, 2.00 x [1.50, 2.50], eff. 2.00 [1.50, 2.50] | - |" in page
    assert "| E | 0.100 ms, 200.0 % [150.0, 250.0] of full | - |" in page
    assert page.count("no compiler") == 1
    assert "- x: late" in page


def test_texts_of_a_result_name_no_folder_of_the_machine(tmp_path: Path) -> None:
    """Oracle: the same texts without the folder, at any depth."""
    found = suite.without_places({"a": [f"{tmp_path}/b-1: damaged"], "c": 1}, tmp_path)
    assert found == {"a": ["b-1: damaged"], "c": 1}


def test_points_of_a_sweep_are_lines_by_executor() -> None:
    """Oracle: two executors and two levels by hand."""
    points = [
        {"group": "dynamic", "engine": "e", "executor": executor, "kept": kept, "ms": {"p50": kept}}
        for executor in ("chain", "fused")
        for kept in (5, 2)
    ]
    found = lines_of({"contestants": points})
    assert {label: [point["kept"] for point in line] for label, line in found.items()} == {
        "e, chain": [2, 5],
        "e, fused": [2, 5],
    }
