"""How much a file from elsewhere may ask for. ``docs/limits.md`` has these numbers, and a test compares them.

Every limit is checked before the work that it bounds: what a file would take is counted first, from its own structure.
Sizes are bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

MIB = 1 << 20

# ---- pickles: torch's checkpoints and CIFAR's batches --------------------------------------------------------------
PICKLE_VALUES = 2_000_000  # operations, and values in the content; a ResNet-1202 with Adam and an average: 0.8 million
PICKLE_NESTING = 100  # of lists, dicts and tuples in each other
PICKLE_NAME = 1000  # characters
PICKLE_ARGUMENTS = 100  # of one call
PICKLE_INTEGER = 64  # bytes of one integer
GROWTH = 4  # texts, bytes, and tensors as float32, each counted at every place where it stands, are at most so many ..
GROWTH_FLOOR = 16 * MIB  # .. times the file, and this
REPEATED_TENSOR = MIB  # a tensor of more elements than are stored for it (stride 0) may be this large

# ---- checkpoints ---------------------------------------------------------------------------------------------------
CHECKPOINT_FILE = 8192 * MIB
CHECKPOINT_DIRECTORY = 8 * MIB  # the zip archive's list of its members; torch's takes about 130 bytes for each
SAFETENSORS_HEADER = 8 * MIB
REFERENCE_ARRAYS = 2048 * MIB  # the arrays of an .npz with logits, unpacked; and its images, preprocessed

# ---- data sets -----------------------------------------------------------------------------------------------------
CIFAR_FILE = 1024 * MIB


# ---- what reading may cost -----------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Cost:
    """The most that reading one file may take: ``memory`` and ``times`` its size in bytes, ``seconds`` on one core.

    Files of more than a hundred MiB may take ten seconds more for each GiB.
    """

    memory: int
    times: int
    seconds: int


TORCH_COST = Cost(512 * MIB, 10, 30)
SAFETENSORS_COST = Cost(256 * MIB, 6, 30)
REFERENCE_COST = Cost(5120 * MIB, 1, 60)
CIFAR_COST = Cost(512 * MIB, 8, 30)
