"""How much a file from elsewhere may ask for. ``docs/limits.md`` has these numbers as a table, and a test compares them.

Every limit is checked before the work that it bounds: what a file would take is counted first, from its own structure.
Sizes are bytes.
"""

from __future__ import annotations

MIB = 1 << 20

# ---- pickles: torch's checkpoints and CIFAR's batches --------------------------------------------------------------
PICKLE_OPERATIONS = 2_000_000  # a ResNet-1202 with Adam's state and an averaged copy has about 800,000
PICKLE_NESTING = 100  # of lists, dicts and tuples in each other
PICKLE_VALUES = 4_000_000  # what is met on a walk through the content, shared values once for each place
PICKLE_TEXT = 4096  # characters of a name, bytes of a number

# ---- checkpoints ---------------------------------------------------------------------------------------------------
CHECKPOINT_FILE = 8 << 30
CHECKPOINT_DIRECTORY = 8 * MIB  # of the zip archive: the list of its members, about 60,000 of torch's
SAFETENSORS_HEADER = 8 * MIB
REPEATED_TENSOR = MIB  # of a tensor that has more elements than are stored for it (stride 0)
GROWTH = 8  # all tensors as float32, counted at each place where they stand, are at most so many times the file ..
GROWTH_FLOOR = 16 * MIB  # .. or this
REFERENCE_ARRAYS = 1 << 30  # the arrays of an .npz with logits, unpacked

# ---- data sets -----------------------------------------------------------------------------------------------------
CIFAR_FILE = 1 << 30
