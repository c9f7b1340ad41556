"""What int8 needs: scales from bdexport's own calibration, and the full network's graph with them.

Images: those of ``--dataset`` where its folder is given (the training split), else the samples that ship with
bdexport, also for networks of another size, to which they are enlarged. Random weights have no accuracy that int8 could
lose: there only the time counts.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from bdexport.calibrate import CalibrationRequest, scales_for
from bdexport.config import CalibrationConfig
from bdexport.export import export_parts
from bdexport.files import write_bytes
from bdexport.parts import FULL
from bdexport.precision import INT8, typed_graphs
from benchmarks.suite.networks import Network
from benchmarks.suite.plan import SuiteConfig

FOLDER = "calibration"  # in --work: scales by network
SAMPLES = "cifar10-samples"
Progress = Callable[[str, float, int], None]


def scales_kept(
    network: Network, config: SuiteConfig, work: Path, progress: Progress | None = None
) -> CalibrationRequest:
    """Gather this network's scales unless an earlier run kept them; what tells a build where they are.

    The classes of the data set need not be the network's: only pixels count.
    """
    kept = CalibrationRequest(_settings(network, config, work))
    mark = work / FOLDER / f"{network.label}.done"
    if not mark.is_file():
        with tempfile.TemporaryDirectory() as folder:
            graphs = export_parts(network.model, network.checkpoint.preprocess, Path(folder), progress=progress)
            scales_for(network.model, graphs, network.checkpoint.preprocess, _request(network, config, work))
        write_bytes(mark, b"")
    return kept


def int8_full_graph(network: Network, backend: str, config: SuiteConfig, work: Path) -> bytes:
    """The undropped network with Q/DQ nodes as ``backend`` takes them best, made once and kept in ``work``."""
    path = work / "graphs" / f"{network.label}-{backend}-int8.onnx"
    if not path.is_file():
        with tempfile.TemporaryDirectory() as folder:
            graphs = export_parts(network.model, network.checkpoint.preprocess, Path(folder, "fp32"))
            scales, _ = scales_for(
                network.model, graphs, network.checkpoint.preprocess, scales_kept(network, config, work)
            )
            made = typed_graphs({FULL: graphs[FULL]}, INT8, backend, Path(folder), scales)
            write_bytes(path, made[FULL].read_bytes())
    return path.read_bytes()


def _request(network: Network, config: SuiteConfig, work: Path) -> CalibrationRequest:
    """The data set's training images where there are any, else the samples."""
    fits = network.trained and config.data is not None
    dataset, data = (config.dataset, config.data) if fits else (SAMPLES, None)
    return CalibrationRequest(_settings(network, config, work), dataset, data)


def _settings(network: Network, config: SuiteConfig, work: Path) -> CalibrationConfig:
    large = network.checkpoint.preprocess.size[0] > 64  # two activations of all images are held at a time
    images = config.calibration_images // (4 if large else 1)
    return CalibrationConfig(images=max(1, images), batch=8 if large else 64, folder=str(work / FOLDER))
