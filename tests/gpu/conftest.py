"""Tests on an NVIDIA GPU: skipped with the reason where there is none."""

from __future__ import annotations

import pytest
from gpu_cases import DRY_RUN, Known

from bdexport.cuda import why_no_cuda


@pytest.fixture(scope="session", autouse=True)
def gpu() -> None:
    """A GPU that cuda-python or PyCUDA can use; a dry run needs none."""
    error = None if DRY_RUN else why_no_cuda()
    if error is not None:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def bundles() -> Known:
    """Bundles built so far, and why others cannot be built."""
    return {}
