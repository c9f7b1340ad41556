"""The benchmark suite: bdexport beside what users would pick instead, on the same images, threads and run.

    python -m benchmarks.suite [--quick] [--plan | --prepare] [--models ..] [--batches ..] [--kinds ..] ..

In the order of the data:

    plan.py          which cells are measured, in which order, by whom; the time shared out between them
    networks.py      checkpoints (trained, or of random weights), bundles, images, masks; int8.py: scales
    graphs.py        the network as one ONNX graph with an ``If`` per block
    baselines.py     what users would pick instead; contestants.py puts bdexport beside it, cell by cell
    estimate.py      what cells cost; run.py and preparing.py: what comes before measuring
    measuring.py     rounds: everybody in turn on the same images, in shuffled order, until the cell's time is up
    statistics.py    medians, ratios and their spread
    footprint.py     load time and memory, each in a process of its own
    results.py       times -> a cell's result as data; store.py keeps it, so that an interrupted run goes on
    tables.py, plots.py   what a person reads

``benchmarks/README.md`` says how to run it and how to read it.
"""
