"""Damaged and hostile bundles.

*Damage* leaves the hashes as they are: the bundle is refused, or gives the undamaged bundle's logits bit for bit.
*Hostile* files have hashes that fit: the bundle is refused, or gives logits of the right shape.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, ClassVar

import numpy as np
from bundles import pixels

import bdexport
from campaign.cases import Kind, Tally, attempt, once
from campaign.mutations import damage_file, damaged, odd_document, odd_text
from campaign.networks import backends, build, model_of

Json = dict[str, Any]
MANIFEST, DIGEST = "manifest.json", "manifest_sha256"


class Bundles(Kind):
    """Bundles of every backend that runs here, with fused paths."""

    name: ClassVar[str] = "bundles"
    about: ClassVar[str] = "bundles with damage, and with hostile files whose hashes fit"
    share: ClassVar[float] = 2
    memory_mb: ClassVar[int | None] = 700

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.images = pixels(4)
        with once(folder / "good") as making:
            if making is not None:
                for backend in backends():
                    build(making / backend, model_of(0), backend, paths=2)
        self.good = {backend: folder / "good" / backend for backend in backends()}
        self.expected = {backend: self.logits(path) for backend, path in self.good.items()}

    def logits(self, path: Path) -> Any:
        """What the bundle gives for this kind's images."""
        with bdexport.load(path, threads=1, fused=True) as orchestrator:
            return orchestrator(self.images).logits

    def case(self, random: Random, scratch: Path) -> Tally:
        """Damage or forge one bundle, then load and run it."""
        backend = random.choice(list(self.good))
        bundle = scratch / "bundle"
        shutil.copytree(self.good[backend], bundle)
        hostile = random.random() < 0.5
        what = forge(bundle, random) if hostile else damage(bundle, random)
        tally = Tally()
        logits = attempt(tally, f"{backend} {what}", lambda: self.logits(bundle))
        if logits is None:
            return tally
        if hostile:
            fits = logits.shape[0] == 4 and logits.ndim == 2 and bool(np.isfinite(logits).all())
            tally.check(fits, f"{backend} {what}: logits {logits.shape}, or not finite")
        else:
            same = np.array_equal(logits, self.expected[backend])
            tally.check(same, f"{backend} {what}: damage was accepted and the logits are others")
        return tally


def files_of(bundle: Path) -> list[Path]:
    """All files, in one order."""
    return sorted(path for path in bundle.rglob("*") if path.is_file())


def damage(bundle: Path, random: Random) -> str:
    """Damage one file, or change one value of the manifest; returns what was done."""
    files = files_of(bundle)
    manifest = bundle / MANIFEST
    match random.randrange(5):
        case 0:
            manifest.write_bytes(odd_text(json.loads(manifest.read_text()), random))
            return "manifest"
        case 4:  # one digit of a number: what is left is good JSON
            text = bytearray(manifest.read_bytes())
            digits = [at for at, value in enumerate(text) if 0x30 < value < 0x39]
            text[random.choice(digits)] += 1
            manifest.write_bytes(text)
            return "digit of the manifest"
        case 1:
            one, other = random.sample(files, 2)
            shutil.copyfile(one, other)
            return f"{other.name} is {one.name}"
        case _:
            path = random.choice(files)
            return f"{path.name} {damage_file(path, random)}"


def forge(bundle: Path, random: Random) -> str:
    """Change a file or the manifest and make all hashes fit again; returns what was done."""
    path = bundle / MANIFEST
    manifest: Json = json.loads(path.read_text())
    hows: list[Callable[[], str]] = [
        lambda: _forge_file(bundle, manifest, random, lambda data: damaged(data, random)),
        lambda: _forge_file(bundle, manifest, random, lambda _: files_of(bundle)[0].read_bytes()),
        lambda: "manifest",
    ]
    what = hows[random.choice((0, 0, 1, 2, 2, 2))]()
    if what == "manifest":
        changed = odd_document(manifest, random)
        manifest = changed if isinstance(changed, dict) else manifest
    sign(manifest)
    try:
        path.write_text(json.dumps(manifest), errors="surrogatepass")
    except ValueError:  # a number that Python does not write
        path.write_text("{}")
    return f"forged {what}"


def _forge_file(bundle: Path, manifest: Json, random: Random, change: Callable[[bytes], bytes]) -> str:
    files = [path for path in files_of(bundle) if path.name != MANIFEST]
    path = random.choice(files)
    path.write_bytes(change(path.read_bytes()))
    name = path.relative_to(bundle).as_posix()
    for entry in entries_of(manifest):
        if entry.get("path", entry.get("file")) == name:
            data = path.read_bytes()
            entry["sha256"] = hashlib.sha256(data).hexdigest()
            entry["bytes"] = len(data)
    return path.name


def entries_of(value: Any) -> list[Json]:
    """Every object below ``value`` that has a ``sha256``."""
    found: list[Json] = []
    children: list[Any] = []
    if isinstance(value, dict):
        if "sha256" in value:
            found.append(value)
        children = list(value.values())
    elif isinstance(value, list):
        children = value
    for child in children:
        found += entries_of(child)
    return found


def sign(manifest: Json) -> None:
    """Make the manifest's own digest fit, as docs/bundle-format.md defines it (R18)."""
    rest = {key: value for key, value in manifest.items() if key != DIGEST}
    try:
        canonical = json.dumps(rest, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except ValueError:  # a number that JSON does not have: the manifest is refused for it
        return
    if DIGEST in manifest:
        manifest[DIGEST] = hashlib.sha256(canonical.encode("ascii")).hexdigest()
