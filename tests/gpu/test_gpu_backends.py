"""Every backend with a GPU: what torch computes, for every precision and executor; streams, DLPack, leaks."""

from __future__ import annotations

import gc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bundles import assert_close, pixels, rows, some_masks, torch_logits
from gpu_cases import (
    CALIBRATED_CASES,
    CASES,
    DEVICE,
    DRY_RUN,
    EXECUTORS,
    GPU_BACKENDS,
    SHARES,
    Known,
    bundle_of,
    network,
    opened,
)
from torch.utils.dlpack import from_dlpack

import bdexport
from bdexport.cuda import open_cuda
from bdexport.errors import BdexportError, InputError, UsageError
from bdexport.partition import part_module
from bdexport.parts import FULL, POLICY, STEM
from bdexport.verify import require, verify_against_model
from bdexport.verify_comparison import kept_samples

BATCH = 7
# Loads of a bundle that are made to fail, before and while memory is watched. torch keeps a workspace of cuBLAS, 32 MiB
# on Hopper, for each of the 32 streams that it hands out in turn; ONNX Runtime takes a second for each load.
LOADS = {"onnxruntime": (3, 20)}
USUAL_LOADS = (40, 200)
pytestmark = pytest.mark.gpu


def near(got: np.ndarray, expected: np.ndarray, precision: str = "fp32") -> None:
    assert_close(got, expected, max(1e-5, SHARES[precision] * float(np.abs(expected).max())))


def new_stream() -> Any:
    return torch.cuda.Stream()  # type: ignore[no-untyped-call]


def sleep() -> None:
    """About 10 ms of nothing on the current stream: work that is not ordered behind it reads zeros."""
    torch.cuda._sleep(20_000_000)  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("name", ["narrow", "wide", "bottleneck"])
@pytest.mark.parametrize(("backend", "precision"), CASES)
def test_parts_compute_what_the_model_does(
    bundles: Known, tmp_path: Path, backend: str, precision: str, name: str
) -> None:
    """Oracle: the torch module of each part on the CPU."""
    bundle, model = bundle_of(bundles, tmp_path, backend, name, precision), network(name)
    with opened(bundle) as orchestrator:
        session = orchestrator.session
        for part, entry in bundle.manifest.parts.items():
            for count in (1, BATCH):
                x = np.random.default_rng(3).standard_normal((count, *entry.input.shape)).astype(np.float32)
                with torch.no_grad():
                    expected = part_module(model, part)(torch.tensor(x)).numpy()
                near(session.get(part, session.run(part, session.put(part, x))), expected, precision)


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize(("backend", "precision"), CASES)
def test_dynamic_inference_is_the_models(
    bundles: Known, tmp_path: Path, backend: str, precision: str, executor: str
) -> None:
    """Oracle: torch ``forward_masked`` on the CPU; single images, batches of several masks; each path three times."""
    bundle, model = bundle_of(bundles, tmp_path, backend, "wide", precision), network("wide")
    inputs = bundle.manifest.preprocess(pixels(BATCH))
    masks = some_masks(BATCH, bundle.manifest.num_blocks)
    expected = torch_logits(model, inputs, masks)
    everything = torch_logits(model, inputs, np.ones_like(masks))
    with opened(bundle, executor) as orchestrator:
        for _ in range(3):
            near(orchestrator(inputs, masks=masks).logits, expected, precision)
            near(orchestrator.full(inputs).logits, everything, precision)
            for row in range(BATCH):
                one = slice(row, row + 1)
                near(orchestrator(inputs[one], masks=masks[one]).logits, expected[one], precision)
            result = orchestrator(inputs)
            near(result.logits, torch_logits(model, inputs, result.masks), precision)
        if executor == "graph":
            report = orchestrator.executor_report()
            assert report is not None
            assert report["hits"] > report["misses"] > 0


