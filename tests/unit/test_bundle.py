"""Bundles are written and read back as the same thing; broken ones are in tests/malformed."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from manifests import change_manifest
from tiny import tiny_checkpoint_file

from bdexport.build import build_bundle
from bdexport.bundle import (
    FORMAT_VERSION,
    RUN_CHECKPOINT,
    file_problems,
    manifest_from_json,
    open_bundle,
    read_manifest,
    write_manifest,
)
from bdexport.bundle_checks import document_sha256
from bdexport.checkpoint.reading import RUN_FILE
from bdexport.config import BuildConfig
from bdexport.errors import BundleError
from bdexport.files import sha256_file
from bdexport.parts import part_names


@pytest.fixture(scope="module")
def bundle_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle")
    checkpoint = tiny_checkpoint_file(folder / "tiny.safetensors")
    return build_bundle(checkpoint, folder / "bundle", config=BuildConfig("null"), cache_dir=folder / "cache").path


def test_round_trip(bundle_path: Path) -> None:
    """Oracle: equality after going through JSON text."""
    manifest = read_manifest(bundle_path)
    assert manifest_from_json(json.loads(json.dumps(manifest.to_json()))) == manifest
    assert manifest.format_version == FORMAT_VERSION


def test_manifest_describes_the_files(bundle_path: Path) -> None:
    """Oracle: sizes and hashes taken from the folder itself."""
    bundle = open_bundle(bundle_path)
    assert tuple(bundle.manifest.parts) == part_names(3, [1])
    on_disk = {file for file in bundle_path.rglob("*") if file.is_file()} - {bundle_path / "manifest.json"}
    assert {bundle_path / entry.path for entry in bundle.manifest.files()} == on_disk
    for part, entry in bundle.manifest.parts.items():
        assert entry.graph is not None
        assert sha256_file(bundle.graph(part)) == entry.graph.sha256
        assert bundle.engine(part).stat().st_size == (entry.engine.bytes if entry.engine else 0)


def test_every_damage_is_listed(bundle_path: Path, tmp_path: Path) -> None:
    """Oracle: three files damaged in three ways give three problems, each naming its file."""
    import shutil

    copy = Path(shutil.copytree(bundle_path, tmp_path / "copy"))
    (copy / "graphs/stem.onnx").unlink()
    (copy / "graphs/head.onnx").write_bytes(b"x")
    (copy / "extra").touch()
    problems = [str(problem) for problem in file_problems(copy, read_manifest(copy))]
    assert len(problems) == 3
    for name in ("graphs/stem.onnx", "graphs/head.onnx", "extra"):
        assert sum(str(copy / name) in problem for problem in problems) == 1


def test_a_link_to_the_bundle_is_fine(bundle_path: Path, tmp_path: Path) -> None:
    """Oracle: the written format: the folder itself may be reached through a link."""
    (tmp_path / "link").symlink_to(bundle_path, target_is_directory=True)
    assert open_bundle(tmp_path / "link").manifest == read_manifest(bundle_path)


def test_relative_path(bundle_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the same bundle by its absolute path, from inside and beside it."""
    monkeypatch.chdir(bundle_path)
    assert open_bundle(".").manifest == read_manifest(bundle_path)
    monkeypatch.chdir(bundle_path.parent)
    assert open_bundle(bundle_path.name).manifest == read_manifest(bundle_path)


def test_parts_without_files(bundle_path: Path) -> None:
    """Oracle: an absent engine, or part, is an error that names it."""
    bundle = open_bundle(bundle_path)
    stripped = replace(bundle.manifest.parts["stem"], engine=None)
    bundle = replace(bundle, manifest=replace(bundle.manifest, parts={**bundle.manifest.parts, "stem": stripped}))
    with pytest.raises(BundleError, match="stem has no engine"):
        bundle.engine("stem")
    with pytest.raises(BundleError, match="no part 'block_99'"):
        bundle.graph("block_99")


@pytest.mark.parametrize("training", [{"loss": float("nan")}, {"model": object()}])
def test_only_plain_json_is_written(bundle_path: Path, tmp_path: Path, training: dict[str, object]) -> None:
    """Oracle: JSON has neither NaN nor objects; nothing is written."""
    manifest = replace(read_manifest(bundle_path), training=training)
    with pytest.raises(BundleError, match="not plain JSON"):
        write_manifest(tmp_path, manifest)
    assert not list(tmp_path.iterdir())


def test_a_manifest_that_breaks_a_rule_is_not_written(bundle_path: Path, tmp_path: Path) -> None:
    """Oracle: the reader's own checks, applied by the writer."""
    manifest = replace(read_manifest(bundle_path), class_names=("only", "two"))
    with pytest.raises(BundleError, match=r"\[R11\]"):
        write_manifest(tmp_path, manifest)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["missing", "file"])
def test_no_bundle_there(tmp_path: Path, name: str) -> None:
    """Oracle: the path is named."""
    (tmp_path / "file").write_text("hello")
    with pytest.raises(BundleError, match=name):
        open_bundle(tmp_path / name)


