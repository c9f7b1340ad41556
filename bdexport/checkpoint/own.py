"""Our own form: one .safetensors file, self-contained. ``docs/checkpoints.md`` is the specification."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import safetensors.torch

from bdexport import files
from bdexport.checkpoint.data import Checkpoint
from bdexport.checkpoint.fitting import fit_own
from bdexport.checkpoint.header import Header, content_sha256, header_from_text, header_to_text
from bdexport.checkpoint.reading import HEADER_KEY, RawFile
from bdexport.errors import CheckpointError

LOADED_WITH = "loaded_with"  # in the training record: what loading assumed when a foreign file became ours


def save_checkpoint(path: str | Path, ckpt: Checkpoint) -> None:
    """Write ``ckpt`` to ``path`` (``.safetensors``), whole or not at all.

    What would not load again is not written: raises :class:`CheckpointError` on weights that are not finite or do not
    fit the specs, and on a configuration that the format does not allow; OutputError when the file cannot be written.
    The same checkpoint always gives the same bytes.
    """
    path = Path(path)
    check_suffix(path)
    training = ckpt.training
    if ckpt.notes:  # they are lost otherwise: what is written says everything itself
        training = training | {LOADED_WITH: [*training.get(LOADED_WITH, []), *ckpt.notes]}
    header = Header(ckpt.network, ckpt.policy, ckpt.preprocess, ckpt.class_names, training, ckpt.gates)
    text = header_to_text(header)
    header_from_text(text, str(path))
    state = fit_own(ckpt.state, ckpt.network, ckpt.policy, str(path), ckpt.gates)
    text = header_to_text(replace(header, sha256=content_sha256(text, state)))
    files.write_bytes(path, safetensors.torch.save(state, {HEADER_KEY: text}))


def check_suffix(path: Path) -> None:
    """Raise :class:`CheckpointError` for a name that no checkpoint is written to; for use before long work."""
    if path.suffix != ".safetensors":
        raise CheckpointError(
            f"{path}: not a checkpoint's name", got=f"suffix {path.suffix!r}", expected=".safetensors"
        )


def checkpoint_from_own(raw: RawFile) -> Checkpoint:
    """Read our own form. Raises :class:`CheckpointError` naming the field or the tensor that is wrong.

    A digest is checked where the file has one; older files have none.
    """
    assert raw.header is not None
    header = header_from_text(raw.header, str(raw.path))
    _check_digest(raw, raw.header, header)
    if header.network.num_blocks > len(raw.content):  # before a network of so many blocks is made
        raise CheckpointError(
            f"{raw.path}: the weights do not fit",
            got=f"{len(raw.content)} tensors",
            expected=f"those of the {header.network.num_blocks} blocks that the header says",
        )
    return Checkpoint(
        network=header.network,
        policy=header.policy,
        preprocess=header.preprocess,
        class_names=header.class_names,
        state=fit_own(raw.content, header.network, header.policy, str(raw.path), header.gates),
        training=header.training,
        form="bdexport",
        gates=header.gates,
        sha256=header.sha256,
    )


def _check_digest(raw: RawFile, text: str, header: Header) -> None:
    found = None if header.sha256 is None else content_sha256(text, raw.content)
    if found != header.sha256:
        raise CheckpointError(
            f"{raw.path}: damaged, or changed after it was saved: its content has another SHA-256",
            got=f"{str(found)[:16]}..",
            expected=f"{str(header.sha256)[:16]}..",
            remedy="copy it again, or train or convert it again",
        )
