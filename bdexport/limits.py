"""How much of somebody else's file is read at most: every limit is here, with its reason.

A file that exceeds one is refused with a sentence that names the file and the limit. ``docs/limits.md`` says how much
memory and time reading may take within them, and tests hold that in a process of limited memory.
"""

from __future__ import annotations

MIB = 2**20

# ---- images ---------------------------------------------------------------------------------------------------------

# The sensors of the largest cameras in common use have 102 megapixels, those of phones 108 (some say 200, and save that
# only when asked to). Decoding takes up to 13 bytes a pixel, so that this is about 1.5 GB.
MAX_PIXELS = 120_000_000
# Decoders of these formats hold the image several times (measured: WebP 16 bytes a pixel, AVIF 10 to 20, JPEG 2000 25),
# so that an image may have this share of the pixels. It keeps the memory of all formats below that of the others.
PIXEL_SHARE = {"WEBP": 1 / 2, "AVIF": 1 / 2, "JPEG2000": 1 / 2}
# An uncompressed image has at most 4 bytes for each pixel (RGBA, CMYK); a small one may still carry thumbnails, colour
# profiles, notes and a film of some seconds, as phones save them.
FILE_BYTES_PER_PIXEL, MIN_IMAGE_BYTES = 4, 64 * MIB
# A progressive JPEG has about ten scans, and each costs a pass over all pixels, though it need not have more than ten
# bytes: 1 MB of them would be decoded for ten minutes. libtiff has the same limit for JPEG inside TIFF.
MAX_JPEG_SCANS = 100
# Pixels that are converted at once where a conversion needs more memory than its result.
BAND_PIXELS = 1_000_000

# ---- arrays, lists and folders --------------------------------------------------------------------------------------

# 5,000 images of 256x256 have 983 MB. Deflated members count with their size after inflating.
MAX_NPZ_BYTES = 1024 * MIB
# numpy.savez writes one member for each array, and this table has about 60 bytes for each.
MAX_NPZ_TABLE_BYTES = MIB // 4
# Images of a reference at the network's size, as float32: 10,000 of 32x32 have 123 MB, 3,500 of 224x224 have 2.1 GB.
MAX_INPUT_BYTES = 2048 * MIB
# A list of 50,000 file names of 60 characters has 3 MB; reading JSON takes about 30 times its size.
MAX_LIST_BYTES = 4 * MIB
MAX_LIST_ENTRIES = 100_000
# A name a line: ImageNet's 21,841 have 0.5 MB.
MAX_NAMES_BYTES = 2 * MIB
# A result is looked at before --json replaces it: whether it is JSON. A profile of a million events has 100 MB.
MAX_REPLACED_BYTES = 256 * MIB
# What the commands write as JSON, and a run's metrics, a line for each epoch; most have less than 1 MB.
MAX_RESULT_BYTES = 16 * MIB
# ImageNet has 1.3 million files; an entry takes 0.5 KB while a folder is read.
MAX_FOLDER_ENTRIES = 5_000_000
