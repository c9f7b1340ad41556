"""A checkpoint becomes a bundle, or nothing at all."""

from __future__ import annotations

import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import SIZE, tiny_checkpoint, tiny_checkpoint_file, tiny_model

import bdexport
from bdexport.backends.base import BuildOptions
from bdexport.backends.null import NullBackend
from bdexport.backends.torch import TorchBackend
from bdexport.build import build_bundle, bundle_from_model, default_bundle_path
from bdexport.build_engines import BUILT, REBUILT, REUSED
from bdexport.bundle import open_bundle
from bdexport.checkpoint import save_checkpoint
from bdexport.config import BuildConfig
from bdexport.errors import BuildError, BundleError, CheckpointError, OutputError, UsageError, VerificationError
from bdexport.files import sha256_file
from bdexport.models.flops import count_flops
from bdexport.models.pair import BlockDropNet

NULL = BuildConfig("null")
PARTS = 8  # of the tiny network: policy, stem, three blocks, one shortcut, head, full


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return tiny_checkpoint_file(tmp_path / "tiny.safetensors")


def names(folder: Path) -> list[str]:
    """Everything in a folder, hidden files too."""
    return sorted(path.name for path in folder.iterdir())


# ---- the result


@pytest.mark.parametrize("backend", ["onnxruntime", "torch"])
def test_bundle_computes_what_the_model_computes(checkpoint: Path, tmp_path: Path, backend: str) -> None:
    """Oracle: torch, dynamic and undropped, through the run-time half."""
    bundle = build_bundle(checkpoint, tmp_path / "bundle", config=BuildConfig(backend))
    assert bundle.manifest.verification is not None
    assert bundle.manifest.verification["ok"] is True
    model = tiny_model()
    images = np.random.default_rng(0).integers(0, 256, (5, *SIZE, 3), dtype=np.uint8)
    x = torch.from_numpy(bundle.manifest.preprocess(images))
    with bdexport.load(bundle.path) as orchestrator, torch.no_grad():
        result, full = orchestrator(images), orchestrator.full(images)
        logits, masks = model(x)
        np.testing.assert_array_equal(result.masks, masks.numpy())
        np.testing.assert_allclose(result.logits, logits.numpy(), rtol=0, atol=1e-4)
        np.testing.assert_allclose(full.logits, model.network(x).numpy(), rtol=0, atol=1e-4)


def test_manifest_says_what_the_checkpoint_says(checkpoint: Path, tmp_path: Path) -> None:
    """Oracle: the checkpoint, the FLOP counter, and the settings of the build."""
    config = BuildConfig("null", max_batch=16)
    manifest = build_bundle(checkpoint, tmp_path / "bundle", config=config).manifest
    source, model = tiny_checkpoint(tiny_model()), tiny_model()
    assert manifest.name == "bundle"
    assert manifest.preprocess == source.preprocess
    assert manifest.class_names == source.class_names
    assert manifest.network == source.network.to_json()
    assert manifest.policy_statistics == source.training["policy_statistics"]
    assert manifest.training == {"accuracy": 0.9}
    assert manifest.checkpoint == {"sha256": sha256_file(checkpoint), "form": "bdexport"}
    assert (manifest.backend, manifest.precision, manifest.max_batch) == ("null", "fp32", 16)
    flops = count_flops(model, SIZE).parts()
    assert {name: part.flops for name, part in manifest.parts.items()} == {name: flops[name] for name in manifest.parts}
    assert manifest.versions["bdexport"] == bdexport.__version__
    assert manifest.versions["torch"] == torch.__version__


def test_run_folder_and_default_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the README's sentence: ``engines/<name>``, the run folder's or the file's."""
    run = tmp_path / "runs" / "r20"
    tiny_checkpoint_file(run / "model.safetensors")
    monkeypatch.chdir(tmp_path)
    bundle = build_bundle(run, config=NULL)
    assert bundle.path.resolve() == tmp_path / "engines" / "r20"
    assert default_bundle_path(run / "model.safetensors") == default_bundle_path(run)
    assert default_bundle_path(Path("x/resnet32-d5.th")) == Path("engines/resnet32-d5")
    monkeypatch.chdir(run)
    assert default_bundle_path(Path(".")) == Path("engines/r20")
    assert default_bundle_path(Path("../r20/../r20")) == Path("engines/r20")


