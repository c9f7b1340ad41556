"""Tests on an NVIDIA GPU: skipped with the reason where there is none."""

from __future__ import annotations

import pytest

from bdexport.bundle import Bundle
from bdexport.cuda import why_no_cuda


@pytest.fixture(scope="session", autouse=True)
def gpu() -> None:
    """A GPU that cuda-python or PyCUDA can use."""
    error = why_no_cuda()
    if error is not None:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def bundles() -> dict[tuple[str, str, str], Bundle]:
    """Bundles built so far, by backend, network and precision."""
    return {}
