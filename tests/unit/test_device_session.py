"""The session on a device: memory, order of the work, rows, captured paths; on the double of CUDA."""

from __future__ import annotations

import gc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from bundles import assert_close, pixels, rows, some_masks, torch_logits
from cuda_double import CudaDouble, GraphDouble, read
from device_cases import SCRATCH, DeviceCase

import bdexport
from bdexport.bench.timed_session import TimedSession
from bdexport.cuda.arena import WAITING_BYTES, Arena, block_bytes
from bdexport.cuda.exchange import DeviceArray, is_device_array
from bdexport.errors import BackendError, InputError, UsageError
from bdexport.parts import HEAD, POLICY, STEM, path_parts
from bdexport.runtime import Orchestrator
from bdexport.runtime.graph_executor import MIXED, GraphExecutor
from bdexport.runtime.grouping import plan_batch

EXECUTORS = ("chain", "graph")


@pytest.fixture(scope="session")
def case(tmp_path_factory: pytest.TempPathFactory) -> DeviceCase:
    return DeviceCase(tmp_path_factory.mktemp("device") / "bundle")


def inputs_of(case: DeviceCase, count: int, seed: int = 0) -> np.ndarray:
    return case.bundle.manifest.preprocess(pixels(count, seed))


def expected_logits(case: DeviceCase, inputs: np.ndarray, masks: np.ndarray) -> np.ndarray:
    return torch_logits(case.model, inputs, masks)


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("batch", [1, 7])
def test_dynamic_inference_is_the_models(case: DeviceCase, executor: str, batch: int) -> None:
    """Oracle: torch ``forward_masked``; three calls, so that captured paths are used again."""
    with Orchestrator(case.bundle, case.session(CudaDouble()), executor) as orchestrator:
        assert orchestrator.executor == executor
        for seed in (0, 1, 0):
            inputs, masks = inputs_of(case, batch, seed), some_masks(batch, case.bundle.manifest.num_blocks, seed)
            assert_close(orchestrator(inputs, masks=masks).logits, expected_logits(case, inputs, masks))
            result = orchestrator(inputs)
            assert_close(result.logits, expected_logits(case, inputs, result.masks))
            everything = np.ones_like(masks)
            assert_close(orchestrator.full(inputs).logits, expected_logits(case, inputs, everything))


def test_the_mask_reaches_the_host_once(case: DeviceCase) -> None:
    """Oracle: the double's list of copies: the probabilities, the logits, nothing else."""
    cuda, manifest = CudaDouble(), case.bundle.manifest
    with Orchestrator(case.bundle, case.session(cuda), "chain") as orchestrator:
        orchestrator(pixels(7))
        assert cuda.to_host == [7 * 4 * manifest.num_blocks, 7 * 4 * 3]


@pytest.mark.parametrize("executor", EXECUTORS)
def test_a_warm_session_allocates_nothing(case: DeviceCase, executor: str) -> None:
    """Oracle: the double's count of allocations; few addresses."""
    cuda, engines = CudaDouble(), case.engines()
    with Orchestrator(case.bundle, case.session(cuda, engines), executor) as orchestrator:
        orchestrator(pixels(7))
        orchestrator(pixels(1))
        orchestrator(pixels(7), masks=some_masks(7, 3, 3))
        orchestrator(pixels(1))
        first = len(engines[POLICY].addresses)
        before = cuda.allocations
        for seed in range(5):
            orchestrator(pixels(7, seed), masks=some_masks(7, 3, 3))
            orchestrator(pixels(1, seed))
        assert cuda.allocations == before
        assert len(set(engines[POLICY].addresses[first:])) <= 4  # few, and they come again


def test_profiled_parts_have_run_when_their_clock_stops(case: DeviceCase) -> None:
    """Oracle: the double's queue, which only somebody who waits empties."""
    cuda = CudaDouble()
    session = case.session(cuda)
    timed = TimedSession(session)
    (stream,) = cuda.streams.values()
    x = timed.put(STEM, inputs_of(case, 7))
    assert not stream.queue
    x = timed.take(timed.run(STEM, x), rows([1, 3, 6]))
    assert not stream.queue
    assert [event.what for event in timed.taken()] == ["put", STEM, "take"]
    session.close()


def test_engines_share_one_scratch(case: DeviceCase) -> None:
    """Oracle: every engine was given the same address, of as many bytes as the largest asks for."""
    cuda, engines = CudaDouble(), case.engines()
    engines[STEM].scratch_bytes = 3 * SCRATCH
    session = case.session(cuda, engines)
    (address,) = {engine.scratch for engine in engines.values()}
    assert cuda.live[address] == 3 * SCRATCH
    session.close()
    assert address not in cuda.live


