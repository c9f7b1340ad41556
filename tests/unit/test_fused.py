"""Fused paths: which masks they are, that they compute what the parts do, how they are chosen, counted and refused."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import assert_close, pixels, some_masks, torch_logits
from tiny import SIZE, tiny_checkpoint, tiny_model

import bdexport
from bdexport.backends import get_backend
from bdexport.build import BuiltBundle, bundle_from_model, checked_backend
from bdexport.choose import decision
from bdexport.config import BuildConfig, FusedConfig
from bdexport.dataset import Dataset
from bdexport.errors import BackendError, BdexportError, BuildError, UsageError
from bdexport.fused import FusedPath, FusedPaths, MaskCounts, choose_fused, counts_of_masks, sampled_masks, shares_text
from bdexport.parts import mask_to_text
from bdexport.runtime import Orchestrator
from bdexport.runtime.grouping import plan_batch
from bdexport.runtime.orchestrator import executors_of

COUNTS = MaskCounts("validation", 100, (("110", 50), ("111", 25), ("010", 15), ("000", 10)))
CLASSES = ("cat", "dog", "newt")


def build(folder: Path, backend: str = "onnxruntime", calibration: Dataset | None = None, **fused: Any) -> BuiltBundle:
    config = BuildConfig(backend=backend, fused=replace(FusedConfig(measure=False), **fused))
    model = tiny_model()
    return bundle_from_model(
        model,
        tiny_checkpoint(model),
        folder / "bundle",
        get_backend(backend),
        config=config,
        checkpoint_sha256="0" * 64,
        counted=calibration,
    )


def calibration(count: int = 40) -> Dataset:
    labels = np.arange(count, dtype=np.int64) % 3
    return Dataset("folder", "validation", CLASSES, labels, pixels(count))


@pytest.fixture(scope="module", params=["onnxruntime", "openvino"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> BuiltBundle:
    if request.param == "openvino":
        pytest.importorskip("openvino")
    return build(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def fused(bundle: BuiltBundle) -> Iterator[Orchestrator]:
    with bdexport.load(bundle.path, executor="fused") as loaded:
        yield loaded


# ---- which masks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "coverage", "most", "masks", "covered"),
    [
        (None, 0.95, 32, ["110", "010", "000"], 1.0),
        (None, 0.9, 32, ["110", "010"], 0.9),
        (None, 0.95, 1, ["110"], 0.75),
        (2, 0.1, 1, ["110", "010"], 0.9),
        (9, 0.95, 32, ["110", "010", "000"], 1.0),
    ],
)
def test_the_most_frequent_masks_are_fused(
    number: int | None, coverage: float, most: int, masks: list[str], covered: float
) -> None:
    """Oracle: COUNTS read by eye; the mask that keeps all is covered by the full engine and is no path of its own."""
    chosen = choose_fused(COUNTS, number, coverage, most)
    assert [path.mask for path in chosen.paths] == masks
    assert chosen.coverage == pytest.approx(covered)
    assert chosen.paths[0].share == pytest.approx(0.5)


def test_sampled_masks_occur_as_counted() -> None:
    """Oracle: the counts: of 200 masks each occurs within one percent of its share."""
    sampled = [mask_to_text(mask) for mask in sampled_masks(COUNTS, 200)]
    for mask, count in COUNTS.counted:
        assert abs(sampled.count(mask) - 2 * count) <= 2


def test_calibration_images_decide_which_masks(tmp_path: Path) -> None:
    """Oracle: torch's policy on the same images, counted by hand."""
    import torch

    data, model = calibration(), tiny_model()
    bundle = build(tmp_path, calibration=data)
    assert bundle.manifest.fused is not None
    inputs = torch.tensor(bundle.manifest.preprocess(data.arrays(bundle.manifest.preprocess)))
    with torch.no_grad():
        counts = counts_of_masks(model.masks(inputs).numpy().astype(bool), "validation")
    assert bundle.manifest.fused == choose_fused(counts, None, 0.95, 32)


# ---- what they compute ---------------------------------------------------------------------------------------------


