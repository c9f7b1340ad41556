"""A loaded checkpoint held against logits that its owner has: what keys and shapes cannot show, numbers can.

The reference is a .npz file with ``logits`` (N, classes) and ``images`` (uint8 (N, h, w, 3), which checks the
preprocessing, too) or ``inputs`` (float (N, channels, H, W), preprocessed already); or the network as an ONNX graph,
which is run by ONNX Runtime on inputs that both read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bdexport.array_files import read_npz
from bdexport.backends.onnxruntime_common import import_onnxruntime
from bdexport.checkpoint.data import Checkpoint
from bdexport.checkpoint.lookalikes import lookalikes, other_normalisations
from bdexport.dataset import Dataset
from bdexport.errors import CheckpointError, VerificationError
from bdexport.files import open_regular, usable_path
from bdexport.limits import REFERENCE_ARRAYS
from bdexport.models.pair import BlockDropNet
from bdexport.models.resnet import ResNet

TOLERANCE = 2e-4  # of the largest logit: float32 on other machines differs by 1e-5, an epsilon of 1e-3 by 1e-3 or more
ROUNDED = 0.02  # differences up to this share of the largest logit may come from TF32 or half precision
IMAGES = 16  # that an ONNX graph is run on
TRIED = 4  # images on which each possible explanation is tried: a ResNet-50 needs six seconds for all of them
BATCH = 64
HOW = "np.savez(FILE, images=uint8 (N, h, w, 3) or inputs=float32 (N, 3, H, W), logits=float32 (N, classes))"

Array = NDArray[Any]


@dataclass(frozen=True)
class Reference:
    """``logits`` for ``images`` (uint8, not preprocessed) or for ``inputs`` (float32); ``where``: what they are."""

    logits: Array
    images: Array | None
    inputs: Array
    where: str


def check_against(model: BlockDropNet, ckpt: Checkpoint, path: Path, dataset: Dataset | None = None) -> dict[str, Any]:
    """Compare the undropped network's logits with the reference at ``path``; the result as a JSON object.

    ``dataset``: gives inputs where the reference has none. Raises :class:`VerificationError` with the difference where
    they are not the same, and :class:`CheckpointError` for a file that is no reference of this network.
    """
    reference = _reference(path, ckpt, dataset)
    logits = reference.logits
    ours = _run(model.network, reference.inputs)
    scale = float(np.abs(logits).max(initial=0.0))
    tolerance = TOLERANCE * max(scale, 1e-6)
    largest, mean = _difference(ours, logits)
    same = int((ours.argmax(axis=1) == logits.argmax(axis=1)).sum())
    if not largest <= tolerance:
        raise VerificationError(
            f"the logits are not those of {path}",
            got=f"differences up to {largest:.3g}, {mean:.3g} on average ({reference.where}); "
            f"the same class for {same} of {len(logits)}",
            expected=f"at most {tolerance:.2g}, which is {100 * TOLERANCE:g} % of the largest logit",
            remedy=_explanation(model.network, ckpt, reference, tolerance),
        )
    return {
        "reference": path,
        "inputs": reference.where,
        "images": len(logits),
        "max_logit_difference": largest,
        "mean_logit_difference": mean,
        "tolerance": tolerance,
        "same_class": same,
    }


def against_text(record: dict[str, Any]) -> str:
    """One line about :func:`check_against`'s result."""
    return (
        f"the undropped network's logits are those of {record['reference']}: largest difference "
        f"{record['max_logit_difference']:.1e}, tolerance {record['tolerance']:.1e} ({record['inputs']})"
    )


def _difference(ours: Array, theirs: Array) -> tuple[float, float]:
    difference = np.abs(ours.astype(np.float64) - theirs)
    return float(difference.max()), float(difference.mean())


@torch.inference_mode()
def _run(network: Callable[[Tensor], Tensor], inputs: Array) -> Array:
    batches = (torch.from_numpy(inputs[at : at + BATCH]) for at in range(0, len(inputs), BATCH))
    return torch.cat([network(batch) for batch in batches]).numpy()


# ---- what the difference may come from


def _explanation(network: ResNet, ckpt: Checkpoint, reference: Reference, tolerance: float) -> str:
    """The one change that gives the expected logits, or what can be changed at all."""
    for difference, remedy, run, inputs in _candidates(network, ckpt, reference):
        try:
            ours = _run(run, inputs[:TRIED])
        except RuntimeError:  # an image so small that nothing is left after another stride
            continue
        if _difference(ours, reference.logits[:TRIED])[0] <= tolerance:
            return f"the same weights give them with {difference}: {remedy}"
    if _difference(_run(network, reference.inputs), reference.logits)[0] <= ROUNDED / TOLERANCE * tolerance:
        return "so small a difference may come from TF32 or half precision: compute the reference in float32 on a CPU"
    return (
        "no single known difference gives them; the file may need another preprocessing (--mean, --std, --size, "
        "--resize-short), or the network is another than was assumed"
    )


def _candidates(
    network: ResNet, ckpt: Checkpoint, reference: Reference
) -> Iterator[tuple[str, str, Callable[[Tensor], Tensor], Array]]:
    if reference.images is not None:
        for name, remedy, other in other_normalisations(ckpt.preprocess):
            yield name, remedy, network, other(reference.images)
    for alike in lookalikes(network):
        yield alike.difference, alike.remedy, alike.run, reference.inputs


# ---- reading the reference


