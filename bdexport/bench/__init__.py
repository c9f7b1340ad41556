"""Measuring, and results as data: dynamic inference against the full network's own engine on the same images."""

from bdexport.bench.measure import Measurement, measure
from bdexport.bench.results import bench_result

__all__ = ["Measurement", "bench_result", "measure"]
