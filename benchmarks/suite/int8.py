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
    settings = _settings(network, config, work)
    mark = Path(settings.folder) / f"{network.label}.done"
    if not mark.is_file():
        dataset, data = _source(network, config)
        request = CalibrationRequest(settings, dataset, data)
        with tempfile.TemporaryDirectory() as folder:
            graphs = export_parts(network.model, network.checkpoint.preprocess, Path(folder), progress=progress)
            scales_for(network.model, graphs, network.checkpoint.preprocess, request)
        write_bytes(mark, b"")
    return CalibrationRequest(settings)


def int8_full_graph(network: Network, backend: str, config: SuiteConfig, work: Path) -> bytes:
    """The undropped network with Q/DQ nodes as ``backend`` takes them best, made once and kept in ``work``."""
    path = work / "graphs" / f"{network.label}-{backend}-int8-{scales_source(network, config)}.onnx"
    if not path.is_file():
        with tempfile.TemporaryDirectory() as folder:
            graphs = export_parts(network.model, network.checkpoint.preprocess, Path(folder, "fp32"))
            kept = scales_kept(network, config, work)
            scales, _ = scales_for(network.model, graphs, network.checkpoint.preprocess, kept)
            made = typed_graphs({FULL: graphs[FULL]}, INT8, backend, Path(folder), scales)
            write_bytes(path, made[FULL].read_bytes())
    return path.read_bytes()


def scales_source(network: Network, config: SuiteConfig) -> str:
    """The data set that int8's scales come from; part of the name of what is made with them."""
    return _source(network, config)[0]


def _source(network: Network, config: SuiteConfig) -> tuple[str, Path | None]:
    """The data set's training images where there are any, else the samples."""
    return (config.dataset, config.data) if network.trained and config.data is not None else (SAMPLES, None)


def _settings(network: Network, config: SuiteConfig, work: Path) -> CalibrationConfig:
    large = network.checkpoint.preprocess.size[0] > 64  # two activations of all images are held at a time
    images = config.calibration_images // (4 if large else 1)
    folder = work / FOLDER / scales_source(network, config)
    return CalibrationConfig(images=max(1, images), batch=8 if large else 64, folder=str(folder))
