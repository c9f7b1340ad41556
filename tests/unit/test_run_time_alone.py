"""The run-time half by itself, from graphs that ship with the tests: it runs where neither torch nor onnx is installed.

``make test-lowest`` runs these with the lowest versions that pyproject.toml allows.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from manifests import change_manifest
from numpy.typing import NDArray
from PIL import Image

import bdexport
from bdexport.cli.main import main
from bdexport.errors import BackendError

DATA = Path(__file__).parents[1] / "data"
BACKENDS = ("onnxruntime", "openvino")


@pytest.fixture(params=BACKENDS)
def bundle(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Graphs that another machine exported, for the backend that is asked for."""
    if importlib.util.find_spec(request.param) is None:
        pytest.skip(f"{request.param} is not installed")
    copy = Path(shutil.copytree(DATA / "portable", tmp_path / "bundle"))
    change_manifest(copy, lambda manifest: manifest.update(backend=request.param))
    return copy


@pytest.fixture(scope="module")
def arrays() -> dict[str, NDArray[Any]]:
    with np.load(DATA / "portable.npz") as file:
        return dict(file)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_rebuilt_bundle_gives_torchs_logits(bundle: Path, arrays: dict[str, NDArray[Any]], threads: int) -> None:
    """Oracle: the logits that torch computed when the graphs were exported."""
    with pytest.raises(BackendError, match="another processor"):
        bdexport.load(bundle)
    with bdexport.load(bundle, rebuild=True, threads=threads) as orchestrator:
        result = orchestrator(arrays["images"], masks=arrays["masks"])
        np.testing.assert_allclose(result.logits, arrays["logits"], atol=1e-5)
        assert orchestrator(arrays["images"]).masks.shape == arrays["masks"].shape


def test_the_commands_of_a_production_machine(
    bundle: Path, arrays: dict[str, NDArray[Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: exit code 0 of every command, and what run prints as JSON."""
    image = tmp_path / "image.png"
    Image.fromarray(np.asarray(arrays["images"][0], np.uint8)).save(image)
    assert main(["rebuild", str(bundle)]) == 0
    assert main(["inspect", str(bundle)]) == 0
    assert main(["verify", str(bundle)]) == 0
    assert main(["profile", str(bundle), "--images", "8"]) == 0
    capsys.readouterr()
    assert main(["run", str(bundle), str(image), "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["schema"].startswith("bdexport.run/")