def test_a_result_that_waits_is_not_overwritten(case: DeviceCase) -> None:
    """Invariant: two launches of one graph before anybody fetches the first result; oracle: torch."""
    session = case.session(CudaDouble())
    parts = path_parts([True, False, True], case.bundle.manifest.transitions)
    path = session.capture_path(parts, 2)
    masks = np.array([[True, False, True]] * 2)
    inputs = [inputs_of(case, 2, seed) for seed in range(3)]
    put = [session.put(STEM, array) for array in inputs]  # one lies where the graph reads, the others elsewhere
    outputs = [path.run(x) for x in put]
    for array, output in zip(inputs, outputs, strict=True):
        assert_close(session.get(HEAD, output), expected_logits(case, array, masks))
    session.close()


def test_a_path_that_begins_with_a_block_has_an_input_of_its_size(case: DeviceCase) -> None:
    """Oracle: the same parts one by one. A block's input is larger than the images, whose memory it must not share."""
    cuda, part = CudaDouble(), "block_00"
    engines = case.engines()
    session = case.session(cuda, engines)
    images = session.capture_path((POLICY,), 2)
    path = session.capture_path((part,), 2)
    address = engines[part].addresses[-1][0]
    values = np.random.default_rng(0).random((2, *case.bundle.manifest.parts[part].input.shape), np.float32)
    assert cuda.live[address] >= values.nbytes > inputs_of(case, 2).nbytes
    expected = session.get(part, session.run(part, session.put(part, values)))
    policy = images.run(session.put(POLICY, inputs_of(case, 2)))
    assert np.array_equal(session.get(part, path.run(session.put(part, values))), expected)
    assert np.isfinite(session.get(POLICY, policy)).all()
    session.close()


def test_capturing_leaves_a_waiting_result_alone(case: DeviceCase) -> None:
    """Invariant: the warm-up before a capture writes where another path's result may still lie."""
    session = case.session(CudaDouble())
    transitions = case.bundle.manifest.transitions
    x = inputs_of(case, 1)
    output = session.capture_path(path_parts([True, True, True], transitions), 1).run(session.put(STEM, x))
    session.capture_path(path_parts([True, False, False], transitions), 1)
    assert_close(session.get(HEAD, output), expected_logits(case, x, np.ones((1, 3), bool)))
    session.close()


@pytest.mark.parametrize("executor", EXECUTORS)
def test_eight_threads_get_what_one_gets(case: DeviceCase, executor: str) -> None:
    """Oracle: torch, for different images and masks in every call."""
    with Orchestrator(case.bundle, case.session(CudaDouble()), executor) as orchestrator:

        def call(seed: int) -> None:
            batch = 1 + 2 * (seed % 2)
            inputs, masks = inputs_of(case, batch, seed), some_masks(3, 3, seed)[::-1][:batch].copy()
            assert_close(orchestrator(inputs, masks=masks).logits, expected_logits(case, inputs, masks))

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(call, range(40)))


def test_rows_are_numpys(case: DeviceCase) -> None:
    """Oracle: numpy indexing, for rows with and without gaps, aligned and not."""
    session = case.session(CudaDouble())
    for part, count in ((STEM, 7), (HEAD, 7)):
        values = np.random.default_rng(1).random((count, *case.bundle.manifest.parts[part].input.shape), np.float32)
        other = values[:3] + 1
        for chosen in ([0, 1, 2], [4, 5, 6], [1, 3, 6]):
            x = session.put(part, values)
            assert np.array_equal(session.get(part, session.take(x, rows(chosen))), values[chosen])
            replaced = values.copy()
            replaced[chosen] = other
            y = session.put(part, other)
            assert np.array_equal(session.get(part, session.replace(x, rows(chosen), y)), replaced)
            rest = [row for row in range(count) if row not in chosen]
            x = session.put(part, values)
            pieces = [(rows(piece), session.take(x, rows(piece))) for piece in (chosen, rest)]
            assert np.array_equal(session.get(part, session.merge(pieces, count)), values)
    session.close()


# ---- the executor graph -------------------------------------------------------------------------------------------


