"""A campaign of faults: hostile files, kills, races, long use. It looks for wrong answers, hangs, tracebacks and leaks.

``make campaign MINUTES=20`` runs it. Every case is drawn from a seed, its kind's name and its number, and runs in a
process of its kind's own, under a time limit and, where its kind says so, a memory limit. What failed can be run again
alone: ``make campaign REPLAY='bundles 1 17'`` (kind, seed, number).

:mod:`campaign.runner` hands out cases, :mod:`campaign.worker` runs them, :mod:`campaign.kinds` lists the kinds.
"""