def test_a_link_gives_its_own_name(tmp_path: Path) -> None:
    """Oracle: the name that a person sees: the link's, or the repository's, where a cache names by hashes."""
    cache = tmp_path / "hub" / "models--somebody--resnet32-cifar"
    blob = cache / "blobs" / "3f9ac0de"
    tiny_checkpoint_file(tmp_path / "m.safetensors")
    blob.parent.mkdir(parents=True)
    (tmp_path / "m.safetensors").rename(blob)
    snapshot = cache / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    for name in ("model.safetensors", "resnet20.pth"):
        (snapshot / name).symlink_to(blob)
    (tmp_path / "latest").symlink_to(snapshot)
    assert default_bundle_path(snapshot / "resnet20.pth") == Path("engines/resnet20")
    assert default_bundle_path(snapshot / "model.safetensors") == Path("engines/resnet32-cifar")
    assert default_bundle_path(snapshot) == Path("engines/resnet32-cifar")
    assert default_bundle_path(tmp_path / "latest") == Path("engines/latest")


def test_several_jobs_build_the_same(checkpoint: Path, tmp_path: Path) -> None:
    """Oracle: a build with one job: equal graphs, equal logits bit by bit (ONNX Runtime's engines differ in names)."""
    one, four = (
        build_bundle(checkpoint, tmp_path / str(jobs), config=BuildConfig(jobs=jobs), cache_dir=tmp_path / f"c{jobs}")
        for jobs in (1, 4)
    )
    assert one.count(BUILT) == four.count(BUILT) == PARTS
    assert tuple(four.manifest.parts) == tuple(one.manifest.parts)
    for part, entry in four.manifest.parts.items():
        assert entry.graph == one.manifest.parts[part].graph
    images = np.random.default_rng(0).integers(0, 256, (4, *SIZE, 3), dtype=np.uint8)
    with bdexport.load(one) as first, bdexport.load(four) as second:
        np.testing.assert_array_equal(first(images).logits, second(images).logits)
        np.testing.assert_array_equal(first.full(images).logits, second.full(images).logits)


def test_progress_covers_every_stage(checkpoint: Path, tmp_path: Path) -> None:
    """Oracle: each stage counts up from 0, never back, and ends at its total where it has one."""
    calls: dict[str, list[tuple[int, int]]] = {}
    build_bundle(
        checkpoint,
        tmp_path / "bundle",
        config=BuildConfig(),
        progress=lambda what, done, total: calls.setdefault(what, []).append((int(done), total)),
    )
    assert list(calls) == ["load", "export", "engines", "parts", "paths", "executors"]
    for steps in calls.values():
        assert steps[0][0] == 0
        assert steps == sorted(steps)
    assert calls["export"][-1] == calls["engines"][-1] == (PARTS, PARTS)


# ---- the engine cache


def test_equal_key_is_reused(checkpoint: Path, tmp_path: Path) -> None:
    """Oracle: the same files from the first build and the second; the second builds none."""
    first = build_bundle(checkpoint, tmp_path / "first")
    second = build_bundle(checkpoint, tmp_path / "second")
    assert (first.count(BUILT), first.count(REUSED)) == (PARTS, 0)
    assert (second.count(BUILT), second.count(REUSED)) == (0, PARTS)
    assert first.manifest.parts == second.manifest.parts