def test_fused_is_chain_is_torch(bundle: BuiltBundle, fused: Orchestrator) -> None:
    """Oracle: torch, for hits, misses and the full mask, image by image and as one batch; chain on the same session."""
    inputs, masks = bundle.manifest.preprocess(pixels(12)), some_masks(12, 3)
    expected = torch_logits(tiny_model(), inputs, masks)
    for loaded in executors_of(fused).values():
        assert_close(loaded(inputs, masks=masks).logits, expected, 1e-4)
        single = [loaded(inputs[[row]], masks=masks[[row]]).logits for row in range(12)]
        assert_close(np.concatenate(single), expected, 1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_order_and_grouping_do_not_matter(fused: Orchestrator, seed: int) -> None:
    """Property: permuting images and masks, and cutting the batch elsewhere, permutes the logits."""
    generator = np.random.default_rng(seed)
    images, masks = pixels(10, seed), some_masks(10, 3, seed)
    expected, order, cut = fused(images, masks=masks).logits, generator.permutation(10), int(generator.integers(1, 9))
    pieces = [fused(images[rows], masks=masks[rows]).logits for rows in (order[:cut], order[cut:])]
    assert_close(np.concatenate(pieces), expected[order])


def test_all_blocks_kept_runs_the_full_engine(fused: Orchestrator) -> None:
    """Oracle: the full engine itself, bit for bit."""
    images = pixels(3)
    got = fused(images, masks=np.ones((3, 3), bool)).logits
    assert np.array_equal(got, fused.full(images).logits)


def test_the_hit_rate_counts_images(bundle: BuiltBundle) -> None:
    """Oracle: the fused masks and the full one are hits, the others are not; chain has no such rate."""
    assert bundle.manifest.fused is not None
    hits = {path.mask for path in bundle.manifest.fused.paths} | {"111"}
    masks = some_masks(16, 3)
    with bdexport.load(bundle.path, executor="fused") as loaded:
        assert loaded.hit_rate is None
        loaded(pixels(16), masks=masks)
        loaded(pixels(1), masks=masks[:1])
        expected = sum(mask_to_text(mask) in hits for mask in masks) + 1
        assert loaded.hit_rate == pytest.approx(expected / 17)
        assert executors_of(loaded)["chain"].hit_rate is None


def test_groups_are_runs_of_equal_masks() -> None:
    """Invariant: the groups of a plan cut its rows without gap; inside each all masks are equal, between them not."""
    plan = plan_batch(some_masks(30, 4, seed=3))
    groups = list(plan.groups())
    assert [begin for begin, _ in groups[1:]] == [end for _, end in groups[:-1]]
    assert (groups[0][0], groups[-1][1]) == (0, 30)
    texts = [{mask_to_text(mask) for mask in plan.masks[begin:end]} for begin, end in groups]
    assert all(len(text) == 1 for text in texts)
    assert len(set.union(*texts)) == len(groups)


def test_eight_threads_get_what_one_gets(bundle: BuiltBundle) -> None:
    """Oracle: the same calls one after another: batches of one and five, hits and misses, policy and forced masks."""
    images, masks = pixels(40), some_masks(40, 3)
    with bdexport.load(bundle.path, executor="fused") as loaded:

        def call(number: int) -> np.ndarray:
            rows = slice(number % 36, number % 36 + (1 if number % 3 else 5))
            return loaded(images[rows], masks=masks[rows] if number % 2 else None).logits

        serial = [call(number) for number in range(60)]
        with ThreadPoolExecutor(8) as pool:
            together = list(pool.map(call, list(range(60)) * 3))
        for number, got in enumerate(together):
            assert_close(got, serial[number % 60], 1e-6)
        assert loaded.hit_rate is not None


def test_two_threads_compute_the_same(tmp_path: Path) -> None:
    """Oracle: one thread."""
    path, images, masks = build(tmp_path).path, pixels(6), some_masks(6, 3)
    with (
        bdexport.load(path, executor="fused", threads=1) as one,
        bdexport.load(path, executor="fused", threads=2) as two,
    ):
        assert_close(two(images, masks=masks).logits, one(images, masks=masks).logits)
        assert_close(two(images[:1], masks=masks[1:2]).logits, one(images[:1], masks=masks[1:2]).logits)


@pytest.mark.parametrize("threads", [2, 3])
def test_shares_of_a_batch_are_the_batch(tmp_path: Path, threads: int) -> None:
    """Oracle: one thread, part by part; also when several callers want the same threads at once."""
    path, masks = build(tmp_path).path, some_masks(9, 3)
    images = pixels(9)
    with (
        bdexport.load(path, executor="chain", threads=1) as one,
        bdexport.load(path, executor="chain", threads=threads) as several,
    ):
        expected = {batch: one(images[:batch], masks=masks[:batch]).logits for batch in range(2, 10)}
        for batch, logits in expected.items():
            assert_close(several(images[:batch], masks=masks[:batch]).logits, logits)

        def call(batch: int) -> None:
            assert_close(several(images[:batch], masks=masks[:batch]).logits, expected[batch])

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(call, list(expected) * 5))


