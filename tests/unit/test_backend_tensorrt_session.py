"""TensorRT's engines on a device session. Where no GPU is, TensorRT does not load anything.

So this runs on a fake of its run-time API and the double of CUDA, with real parts of a network. The real thing runs in
tests/gpu and in the contract suite on a GPU.
"""

from __future__ import annotations

import gc
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import assert_close, pixels, some_masks, torch_logits
from cuda_double import CudaDouble
from fake_tensorrt import MAX_BATCH, SCRATCH, VERSION, FakeTensorRT, changed_bundle, fake_api, make_fake_bundle
from manifests import with_engines_as_they_are

from bdexport.backends import tensorrt_session
from bdexport.backends.base import RunOptions
from bdexport.backends.tensorrt_common import RTX, TENSORRT, Flavour
from bdexport.backends.tensorrt_session import TensorRTSession, open_session
from bdexport.bundle import Bundle
from bdexport.errors import BackendError, UsageError
from bdexport.parts import HEAD, POLICY, STEM
from bdexport.runtime import Orchestrator

FLAVOURS = pytest.mark.parametrize("flavour", [TENSORRT, RTX], ids=lambda flavour: flavour.name)
CUDA = RunOptions("cuda")


class Place:
    """A bundle, a device and a TensorRT."""

    def __init__(self, bundle: Bundle, flavour: Flavour, patch: pytest.MonkeyPatch, total: int = 1 << 30) -> None:
        self.bundle, self.flavour = bundle, flavour
        self.cuda = CudaDouble(total)
        self.trt = FakeTensorRT(bundle, self.cuda, flavour.rtx)
        self.api = fake_api(flavour, self.trt)
        self.opened: list[dict[str, Any]] = []
        patch.setattr(tensorrt_session, "open_cuda", self._open_cuda)

    def _open_cuda(self, **options: Any) -> CudaDouble:
        self.opened.append(options)
        return self.cuda

    def open(self, options: RunOptions = CUDA) -> TensorRTSession:
        return open_session(self.api, self.bundle, options)

    def orchestrator(self, executor: str = "chain") -> Orchestrator:
        return Orchestrator(self.bundle, self.open(), executor)

    def is_empty(self) -> bool:
        """Nothing is left on the device."""
        gc.collect()
        return not self.cuda.live and self.cuda.pinned_live == 0 and self.trt.alive == 0 and self.cuda.closed


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    folder = tmp_path_factory.mktemp("fake-tensorrt")
    return {flavour.name: make_fake_bundle(folder / flavour.name, flavour) for flavour in (TENSORRT, RTX)}


class Faulty:
    """Makes places whose engines are not as they should be."""

    def __init__(self, folder: Path, bundles: dict[str, Bundle], patch: pytest.MonkeyPatch) -> None:
        self._folder, self._bundles, self._patch = folder, bundles, patch

    def __call__(self, flavour: Flavour, faults: dict[str, str] | None = None, **changes: Any) -> Place:
        bundle = changed_bundle(self._folder / "faulty", self._bundles[flavour.name], faults, **changes)
        return Place(bundle, flavour, self._patch)


@pytest.fixture
def faulty(tmp_path: Path, bundles: dict[str, Bundle], monkeypatch: pytest.MonkeyPatch) -> Faulty:
    return Faulty(tmp_path, bundles, monkeypatch)


@pytest.fixture
def place(flavour: Flavour, bundles: dict[str, Bundle], monkeypatch: pytest.MonkeyPatch) -> Place:
    return Place(bundles[flavour.name], flavour, monkeypatch)


# ---- running ------------------------------------------------------------------------------------------------------


