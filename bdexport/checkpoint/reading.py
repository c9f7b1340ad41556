"""Bytes on disk -> tensors by name. Code in a file is never run; every way to be no checkpoint has its own sentence.

What a file is, is told from its first bytes, never from its name: ``.th``, ``.pt``, ``.pth``, ``.t7`` and
``.pth.tar`` are all the same two torch forms (a zip archive since torch 1.6, a sequence of pickles before).
"""

from __future__ import annotations

import pickle
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open

from bdexport.checkpoint.beside import known_beside_weights
from bdexport.checkpoint.counting import count_torch_pickles, count_torch_zip, zip_names
from bdexport.errors import CheckpointError
from bdexport.files import native_path, open_regular, usable_path
from bdexport.limits import CHECKPOINT_FILE, SAFETENSORS_HEADER
from bdexport.zoo import zoo_model, zoo_name

RUN_FILE = "model.safetensors"  # what a training run leaves in its folder
HEADER_KEY = "bdexport"  # our entry in the metadata of a safetensors header
WEIGHTS_ONLY = "weights only (tensors, numbers, text and plain containers; beside them options, paths, dates)"
ONLY_WEIGHTS = "save only the weights: torch.save(model.state_dict(), FILE)"


@dataclass(frozen=True)
class RawFile:
    """``content``: what the file holds, tensors by name, perhaps inside containers. ``header``: our JSON, if any."""

    path: Path
    content: Any
    header: str | None = None


def read_raw(path: Path) -> RawFile:
    """Read what :func:`checkpoint_file` finds at ``path``. Raises :class:`CheckpointError` naming file and reason."""
    try:
        path = checkpoint_file(path)
        with open_regular(path) as file:
            start = file.read(512)
            length = _length(file, path)
        return _read_by_start(path, start, length)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file", remedy="check the path") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error


def checkpoint_file(path: Path) -> Path:
    """The file behind what a caller names: ``zoo:NAME``, a run folder, or the file itself (which may not exist).

    Raises UsageError for a name that the zoo does not have or that no file can have, :class:`CheckpointError` for
    another kind of folder.
    """
    name = zoo_name(path)
    if name is not None:
        return zoo_model(name)
    if not usable_path(path).is_dir():
        return path
    if (path / RUN_FILE).exists():
        return path / RUN_FILE
    if (path / "manifest.json").exists():
        raise CheckpointError(f"{path}: this is a bundle", expected="a checkpoint file or a run folder")
    raise CheckpointError(
        f"{path}: a folder without {RUN_FILE}",
        expected="a checkpoint file or the folder of a finished training run",
        remedy="run the same bdexport train command again to finish a run that was cut off",
    )


def _length(file: BinaryIO, path: Path) -> int:
    length = file.seek(0, 2)
    file.seek(0)
    if length > CHECKPOINT_FILE:
        raise CheckpointError(
            f"{path}: too large for a checkpoint", got=f"{length:,} bytes", expected=f"at most {CHECKPOINT_FILE:,}"
        )
    return length


def _read_by_start(path: Path, start: bytes, length: int) -> RawFile:
    if not start:
        raise CheckpointError(f"{path}: the file is empty", remedy="copy or download it again")
    if start[8:9] == b"{":  # before the others: the eight bytes in front are a length and may begin like anything
        return _read_safetensors(path, start, length)
    if start.startswith((b"PK\x03\x04", b"\x80")):
        return RawFile(path, read_torch(path))
    if path.suffix == ".safetensors":
        return _read_safetensors(path, start, length)
    raise CheckpointError(
        f"{path}: not a checkpoint",
        got=_kind_of(start),
        expected="a .safetensors file or a file written by torch.save",
    )


def _kind_of(start: bytes) -> str:
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer (run git lfs pull)"
    if start.startswith(b"\x1f\x8b"):
        return "a gzip archive (unpack it first)"
    if start[257:262] == b"ustar":
        return "a tar archive (unpack it first)"
    text = start.decode(errors="replace").rstrip("\ufffd")  # the sample may end inside a character
    if "\ufffd" in text or any(ord(character) < 32 and not character.isspace() for character in text):
        return "a file of an unknown kind"
    return "a text file"


