"""The base of a trained network on the same images: measured where it can be found, otherwise as it is on record."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bdexport.base_figures import MEASURED, BaseFigures, known_base
from bdexport.checkpoint import Checkpoint, build_model, load_checkpoint
from bdexport.checkpoint.reading import checkpoint_file
from bdexport.dataset import Dataset, check_classes
from bdexport.errors import BdexportError
from bdexport.evaluate import Batches, keep_all, run_masks
from bdexport.files import sha256_file
from bdexport.train.data import DeviceImages
from bdexport.train.state import BASE_FILE
from bdexport.zoo import zoo_name

Tracked = Callable[[Batches, int], Batches]  # (batches, their number) -> the same batches, watched


def find_base(path: Path, found: Checkpoint, given: Path | None) -> tuple[str, Checkpoint] | None:
    """The base's name and the base: the one that is given, or the very file that the run of ``path`` recorded.

    Such a file stands beside a run's model, or is a model of the zoo. Raises what :func:`load_checkpoint` raises, for
    the given one alone.
    """
    if given is not None:
        base = load_checkpoint(given)
        # A foreign file does not say how its images are to be prepared; training prepared them as it does the model's.
        return given.name, base if base.form == "bdexport" else replace(base, preprocess=found.preprocess)
    training = found.training
    measured, name = training.get("base_measured"), training.get("base")
    wanted = [(checkpoint_file(path).parent / BASE_FILE, measured.get("file_sha256"))] if measured else []
    if isinstance(name, str) and zoo_name(name) is not None:
        wanted.append((Path(name), training.get("base_sha256")))
    for candidate, digest in wanted:
        try:
            if digest is not None and sha256_file(checkpoint_file(candidate)) == digest:
                return str(name or "pretrained in the same run"), load_checkpoint(candidate)
        except (BdexportError, OSError):  # not there: it was looked for, not asked for
            continue
    return None


def base_figures(
    path: Path,
    found: Checkpoint,
    given: Path | None,
    dataset: Dataset,
    result: dict[str, Any] | None,
    *,
    batch: int,
    tracked: Tracked,
) -> BaseFigures | None:
    """The base beside ``result`` (of ``bdexport evaluate``): measured now, or as recorded; None where nothing is known.

    Raises DatasetError where the base has other classes, and what :func:`find_base` raises.
    """
    base = find_base(path, found, given)
    if base is None:
        digest = sha256_file(checkpoint_file(path))
        return known_base(found.training, digest, dataset.name, dataset.split, len(dataset))
    name, ckpt = base
    check_classes(dataset, ckpt.network.num_classes)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build_model(ckpt, with_policy=False).to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    source = DeviceImages(dataset.arrays(ckpt.preprocess), dataset.labels, ckpt.preprocess, device)
    batches = tracked(source.batches(batch), -(-len(source) // batch))
    outcome = run_masks(model, batches, keep_all(ckpt.network.num_blocks))
    result = result or {"full": {"accuracy": None}}
    dynamic = result.get("policy") or result.get("gates") or next(iter(result.get("fixed", {}).values()), None)
    return BaseFigures(
        name,
        outcome.accuracy,
        dataset.name,
        dataset.split,
        len(dataset),
        MEASURED,
        here=True,
        full=result["full"]["accuracy"],
        dynamic=None if dynamic is None else dynamic["accuracy"],
    )