def test_reading_needs_no_build_half(bundle_path: Path) -> None:
    """Oracle: the modules that a fresh interpreter has loaded after opening a bundle."""
    code = (
        "import sys; from bdexport.bundle import open_bundle; open_bundle(sys.argv[1]);"
        "print(sorted({'torch', 'onnx', 'onnxruntime'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, bundle_path], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("what", ["run", "run/model.safetensors", "resnet32.th", "zoo:resnet20-digits"])
def test_a_checkpoint_in_place_of_a_bundle_is_told_how_to_become_one(tmp_path: Path, what: str) -> None:
    """Oracle: the line that builds it stands in the error; and the run's file is called as training calls it."""
    assert RUN_CHECKPOINT == RUN_FILE
    (tmp_path / "run").mkdir()
    for name in ("run/model.safetensors", "resnet32.th"):
        (tmp_path / name).write_bytes(b"weights")
    path = what if what.startswith("zoo:") else tmp_path / what
    with pytest.raises(BundleError, match=re.escape(f"build it first: bdexport build {path}")):
        open_bundle(path)


def linked_as_a_download(bundle: Path, folder: Path) -> Path:
    """Every file a link to a blob that is named by its hash: a Hugging Face cache."""
    (folder / "blobs").mkdir(parents=True)
    for number, file in enumerate(sorted(path for path in bundle.rglob("*") if path.is_file())):
        blob, link = folder / "blobs" / f"{number:040x}", folder / "snapshots" / "abc" / file.relative_to(bundle)
        blob.write_bytes(file.read_bytes())
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return folder / "snapshots" / "abc"


def linked_as_a_volume(bundle: Path, folder: Path) -> Path:
    """The entries of the top folder are links through ``..data``: a Kubernetes ConfigMap."""
    shutil.copytree(bundle, folder / "..2026_11_30_10_00_00.1")
    (folder / "..data").symlink_to("..2026_11_30_10_00_00.1", target_is_directory=True)
    for path in bundle.iterdir():
        (folder / path.name).symlink_to(f"..data/{path.name}", target_is_directory=path.is_dir())
    return folder


@pytest.mark.parametrize("linked", [linked_as_a_download, linked_as_a_volume])
def test_a_bundle_of_links_is_one(bundle_path: Path, tmp_path: Path, linked: Callable[[Path, Path], Path]) -> None:
    """Oracle: the manifest and the bytes of the bundle that the links lead to."""
    opened = open_bundle(linked(bundle_path, tmp_path / "mounted"))
    assert opened.manifest == read_manifest(bundle_path)
    assert opened.graph("stem").read_bytes() == (bundle_path / "graphs/stem.onnx").read_bytes()


def test_droppings_are_named_with_the_line_that_removes_them(bundle_path: Path, tmp_path: Path) -> None:
    """Oracle: a shell that runs the line: the bundle opens then."""
    copy = shutil.copytree(bundle_path, tmp_path / "a copy")
    for name in (".DS_Store", "graphs/.DS_Store", "engines/._stem.json"):
        (copy / name).touch()
    (copy / ".cache/huggingface").mkdir(parents=True)
    with pytest.raises(BundleError, match=r"\.DS_Store.*\[R14\]; remove it: rm -r ") as caught:
        open_bundle(copy)
    subprocess.run(str(caught.value.remedy).partition(": ")[2], shell=True, check=True)
    open_bundle(copy)


# ---- the manifest's digest ---------------------------------------------------------------------------------------


def test_the_digest_is_that_of_the_written_form() -> None:
    """Oracle: the canonical form of docs/bundle-format.md, by hand: keys, numbers and characters as it says."""
    document = {"b": [1, 1.0, 0.1, 1e-05, 1e16, -0.0, True, None], "a": {'\u00e4\U0001f600"/\n\x7f': ""}}
    canonical = '{"a":{"\\u00e4\\ud83d\\ude00\\"/\\n\\u007f":""},"b":[1,1.0,0.1,1e-05,1e+16,-0.0,true,null]}'
    expected = hashlib.sha256(canonical.encode("ascii")).hexdigest()
    assert document_sha256(document) == expected
    assert document_sha256(document | {"manifest_sha256": "whatever"}) == expected


def test_a_bundle_without_a_digest_opens(bundle_path: Path, tmp_path: Path) -> None:
    """Oracle: the manifest: bundles of earlier builds are read as before, and it is known that nothing was checked."""
    copy = Path(shutil.copytree(bundle_path, tmp_path / "copy"))
    change_manifest(copy, lambda manifest: manifest.pop("manifest_sha256"))
    old, new = open_bundle(copy).manifest, open_bundle(bundle_path).manifest
    assert old == new
    assert (old.sealed, new.sealed) == (False, True)


def test_every_flipped_digit_of_the_manifest_is_noticed(bundle_path: Path, tmp_path: Path) -> None:
    """Property: whatever digit or letter becomes another, the bundle is refused: no number of it may change unseen."""
    copy = Path(shutil.copytree(bundle_path, tmp_path / "copy"))
    text = (copy / "manifest.json").read_bytes()
    generator = np.random.default_rng(0)
    places = [place for place, byte in enumerate(text) if chr(byte).isalnum()]
    for place in generator.choice(places, 100, replace=False):
        other = b"8" if text[place : place + 1] != b"8" else b"3"
        (copy / "manifest.json").write_bytes(text[:place] + other + text[place + 1 :])
        with pytest.raises(BundleError):
            read_manifest(copy)


def test_a_manifest_that_no_reader_would_take_is_not_written(bundle_path: Path, tmp_path: Path) -> None:
    """Oracle: the limit of R1, held by the writer as well."""
    manifest = replace(read_manifest(bundle_path), extra={"large": ["x" * 1000] * 5000})
    with pytest.raises(BundleError, match=r"manifest: got 5\d{6} bytes, expected at most 4194304"):
        write_manifest(tmp_path, manifest)
    assert list(tmp_path.iterdir()) == []