def test_the_cache_of_graphs_is_bounded(case: DeviceCase) -> None:
    """Oracle: counting by hand: policy at load, then three masks in two places."""
    cuda = CudaDouble()
    session = case.session(cuda)
    executor = GraphExecutor(session, case.bundle.manifest, capacity=2)
    alive = GraphDouble.alive
    x = session.put(STEM, inputs_of(case, 1))
    masks = [np.array([[True, bool(bit), False]]) for bit in (0, 1)] + [np.ones((1, 3), bool)]
    for index in (0, 1, 0, 2, 1):
        logits = session.get(HEAD, executor.run(x, plan_batch(masks[index])))
        assert_close(logits, expected_logits(case, inputs_of(case, 1), masks[index]))
    report = executor.report()
    assert (report["captured"], report["evicted"], report["hits"], report["misses"]) == (5, 3, 1, 4)
    assert report["kept"] == 2
    assert report["hit_rate"] == pytest.approx(0.2)
    assert GraphDouble.alive == alive + 1  # the policy's has gone, two have come
    session.close()
    assert GraphDouble.alive == alive - 1


def test_refused_captures_run_as_chain_and_say_why(case: DeviceCase) -> None:
    """Oracle: the reason is the driver's; results are torch's."""
    session = case.session(CudaDouble(refusal="operation not permitted when stream is capturing"))
    with Orchestrator(case.bundle, session, "graph") as orchestrator:
        assert "runs as chain: capture refused" in orchestrator.executor_reason
        assert "operation not permitted" in orchestrator.executor_reason
        masks = np.array([[True, False, True]])
        logits = orchestrator(inputs_of(case, 1), masks=masks).logits
        assert_close(logits, expected_logits(case, inputs_of(case, 1), masks))


def test_a_path_that_cannot_be_captured_later_runs_as_chain(case: DeviceCase) -> None:
    """Oracle: the executor's report names the reason once; the result is torch's; it is not tried again."""
    cuda = CudaDouble()
    with Orchestrator(case.bundle, case.session(cuda), "graph") as orchestrator:
        cuda.refusal = "no more graphs"
        masks = np.array([[True, False, True]])
        for _ in range(2):
            logits = orchestrator(inputs_of(case, 1), masks=masks).logits
            assert_close(logits, expected_logits(case, inputs_of(case, 1), masks))
        report = orchestrator.executor_report()
        assert report is not None
        assert list(report["fallbacks"].values()) == [1]
        assert "no more graphs" in next(iter(report["fallbacks"]))


def test_engines_that_cannot_be_captured_are_named(case: DeviceCase) -> None:
    """Oracle: the reason that the engines' maker gave."""
    session = case.session(CudaDouble(), capturable=(False, "it aborts"))
    with pytest.raises(UsageError, match="executor 'graph': it aborts, expected chain"):
        Orchestrator(case.bundle, session, "graph")
    session.close()


def test_mixed_batches_are_counted(case: DeviceCase) -> None:
    """Oracle: one mixed batch, one reason."""
    with Orchestrator(case.bundle, case.session(CudaDouble()), "graph") as orchestrator:
        orchestrator(pixels(4), masks=some_masks(4, 3))
        report = orchestrator.executor_report()
        assert report is not None
        assert report["fallbacks"] == {MIXED: 1}


# ---- streams, other libraries' arrays -----------------------------------------------------------------------------


def test_work_is_queued_on_the_callers_stream(case: DeviceCase) -> None:
    """Oracle: the double's streams: nothing anywhere else, and the caller's is not closed."""
    cuda = CudaDouble()
    caller = cuda.stream()
    session = case.session(cuda, stream=caller.handle)
    with Orchestrator(case.bundle, session, "chain") as orchestrator:
        orchestrator(pixels(5))
    assert list(cuda.streams) == [caller.handle]
    assert caller.submitted > 10
    assert any("the caller's" in note for note in session.notes)


def test_logits_stay_on_the_device_and_images_come_from_it(case: DeviceCase) -> None:
    """Oracle: torch's logits; the images' own address reaches the engines; order of the images is kept."""
    cuda, engines = CudaDouble(), case.engines()
    inputs, masks = inputs_of(case, 5), some_masks(5, 3)
    with Orchestrator(case.bundle, case.session(cuda, engines), "chain") as orchestrator:
        images = on_double(cuda, inputs)
        result = orchestrator.on_device(images, masks=masks)
        assert is_device_array(result.logits)
        assert not cuda.to_host
        cuda.wait_for_all()
        assert_close(read(result.logits.pointer, (5, 3)), expected_logits(case, inputs, masks))
        same = np.repeat(masks[:1], 5, axis=0)
        result = orchestrator.on_device(images, masks=same)
        cuda.wait_for_all()
        assert engines[STEM].addresses[-1][0] == images.pointer
        assert_close(read(result.logits.pointer, (5, 3)), expected_logits(case, inputs, same))
        assert_close(orchestrator(images, masks=masks).logits, expected_logits(case, inputs, masks))


