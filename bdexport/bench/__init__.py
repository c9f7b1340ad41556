"""Measuring, and results as data: dynamic inference against the full network's own engine on the same images."""

from bdexport.bench.measure import Measurement, measure, measure_all
from bdexport.bench.profile_result import profile_result
from bdexport.bench.profiling import Profile, profile
from bdexport.bench.results import bench_result, executors_result
from bdexport.bench.trace import write_trace

__all__ = [
    "Measurement",
    "Profile",
    "bench_result",
    "executors_result",
    "measure",
    "measure_all",
    "profile",
    "profile_result",
    "write_trace",
]