def test_other_weights_and_options_are_not_reused(checkpoint: Path, tmp_path: Path) -> None:
    """Oracle: a network of equal shape, and another batch profile, share no engine with the first."""
    build_bundle(checkpoint, tmp_path / "first", config=NULL)
    other = tiny_checkpoint_file(tmp_path / "other.safetensors", tiny_model(seed=1))
    changed = build_bundle(other, tmp_path / "second", config=NULL)
    assert {part for part, outcome in changed.engines.items() if outcome == REUSED} == {"shortcut_01"}  # no weights
    batched = build_bundle(checkpoint, tmp_path / "third", config=replace(NULL, max_batch=2))
    assert batched.count(BUILT) == PARTS


def test_damaged_cache_is_rebuilt_and_said(checkpoint: Path, tmp_path: Path, own_cache: Path) -> None:
    """Oracle: the first build's files."""
    first = build_bundle(checkpoint, tmp_path / "first", config=NULL)
    entries = [path for path in (own_cache / "engines").rglob("*") if path.is_file()]
    assert len(entries) == PARTS
    entries[0].write_bytes(entries[0].read_bytes()[:-3])
    entries[1].write_bytes(b"")
    second = build_bundle(checkpoint, tmp_path / "second", config=NULL)
    assert (second.count(REBUILT), second.count(REUSED)) == (2, PARTS - 2)
    assert sum("damaged" in note for note in second.notes) == 2
    assert first.manifest.parts == second.manifest.parts
    assert build_bundle(checkpoint, tmp_path / "third", config=NULL).count(REUSED) == PARTS


def test_a_cache_that_cannot_be_used_is_said_once(checkpoint: Path, tmp_path: Path) -> None:
    """Oracle: the bundle is built all the same."""
    (tmp_path / "cache").write_text("a file where the folder should be")
    bundle = build_bundle(checkpoint, tmp_path / "bundle", config=NULL, cache_dir=tmp_path / "cache")
    assert open_bundle(bundle.path).manifest == bundle.manifest
    assert len([note for note in bundle.notes if "cannot be written" in note]) == 1
    assert len([note for note in bundle.notes if "cannot be read" in note]) == 1


# ---- nothing is left behind


def test_existing_bundle_is_kept_unless_told(checkpoint: Path, tmp_path: Path) -> None:
    """Oracle: the old manifest, until --overwrite replaces it."""
    out = tmp_path / "bundle"
    old = build_bundle(checkpoint, out, config=NULL).manifest
    with pytest.raises(OutputError, match="--overwrite"):
        build_bundle(checkpoint, out, config=replace(NULL, max_batch=3))
    assert open_bundle(out).manifest == old
    build_bundle(checkpoint, out, config=replace(NULL, max_batch=3), overwrite=True)
    assert open_bundle(out).manifest.max_batch == 3
    assert names(tmp_path) == ["bundle", "tiny.safetensors"]


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (BuildConfig("onnxruntime", precision="int3"), "fp32"),
        (BuildConfig("nonesuch"), "onnxruntime"),
        (BuildConfig("null", max_batch=0), "--max-batch"),
        (BuildConfig("null", jobs=0), "--jobs"),
    ],
)
def test_wrong_settings(checkpoint: Path, tmp_path: Path, config: BuildConfig, said: str) -> None:
    """Oracle: refused before any work, with what would do."""
    with pytest.raises(UsageError, match=said):
        build_bundle(checkpoint, tmp_path / "bundle", config=config)
    assert names(tmp_path) == ["tiny.safetensors"]


def test_no_policy_no_bundle(tmp_path: Path) -> None:
    """Oracle: the remedy is named, and not even the parent folder is made."""
    found = tiny_checkpoint(tiny_model())
    state = {name: value for name, value in found.state.items() if name.startswith("network.")}
    save_checkpoint(tmp_path / "base.safetensors", replace(found, policy=None, state=state, training={}))
    with pytest.raises(CheckpointError, match="bdexport train"):
        build_bundle(tmp_path / "base.safetensors", tmp_path / "new" / "bundle", config=NULL)
    assert names(tmp_path) == ["base.safetensors"]