@FLAVOURS
@pytest.mark.parametrize("executor", ["chain", "graph"])
def test_dynamic_inference_is_the_models(place: Place, executor: str) -> None:
    """Oracle: torch ``forward_masked`` on the same inputs and masks; everything is freed at the end."""
    with place.orchestrator(executor) as orchestrator:
        assert orchestrator.executor == executor
        for batch, seed in ((1, 0), (7, 1), (MAX_BATCH, 2), (1, 3)):
            inputs = place.bundle.manifest.preprocess(pixels(batch, seed))
            masks = some_masks(batch, place.bundle.manifest.num_blocks, seed)
            got = orchestrator(inputs, masks=masks).logits
            assert_close(got, torch_logits(place.trt.model, inputs, masks))
            assert_close(orchestrator.full(inputs).logits, torch_logits(place.trt.model, inputs, np.ones_like(masks)))
    del orchestrator
    assert place.is_empty()


@FLAVOURS
def test_engines_have_no_memory_of_their_own(place: Place) -> None:
    """Oracle: the double's list: one scratch buffer for all engines; the fake checks that each was given it."""
    session = place.open()
    assert list(place.cuda.live.values()) == [SCRATCH]
    session.close()
    assert place.is_empty()


@FLAVOURS
def test_a_call_that_repeats_only_executes(place: Place) -> None:
    """Property: shapes and addresses are told once, since they do not change."""
    with place.orchestrator() as orchestrator:
        for _ in range(3):
            orchestrator(pixels(1), masks=np.ones((1, 3), bool))
        place.trt.calls.clear()
        orchestrator(pixels(1), masks=np.ones((1, 3), bool))
        assert place.trt.calls.count("shape") == 0
        assert place.trt.calls.count("execute") == 5  # stem, three blocks, head


@pytest.mark.parametrize("flavour", [RTX])
def test_named_batches_get_their_final_kernels_at_once(place: Place) -> None:
    """Oracle: the strategy of the context that ran: eager for batches of the profile, lazy for others."""
    with place.orchestrator() as orchestrator:
        for batch in (1, 4, MAX_BATCH):
            orchestrator.full(pixels(batch))
    assert place.trt.strategies["full"] == [("eager", 1), ("lazy", 4), ("eager", MAX_BATCH)]


@FLAVOURS
def test_the_callers_stream_is_asked_for(place: Place) -> None:
    """Oracle: how CUDA was opened, and whose stream the work is on."""
    stream = place.cuda.stream()
    place.open(RunOptions("cuda:3", stream=stream.handle)).close()
    assert place.opened == [{"device": 3, "foreign_stream": True}]


@FLAVOURS
def test_batches_outside_of_the_profile_name_the_rebuild_line(place: Place) -> None:
    """Oracle: part, batch, the profile's limit and the option that moves it."""
    with place.orchestrator() as orchestrator:
        engine = orchestrator.session._engines[HEAD]  # type: ignore[attr-defined]
        stream = place.cuda.stream()
        with pytest.raises(
            BackendError, match=r"head \[.*\]: batch 10 exceeds the profile's 9; rebuild with --max-batch 10"
        ):
            engine.enqueue(0, 0, 10, stream)
        x = orchestrator.session.put(STEM, np.zeros((1, 3, 24, 32), np.float32))
        x.shape = (10, *x.shape[1:])
        with pytest.raises(BackendError, match="rebuild with --max-batch 10"):
            orchestrator.session.run(STEM, x)


@FLAVOURS
def test_the_smallest_batch_counts_too(faulty: Faulty, flavour: Flavour) -> None:
    """Oracle: the option that moves it."""
    place = faulty(flavour, batches=(2, 4, MAX_BATCH))
    with (
        place.orchestrator() as orchestrator,
        pytest.raises(BackendError, match=r"full \[.*\]: batch 1 is below the profile's 2; rebuild with --min-batch 1"),
    ):
        orchestrator.full(pixels(1))


# ---- what does not load -------------------------------------------------------------------------------------------


@FLAVOURS
def test_another_version_is_named_with_this_one(faulty: Faulty, flavour: Flavour) -> None:
    """Oracle: both versions and the rebuild line, before any GPU is looked for."""
    place = faulty(flavour, version="10.3.0")
    said = rf"policy \[{flavour.name}\]: .*got 10\.3\.0, expected {VERSION} \(here\); "
    said += rf".*--backend {flavour.name} --precision fp32 --out .* --overwrite"
    with pytest.raises(BackendError, match=said):
        place.open()
    assert place.opened == []