@pytest.mark.parametrize("name", ["narrow", "wide", "bottleneck"])
@pytest.mark.parametrize(("backend", "precision"), CALIBRATED_CASES)
def test_calibrated_precisions_are_verified(
    bundles: Known, tmp_path: Path, backend: str, precision: str, name: str
) -> None:
    """Oracle: torch, on the images that the scales come from and the policy's own masks, by the rule of ``verify``."""
    bundle = bundle_of(bundles, tmp_path, backend, name, precision)
    opened(bundle).close()
    report = verify_against_model(bundle, network(name), device=DEVICE)
    require(report)
    assert report["precision"] == precision
    assert {entry["held"] for entry in (*report["parts"], *report["paths"])} == {"mean_abs"}


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize(("backend", "precision"), CALIBRATED_CASES)
def test_executors_agree_in_calibrated_precisions(
    bundles: Known, tmp_path: Path, backend: str, precision: str, executor: str
) -> None:
    """Oracle: the same engines one by one, ``chain``, on the images that the scales come from."""
    bundle = bundle_of(bundles, tmp_path, backend, "wide", precision)
    samples = kept_samples(bundle.manifest)
    assert samples is not None
    images, masks = samples[:BATCH], some_masks(BATCH, bundle.manifest.num_blocks)
    singles = [slice(row, row + 1) for row in range(BATCH)]
    with opened(bundle) as chain:
        expected = np.concatenate([chain(images[one], masks=masks[one]).logits for one in singles])
    with opened(bundle, executor) as orchestrator:
        for _ in range(3):
            for one in singles:
                near(orchestrator(images[one], masks=masks[one]).logits, expected[one], precision)
            near(orchestrator(images, masks=masks).logits, expected, precision)


@pytest.mark.parametrize("backend", GPU_BACKENDS)
def test_rows_are_numpys(bundles: Known, tmp_path: Path, backend: str) -> None:
    """Oracle: numpy indexing."""
    if DRY_RUN and backend == "onnxruntime":
        pytest.skip("a dry run: on the CPU its tensors have a layout of their own")
    with opened(bundle_of(bundles, tmp_path, backend)) as orchestrator:
        session = orchestrator.session
        shape = orchestrator.manifest.parts[STEM].input.shape
        values = np.random.default_rng(1).random((BATCH, *shape), np.float32)
        for chosen in ([0, 1, 2], [1, 3, 6]):
            rest = [row for row in range(BATCH) if row not in chosen]
            x = session.put(STEM, values)
            taken = session.take(x, rows(chosen))
            assert np.array_equal(session.get(STEM, taken), values[chosen])
            merged = session.merge([(rows(chosen), taken), (rows(rest), session.take(x, rows(rest)))], BATCH)
            assert np.array_equal(session.get(STEM, merged), values)
            expected = values.copy()
            expected[chosen] += 1
            y = session.put(STEM, values[chosen] + 1)
            assert np.array_equal(
                session.get(STEM, session.replace(session.put(STEM, values), rows(chosen), y)), expected
            )


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("backend", GPU_BACKENDS)
def test_eight_threads_get_what_one_gets(bundles: Known, tmp_path: Path, backend: str, executor: str) -> None:
    """Oracle: the same calls in sequence."""
    with opened(bundle_of(bundles, tmp_path, backend), executor) as orchestrator:
        num_blocks = orchestrator.manifest.num_blocks

        def logits(seed: int) -> np.ndarray:
            batch = 1 + 2 * (seed % 2)
            masks = some_masks(3, num_blocks, seed)[::-1][:batch].copy()
            result: np.ndarray = orchestrator(pixels(batch, seed), masks=masks).logits
            return result

        serial = [logits(seed) for seed in range(24)]
        with ThreadPoolExecutor(8) as pool:
            for got, expected in zip(pool.map(logits, range(24)), serial, strict=True):
                near(got, expected)


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("backend", GPU_BACKENDS)
def test_the_callers_stream_and_arrays(bundles: Known, tmp_path: Path, backend: str, executor: str) -> None:
    """Oracle: torch's logits; images made and logits read on the caller's stream, nothing synchronised."""
    if not torch.cuda.is_available():
        pytest.skip(f"torch {torch.__version__} finds no GPU")
    bundle, model = bundle_of(bundles, tmp_path, backend), network("wide")
    inputs = bundle.manifest.preprocess(pixels(BATCH))
    masks = some_masks(BATCH, bundle.manifest.num_blocks)
    expected = torch_logits(model, inputs, masks)
    stream, source = new_stream(), torch.from_numpy(inputs).cuda()  # copied now: a copy from the host would wait
    with opened(bundle, executor, stream) as orchestrator, torch.cuda.stream(stream):
        for _ in range(5):
            images = torch.zeros(inputs.shape, device="cuda")
            sleep()
            images.copy_(source)
            result = orchestrator.on_device(images, masks=masks)
            doubled = from_dlpack(result.logits) * 2
            near(doubled.cpu().numpy() / 2, expected)
            near(orchestrator(images, masks=masks).logits, expected)


