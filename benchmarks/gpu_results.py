"""README's words about GPUs, from the results in ``benchmarks/results/gpu/``: rewrites them between their two markers.

    python benchmarks/gpu_results.py [--check]

``--check`` changes nothing and fails where README.md says something else than the results do.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bdexport.report.benchmarks import LATENCY, TRAINING, Benchmark, read_benchmark  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "gpu"
BEGIN, END = "<!-- gpu results: begin -->\n", "<!-- gpu results: end -->\n"
NOTHING = """\
Nothing has run on a GPU yet, because none was at hand: [docs/gpu.md](docs/gpu.md) has the two lines that run it there.
No engine of TensorRT itself has been built either, because its libraries come from the vendor's package index alone.
"""


def shown(folder: Path = RESULTS) -> str:
    """Markdown: the latencies and training speeds of the folder's results; a sentence where there are none."""
    found = [read_benchmark(json.loads(path.read_text()), path.name) for path in sorted(folder.glob("*.json"))]
    texts = [
        _markdown(benchmark)
        for benchmark in found
        if isinstance(benchmark, Benchmark) and benchmark.kind in (LATENCY, TRAINING)
    ]
    return "\n".join(texts) or NOTHING


def _markdown(benchmark: Benchmark) -> str:
    table = benchmark.table
    assert table is not None
    rows = [table.columns, ("---",) * len(table.columns), *table.rows]
    lines = "".join(f"| {' | '.join(row)} |\n" for row in rows)
    return f"{table.title} (`benchmarks/results/gpu/{benchmark.where}`):\n\n{lines}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    readme = ROOT / "README.md"
    text = readme.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    wanted = before + BEGIN + shown() + END + after
    if parser.parse_args().check:
        sys.exit(None if text == wanted else "README.md does not show the GPU results: run benchmarks/gpu_results.py")
    readme.write_text(wanted)


if __name__ == "__main__":
    main()
