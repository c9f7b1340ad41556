"""The null backend: what its tags say about the path that ran."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from bundles import make_bundle, pixels, some_masks
from tiny import tiny_model

import bdexport
from bdexport.backends.null import NullBackend
from bdexport.bundle import Bundle
from bdexport.errors import BackendError, InputError
from bdexport.files import sha256_file

MASKS = ["101", "010", "111", "000"]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    backend = NullBackend(latency_ms={"block_01": 20.0}, masks=MASKS)
    return make_bundle(tmp_path_factory.mktemp("null") / "bundle", tiny_model(), backend)


def test_logits_hold_the_sum_of_the_blocks_that_ran(bundle: Bundle) -> None:
    """Oracle: the definition: the image's tag plus index + 1 of every kept block, whatever the grouping."""
    masks = some_masks(9, 3)
    with bdexport.load(bundle) as orchestrator:
        inputs = orchestrator.manifest.preprocess(pixels(9))
        logits = orchestrator(inputs, masks=masks).logits
        expected = inputs[:, 0, 0, 0] + masks @ np.array([1.0, 2.0, 3.0], np.float32)
        assert np.allclose(logits, expected[:, None], atol=1e-5)
        assert np.allclose(orchestrator.full(inputs).logits, inputs[:, 0, 0, 0][:, None] + 6, atol=1e-5)


def test_the_policy_answers_from_its_table(bundle: Bundle) -> None:
    """Oracle: the declared masks, row ``int(|tag|) % rows``."""
    inputs = np.zeros((6, 3, 24, 32), np.float32)
    inputs[:, 0, 0, 0] = [0.5, 1.5, -2.5, 3.0, 4.0, 9.0]
    with bdexport.load(bundle) as orchestrator:
        got = orchestrator(inputs).masks
    expected = [MASKS[row] for row in (0, 1, 2, 3, 0, 1)]
    assert ["".join(map(str, row.astype(int))) for row in got] == expected


def test_a_declared_latency_passes(bundle: Bundle) -> None:
    """Oracle: the clock: 20 ms for a path with block 1, none without."""
    with bdexport.load(bundle) as orchestrator:
        images = pixels(1)
        orchestrator.warm_up()
        started = time.perf_counter()
        orchestrator(images, masks=np.array([[False, True, False]]))
        assert time.perf_counter() - started >= 0.020
        other = np.array([[True, False, True]])
        assert min(orchestrator(images, masks=other).timings["network"] for _ in range(5)) < 20.0


@pytest.mark.parametrize("text", ["", "{}", '{"schema": "other", "part": "stem", "latency_ms": 0, "masks": null}'])
def test_a_damaged_engine_is_named(bundle: Bundle, tmp_path: Path, text: str) -> None:
    """Oracle: the contract: BackendError with the part and the remedy."""
    from bdexport.backends.null import _read_engine

    path = tmp_path / "stem.json"
    path.write_text(text)
    with pytest.raises(BackendError, match=r"stem \[null\].*rebuild"):
        _read_engine(path, "stem")
    assert sha256_file(bundle.engine("stem"))


def test_masks_of_another_length_are_refused(tmp_path: Path) -> None:
    """Oracle: K of the network."""
    bundle = make_bundle(tmp_path / "bundle", tiny_model(), NullBackend(masks=["10"]))
    with pytest.raises(InputError, match="3 characters"):
        bdexport.load(bundle)
