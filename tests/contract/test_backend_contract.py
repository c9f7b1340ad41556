"""What every backend must do; the same tests for all of them. The null backend computes nothing: no numbers there."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from bundles import pixels, rows, some_masks, torch_logits
from contract_cases import ON_GPU, Case

import bdexport
from bdexport.backends import get_backend
from bdexport.backends.base import RunOptions, default_device
from bdexport.errors import BackendError, UsageError
from bdexport.parts import FULL, HEAD, POLICY, STEM, block_part, path_parts

BATCH = 7


def inputs_of(case: Case, count: int = BATCH, seed: int = 0) -> np.ndarray:
    return case.orchestrator.manifest.preprocess(pixels(count, seed))


def part_input(case: Case, part: str, count: int = BATCH) -> np.ndarray:
    shape = case.orchestrator.manifest.parts[part].input.shape
    return np.random.default_rng(3).standard_normal((count, *shape)).astype(np.float32)


def run_part(case: Case, part: str, x: np.ndarray) -> np.ndarray:
    session = case.orchestrator.session
    return session.get(part, session.run(part, session.put(part, x)))


def computes(case: Case) -> None:
    if not get_backend(case.backend).computes:
        pytest.skip("the null backend computes nothing")


@pytest.mark.parametrize("count", [1, BATCH])
def test_parts_give_what_the_manifest_says(case: Case, count: int) -> None:
    """Oracle: the manifest's output specs, for every part and batch."""
    for part, entry in case.orchestrator.manifest.parts.items():
        entry.output.check(run_part(case, part, part_input(case, part, count)), part)


def test_parts_compute_what_the_model_does(case: Case) -> None:
    """Oracle: the torch module of each part."""
    computes(case)
    from bdexport.partition import part_module

    for part in case.orchestrator.manifest.parts:
        x = part_input(case, part)
        with torch.no_grad():
            expected = part_module(case.model, part)(torch.tensor(x)).numpy()
        case.assert_close(run_part(case, part, x), expected)


def test_a_part_gives_the_same_twice(case: Case) -> None:
    """Invariant: no state between calls."""
    for part in case.orchestrator.manifest.parts:
        x = part_input(case, part)
        assert np.array_equal(run_part(case, part, x), run_part(case, part, x))


def test_images_of_a_batch_do_not_meet(case: Case) -> None:
    """Invariant: a batch gives what its images give one by one."""
    for part in case.orchestrator.manifest.parts:
        x = part_input(case, part)
        alone = np.concatenate([run_part(case, part, x[row : row + 1]) for row in range(BATCH)])
        case.assert_close(run_part(case, part, x), alone)


def test_a_path_is_its_parts_in_sequence(case: Case) -> None:
    """Invariant: ``run_path`` equals ``run`` after ``run``, at batch 1 and beyond."""
    session, manifest = case.orchestrator.session, case.orchestrator.manifest
    for mask in some_masks(6, manifest.num_blocks):
        parts = path_parts(mask.tolist(), manifest.transitions)
        for count in (1, 3):
            inputs = inputs_of(case, count)
            x = session.put(STEM, inputs)
            for part in parts:
                x = session.run(part, x)
            whole = session.get(HEAD, session.run_path(parts, session.put(STEM, inputs)))
            case.assert_close(whole, session.get(HEAD, x))


def test_a_piece_of_a_path_runs_too(case: Case) -> None:
    """Invariant: ``run_path`` takes any sequence of parts, not only whole paths."""
    session = case.orchestrator.session
    x = session.run(STEM, session.put(STEM, inputs_of(case)))
    one = session.get(block_part(0), session.run(block_part(0), x))
    assert np.array_equal(one, session.get(block_part(0), session.run_path([block_part(0)], x)))


def test_take_picks_rows_in_order(case: Case) -> None:
    """Oracle: numpy indexing of the same output, gaps, order and single rows included."""
    session = case.orchestrator.session
    x = session.run(STEM, session.put(STEM, inputs_of(case)))
    host = session.get(STEM, x)
    for chosen in ([2], [1, 2, 3], [0, 2, 5], [4, 1, 6], range(BATCH), [3, 2]):
        assert np.array_equal(session.get(STEM, session.take(x, rows(chosen))), host[list(chosen)])


def test_merge_undoes_take(case: Case) -> None:
    """Invariant: pieces whose rows make up the batch give the batch."""
    session = case.orchestrator.session
    x = session.run(STEM, session.put(STEM, inputs_of(case)))
    for cut in ([[0, 2, 4, 6], [1, 3, 5]], [[3], [0, 1, 2], [4, 5, 6]], [list(range(BATCH))]):
        pieces = [(rows(piece), session.take(x, rows(piece))) for piece in cut]
        assert np.array_equal(session.get(STEM, session.merge(pieces, BATCH)), session.get(STEM, x))


def test_replace_changes_those_rows_only(case: Case) -> None:
    """Oracle: numpy assignment."""
    session = case.orchestrator.session
    for chosen in ([0], [1, 2], [0, 3, 6]):
        x = session.run(STEM, session.put(STEM, inputs_of(case)))
        other = session.run(STEM, session.put(STEM, inputs_of(case, len(chosen), seed=9)))
        expected = session.get(STEM, x)
        expected[chosen] = session.get(STEM, other)
        assert np.array_equal(session.get(STEM, session.replace(x, rows(chosen), other)), expected)