@pytest.mark.parametrize("number", [1, 2, 3, 16])
@pytest.mark.parametrize("images", [2, 3, 7, 64])
def test_shares_have_equal_work(number: int, images: int) -> None:
    """Oracle: every row in one share, in order; as many shares as can be; none above its part plus one image."""
    masks = np.random.default_rng(images).random((images, 15)) < 0.4
    plan = plan_batch(masks)
    shares = plan.shares(number)
    assert np.array_equal(np.concatenate(shares), np.arange(images))
    assert len(shares) == min(number, images)
    assert all(len(rows) for rows in shares)
    work = plan.masks.sum(axis=1) + 1
    assert max(work[rows].sum() for rows in shares) <= work.sum() / number + work.max()


# ---- choosing ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fused_ms", "choice"),
    [((0.8, 9.0), "fused"), ((0.8, 12.5), "chain"), ((0.999, 10.0), "chain"), ((1.5, 2.0), "fused")],
)
def test_the_faster_executor_is_chosen(fused_ms: tuple[float, float], choice: str) -> None:
    """Oracle: the rule by hand: the mean of both batches' ratios to chain, at least 1 % better."""
    rows = [
        {"batch": batch, "calls": 4, "ms": {"chain": chain, "fused": own}}
        for batch, chain, own in zip((1, 64), (1.0, 10.0), fused_ms, strict=True)
    ]
    assert decision(rows, 0.01)[0] == choice


def test_auto_is_what_was_measured(tmp_path: Path) -> None:
    """Oracle: the manifest's record, which has both executors' numbers at batch 1 and a larger one."""
    bundle = build(tmp_path, measure=True)
    record = bundle.manifest.executor
    assert record is not None
    assert [set(row["ms"]) for row in record["measured"]] == [{"chain", "fused"}] * 2
    assert record["measured"][0]["batch"] == 1 < record["measured"][1]["batch"]
    assert record["choice"] == decision(record["measured"], 0.01)[0]
    with bdexport.load(bundle.path) as loaded:
        assert (loaded.executor, loaded.executor_reason) == (record["choice"], record["reason"])


# ---- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backend", "settings", "words"),
    [
        ("onnxruntime", {"paths": 0}, "--fused: got 0"),
        ("onnxruntime", {"paths": 100_000}, "--fused: got 100000"),
        ("torch", {"paths": 2}, "backend torch runs no fused paths"),
        ("onnxruntime", {"max_bundle_mb": 0.0}, "--max-bundle-mb"),
        ("onnxruntime", {"quantise": "nearest"}, "cover or budget"),
        ("onnxruntime", {"quantise": "budget", "accuracy_budget": -1.0}, "--accuracy-budget"),
        ("onnxruntime", {"accuracy_budget": 3.0}, "--accuracy-budget has no effect"),
        ("onnxruntime", {"mask_images": 0}, "--mask-images"),
    ],
)
def test_settings_that_cannot_be_are_refused(backend: str, settings: dict[str, Any], words: str) -> None:
    """Oracle: the contract: before anything is built."""
    with pytest.raises(UsageError, match=words):
        checked_backend(BuildConfig(backend=backend, fused=replace(FusedConfig(), **settings)))