def _read_safetensors(path: Path, start: bytes, length: int) -> RawFile:
    header = int.from_bytes(start[:8], "little")
    if min(header, length) > SAFETENSORS_HEADER:  # what goes on behind the file's end is damage, and said below
        raise CheckpointError(
            f"{path}: too long a header", got=f"{header:,} bytes", expected=f"at most {SAFETENSORS_HEADER:,}"
        )
    try:
        with native_path(path) as name, safe_open(name, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except SafetensorError as error:
        raise CheckpointError(
            f"{path}: damaged safetensors file ({_first_line(error)})", remedy="copy or download it again"
        ) from error
    return RawFile(path, tensors, metadata.get(HEADER_KEY))


def read_torch(path: Path) -> Any:
    """What a file of torch's holds. Nothing is loaded before it is counted what loading would take.

    Raises :class:`CheckpointError` for what is damaged, or is not weights only, or would take more than its size is
    worth (``docs/limits.md``); OSError is left to the caller.
    """
    try:
        with open(path, "rb") as file:
            _count(path, file)
            return _loaded(file)
    except pickle.UnpicklingError as error:
        raise _refused(path, error) from error
    except (OSError, CheckpointError):
        raise
    except Exception as error:  # whatever class the broken bytes happen to hit
        if "Invalid magic number" in str(error):
            raise CheckpointError(
                f"{path}: a pickle, but not one written by torch.save", remedy=ONLY_WEIGHTS
            ) from error
        raise _damaged(path, error) from error


def _count(path: Path, file: BinaryIO) -> None:
    length = _length(file, path)
    zipped = file.read(4) == b"PK\x03\x04"
    file.seek(0)
    if not zipped:
        count_torch_pickles(file, length)
        return
    names = zip_names(file, length)
    if "constants.pkl" in names:
        raise CheckpointError(
            f"{path}: a TorchScript program, which is code", expected="weights only", remedy=ONLY_WEIGHTS
        )
    if "data.pkl" not in names:
        raise CheckpointError(f"{path}: a zip archive that holds no checkpoint", remedy="unpack it, if it is inside")
    count_torch_zip(file, length)


def _loaded(file: BinaryIO) -> Any:
    # weights_only: torch's own unpickler, which builds tensors and plain containers and refuses every other global but
    # those of beside.py, for which harmless builders of ours stand.
    file.seek(0)
    with warnings.catch_warnings(), torch.serialization.safe_globals(known_beside_weights()):
        warnings.simplefilter("ignore")  # on pickle protocols and old storages; what matters comes as an error
        return torch.load(file, map_location="cpu", weights_only=True)


def _damaged(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{path}: truncated or damaged torch file ({type(error).__name__}: {_first_line(error)})",
        remedy="copy or download it again",
    )


def _refused(path: Path, error: pickle.UnpicklingError) -> CheckpointError:
    text = str(error)
    wanted = re.search(r"nsupported (?:global: )?GLOBAL ([\w.]+)", text)
    if wanted is not None and _ends_with(path, wanted.group(1).rpartition(".")[2]):
        return _damaged(path, EOFError("the file ends within a name"))
    if wanted is not None:
        return CheckpointError(
            f"{path}: refused, loading it would run code from the file: it asks for {wanted.group(1)}",
            expected=WEIGHTS_ONLY,
            remedy=ONLY_WEIGHTS + " where you trust the file",
        )
    return CheckpointError(
        f"{path}: refused, not plain weights ({_reason(text)})",
        expected=WEIGHTS_ONLY,
        remedy=ONLY_WEIGHTS + " where you trust the file",
    )


def _ends_with(path: Path, text: str) -> bool:
    return path.read_bytes().endswith(text.encode())


def _reason(text: str) -> str:
    """The sentence that torch's unpickler itself said, out of the advice that torch.load wraps around it."""
    match = re.search(r"WeightsUnpickler error:\s*(.+)", text)
    return (match.group(1) if match else text).strip().splitlines()[0][:300]


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no details"])[0][:200]