class FailingBackend(NullBackend):
    """Cannot build one part."""

    def build_part(
        self, part: str, graph: Path, engine: Path, options: BuildOptions, model: BlockDropNet | None = None
    ) -> None:
        if part == "block_01":
            raise BuildError(f"{part} [failing]: out of registers")
        super().build_part(part, graph, engine, options, model)


class ForgetfulBackend(NullBackend):
    """Leaves no file."""

    def build_part(
        self, part: str, graph: Path, engine: Path, options: BuildOptions, model: BlockDropNet | None = None
    ) -> None:
        pass


class ExchangingBackend(TorchBackend):
    """Builds the engines of another network of the same shape."""

    def build_part(
        self, part: str, graph: Path, engine: Path, options: BuildOptions, model: BlockDropNet | None = None
    ) -> None:
        super().build_part(part, graph, engine, options, tiny_model(seed=1))


@pytest.mark.parametrize("backend", [FailingBackend(), ForgetfulBackend()])
def test_a_part_that_fails_leaves_nothing(tmp_path: Path, backend: NullBackend) -> None:
    """Oracle: the folder, hidden files included; the error names part and backend."""
    model = tiny_model()
    with pytest.raises(BuildError, match=r"\[(failing|null)\]"):
        bundle_from_model(
            model, tiny_checkpoint(model), tmp_path / "bundle", backend, config=NULL, checkpoint_sha256="0" * 64
        )
    assert names(tmp_path) == []


def test_engines_that_compute_something_else_are_refused(tmp_path: Path) -> None:
    """Oracle: the engines are another network's, so that they cannot pass the verification."""
    model = tiny_model()
    with pytest.raises(VerificationError, match="differs from torch"):
        bundle_from_model(
            model,
            tiny_checkpoint(model),
            tmp_path / "bundle",
            ExchangingBackend(),
            config=BuildConfig("torch"),
            checkpoint_sha256="0" * 64,
        )
    assert names(tmp_path) == []


SCRIPT = """
import os, signal, sys
from pathlib import Path
from bdexport.build import build_bundle
from bdexport.config import BuildConfig
checkpoint, out, stage, number = sys.argv[1:]

def progress(what, done, total):
    if what == stage and (done or what == "load"):
        os.kill(os.getpid(), int(number))

build_bundle(checkpoint, out, config=BuildConfig("torch"), overwrite=True, progress=progress)
"""


def interrupted(checkpoint: Path, out: Path, stage: str, number: signal.Signals) -> int:
    line = [sys.executable, "-c", SCRIPT, str(checkpoint), str(out), stage, str(int(number))]
    return subprocess.run(line, capture_output=True, check=False, timeout=120).returncode


@pytest.mark.parametrize(("stage", "existing"), [("engines", False), ("paths", True)])
def test_kill_leaves_no_bundle(checkpoint: Path, tmp_path: Path, stage: str, existing: bool) -> None:
    """Oracle: after kill -9 the old bundle or none, nothing else that opens as one, and the next build works."""
    out = tmp_path / "bundle"
    old = build_bundle(checkpoint, out, config=NULL).manifest if existing else None
    assert interrupted(checkpoint, out, stage, signal.SIGKILL) == -signal.SIGKILL
    if existing:
        assert open_bundle(out).manifest == old
    else:
        assert not out.exists()
    for left in tmp_path.glob(".*"):
        with pytest.raises(BundleError):
            open_bundle(left)
    build_bundle(checkpoint, out, config=BuildConfig("torch"), overwrite=True)
    assert open_bundle(out).manifest.backend == "torch"


@pytest.mark.parametrize("stage", ["load", "engines"])
def test_ctrl_c_leaves_nothing(checkpoint: Path, tmp_path: Path, stage: str) -> None:
    """Oracle: SIGINT, as the terminal sends it: not even a hidden folder is left."""
    assert interrupted(checkpoint, tmp_path / "bundle", stage, signal.SIGINT) == -signal.SIGINT
    assert names(tmp_path) == ["tiny.safetensors"]
