"""One bundle of real parts per backend and network, loaded once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from bundles import make_bundle
from contract_cases import CASES, NETWORKS, ON_GPU, OPTIONAL, Case

import bdexport
from bdexport.backends import backend_class
from bdexport.backends.openvino_common import no_bf16_reason
from bdexport.errors import BdexportError

PARAMS = [pytest.param(case, marks=pytest.mark.gpu) if case[0] in ON_GPU else case for case in CASES]


@pytest.fixture(scope="session", params=PARAMS, ids=lambda case: "-".join(map(str, case)))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    backend, network, threads, precision = request.param
    available = backend_class(backend)().available()
    if backend in OPTIONAL and not available.ok:
        pytest.skip(f"{backend}: {available.reason}")
    if (backend, precision) == ("openvino", "bf16") and (reason := no_bf16_reason()):
        pytest.skip(f"openvino bf16: {reason}")
    model = NETWORKS[network]()
    try:
        bundle = make_bundle(tmp_path_factory.mktemp("bundles") / "bundle", model, backend, precision=precision)
        loaded = bdexport.load(bundle, threads=threads)
    except BdexportError as error:
        if backend not in ON_GPU:
            raise
        pytest.skip(f"{backend}: {error}")  # its engines are not for the GPU that is here, say
    with loaded as orchestrator:
        yield Case(backend, precision, model, bundle, orchestrator)
