"""The teachers' pass over the training images: seen while it runs, and kept beside the state for a resumed run.

RUN/teacher.safetensors   logits float32 (N, C), and in the header a hash of all that they depend on and one of
                          themselves; goes at the end
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bdexport.files import write_bytes
from bdexport.train.data import DeviceImages
from bdexport.train.phases import Setting
from bdexport.train.reporter import Reporter
from bdexport.train.state import TEACHER_FILE

LOGITS, KEY = "logits", "key"
LARGEST = 1 << 30  # bytes; beyond that, writing them to disk is no small matter any more


def teacher_logits(setting: Setting, images: DeviceImages, run: Path, mirrored: bool, reporter: Reporter) -> Tensor:
    """The teachers' mean logits for every image as it is (and mirrored), float32 (N, C): kept ones, or computed now."""
    path, key = run / TEACHER_FILE, _key(setting, images, mirrored)
    kept = setting.world.once(lambda: _read(path, key))
    if kept is not None:
        reporter.note("the teacher has seen the training images already: its answers are kept in the run")
        return kept.to(setting.device)
    logits = _computed(setting, images, mirrored, reporter)
    if logits.nbytes <= LARGEST:
        held = logits.cpu().contiguous()
        setting.world.once(
            lambda: write_bytes(path, safetensors.torch.save({LOGITS: held}, {KEY: _with_digest(key, held)}))
        )
    return logits


@torch.no_grad()
def _computed(setting: Setting, images: DeviceImages, mirrored: bool, reporter: Reporter) -> Tensor:
    batch = setting.config.evaluation_batch
    logits = []
    with (
        setting.autocast(),
        reporter.epoch(f"teacher's pass over {len(images)} training images", -(-len(images) // batch)) as advance,
    ):
        for x, _ in images.batches(batch):
            views = (x, x.flip(3)) if mirrored else (x,)
            outputs = [teacher(view).float() for teacher in setting.teachers for view in views]
            logits.append(torch.stack(outputs).mean(dim=0))
            advance()
    return torch.cat(logits)


def _key(setting: Setting, images: DeviceImages, mirrored: bool) -> str:
    """A hash of teachers, images and arithmetic: with any other, the logits would be others."""
    digest = hashlib.sha256()
    for teacher in setting.teachers:
        for name, tensor in sorted(teacher.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    for tensor in (images.images, images.scale, images.offset):
        digest.update(tensor.cpu().contiguous().numpy().data)
    arithmetic = [mirrored, setting.bf16, setting.device.partition(":")[0], setting.config.evaluation_batch]
    digest.update(json.dumps([*arithmetic, torch.__version__]).encode())
    return digest.hexdigest()


def _with_digest(key: str, logits: Tensor) -> str:
    """The key, and a hash of the kept logits themselves, so that damage to them is noticed."""
    return f"{key} {hashlib.sha256(logits.contiguous().numpy().data).hexdigest()}"


def _read(path: Path, key: str) -> Tensor | None:
    """The kept logits; None where there are none of this key. What is damaged is computed again."""
    try:
        with safe_open(path, framework="pt") as file:
            found = (file.metadata() or {}).get(KEY, "")
            if not found.startswith(key):
                return None
            logits = file.get_tensor(LOGITS)
            return logits if found in (key, _with_digest(key, logits)) else None  # earlier versions: the key alone
    except (OSError, SafetensorError):
        return None
