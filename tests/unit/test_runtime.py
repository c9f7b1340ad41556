"""The orchestrator: what it promises beyond what every backend is tested for."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import assert_close, make_bundle, pixels, some_masks, torch_logits
from tiny import tiny_model

import bdexport
from bdexport.bundle import Bundle
from bdexport.errors import BackendError, BundleError, InputError, UsageError
from bdexport.runtime import Orchestrator


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("runtime") / "bundle", tiny_model(), max_batch=8)


@pytest.fixture
def orchestrator(bundle: Bundle) -> Iterator[Orchestrator]:
    with bdexport.load(bundle.path) as loaded:
        yield loaded


def test_a_result_says_what_ran(orchestrator: Orchestrator) -> None:
    """Oracle: shapes and dtypes of the contract, and the definitions of class, confidence and blocks used."""
    result = orchestrator(pixels(5))
    assert result.logits.shape == result.masks.shape == (5, 3)
    assert (result.logits.dtype.name, result.masks.dtype.name) == ("float32", "bool")
    assert result.probabilities is not None
    assert np.array_equal(result.masks, result.probabilities >= 0.5)
    assert result.blocks_used.dtype == np.int64
    assert result.blocks_used.tolist() == [int(mask.sum()) for mask in result.masks]
    softmax = np.exp(result.logits) / np.exp(result.logits).sum(axis=1, keepdims=True)
    assert result.classes.tolist() == softmax.argmax(axis=1).tolist()
    assert_close(result.confidence, softmax.max(axis=1))


def test_timings_add_up(orchestrator: Orchestrator) -> None:
    """Invariant: the stages make up the total, none is negative; the policy takes no time when masks are forced."""
    for result in (orchestrator(pixels(3)), orchestrator.full(pixels(3))):
        stages = [result.timings[name] for name in ("preprocess", "policy", "network")]
        assert min(stages) >= 0
        assert sum(stages) == pytest.approx(result.timings["total"])
    forced = [orchestrator(pixels(3), masks=some_masks(3, 3)) for _ in range(5)]
    assert forced[0].probabilities is None
    assert min(result.timings["policy"] for result in forced) < 0.1


def test_a_large_confidence_does_not_overflow() -> None:
    """Oracle: softmax's invariance to a shift."""
    from bdexport.runtime import Result

    logits = np.array([[1e30, 0.0], [-2000.0, -2001.0]], np.float32)
    none = np.zeros((2, 1), bool)
    result = Result(logits, none, None, {})
    assert result.confidence.tolist() == pytest.approx([1.0, 1 / (1 + np.exp(-1.0))])


def test_images_of_another_size_are_fitted(orchestrator: Orchestrator) -> None:
    """Oracle: the same images, fitted beforehand."""
    images = pixels(2, size=(50, 41))
    fitted = orchestrator.manifest.preprocess.fit_array(images)
    assert np.array_equal(orchestrator(images).logits, orchestrator(fitted).logits)


def test_pixels_and_preprocessed_floats_agree(orchestrator: Orchestrator) -> None:
    """Oracle: the manifest's preprocessing."""
    images = pixels(4)
    assert np.array_equal(orchestrator(images).logits, orchestrator(orchestrator.manifest.preprocess(images)).logits)


@pytest.mark.parametrize("seed", range(5))
def test_the_order_of_a_batch_does_not_matter(orchestrator: Orchestrator, seed: int) -> None:
    """Property: permuting images and masks permutes the logits, however they are regrouped."""
    images, masks = pixels(8, seed), some_masks(8, 3, seed)
    order = np.random.default_rng(seed).permutation(8)
    expected = orchestrator(images, masks=masks).logits[order]
    assert_close(orchestrator(images[order], masks=masks[order]).logits, expected)


def test_wide_shortcuts_run_too(tmp_path: Path) -> None:
    """Oracle: torch; channels beyond which padding is not rewritten as a convolution."""
    import torch

    from bdexport.architecture import PolicySpec, ResNetSpec
    from bdexport.models.pair import BlockDropNet

    torch.manual_seed(0)
    network = ResNetSpec("cifar", "basic", (1, 1), (128, 256), "option_a", num_classes=3)
    model = BlockDropNet(network, PolicySpec("cifar", (1,), (8,), 2)).eval()
    masks = np.array([[True, True], [True, False], [False, True], [False, False]])
    for threads in (1, 2):
        with bdexport.load(make_bundle(tmp_path / "bundle", model), threads=threads) as loaded:
            inputs = loaded.manifest.preprocess(pixels(4))
            expected = torch_logits(model, inputs, masks)
            assert_close(loaded(inputs, masks=masks).logits, expected)
            assert_close(
                np.concatenate([loaded(inputs[[row]], masks=masks[[row]]).logits for row in range(4)]), expected
            )


# ---- errors -------------------------------------------------------------------------------------------------------


def test_a_batch_beyond_the_profile_is_refused(orchestrator: Orchestrator) -> None:
    """Oracle: the contract, for dynamic and full alike."""
    for call in (orchestrator, orchestrator.full):
        with pytest.raises(InputError, match="batch 9 exceeds the bundle's 8"):
            call(pixels(9))


def test_forced_masks_are_checked(orchestrator: Orchestrator) -> None:
    """Oracle: the contract."""
    with pytest.raises(InputError, match=r"masks: wrong shape.*\(2, 3\)"):
        orchestrator(pixels(2), masks=np.ones((2, 4), bool))


