"""Profiling: events, the result made of them, the trace and the command; declared latencies as the oracle."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import make_bundle, pixels
from test_fused import build, calibration
from tiny import tiny_model

import bdexport
from bdexport.backends.null import NullBackend
from bdexport.bench import Profile, profile, profile_result
from bdexport.bench.profile_result import bound_of, launch_cost_ms
from bdexport.bench.profiling import Alone, Call, bytes_moved
from bdexport.bench.timed_session import COPY, FUSED, PART, REGROUP, Event, clock_cost_us
from bdexport.bench.trace import trace_events
from bdexport.bundle import Bundle
from bdexport.cli.console import to_plain
from bdexport.cli.main import main
from bdexport.config import ProfileConfig
from bdexport.errors import UsageError

# Short, so that on a busy machine some of the runs are not interrupted.
LATENCY_MS = {"policy": 0.2, "stem": 0.1, "block_00": 0.4, "block_02": 0.2, "full": 0.8}
DECLARED_IMAGES = 40
FEW = ProfileConfig(warmup_batches=0, alone_runs=2)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The policy always keeps blocks 0 and 2; block 1 is a transition without parameters, which is dropped."""
    backend = NullBackend(latency_ms=LATENCY_MS, masks=["101"])
    return make_bundle(tmp_path_factory.mktemp("profile") / "bundle", tiny_model(), backend)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Masks that differ within a batch."""
    backend = NullBackend(masks=["101", "110", "000", "111"])
    return make_bundle(tmp_path_factory.mktemp("mixed") / "bundle", tiny_model(), backend)


def profiled(bundle: Bundle, count: int = 10, batch: int = 1, rounds: int = 1) -> tuple[Profile, dict[str, Any]]:
    with bdexport.load(bundle) as orchestrator:
        measured = profile(orchestrator, pixels(count), batch=batch, rounds=rounds, config=FEW)
        return measured, profile_result(orchestrator, measured, {"name": "synthetic", "split": "none"}, FEW)


@pytest.fixture(scope="module")
def declared(bundle: Bundle) -> tuple[Profile, dict[str, Any]]:
    return profiled(bundle, DECLARED_IMAGES)


def parts_of(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {entry["part"]: entry for entry in result["parts"]}


def test_every_part_takes_what_is_declared(bundle: Bundle, declared: tuple[Profile, dict[str, Any]]) -> None:
    """Oracle: the declared latencies; the fastest run only has an upper limit, a busy machine adds what it likes."""
    measured, result = declared
    parts = parts_of(result)
    for part in ("policy", "stem", "block_00", "block_02"):
        fastest = min(event.ms for call in measured.calls for event in call.events if event.what == part)
        assert LATENCY_MS[part] <= fastest < LATENCY_MS[part] + 0.09
        assert LATENCY_MS[part] <= parts[part]["p50_ms"] <= parts[part]["p90_ms"]
        assert parts[part]["runs"] == parts[part]["images"] == DECLARED_IMAGES
    assert set(parts) == set(bundle.manifest.parts) - {"full"}
    assert result["full"]["p50"] >= LATENCY_MS["full"]


def test_a_part_that_no_image_ran_has_no_times(declared: tuple[Profile, dict[str, Any]]) -> None:
    """Oracle: the declared mask: block 1 is dropped, its shortcut runs."""
    parts = parts_of(declared[1])
    assert parts["block_01"]["runs"] == parts["block_01"]["images"] == 0
    assert {parts["block_01"][key] for key in ("p50_ms", "p90_ms", "gap_ms", "gflops_per_s", "bound")} == {None}
    assert parts["block_01"]["share"] == 0
    assert parts["shortcut_01"]["runs"] == DECLARED_IMAGES


def test_a_call_is_the_sum_of_its_stages(mixed: Bundle) -> None:
    """Invariant: stages add up to the call, parts to their stages, shares to 1; nothing is negative."""
    _, result = profiled(mixed, count=12, batch=4)
    stages = {entry["stage"]: entry for entry in result["stages"]}
    assert sum(entry["mean_ms"] for entry in stages.values()) == pytest.approx(result["call_ms"]["mean"])
    assert sum(entry["share"] for entry in stages.values()) == pytest.approx(1)
    assert min(entry["mean_ms"] for entry in stages.values()) >= 0
    parts = sum(entry["share"] for entry in result["parts"])
    assert parts == pytest.approx(stages["policy"]["share"] + stages["network"]["share"])
    assert stages["regrouping"]["mean_ms"] > 0


def test_a_part_counts_the_images_that_ran_it(mixed: Bundle) -> None:
    """Oracle: the masks of the calls themselves."""
    measured, result = profiled(mixed, count=12, batch=4, rounds=2)
    masks = np.concatenate([call.masks for call in measured.calls])
    parts = parts_of(result)
    assert len(masks) == result["images"] == 24
    assert [parts[f"block_0{index}"]["images"] for index in range(3)] == masks.sum(axis=0).tolist()
    assert parts["shortcut_01"]["images"] == (~masks[:, 1]).sum()
    assert result["blocks_used"]["mean"] == pytest.approx(masks.sum(axis=1).mean())


def test_the_results_are_those_of_the_plain_loop(mixed: Bundle) -> None:
    """Oracle: the orchestrator without clocks, image by image: watching changes nothing."""
    measured, _ = profiled(mixed, count=8, batch=4)
    with bdexport.load(mixed) as orchestrator:
        expected = orchestrator(pixels(8)).masks
    assert np.array_equal(np.concatenate([call.masks for call in measured.calls]), expected)


# ---- numbers from events made by hand ----------------------------------------------------------------------------


def by_hand(bundle: Bundle) -> dict[str, Any]:
    """Two equal calls of two images, in us: 10 preprocess, policy 100, gap 5, stem 40, take 3, gap 2, block_00 200.."""
    spans = [
        (COPY, "put", 10, 12, 2),
        (PART, "policy", 12, 112, 2),
        (PART, "stem", 117, 157, 2),
        (REGROUP, "take", 158, 161, 1),
        (PART, "block_00", 162, 362, 1),
        (PART, "head", 370, 380, 2),
    ]
    masks = np.array([[True, False, False], [False, False, False]])
    calls = tuple(
        Call(
            at,
            at + 400_000,
            10_000,
            masks,
            tuple(Event(k, w, at + b * 1000, at + e * 1000, r) for k, w, b, e, r in spans),
        )
        for at in (0, 1_000_000)
    )
    alone = dict.fromkeys(bundle.manifest.parts, Alone(ms=0.030, copy_ms=0.001, single_copy_ms=0.001))
    alone["stem"] = Alone(ms=0.010, copy_ms=0.030, single_copy_ms=0.002)
    ones = np.ones(2)
    measured = Profile(calls, ones, 2 * ones, 4 * ones, alone, 0.5, 2, 1, 0, 0)
    with bdexport.load(bundle) as orchestrator:
        return profile_result(orchestrator, measured, {"name": "synthetic", "split": "none"})


def test_numbers_follow_their_definitions(bundle: Bundle) -> None:
    """Oracle: events whose numbers are computed by hand."""
    result = by_hand(bundle)
    parts, stages = parts_of(result), {entry["stage"]: entry for entry in result["stages"]}
    assert {name: round(entry["p50_ms"] * 1e3) for name, entry in stages.items()} == {
        **dict(zip(("preprocess", "policy", "network", "copies", "regrouping"), (10, 100, 250, 2, 3), strict=True)),
        "between": 400 - 10 - 100 - 250 - 2 - 3,
    }
    assert parts["stem"]["gap_ms"] == pytest.approx(0.005)
    assert parts["block_00"]["gap_ms"] == pytest.approx(0.002)  # 5 us from the stem, 3 of them a copy
    assert parts["policy"]["gap_ms"] is None
    flops = bundle.manifest.parts["block_00"].flops
    assert parts["block_00"]["gflops_per_s"] == pytest.approx(flops / 200e-6 / 1e9)
    assert parts["policy"]["gflops_per_s"] == pytest.approx(2 * bundle.manifest.parts["policy"].flops / 100e-6 / 1e9)
    assert parts["block_00"]["share"] == pytest.approx(200 / 400)
    assert result["call_ms"]["p50"] == pytest.approx(0.4)
    verbs = {entry["verb"]: entry for entry in result["verbs"]}
    assert (verbs["take"]["per_call"], verbs["take"]["images_per_call"]) == (1, 1)
    assert verbs["put"]["ms_per_call"] == pytest.approx(0.002)
    assert result["full"]["gflops_per_s"] == pytest.approx(2 * bundle.manifest.parts["full"].flops / 4e-3 / 1e9)


def test_the_cost_of_the_clocks_is_stated(bundle: Bundle) -> None:
    """Oracle: the same events: six per call at 0.5 us, of a call of 400 us; medians 1, 2 and 0.4 ms of the sides."""
    cost = by_hand(bundle)["instrumentation"]
    assert cost["events_per_call"] == 6
    assert cost["clocks_ms"] == pytest.approx(0.003)
    assert cost["clocks_share"] == pytest.approx(0.003 / 0.4)
    assert cost["part_by_part_over_as_run"] == 2
    assert cost["profiled_over_part_by_part"] == pytest.approx(0.2)


def test_noting_an_event_is_cheap() -> None:
    """Property: positive, and far below any part (the median of many rounds; a loaded machine included)."""
    assert 0 < clock_cost_us() < 50


def test_what_bounds_a_part() -> None:
    """Oracle: the stated criterion, at both of its edges."""
    assert bound_of(1.0, 0.5, 0.1, 0.5) == "launch"
    assert bound_of(1.0, 0.1, 0.5, 0.5) == "memory"
    assert bound_of(1.0, 0.6, 0.7, 0.5) == "memory"
    assert bound_of(1.0, 0.49, 0.49, 0.5) == "compute"
    assert bound_of(None, 0.5, 0.5, 0.5) is bound_of(1.0, None, 0.5, 0.5) is bound_of(1.0, 0.5, None, 0.5) is None
    alone = {"head": Alone(0.010, 1.0, 0.004), "stem": Alone(0.009, 1.0, 0.001), "full": Alone(1.0, 1.0, 1.0)}
    assert launch_cost_ms(alone) == pytest.approx(0.0)
    assert launch_cost_ms({name: alone[name] for name in ("head", "stem")}) == pytest.approx(0.006)


def test_bytes_of_a_part(bundle: Bundle) -> None:
    """Oracle: engine's size, and float32 tensors of the manifest's shapes: stem 3 -> 4 channels at 24 x 32."""
    entry = bundle.manifest.parts["stem"]
    engine = bundle.engine("stem").stat().st_size
    assert bytes_moved(entry, 2.0) == engine + 2 * (3 + 4) * 24 * 32 * 4


def test_a_computing_backend_is_judged(tmp_path: Path) -> None:
    """Oracle: the contract: parts that ran on a CPU have a rate and a bound; null is not judged."""
    _, result = profiled(make_bundle(tmp_path / "bundle", tiny_model()), count=4)
    for entry in result["parts"]:
        assert (entry["bound"] in {"launch", "memory", "compute"}) == (entry["runs"] > 0)
    assert result["criterion"]["launch_ms"] > 0
    assert to_plain(result)["schema"] == "bdexport.profile/1"


def test_null_is_not_judged(declared: tuple[Profile, dict[str, Any]]) -> None:
    """Oracle: the contract."""
    _, result = declared
    assert {entry["bound"] for entry in result["parts"]} == {None}
    assert "computes nothing" in result["criterion"]["text"]


# ---- fused paths -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def linked(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The most frequent masks of some images as fused paths, and not all of them."""
    return build(tmp_path_factory.mktemp("linked"), calibration=calibration(), paths=2)