@pytest.mark.parametrize(
    ("settings", "data", "error", "words"),
    [
        ({"max_bundle_mb": 0.001}, None, BuildError, "larger than --max-bundle-mb"),
        ({"quantise": "cover"}, None, UsageError, "needs images with labels"),
        ({}, Dataset("folder", "validation", CLASSES, np.zeros(0, np.int64), pixels(0)), UsageError, "no images"),
        ({}, Dataset("folder", "validation", ("a", "b"), np.zeros(2, np.int64), pixels(2)), BdexportError, "2 classes"),
    ],
)
def test_what_cannot_be_built_leaves_nothing(
    tmp_path: Path, settings: dict[str, Any], data: Dataset | None, error: type[Exception], words: str
) -> None:
    """Oracle: the contract: a clear error, and no folder behind it."""
    with pytest.raises(error, match=words):
        build(tmp_path, calibration=data, **settings)
    assert not (tmp_path / "bundle").exists()


def test_a_bundle_without_fused_paths_runs_chain_and_says_so(tmp_path: Path) -> None:
    """Oracle: a manifest as earlier builds wrote it, without the key: it opens, and asking for fused is an error."""
    bundle = build(tmp_path)
    from bdexport.bundle import Bundle, manifest_from_json

    data = bundle.manifest.to_json()
    del data["fused"]
    data["executor"] = {"choice": "chain", "reason": "one engine per part"}
    older = Bundle(bundle.path, manifest_from_json(data))
    with bdexport.load(older) as loaded:
        assert loaded.executor == "chain"
        loaded(pixels(2))
    with pytest.raises(UsageError, match="no fused paths; build it with --fused N"):
        bdexport.load(older, executor="fused")


def test_more_paths_than_masks_is_a_note(tmp_path: Path) -> None:
    """Oracle: the contract: what occurs is fused, and the build says that it is less than was asked for."""
    bundle = build(tmp_path, paths=5)
    assert bundle.manifest.fused is not None
    assert [path.mask for path in bundle.manifest.fused.paths] == ["000"]
    assert any("--fused 5: only 1 mask" in note for note in bundle.notes)
    assert bundle.fusing is not None
    assert bundle.fusing["bytes_before"] == bundle.fusing["bytes_after"]


def test_a_closed_session_refuses_fused_paths(tmp_path: Path) -> None:
    """Oracle: the contract."""
    loaded = bdexport.load(build(tmp_path).path, executor="fused")
    session = loaded.session
    loaded.close()
    with pytest.raises((UsageError, BackendError), match="after close"):
        session.run_fused((), np.zeros((1, 3, *SIZE), np.float32))  # type: ignore[attr-defined]


def test_a_choice_that_no_executor_has_is_the_manifests_fault(tmp_path: Path) -> None:
    """Oracle: the contract: a damaged choice names the manifest; an executor asked for by name still runs."""
    from bdexport.errors import BundleError
    from bdexport.runtime.executors import executor_name

    manifest = replace(build(tmp_path).manifest, executor={"choice": "nonsense", "reason": ""})
    with pytest.raises(BundleError, match=r'manifest.json: executor: choice: got "nonsense"'):
        executor_name("auto", manifest)
    assert executor_name("chain", manifest)[0] == "chain"


def test_what_the_paths_cover_in_words() -> None:
    """Oracle: English."""
    one, two = FusedPath("000", 0.5), FusedPath("010", 0.25)
    assert shares_text(FusedPaths("validation", 8, 0.5, (one,))) == "1 fused path covers 50.0 % of 8 validation images"
    assert shares_text(FusedPaths("test", 8, 0.75, (one, two))) == "2 fused paths cover 75.0 % of 8 test images"
    assert shares_text(FusedPaths("test", 8, 0.0, ())) == "0 fused paths cover 0.0 % of 8 test images"
