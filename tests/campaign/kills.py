"""Kills at random moments. A killed training resumes to the same weights; a killed build leaves a whole one or none."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random
from typing import ClassVar

import numpy as np
import torch
from bundles import calibration_images, pixels
from numpy.typing import NDArray
from safetensors.torch import save
from tiny import tiny_checkpoint_file
from training_cases import CONFIG, MARGINAL, Recorder, request, weights_of

import bdexport
from bdexport.build import build_bundle
from bdexport.calibrate import CalibrationRequest
from bdexport.checkpoint import load_checkpoint
from bdexport.config import BuildConfig, CalibrationConfig, FusedConfig, TrainConfig
from bdexport.errors import BdexportError
from bdexport.train.pipeline import train
from campaign.cases import Kind, Tally, once
from campaign.networks import model_of

SHORT = {
    "blockdrop": replace(CONFIG, pretrain=replace(CONFIG.pretrain, epochs=2)),
    "marginal": replace(MARGINAL, pretrain=replace(MARGINAL.pretrain, epochs=2)),
}


class Kills(Kind):
    """Training, building and calibrating in a child process that is killed with SIGKILL."""

    name: ClassVar[str] = "kills"
    about: ClassVar[str] = "SIGKILL during train, build and calibrate; then the same command again"
    share: ClassVar[float] = 6
    limit_s: ClassVar[float] = 180.0

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        torch.set_num_threads(1)  # a forked child has no thread pool to wait for
        self.images = pixels(4)
        with once(folder / "good") as making:
            if making is not None:
                tiny_checkpoint_file(making / "tiny.safetensors", model_of(0))
                calibration_images(making)
        self.checkpoint = folder / "good" / "tiny.safetensors"
        self.straight: dict[str, tuple[str, float]] = {}
        for name, config in SHORT.items():
            out = folder / f"straight-{name}-{os.getpid()}"
            seconds = _in_child(partial(_train, out, config))
            self.straight[name] = _digest(out), seconds
            shutil.rmtree(out)
        self.logits, self.build_s = self._straight_build()

    def case(self, random: Random, scratch: Path) -> Tally:
        """Kill one command at a random moment, once or twice, then let it end."""
        return self._training(random, scratch) if random.random() < 0.7 else self._building(random, scratch)

    def _training(self, random: Random, scratch: Path) -> Tally:
        name = random.choice(list(SHORT))
        digest, seconds = self.straight[name]
        out, tally = scratch / "run", Tally()
        for _ in range(random.choice((1, 1, 2))):
            _in_child(lambda: _train(out, SHORT[name]), kill_after=random.random() * seconds * 1.05)
        try:
            _in_child(lambda: _train(out, SHORT[name]))
        except _ChildError as error:
            tally.failures.append(f"{name}: does not resume after a kill: {error}")
            return tally
        tally.check(_digest(out) == digest, f"{name}: other weights after a kill and a resumption")
        self._check_leftovers(tally, scratch, {"run"})
        return tally

    def _building(self, random: Random, scratch: Path) -> Tally:
        out, tally = scratch / "bundle", Tally()
        precision = random.choice(("fp32", "int8"))
        before = random.random() < 0.5
        if before:
            _in_child(lambda: self._build(out, "fp32", scratch))
        _in_child(lambda: self._build(out, precision, scratch), kill_after=random.random() * self.build_s[precision])
        if out.exists() or before:  # the old bundle or the new one, but a whole one
            try:
                with bdexport.load(out, threads=1) as orchestrator:
                    logits = orchestrator(self.images).logits
                whole = any(np.array_equal(logits, each) for each in self.logits.values())
            except BdexportError as error:
                tally.failures.append(f"{precision}: half a bundle after a kill: {error}")
                return tally
            tally.check(whole, f"{precision}: a bundle with other logits after a kill")
        _in_child(lambda: self._build(out, precision, scratch))
        with bdexport.load(out, threads=1) as orchestrator:
            same = np.array_equal(orchestrator(self.images).logits, self.logits[precision])
        tally.check(same, f"{precision}: other logits when it is built again after a kill")
        self._check_leftovers(tally, scratch, {"bundle", "scales"})
        return tally

    def _check_leftovers(self, tally: Tally, scratch: Path, wanted: set[str]) -> None:
        """After the command has ended by itself nothing may be left of the one that was killed."""
        left = sorted(path.name for path in scratch.iterdir() if path.name not in wanted)
        left += sorted(path.name for path in scratch.rglob("*.partial"))
        temporary = Path(os.environ["TMPDIR"])
        left += sorted(path.name for named in ("tmp*", "ort.*", ".*.partial") for path in temporary.glob(named))
        tally.check(not left, f"left behind after a kill: {', '.join(left[:3])}")

    def _build(self, out: Path, precision: str, scratch: Path) -> None:
        config = CalibrationConfig(images=24, folder=str(scratch / "scales"))
        images = CalibrationRequest(config, "folder", self.folder / "good" / "images")
        build_bundle(
            self.checkpoint,
            out,
            config=BuildConfig(precision=precision, fused=FusedConfig(measure=False)),
            overwrite=True,
            calibration=images if precision == "int8" else None,
        )

    def _straight_build(self) -> tuple[dict[str, NDArray[np.float32]], dict[str, float]]:
        logits: dict[str, NDArray[np.float32]] = {}
        seconds: dict[str, float] = {}
        for precision in ("fp32", "int8"):
            scratch = self.folder / f"straight-{precision}-{os.getpid()}"
            scratch.mkdir()
            out = scratch / "bundle"
            seconds[precision] = _in_child(partial(self._build, out, precision, scratch))
            with bdexport.load(out, threads=1) as orchestrator:
                logits[precision] = orchestrator(self.images).logits
            shutil.rmtree(scratch)
        return logits, seconds


class _ChildError(Exception):
    """The child process did not end well."""


def _in_child(work: Callable[[], None], kill_after: float | None = None) -> float:
    """Run ``work`` in a forked child, killed after so many seconds; returns the seconds that it took."""
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException as error:
            print(f"child: {type(error).__name__}: {error}", flush=True)
        finally:
            os._exit(code)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if kill_after is None and status:
        raise _ChildError(f"exit {os.waitstatus_to_exitcode(status)}")
    return time.monotonic() - started


def _train(out: Path, config: TrainConfig) -> None:
    train(request(out), config, Recorder())


def _digest(out: Path) -> str:
    """SHA-256 of the trained weights and of what was learned about the masks."""
    trained = load_checkpoint(out)
    statistics = repr(trained.training["policy_statistics"]["masks"]).encode()
    return hashlib.sha256(save(weights_of(out)) + statistics).hexdigest()
