"""Odd JSON: calibration lists, run folders, and results of ``evaluate``, ``bench`` and the benchmarks."""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from random import Random
from typing import Any, ClassVar

import numpy as np
from bundles import calibration_images
from tiny import SIZE
from training_cases import CONFIG, Recorder, request

from bdexport.calibration_list import list_images, make_list, read_list, write_list
from bdexport.config import CalibrationConfig, ReportConfig
from bdexport.preprocess import Preprocess
from bdexport.report.collect import collect
from bdexport.report.sources import read_sources
from bdexport.report.write import write_report
from bdexport.train.pipeline import train
from campaign.cases import Kind, Tally, attempt, once
from campaign.mutations import damage_file, odd_text

REPOSITORY = Path(__file__).resolve().parents[2]
RESULTS = REPOSITORY / "benchmarks" / "results"
DRAWN = 0.04  # share of the reports that are drawn and written: that takes a second
LARGEST_RESULT = 1 << 20


class Lists(Kind):
    """Calibration lists of an image folder."""

    name: ClassVar[str] = "lists"
    about: ClassVar[str] = "calibration lists with damage and odd values"
    share: ClassVar[float] = 0.7
    memory_mb: ClassVar[int | None] = 300

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        with once(folder / "good") as making:
            if making is not None:
                calibration_images(making)
                config = CalibrationConfig(images=12)
                write_list(making / "list.json", make_list("folder", making / "images", config))
        self.images, self.list = folder / "good" / "images", folder / "good" / "list.json"
        self.document = json.loads(self.list.read_text())
        self.expected = self._sorted_images(self.list)

    def case(self, random: Random, scratch: Path) -> Tally:
        """The list is refused, or names the same images."""
        path, tally = scratch / "list.json", Tally()
        if random.random() < 0.2:
            shutil.copyfile(self.list, path)
            damage_file(path, random)
        else:
            path.write_bytes(odd_text(self.document, random))

        images = attempt(tally, "list", lambda: self._sorted_images(path))
        if images is not None:
            same = images == self.expected
            tally.check(same, f"a damaged list was accepted with other images: {path.read_bytes()[:300]!r}")
        return tally

    def _sorted_images(self, path: Path) -> list[bytes]:
        """The listed images' pixels; their order does not matter to ranges."""
        images = list_images(read_list(path), self.images, Preprocess(size=SIZE), where=path)
        return sorted(image.tobytes() for image in images)


class Reports(Kind):
    """What ``bdexport report`` reads."""

    memory_mb: ClassVar[int | None] = 500

    def report(self, tally: Tally, random: Random, paths: list[Path], scratch: Path) -> None:
        """Read the sources, collect, now and then draw: refused, or a page is there."""

        def make() -> Any:
            found = read_sources(paths)
            found = replace(found, trained=[each for each in found.trained if not each.has_model])
            config = ReportConfig()
            made = collect(found, None, config, "bdexport report", lambda _title, batches, _total: iter(batches), {})
            plain = json.loads(json.dumps(made.to_json(), default=_plain))
            if random.random() < DRAWN:
                return write_report(made, plain, scratch / "out", config)[0].is_file()
            return True

        done = attempt(tally, "report", make)
        if done is not None:
            tally.check(done, "no page was written")


class Runs(Reports):
    """Run folders of an unfinished training."""

    name: ClassVar[str] = "runs"
    about: ClassVar[str] = "run folders with damage and odd values, reported"
    share: ClassVar[float] = 0.7

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        with once(folder / "good") as making:
            if making is not None:
                train(request(making / "run", base_only=False), CONFIG, Recorder())
                for path in (making / "run").glob("*.safetensors"):
                    path.unlink()
        self.run = folder / "good" / "run"

    def case(self, random: Random, scratch: Path) -> Tally:
        """Change the settings or the epochs of a run."""
        run, tally = scratch / "run", Tally()
        run.mkdir()
        for name in ("run.json", "metrics.jsonl"):
            shutil.copyfile(self.run / name, run / name)
        changed = run / random.choice(("run.json", "metrics.jsonl", "metrics.jsonl"))
        if random.random() < 0.2:
            damage_file(changed, random)
        elif changed.suffix == ".json":
            changed.write_bytes(odd_text(json.loads(changed.read_text()), random))
        else:
            lines = changed.read_bytes().splitlines()
            for _ in range(random.choice((1, 1, 2, 5))):
                at = random.randrange(len(lines))
                with suppress(ValueError, RecursionError):  # a line that was made no JSON, or too deep, before
                    lines[at] = odd_text(json.loads(lines[at]), random).replace(b"\n", b" ")
            changed.write_bytes(b"\n".join(lines) + b"\n")
        self.report(tally, random, [run], scratch)
        return tally


class Results(Reports):
    """The results that this repository holds."""

    name: ClassVar[str] = "results"
    about: ClassVar[str] = "results of evaluate, bench and benchmarks with odd values, reported"
    share: ClassVar[float] = 0.7

    def case(self, random: Random, scratch: Path) -> Tally:
        """Change one result; sometimes another one stands beside it."""
        tally = Tally()
        documents = _documents()
        path = scratch / "result.json"
        path.write_bytes(odd_text(random.choice(documents), random))
        paths = [path]
        if random.random() < 0.3:
            beside = scratch / "beside.json"
            beside.write_text(json.dumps(random.choice(documents)))
            paths.append(beside)
        self.report(tally, random, paths, scratch)
        return tally


@cache
def _documents() -> list[Any]:
    """Results of every kind that is committed, the large ones left out."""
    found = []
    for path in sorted(RESULTS.rglob("*.json")):
        if path.parent.name != "campaign" and path.stat().st_size <= LARGEST_RESULT:  # the same whatever was committed
            document = json.loads(path.read_text())
            if isinstance(document, dict) and str(document.get("schema", "")).startswith("bdexport."):
                found.append(document)
    return found


def _plain(value: Any) -> Any:
    """What the report holds beside plain values: arrays and numbers of numpy."""
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} in a report")
