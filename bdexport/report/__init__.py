"""Runs and results as tables, plots and one page. Build half: curves and masks need torch, plots need matplotlib.

In the order of the data:

- paper.py, paper.json   the paper's published figures, each with the table it is printed in
- points.py              one accuracy/FLOPs/blocks result, measured or published; the JSON forms that hold such
- sources.py             what was named on the command line -> runs, checkpoints, points
- measure.py             a checkpoint on a data set: mask, correctness and confidence of every image (torch)
- curves.py usage.py samples.py tables.py    pure data: training curves, block usage, picked images, the paper's tables
- collect.py             all of it -> Report
- plots.py sheets.py     data -> figures (matplotlib)
- document.py page.py    Report -> headings, tables, figures -> HTML and Markdown
- write.py               the folder
"""

from __future__ import annotations
