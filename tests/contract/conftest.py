"""One bundle of real parts per backend and network, loaded once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from bundles import make_bundle
from contract_cases import CASES, NETWORKS, Case

import bdexport


@pytest.fixture(scope="session", params=CASES, ids=lambda case: "-".join(map(str, case)))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    backend, network, threads = request.param
    model = NETWORKS[network]()
    bundle = make_bundle(tmp_path_factory.mktemp("bundles") / "bundle", model, backend)
    with bdexport.load(bundle, threads=threads) as orchestrator:
        yield Case(backend, model, bundle, orchestrator)