def _reference(path: Path, ckpt: Checkpoint, dataset: Dataset | None) -> Reference:
    try:
        with open_regular(usable_path(path)) as file:
            start = file.read(4)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})", remedy="check the path") from error
    if start.startswith(b"PK"):
        return _from_arrays(path, ckpt, dataset)
    if path.suffix == ".onnx":
        return _from_graph(path, ckpt, dataset)
    raise CheckpointError(f"{path}: no reference", expected="a .npz or an .onnx file", remedy=f"make one: {HOW}")


def _from_arrays(path: Path, ckpt: Checkpoint, dataset: Dataset | None) -> Reference:
    try:
        arrays = read_npz(path, ("logits", "images", "inputs"))
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path}: damaged, or no .npz of numbers ({error})", remedy=f"make one: {HOW}") from error
    if "logits" not in arrays:
        raise CheckpointError(f"{path}: no logits", got=", ".join(arrays) or "no array of a known name", remedy=HOW)
    logits = _checked_logits(arrays["logits"], ckpt, path)
    if "images" in arrays:
        images = arrays["images"]
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or len(images) != len(logits):
            raise _other_shape(path, "images", images, f"uint8 ({len(logits)}, height, width, 3)")
        _check_count(len(images), ckpt, path)
        return Reference(logits, images, ckpt.preprocess(images), f"{len(images)} images, preprocessing included")
    if "inputs" in arrays:
        inputs = arrays["inputs"]
        fits = inputs.ndim == 4 and inputs.shape[1] in (1, 3) and len(inputs) == len(logits)
        if not fits or not np.issubdtype(inputs.dtype, np.floating):
            raise _other_shape(path, "inputs", inputs, f"floats ({len(logits)}, 3, height, width)")
        return Reference(logits, None, _three_channels(inputs), f"{len(inputs)} preprocessed inputs")
    if dataset is None or len(dataset) < len(logits):
        raise CheckpointError(f"{path}: logits alone, and no images for them", expected="images or inputs", remedy=HOW)
    images = dataset.first(len(logits)).arrays(ckpt.preprocess)
    where = f"the first {len(images)} images of {dataset.name} {dataset.split}, preprocessing included"
    return Reference(logits, images, ckpt.preprocess(images), where)


def _from_graph(path: Path, ckpt: Checkpoint, dataset: Dataset | None) -> Reference:
    """Run the graph on images of the data set, or on random ones: both networks read the same inputs."""
    if dataset is None:
        shape = (IMAGES, *ckpt.preprocess.size, 3)
        images, where = np.random.default_rng(0).integers(0, 256, shape, np.uint8), f"{IMAGES} random images"
    else:
        images = dataset.first(IMAGES).arrays(ckpt.preprocess)
        where = f"the first {len(images)} images of {dataset.name} {dataset.split}"
    inputs = ckpt.preprocess(images)
    runtime = import_onnxruntime()
    try:
        options = runtime.SessionOptions()
        options.log_severity_level = 4
        session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        given = session.get_inputs()[0]
        theirs = inputs[:, :1] if given.shape[1] == 1 else inputs
        batch = given.shape[0] if isinstance(given.shape[0], int) else len(theirs)
        parts = [theirs[at : at + batch] for at in range(0, len(theirs) - batch + 1, batch)]
        logits = np.concatenate([session.run(None, {given.name: part})[0] for part in parts])
    except Exception as error:  # its exceptions have no common class
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{path}: cannot be run on inputs of {list(inputs.shape)} ({reason})",
            expected="a graph of one float32 input (N, 3, height, width) and logits as its first output",
            remedy="where it reads another size, pass that as --size",
        ) from error
    used = inputs[: len(logits)]
    used = _three_channels(used[:, :1]) if theirs.shape[1] == 1 else used
    return Reference(_checked_logits(logits, ckpt, path), None, used, f"{where}, preprocessing not included")


def _check_count(count: int, ckpt: Checkpoint, path: Path) -> None:
    """Raise where so many images at the network's size take too much memory: tiny ones may be many in a small file."""
    height, width = ckpt.preprocess.size
    most = REFERENCE_ARRAYS // (height * width * 3 * 4)
    if count > most:
        what, remedy = f"{path}: too many images for one comparison", "save the first of them; 100 show as much"
        raise CheckpointError(what, got=count, expected=f"at most {most} at {height}x{width}", remedy=remedy)


def _three_channels(inputs: Array) -> Array:
    """Grey inputs in all three channels: a network of one channel is loaded as one that makes grey of them."""
    inputs = inputs.astype(np.float32)
    return np.ascontiguousarray(np.repeat(inputs, 3, axis=1)) if inputs.shape[1] == 1 else inputs


def _checked_logits(logits: Array, ckpt: Checkpoint, path: Path) -> Array:
    count = ckpt.network.num_classes
    if logits.ndim != 2 or logits.shape[1] != count or len(logits) == 0 or not np.issubdtype(logits.dtype, np.floating):
        raise _other_shape(path, "logits", logits, f"floats (N, {count})")
    if not np.isfinite(logits).all():
        raise CheckpointError(f"{path}: logits", got="values that are not finite", expected="finite numbers")
    if (logits >= 0).all() and np.allclose(logits.sum(axis=1), 1, atol=1e-3):
        raise CheckpointError(
            f"{path}: probabilities", expected="logits: what the last layer gives", remedy="leave the softmax out"
        )
    return logits.astype(np.float32)


def _other_shape(path: Path, name: str, array: Array, expected: str) -> CheckpointError:
    return CheckpointError(f"{path}: {name}", got=f"{array.dtype} {array.shape}", expected=expected, remedy=HOW)