@FLAVOURS
@pytest.mark.parametrize(("built", "fits"), [("10.3.0", True), ("9.3.0", False)])
def test_version_compatible_engines_load_within_a_major_version(
    faulty: Faulty, flavour: Flavour, built: str, fits: bool
) -> None:
    """Oracle: a note with both versions, and host code allowed for these engines only."""
    place = faulty(flavour, version=built, version_compatible=True)
    if not fits:
        with pytest.raises(BackendError, match="another version"):
            place.open()
        return
    session = place.open()
    assert any(built in note and VERSION in note for note in session.notes)
    assert place.trt.host_code
    session.close()


def test_engines_of_this_version_bring_no_code(bundles: dict[str, Bundle], monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the run time's own switch, which is off by default."""
    place = Place(bundles[TENSORRT.name], TENSORRT, monkeypatch)
    place.open().close()
    assert not place.trt.host_code


@pytest.mark.parametrize(
    ("changes", "outcome"),
    [
        ({"compute_capabilities": ("8.9",), "gpu": "other"}, "error"),
        ({"compute_capabilities": ("8.9",), "hardware_compatible": "same-compute-capability"}, "error"),
        ({"gpu": "other"}, "note"),
        ({"gpu": "other", "hardware_compatible": "same-compute-capability"}, "fits"),
        ({"compute_capabilities": ("8.0",), "gpu": "other", "hardware_compatible": "ampere+"}, "fits"),
        ({}, "fits"),
    ],
)
def test_engines_belong_to_a_gpu(faulty: Faulty, changes: dict[str, Any], outcome: str) -> None:
    """Oracle: TensorRT's rules for compute capability and compatibility level; the double is a 9.0."""
    place = faulty(TENSORRT, **changes)
    if outcome == "error":
        said = r"for another GPU: got .*8\.9, expected host memory, 9\.0 \(here\); rebuild it here: bdexport build"
        with pytest.raises(BackendError, match=said):
            place.open()
        assert place.is_empty()
        return
    session = place.open()
    assert any("tuned for other" in note for note in session.notes) == (outcome == "note")
    session.close()


@FLAVOURS
def test_an_engine_that_does_not_load_is_an_error(faulty: Faulty, flavour: Flavour) -> None:
    """Oracle: part, TensorRT's words, both sides; for RTX also its diagnosis. ``None`` is no engine."""
    place = faulty(flavour, {"block_02": "refused"})
    with pytest.raises(BackendError, match=r"block_02 .*does not load.*no kernel image.*9\.0 \(here\)") as caught:
        place.open()
    assert ("UNSUPPORTED_CC" in str(caught.value)) == flavour.rtx
    assert place.is_empty()


@FLAVOURS
@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("memory", r"out of device memory .*: got 1024 of 1024 MiB free, for an engine of .*--max-batch"),
        ("scratch", r"asked for|free"),
        ("context", "no execution context can be made"),
        ("shape", "does not have the manifest's tensors"),
        ("dtype", r"does not have the manifest's tensors.*HALF"),
    ],
)
def test_a_load_that_fails_leaves_nothing_on_the_device(
    faulty: Faulty, flavour: Flavour, fault: str, said: str
) -> None:
    """Invariant: after many failures at the last part, no memory, engine or context is left. Oracle: the double's."""
    place = faulty(flavour, {"full": fault})
    for _ in range(200 if fault == "memory" else 3):
        place.cuda.closed = False
        with pytest.raises(BackendError, match=said):
            place.open()
        assert not place.cuda.live
    assert place.is_empty()