def profiled_paths(bundle: Bundle, batch: int, executor: str = "fused") -> tuple[Profile, dict[str, Any]]:
    """On the images that the masks were counted on."""
    images = np.asarray(calibration().source)
    with bdexport.load(bundle, executor=executor, fused=True) as orchestrator:
        measured = profile(orchestrator, images, batch=batch, config=FEW)
        return measured, profile_result(orchestrator, measured, {"name": "synthetic", "split": "none"}, FEW)


@pytest.mark.parametrize(("batch", "executor"), [(1, "fused"), (8, "fused"), (1, "chain")])
def test_fused_paths_are_timed_over_their_hits(linked: Bundle, batch: int, executor: str) -> None:
    """Oracle: the masks of the calls, the manifest's paths and FLOPs; shares are of everything on that side."""
    measured, result = profiled_paths(linked, batch, executor)
    masks = ["".join("01"[int(kept)] for kept in row) for call in measured.fused_calls for row in call.masks]
    fused, manifest = result["fused"], linked.manifest
    assert manifest.fused is not None
    known = {path.mask for path in manifest.fused.paths} | {"111"}
    assert {entry["mask"]: entry["images"] for entry in fused["paths"] if entry["runs"]} == {
        mask: masks.count(mask) for mask in set(masks) & known
    }
    assert fused["hits"] == sum(mask in known for mask in masks) > 0
    assert fused["missed"]["images"] == len(masks) - fused["hits"]
    assert fused["images"] == result["images"] == len(masks)
    for entry in fused["paths"]:
        kept = [
            part for part, keep in zip(("block_00", "block_01", "block_02"), entry["mask"], strict=True) if keep == "1"
        ]
        flops = sum(manifest.parts[part].flops for part in ("stem", "head", *kept))
        flops += 0 if entry["mask"][1] == "1" else manifest.parts["shortcut_01"].flops
        assert entry["flops"] == (manifest.parts["full"].flops if entry["mask"] == "111" else flops)
        assert entry["blocks"] == len(kept)
        if entry["runs"]:
            assert 0 < entry["p50_ms"] <= entry["p90_ms"]
            times = [event.ms for call in measured.fused_calls for event in call.events if event.what == entry["mask"]]
            if entry["mask"] != "111":
                assert entry["p50_ms"] == pytest.approx(float(np.median(times)))
    stages = {entry["stage"]: entry["share"] for entry in fused["stages"]}
    assert sum(stages.values()) == pytest.approx(1)
    assert stages["network"] == pytest.approx(
        fused["missed"]["share"] + sum(entry["share"] for entry in fused["paths"])
    )