def test_what_get_returns_is_the_callers(case: Case) -> None:
    """Invariant: later runs leave an earlier result alone (static buffers are copied out)."""
    session, manifest = case.orchestrator.session, case.orchestrator.manifest
    parts = path_parts([True] * manifest.num_blocks, manifest.transitions)
    first = session.get(HEAD, session.run_path(parts, session.put(STEM, inputs_of(case, 1))))
    kept = first.copy()
    session.run_path(parts, session.put(STEM, inputs_of(case, 1, seed=5)))
    assert np.array_equal(first, kept)
    first[:] = 0  # writable, too


def test_dynamic_inference_is_the_models(case: Case) -> None:
    """Oracle: torch ``forward_masked`` under random masks, as one batch and image by image."""
    computes(case)
    images, masks = pixels(BATCH), some_masks(BATCH, case.orchestrator.manifest.num_blocks)
    expected = torch_logits(case.model, inputs_of(case), masks)
    case.assert_close(case.orchestrator(images, masks=masks).logits, expected)
    for row in range(BATCH):
        one = slice(row, row + 1)
        case.assert_close(case.orchestrator(images[one], masks=masks[one]).logits, expected[one])


def test_the_policys_masks_are_the_models(case: Case) -> None:
    """Oracle: torch's policy and its threshold."""
    computes(case)
    result = case.orchestrator(pixels(BATCH))
    with torch.no_grad():
        expected = case.model.policy(torch.tensor(inputs_of(case))).numpy()
    assert result.probabilities is not None  # the policy ran
    case.assert_close(result.probabilities, expected, 1e-6, scale=1.0)
    assert np.array_equal(result.masks, (expected if case.precision == "fp32" else result.probabilities) >= 0.5)
    case.assert_close(result.logits, torch_logits(case.model, inputs_of(case), result.masks))


def test_full_is_every_block_kept(case: Case) -> None:
    """Invariant: the full engine and the chain of all blocks agree."""
    everything = np.ones((BATCH, case.orchestrator.manifest.num_blocks), bool)
    full, chain = case.orchestrator.full(pixels(BATCH)), case.orchestrator(pixels(BATCH), masks=everything)
    case.assert_close(full.logits, chain.logits)
    assert np.array_equal(full.masks, everything)


def test_the_callers_array_is_left_alone(case: Case) -> None:
    """Invariant: rows are replaced in the session's own tensors, never in the input; a read-only input will do."""
    inputs = inputs_of(case)
    before = inputs.copy()
    inputs.flags.writeable = False
    case.orchestrator(inputs, masks=some_masks(BATCH, case.orchestrator.manifest.num_blocks))
    assert np.array_equal(inputs, before)


def test_eight_threads_get_what_one_gets(case: Case) -> None:
    """Oracle: the same calls in sequence. Batches of 1 and 3, different masks in every call."""
    num_blocks = case.orchestrator.manifest.num_blocks
    calls = [(pixels(1 + 2 * (seed % 2), seed), some_masks(3, num_blocks, seed)[::-1]) for seed in range(24)]

    def logits(call: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        images, masks = call
        return case.orchestrator(images, masks=masks[: len(images)]).logits

    serial = [logits(call) for call in calls]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            for got, expected in zip(pool.map(logits, calls), serial, strict=True):
                case.assert_close(got, expected)


def test_use_after_close_is_refused(case: Case) -> None:
    """Oracle: the contract: UsageError that says so; closing twice is harmless."""
    backend = get_backend(case.backend)
    session = backend.open(case.bundle, RunOptions(default_device(backend), case.orchestrator.threads))
    x = session.put(POLICY, inputs_of(case))
    session.close()
    session.close()
    with pytest.raises(UsageError, match="after close"):
        session.run(POLICY, x)


def test_a_device_that_is_not_there_is_named(case: Case) -> None:
    """Oracle: the contract: BackendError with the device and what there is."""
    device, there = ("tpu:7", "cuda:N") if case.backend in ON_GPU else ("cuda:7", "cpu")
    with pytest.raises(BackendError, match=f"'{device}'.*{there}"):
        bdexport.load(case.bundle, device=device)


def test_a_session_says_where_it_runs(case: Case) -> None:
    """Oracle: what was asked for."""
    session = case.orchestrator.session
    assert session.device == ("cuda:0" if case.backend in ON_GPU else "cpu")
    assert session.notes
    assert case.orchestrator.manifest.parts[FULL].flops > 0


def test_a_backend_describes_itself(case: Case) -> None:
    """Oracle: the protocol: everything that a cache key and a manifest need, stable from call to call."""
    backend = get_backend(case.backend)
    assert backend.name == case.backend
    assert backend.available().ok
    assert case.precision in backend.precisions
    assert backend.engine_suffix.startswith(".")
    assert dict(backend.versions()) == dict(get_backend(case.backend).versions())
    assert backend.fingerprint() == get_backend(case.backend).fingerprint()
