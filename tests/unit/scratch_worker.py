"""Builds that are killed at seeded moments, for test_scratch.py: ``python scratch_worker.py FOLDER KILLS``.

Moments are counted in what Python says of files (its audit events), not in seconds. A first build of each precision
counts them; each of KILLS others is killed at one of them, every second time just after a folder for scratch was made.
Prints one JSON object: the moments by precision, and what each killed build left in the system's temporary folder.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random

import torch
from bundles import calibration_images
from tiny import tiny_checkpoint_file

from bdexport.backends.onnxruntime_common import import_onnxruntime
from bdexport.build import build_bundle
from bdexport.config import BuildConfig, FusedConfig

WATCHED = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")
SCRATCH = "tempfile.mkdtemp"


def in_child(work: Callable[[], None]) -> int:
    """The exit status of ``work`` in a forked process."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def build(folder: Path, precision: str, kill_at: int = -1) -> None:
    """Build FOLDER/bundle, with scales for int8; without a kill, write the moments to FOLDER/events."""
    events: list[str] = []

    def watch(event: str, _arguments: tuple[object, ...]) -> None:
        if event in WATCHED or event == SCRATCH:
            if len(events) == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            events.append(event)

    images = calibration_images(folder) if precision == "int8" else None
    config = BuildConfig(precision=precision, fused=FusedConfig(measure=False))
    sys.addaudithook(watch)
    build_bundle(
        folder / "tiny.safetensors",
        folder / "bundle",
        config=config,
        overwrite=True,
        cache_dir=folder / f"cache-{kill_at}",
        calibration=images,
    )
    if kill_at < 0:
        (folder / "events").write_text(json.dumps(events))


def main(folder: Path, kills: int) -> None:
    """See the module."""
    torch.set_num_threads(1)
    import_onnxruntime()  # once, here, and not in every build
    random, counts, left = Random(0), {}, []
    tiny_checkpoint_file(folder / "tiny.safetensors")
    for precision in ("fp32", "int8"):
        assert in_child(partial(build, folder, precision)) == 0
        events = json.loads((folder / "events").read_text())
        (folder / "events").unlink()
        counts[precision] = len(events)
        after_scratch = [index + 2 for index, event in enumerate(events[:-2]) if event == SCRATCH]
        for number in range(kills):
            moment = random.choice(after_scratch if number % 2 == 0 else range(len(events)))
            for scales in (folder / "scales").glob("*"):  # gathered anew
                scales.unlink()
            status = in_child(partial(build, folder, precision, moment))
            assert status == -signal.SIGKILL, (precision, moment, status)
            left += [f"{precision} at {moment}: {path}" for path in Path(tempfile.gettempdir()).iterdir()]
    assert in_child(partial(build, folder, "int8")) == 0
    (folder / "events").unlink()
    print(json.dumps({"moments": counts, "left": left}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