@FLAVOURS
def test_a_machine_that_tensorrt_does_not_run_on(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: what TensorRT's Python package raises for an object that its library did not make, as a BackendError."""
    monkeypatch.setattr(place.trt, "Runtime", made_by_no_library, raising=False)
    with pytest.raises(BackendError, match=r"cannot run on this machine; it said: CUDA initialization failure"):
        place.open()
    assert place.is_empty()


def made_by_no_library(log: Any) -> Any:
    log.log(log.ERROR, "CUDA initialization failure with error: 209")
    raise TypeError("pybind11::init(): factory function returned nullptr")


@FLAVOURS
def test_a_run_that_fails_quotes_tensorrt_and_leaves_nothing(faulty: Faulty, flavour: Flavour) -> None:
    """Invariant: 200 failed calls leave the device's memory as one did; the error names part and reason."""
    place = faulty(flavour, {"block_01": "run"})
    with place.orchestrator() as orchestrator:
        used = []
        for _ in range(200):
            with pytest.raises(BackendError, match=r"block_01 \[.*\]: failed; .* said: misaligned address$"):
                orchestrator(pixels(3), masks=np.ones((3, 3), bool))
            used.append(dict(place.cuda.live))
        assert used[0] == used[-1]
    del orchestrator
    assert place.is_empty()


@FLAVOURS
def test_a_damaged_engine_file_is_named(faulty: Faulty, flavour: Flavour) -> None:
    """Oracle: part, file and rebuild line."""
    place = faulty(flavour)
    with zipfile.ZipFile(place.bundle.engine(STEM), "w") as packed:
        packed.writestr("plan", b"")
    place.bundle = with_engines_as_they_are(place.bundle)
    with pytest.raises(BackendError, match=r"stem \[.*stem\.json is no engine.*; rebuild it here"):
        place.open()


@FLAVOURS
def test_another_device_is_refused(place: Place) -> None:
    """Oracle: what there is, in the error."""
    with pytest.raises(BackendError, match=r"got 'cpu', expected cuda or cuda:N"):
        place.open(RunOptions("cpu"))


@FLAVOURS
def test_use_after_close_is_refused(place: Place) -> None:
    """Oracle: the contract."""
    session = place.open()
    x = session.put(POLICY, np.zeros((1, 3, 24, 32), np.float32))
    session.close()
    session.close()
    with pytest.raises(UsageError, match="after close"):
        session.run(POLICY, x)


# ---- what TensorRT for RTX has compiled -----------------------------------------------------------------------------


@pytest.mark.parametrize("flavour", [RTX])
def test_compiled_kernels_outlive_the_session(place: Place, own_cache: Path) -> None:
    """Oracle: the file in the cache folder, the notes, and that a damaged file does not stop anything."""
    first = place.open()
    assert any("compiled as they are needed" in note for note in first.notes)
    first.close()
    (kept,) = (own_cache / "tensorrt-rtx").iterdir()
    assert kept.read_bytes() == b"kernels"
    second = place.open()
    assert any(f"compiled before: {kept}" in note for note in second.notes)
    second.close()
    kept.write_bytes(b"damaged")
    third = place.open()
    assert any("TensorRT refuses" in note for note in third.notes)
    third.close()
    assert kept.read_bytes() == b"kernels"


@pytest.mark.parametrize("flavour", [RTX])
def test_compiled_kernels_stay_until_no_context_uses_them(place: Place) -> None:
    """Oracle: the fake's count of engines and contexts at the moment that the cache was freed."""
    session = place.open()
    session.close()
    gc.collect()
    assert place.trt.alive_when_the_cache_went == 0


@pytest.mark.parametrize("flavour", [RTX])
def test_other_engines_have_other_kernels(place: Place, own_cache: Path) -> None:
    """Invariant: the file belongs to the engines' content."""
    place.open().close()
    place.bundle = Bundle(Path(shutil.copytree(place.bundle.path, own_cache / "other")), place.bundle.manifest)
    with zipfile.ZipFile(place.bundle.engine(HEAD), "a") as packed:
        packed.writestr("more", b"")
    place.bundle = with_engines_as_they_are(place.bundle)
    place.open().close()
    assert len(list((own_cache / "tensorrt-rtx").iterdir())) == 2


@pytest.mark.parametrize("flavour", [RTX])
def test_a_cache_folder_that_cannot_be_written_stops_nothing(place: Place, own_cache: Path) -> None:
    """Oracle: the session closes, and everything is freed."""
    (own_cache / "tensorrt-rtx").write_text("a file where the folder should be")
    place.open().close()
    assert place.is_empty()