def on_double(cuda: CudaDouble, values: np.ndarray, offset: int = 0) -> DeviceArray:
    """``values`` in the double's memory, as another library's array."""
    arena, stream = Arena(cuda), cuda.stream()
    block = arena.take(values.nbytes + offset)
    read(block.pointer + offset, values.shape)[...] = values
    return DeviceArray(block.pointer + offset, values.shape, block, cuda, stream)


class InterfaceOnly:
    """An array with nothing but ``__cuda_array_interface__``, as PyCUDA's."""

    def __init__(self, array: DeviceArray, **changes: object) -> None:
        self._array, self._changes = array, changes
        self.shape = array.shape

    @property
    def __cuda_array_interface__(self) -> dict[str, object]:
        return self._array.__cuda_array_interface__ | self._changes


@pytest.mark.parametrize("interface", [False, True])
@pytest.mark.parametrize("offset", [0, 4])
def test_arrays_come_in_by_either_protocol(case: DeviceCase, interface: bool, offset: int) -> None:
    """Oracle: the values; no copy where the address is aligned; the producer's stream goes first."""
    cuda = CudaDouble()
    session = case.session(cuda)
    values = inputs_of(case, 2)
    array = on_double(cuda, np.zeros_like(values), offset)
    producer = next(stream for handle, stream in cuda.streams.items() if handle == 101)
    producer.submit(lambda: read(array.pointer, values.shape).__setitem__(..., values))
    x = session.put(STEM, InterfaceOnly(array) if interface else array)
    assert (x.pointer == array.pointer) is (offset == 0)
    assert np.array_equal(session.get(STEM, x), values)
    session.close()


def test_a_dlpack_capsule_keeps_the_memory_until_its_taker_lets_go(case: DeviceCase) -> None:
    """Oracle: the double's list of live memory."""
    cuda = CudaDouble()
    session = case.session(cuda)
    array = on_double(cuda, inputs_of(case, 1))
    pointer = array.pointer
    x = session.put(STEM, array)
    array._memory._arena.close()  # type: ignore[attr-defined]
    del array
    gc.collect()
    assert pointer in cuda.live
    del x
    assert pointer not in cuda.live
    unused = on_double(cuda, inputs_of(case, 1))
    pointer, capsule = unused.pointer, unused.__dlpack__(stream=-1)
    unused._memory._arena.close()  # type: ignore[attr-defined]
    del unused
    assert pointer in cuda.live
    del capsule  # never taken over
    assert pointer not in cuda.live
    session.close()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"typestr": "<f8"}, "wrong dtype: got <f8"),
        ({"shape": (2, 3, 5, 5)}, "wrong shape"),
        ({"shape": (0, 3, 24, 32)}, "wrong shape"),
        ({"strides": (4, 4, 4, 4)}, "not C-contiguous"),
    ],
)
def test_other_arrays_are_refused(case: DeviceCase, changes: dict[str, object], message: str) -> None:
    """Oracle: the text names what was given."""
    cuda = CudaDouble()
    session = case.session(cuda)
    with pytest.raises(InputError, match=message):
        session.put(STEM, InterfaceOnly(on_double(cuda, inputs_of(case, 2)), **changes))
    session.close()


def test_an_array_of_another_device_is_refused(case: DeviceCase) -> None:
    """Oracle: both devices in the text."""
    other = CudaDouble()
    other.device = 1
    session = case.session(CudaDouble())
    with pytest.raises(InputError, match="got cuda:1, expected cuda:0"):
        session.put(STEM, on_double(other, inputs_of(case, 1)))
    session.close()


def test_a_session_on_the_cpu_takes_no_gpu_arrays(case: DeviceCase) -> None:
    """Oracle: InputError with the remedy; UsageError for logits that should stay on a GPU."""
    cuda = CudaDouble()
    with bdexport.load(case.bundle) as orchestrator:
        with pytest.raises(InputError, match="in a GPU's memory: got DeviceArray, expected on cpu; copy them"):
            orchestrator(on_double(cuda, inputs_of(case, 1)))
        with pytest.raises(UsageError, match="on_device: this bundle runs on cpu"):
            orchestrator.on_device(pixels(1))
    with pytest.raises(UsageError, match="stream: got one for device 'cpu'"):
        bdexport.load(case.bundle, stream=123)


# ---- failures -----------------------------------------------------------------------------------------------------


