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
PICKLE_CHOSEN_KEYS = 20_000  # keys that are neither texts nor small integers: they can be chosen to collide in a dict
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

# ---- images ---------------------------------------------------------------------------------------------------------

# The sensors of the largest cameras in common use have 102 megapixels, those of phones 108 (some say 200, and save that
# only when asked to). Decoding takes up to 13 bytes a pixel, so that this is about 1.5 GB.
MAX_PIXELS = 120_000_000
# Decoders of these formats hold the image several times (measured: WebP 16 bytes a pixel, AVIF 10 to 20),
# so that an image may have this share of the pixels. It keeps the memory of all formats below that of the others.
PIXEL_SHARE = {"WEBP": 1 / 2, "AVIF": 1 / 2}
# An uncompressed image has at most 4 bytes for each pixel (RGBA, CMYK); a small one may still carry thumbnails, colour
# profiles, notes and a film of some seconds, as phones save them.
FILE_BYTES_PER_PIXEL, MIN_IMAGE_BYTES = 4, 64 * MIB
# A progressive JPEG has about ten scans, and each costs a pass over all pixels, though it need not have more than ten
# bytes: 1 MB of them would be decoded for ten minutes. libtiff has the same limit for JPEG inside TIFF.
MAX_JPEG_SCANS = 100
# Each chunk of a PNG costs a microsecond or more, and may be empty. Encoders write 8 kB or more into one.
MAX_PNG_CHUNKS = 200_000
MAX_TEXT_PPM_BYTES = 32 * MIB  # numbers as text are read one by one
# Pixels that are converted at once where a conversion needs more memory than its result.
BAND_PIXELS = 1_000_000

# ---- arrays, lists and folders --------------------------------------------------------------------------------------

# REFERENCE_ARRAYS above is the limit of an .npz: 5,000 images of 256x256 have 983 MB. numpy.savez writes one member for
# each array, and the archive's table has about 60 bytes for each.
MAX_NPZ_TABLE_BYTES = MIB // 4
# A list of 50,000 file names of 60 characters has 3 MB; reading JSON takes about 30 times its size.
MAX_LIST_BYTES = 4 * MIB
MAX_LIST_ENTRIES = 100_000
# A name a line: ImageNet's 21,841 have 0.5 MB.
MAX_NAMES_BYTES = 2 * MIB
# A result is looked at before --json replaces it: whether it is JSON. A profile of a million events has 100 MB.
MAX_REPLACED_BYTES = 256 * MIB
# A run's settings, its metrics (a line for each epoch), and kept scales: most have less than 1 MB.
MAX_RESULT_BYTES = 16 * MIB
# ImageNet has 1.3 million files; an entry takes 0.5 KB while a folder is read.
MAX_FOLDER_ENTRIES = 5_000_000


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
IMAGE_COST = Cost(1536 * MIB, 3, 30)
LIST_COST = Cost(256 * MIB, 1, 20)