@pytest.mark.parametrize("backend", GPU_BACKENDS)
def test_another_stream_is_ordered_by_dlpack(bundles: Known, tmp_path: Path, backend: str) -> None:
    """Oracle: as above, with the session on its own stream."""
    if not torch.cuda.is_available():
        pytest.skip(f"torch {torch.__version__} finds no GPU")
    bundle, model = bundle_of(bundles, tmp_path, backend), network("wide")
    inputs = bundle.manifest.preprocess(pixels(3))
    masks = some_masks(3, bundle.manifest.num_blocks)
    expected = torch_logits(model, inputs, masks)
    source = torch.from_numpy(inputs).cuda()
    with opened(bundle) as orchestrator, torch.cuda.stream(new_stream()):
        for _ in range(5):
            images = torch.zeros(inputs.shape, device="cuda")
            sleep()
            images.copy_(source)
            result = orchestrator.on_device(images, masks=masks)
            near(from_dlpack(result.logits).cpu().numpy(), expected)


@pytest.mark.parametrize("backend", GPU_BACKENDS)
def test_cupys_arrays_come_in(bundles: Known, tmp_path: Path, backend: str) -> None:
    """Oracle: the same images from the host."""
    cupy = pytest.importorskip("cupy")
    bundle = bundle_of(bundles, tmp_path, backend)
    inputs = bundle.manifest.preprocess(pixels(3))
    with opened(bundle) as orchestrator:
        near(orchestrator(cupy.asarray(inputs)).logits, orchestrator(inputs).logits)
        if backend != "torch":
            near(cupy.asnumpy(cupy.from_dlpack(orchestrator.on_device(inputs).logits)), orchestrator(inputs).logits)


@pytest.mark.parametrize("backend", GPU_BACKENDS)
def test_wrong_arrays_are_refused(bundles: Known, tmp_path: Path, backend: str) -> None:
    """Oracle: InputError naming dtype or shape."""
    if not torch.cuda.is_available():
        pytest.skip(f"torch {torch.__version__} finds no GPU")
    with opened(bundle_of(bundles, tmp_path, backend)) as orchestrator:
        shape = (2, *orchestrator.manifest.parts[STEM].input.shape)
        with pytest.raises(InputError, match="wrong dtype"):
            orchestrator(torch.zeros(shape, device="cuda", dtype=torch.float16))
        with pytest.raises(InputError, match="wrong shape"):
            orchestrator(torch.zeros(2, 3, 5, 5, device="cuda"))


@pytest.mark.parametrize("backend", GPU_BACKENDS)
def test_failing_again_and_again_leaks_nothing(bundles: Known, tmp_path: Path, backend: str) -> None:
    """Oracle: the GPU's free memory before and after."""
    if DRY_RUN:
        pytest.skip("a dry run: there is no GPU memory to watch")
    bundle = bundle_of(bundles, tmp_path, backend)
    cuda = open_cuda("cuda-python")

    def free() -> int:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return cuda.memory()[0]

    def fail() -> None:
        with opened(bundle) as orchestrator:
            inputs = np.zeros((1, *orchestrator.manifest.parts[STEM].input.shape), np.float32)
            orchestrator(inputs)
            with pytest.raises((BdexportError, KeyError)):
                orchestrator.session.run("block_99", orchestrator.session.put(POLICY, inputs))

    warmup, watched = LOADS.get(backend, USUAL_LOADS)
    for _ in range(warmup):
        fail()
    before = free()
    for _ in range(watched):
        fail()
    lost = before - free()
    assert lost < 16 << 20, f"{lost / 2**20:.1f} MiB"


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("backend", GPU_BACKENDS)
def test_use_after_close_is_refused(bundles: Known, tmp_path: Path, backend: str, executor: str) -> None:
    """Oracle: the contract."""
    orchestrator = opened(bundle_of(bundles, tmp_path, backend), executor)
    session = orchestrator.session
    x = session.put(FULL, np.zeros((1, *orchestrator.manifest.parts[FULL].input.shape), np.float32))
    orchestrator.close()
    orchestrator.close()
    with pytest.raises(UsageError, match="after close"):
        session.run(FULL, x)


@pytest.mark.parametrize("backend", GPU_BACKENDS)
def test_a_device_that_is_not_there_is_named(bundles: Known, tmp_path: Path, backend: str) -> None:
    """Oracle: the ordinal in the text."""
    bundle = bundle_of(bundles, tmp_path, backend)
    opened(bundle).close()
    with pytest.raises(BdexportError, match="cuda:77"):
        bdexport.load(bundle, device="cuda:77")
