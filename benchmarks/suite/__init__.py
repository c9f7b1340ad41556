"""The benchmark suite: bdexport beside what users would pick instead, on the same images, threads and run.

    python -m benchmarks.suite [--quick] [--models ..] [--batches ..] [--threads ..] [--checkpoint NAME=CKPT] ..

In the order of the data:

    plan.py          which cells are measured, in which order, and what each may take
    networks.py      checkpoints (trained, or of random weights), bundles, images, masks
    graphs.py        the network as one ONNX graph with an ``If`` per block
    baselines.py     what users would pick instead; contestants.py puts bdexport beside it, cell by cell
    measuring.py     rounds: everybody in turn on the same images, in shuffled order, until the cell's time is up
    statistics.py    medians, ratios and their spread
    footprint.py     load time and memory, each in a process of its own
    results.py       times -> a cell's result as data; store.py keeps it, so that an interrupted run goes on
    tables.py, plots.py   what a person reads

``benchmarks/README.md`` says how to run it and how to read it.
"""