def test_failing_200_times_leaks_nothing(case: DeviceCase) -> None:
    """Invariant: device and pinned memory are what they were; failures at load, in a part, in a capture."""
    cuda, engines = CudaDouble(), case.engines()
    session = case.session(cuda, engines)
    orchestrator = Orchestrator(case.bundle, session, "graph")
    inputs = inputs_of(case, 3)
    orchestrator(inputs, masks=some_masks(3, 3))
    engines["block_01"].fails = True
    free, graphs = cuda.memory()[0], GraphDouble.alive
    for turn in range(200):
        with pytest.raises(BackendError, match=r"block_01 \[double\]: failed"):
            orchestrator(inputs[: 1 + turn % 3], masks=np.ones((1 + turn % 3, 3), bool))
    cuda.wait_for_all()
    gc.collect()
    # Buffers of the batch sizes that came for the first time stay, and are bounded; then nothing more is taken.
    after = cuda.memory()[0]
    for turn in range(30):
        with pytest.raises(BackendError):
            orchestrator(inputs[: 1 + turn % 3], masks=np.ones((1 + turn % 3, 3), bool))
    assert cuda.memory()[0] == after
    assert free - after < 1 << 20
    assert GraphDouble.alive == graphs
    orchestrator.close()
    gc.collect()
    assert cuda.live == {}
    assert cuda.pinned_live == 0
    assert all(engine.closed for engine in engines.values())
    for _ in range(200):
        with pytest.raises(BackendError, match="out of device memory"):
            case.session(CudaDouble(total=SCRATCH - 1))


def test_rows_are_copied_without_waiting_for_the_work_before(case: DeviceCase) -> None:
    """Oracle: the double runs nothing before somebody waits. Pinned memory is bounded, and used again once free."""
    cuda = CudaDouble()
    session = case.session(cuda)
    x = session.put(STEM, inputs_of(case, 7))
    (stream,) = cuda.streams.values()
    queued = len(stream.queue)
    for turn in range(1, 21):
        taken = session.take(x, rows([1, 3, 6]))
        assert len(stream.queue) > queued + turn
    assert np.array_equal(session.get(STEM, taken), inputs_of(case, 7)[[1, 3, 6]])
    session.get(STEM, session.take(x, rows([1, 3, 6])))
    pinned = cuda.pinned_live
    for _ in range(20):
        session.get(STEM, session.take(x, rows([1, 3, 6])))
    assert cuda.pinned_live == pinned
    for _ in range(5000):
        session.take(x, rows([1, 3, 6]))
    assert cuda.pinned_live <= pinned + WAITING_BYTES // 256
    session.close()
    assert cuda.pinned_live == 0


def test_out_of_memory_says_how_much(case: DeviceCase) -> None:
    """Oracle: the numbers; the session goes on with smaller batches."""
    cuda = CudaDouble(total=300_000)
    with Orchestrator(case.bundle, case.session(cuda), "chain") as orchestrator:
        with pytest.raises(BackendError, match=r"out of device memory: 0\.\d MiB asked for, 0\.\d of 0\.3 MiB free"):
            orchestrator(pixels(9), masks=some_masks(9, 3))
        orchestrator(pixels(1))


def test_memory_that_nobody_uses_is_given_up_before_failing() -> None:
    """Oracle: the double's memory: the second size fits only when the first has been freed."""
    arena = Arena(CudaDouble(total=1000))
    arena.take(700)
    arena.take(300)  # the 768 bytes are free again, and of another size
    with pytest.raises(BackendError, match="out of device memory"):
        arena.take(2000)


def test_block_sizes_are_bounded() -> None:
    """Property: at least what was asked for, a multiple of 256, at most half too much (beyond 512)."""
    for nbytes in (*range(1, 3000, 7), 10**6, 10**9 + 1):
        size = block_bytes(nbytes)
        assert nbytes <= size
        assert size % 256 == 0
        assert size <= max(512, 1.5 * nbytes)


def test_a_batch_beyond_the_profile_is_refused(case: DeviceCase) -> None:
    """Oracle: part, both numbers, remedy."""
    session = case.session(CudaDouble())
    x = session.put(STEM, inputs_of(case, 10))
    with pytest.raises(
        BackendError, match=r"stem \[double\]: batch 10 exceeds the profile's 9; rebuild with --max-batch 10"
    ):
        session.run(STEM, x)
    session.close()


def test_use_after_close_is_refused(case: DeviceCase) -> None:
    """Oracle: UsageError; closing twice is harmless."""
    session = case.session(CudaDouble())
    x = session.put(STEM, inputs_of(case, 1))
    session.close()
    session.close()
    for call in (lambda: session.run(STEM, x), lambda: session.get(STEM, x), lambda: session.put(STEM, x)):
        with pytest.raises(UsageError, match="after close"):
            call()