def test_fused_calls_have_a_track_of_their_own(linked: Bundle) -> None:
    """Oracle: as many calls there as part by part; every slice of a path is on it and named by its mask."""
    measured, result = profiled_paths(linked, batch=8)
    events = trace_events(measured)
    calls = [event["tid"] for event in events if event.get("cat") == "call"]
    assert calls.count(1) == calls.count(2) == len(measured.calls)
    paths = [event for event in events if event.get("cat") == FUSED]
    assert {event["tid"] for event in paths} == {2}
    assert {event["name"] for event in paths} <= {entry["mask"] for entry in result["fused"]["paths"]}
    assert min(event["ts"] for event in events if event["ph"] == "X") == 0


def test_command_shows_the_paths(linked: Bundle, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Oracle: every path of the manifest that ran is a row, whatever the executor; the JSON has them all."""
    line = ["profile", str(linked.path), "--images", "6", "--executor", "chain", "--json", str(tmp_path / "p.json")]
    assert main(line) == 0
    printed, result = capsys.readouterr().out, json.loads((tmp_path / "p.json").read_text())
    assert "through the fused paths" in printed
    assert result["executor"] == "chain"
    assert linked.manifest.fused is not None
    assert {path.mask for path in linked.manifest.fused.paths} <= {entry["mask"] for entry in result["fused"]["paths"]}
    assert all(entry["mask"] in printed for entry in result["fused"]["paths"] if entry["runs"])


def test_without_fused_paths_there_is_nothing_of_them(declared: tuple[Profile, dict[str, Any]]) -> None:
    """Oracle: the contract: null runs none."""
    measured, result = declared
    assert result["fused"] is None
    assert measured.fused_calls == ()


# ---- trace -------------------------------------------------------------------------------------------------------


def test_slices_nest_and_do_not_overlap(mixed: Bundle) -> None:
    """Invariant: each call's slices lie inside it, one after another; the trace's times are the profile's."""
    measured, _ = profiled(mixed, count=8, batch=4)
    slices = [event for event in trace_events(measured) if event["ph"] == "X"]
    calls = [event for event in slices if event["cat"] == "call"]
    assert [call["name"] for call in calls] == ["call 0", "call 1"]
    assert calls[0]["ts"] == 0
    ends = []
    for call in calls:
        begin, end = call["ts"], call["ts"] + call["dur"]
        inner = [event for event in slices if event["cat"] != "call" and begin <= event["ts"] < end]
        ends += [event["name"] for event in inner[-1:]]
        for event, following in itertools.pairwise(inner):
            assert event["ts"] + event["dur"] <= following["ts"] + 1e-3
        assert inner[-1]["ts"] + inner[-1]["dur"] <= end + 1e-3
        assert inner[0]["name"] == "preprocess"
    assert ends == ["get", "get"]
    total = sum(event.ms for call in measured.calls for event in call.events)
    assert sum(event["dur"] for event in slices if event["cat"] in (PART, COPY, REGROUP)) == pytest.approx(total * 1e3)
    assert {(event["pid"], event["tid"]) for event in slices} == {(1, 1)}


# ---- command -----------------------------------------------------------------------------------------------------


def test_command(mixed: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: exit code 0, every part in the table, the result as JSON, a trace that JSON's reader takes."""
    out, trace = tmp_path / "deep" / "profile.json", tmp_path / "trace.json"
    line = ["profile", str(mixed.path), "--images", "10", "--batch", "4", "--threads", "1", "--rounds", "2"]
    assert main([*line, "--json", str(out), "--trace", str(trace)]) == 0
    printed, result = capsys.readouterr().out, json.loads(out.read_text())
    assert all(part in printed for part in mixed.manifest.parts)
    assert all(stage in printed for stage in ("preprocess", "regrouping", "between"))
    assert "the clocks take" in printed
    assert "last 2 images" in printed
    assert "random images" in printed
    assert (result["schema"], result["batch"], result["measured"]["calls"]) == ("bdexport.profile/1", 4, 4)
    document = json.loads(trace.read_text())
    assert sum(event.get("cat") == "call" for event in document["traceEvents"]) == 4
    assert document["otherData"]["backend"] == "null"


def test_command_on_a_data_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: --json - leaves stdout to JSON; a folder of images is read as bench reads it."""
    from PIL import Image

    bundle = make_bundle(tmp_path / "bundle", tiny_model(), "null")
    for number, name in enumerate(("cat", "dog", "newt")):
        (tmp_path / "data" / "test" / name).mkdir(parents=True)
        Image.fromarray(pixels(1, number)[0]).save(tmp_path / "data" / "test" / name / "a.png")
    line = ["profile", str(bundle.path), "--dataset", "folder", "--data", str(tmp_path / "data"), "--batch", "99"]
    assert main([*line, "--json", "-"]) == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert result["dataset"] == {"name": "folder", "split": "test"}
    assert (result["images"], result["batch"]) == (3, 3)
    assert "batch 99 is more than there are images" in err


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--images", "0"], 2, "--images"),
        (["--images", "1000000000000"], 2, "at most"),
        (["--batch", "-1"], 2, "--batch"),
        (["--rounds", "1000000"], 2, "fewer images or rounds"),
        (["--threads", "100000"], 2, "threads"),
        (["--dataset", "cifar11"], 2, "cifar11"),
        (["--data", "somewhere"], 2, "--dataset"),
        (["--executor", "magic"], 2, "magic"),
        (["--trace", "FILE/trace.json"], 1, "cannot be written"),
        (["--trace", "."], 1, "cannot be written"),
        (["--json", "FILE/out.json"], 1, "cannot be written"),
    ],
)
def test_refusals(
    bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], code: int, said: str
) -> None:
    """Oracle: one line that says what is wrong, exit code 2 for the request and 1 for the job; nothing is written."""
    (tmp_path / "file").write_text("")
    words = [word.replace("FILE", str(tmp_path / "file")) for word in words]
    assert main(["profile", str(bundle.path), *words]) == code
    lines = capsys.readouterr().err.strip().splitlines()
    assert said in lines[-1]
    assert "internal error" not in lines[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_damaged_bundle_is_refused(bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: the bundle's own hashes; no trace is left."""
    broken = Path(shutil.copytree(bundle.path, tmp_path / "broken"))
    (broken / "engines" / "stem.json").write_text("{}")
    assert main(["profile", str(broken), "--trace", str(tmp_path / "trace.json")]) == 1
    assert "stem.json" in capsys.readouterr().err
    assert not (tmp_path / "trace.json").exists()


def test_settings_that_cannot_be_are_refused(bundle: Bundle) -> None:
    """Oracle: the contract of the library's own function."""
    with bdexport.load(bundle) as orchestrator:
        for batch, rounds in ((0, 1), (3, 1), (1, 0)):
            with pytest.raises(UsageError):
                profile(orchestrator, pixels(2), batch=batch, rounds=rounds, config=FEW)