def test_numbers_that_overflow_are_an_error_not_class_0(orchestrator: Orchestrator) -> None:
    """Oracle: the contract: finite inputs whose products are not."""
    huge = np.full((1, 3, 24, 32), 3e38, np.float32)
    with pytest.raises(BackendError, match="not finite"):
        orchestrator(huge, masks=np.ones((1, 3), bool))
    with pytest.raises(BackendError, match="not finite"):
        orchestrator.full(huge)


def test_use_after_close_is_refused(bundle: Bundle) -> None:
    """Oracle: the contract; closing twice is harmless."""
    loaded = bdexport.load(bundle)
    loaded.close()
    loaded.close()
    for call in (loaded, loaded.full):
        with pytest.raises(UsageError, match="after close"):
            call(pixels(1))


def test_leaving_the_block_closes(bundle: Bundle) -> None:
    """Oracle: the contract, also when an exception leaves it."""
    with pytest.raises(KeyError), bdexport.load(bundle) as loaded:
        raise KeyError
    with pytest.raises(UsageError, match="after close"):
        loaded(pixels(1))


@pytest.mark.parametrize("threads", [0, -1, 1024, True, 1.5, "2"])
def test_a_thread_count_that_cannot_be_is_refused(bundle: Bundle, threads: int) -> None:
    """Oracle: the contract; 1024 spinning threads would stop a small machine."""
    with pytest.raises(UsageError, match="threads"):
        bdexport.load(bundle, threads=threads)


@pytest.mark.parametrize("batch", [0, -1, True, 1.5, "3"])
@pytest.mark.parametrize("verb", ["warm_up", "prepare"])
def test_a_batch_that_cannot_be_is_refused(orchestrator: Orchestrator, verb: str, batch: Any) -> None:
    """Oracle: the contract."""
    with pytest.raises(UsageError, match=r"^batch: got .* whole number of 1 or more"):
        getattr(orchestrator, verb)(batch)


@pytest.mark.parametrize(("name", "value"), [("device", ""), ("device", 3), ("executor", None)])
def test_arguments_of_another_kind_are_refused(bundle: Bundle, name: str, value: Any) -> None:
    """Oracle: the contract."""
    with pytest.raises(UsageError, match=name):
        bdexport.load(bundle, **{name: value})
    nowhere: Any = 3
    with pytest.raises(UsageError, match="bundle"):
        bdexport.load(nowhere)


@pytest.mark.parametrize("threads", [1, 2])
def test_closing_while_others_run_ends_their_calls_cleanly(bundle: Bundle, threads: int) -> None:
    """Oracle: the contract: a call gives its result or the UsageError of a closed session, never anything else."""
    ended: list[BaseException] = []
    for _ in range(5):
        loaded = bdexport.load(bundle, threads=threads)
        loaded.warm_up()
        begun = threading.Barrier(5)

        def work(loaded: Orchestrator = loaded, begun: threading.Barrier = begun) -> None:
            begun.wait()
            try:
                while True:
                    loaded(pixels(3), masks=some_masks(3, 3))
            except BaseException as error:
                ended.append(error)

        workers = [threading.Thread(target=work) for _ in range(4)]
        for worker in workers:
            worker.start()
        begun.wait()
        loaded.close()
        for worker in workers:
            worker.join()
    assert len(ended) == 20
    assert {type(error) for error in ended} == {UsageError}


def test_a_precision_that_the_backend_has_not_is_refused(bundle: Bundle) -> None:
    """Oracle: a manifest that says int8 over fp32 engines would make every report wrong."""
    claimed = Bundle(bundle.path, replace(bundle.manifest, precision="int3"))
    with pytest.raises(BackendError, match="precision: got int3, expected fp32"):
        bdexport.load(claimed)


def test_an_unknown_executor_lists_the_known_ones(bundle: Bundle) -> None:
    """Oracle: the table of executors."""
    with pytest.raises(UsageError, match=r"'fast'.*auto.*chain"):
        bdexport.load(bundle, executor="fast")


def test_executors_report_their_reason(bundle: Bundle) -> None:
    """Oracle: what was asked for, and the manifest's record."""
    with bdexport.load(bundle, executor="chain") as loaded:
        assert (loaded.executor, loaded.executor_reason) == ("chain", "asked for by name")
    with bdexport.load(bundle) as loaded:
        assert loaded.manifest.executor is not None
        assert loaded.executor_reason == loaded.manifest.executor["reason"]


def test_a_missing_bundle_is_named(tmp_path: Path) -> None:
    """Oracle: the contract."""
    with pytest.raises(BundleError, match="nowhere"):
        bdexport.load(tmp_path / "nowhere")


# ---- what a production box needs ----------------------------------------------------------------------------------


def test_running_a_bundle_imports_neither_torch_nor_onnx(bundle: Bundle) -> None:
    """Oracle: an interpreter in which importing them fails."""
    code = f"""
import sys
for name in ("torch", "onnx", "safetensors", "sklearn"):
    sys.modules[name] = None
import numpy, bdexport
with bdexport.load({str(bundle.path)!r}, threads=2) as orchestrator:
    orchestrator.warm_up()
    images = numpy.random.default_rng(0).integers(0, 256, (5, 24, 32, 3), dtype=numpy.uint8)
    print(orchestrator(images).logits.shape, orchestrator.full(images).logits.shape)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "(5, 3) (5, 3)"
