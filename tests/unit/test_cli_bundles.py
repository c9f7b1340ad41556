"""The commands export, build and inspect, as they are typed."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import onnx
import pytest
from manifests import change_manifest
from tiny import SIZE, tiny_checkpoint_file, tiny_model

import bdexport
from bdexport.cli.main import main
from bdexport.errors import BdexportError, OutputError
from bdexport.models.flops import count_flops
from bdexport.partition import model_parts

PARTS = model_parts(tiny_model())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint_file(tmp_path_factory.mktemp("checkpoint") / "tiny.safetensors")


@pytest.fixture(scope="module")
def good_bundle(checkpoint: Path) -> Path:
    out = checkpoint.parent / "bundle"
    assert main(["build", str(checkpoint), "--out", str(out)]) == 0
    return out


@pytest.fixture
def bundle(good_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good_bundle, tmp_path / "bundle"))


def test_export_writes_the_parts(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: the model's parts, the graphs themselves, and the FLOP counter."""
    out, result = tmp_path / "graphs", tmp_path / "export.json"
    assert main(["export", str(checkpoint), "--out", str(out), "--json", str(result)]) == 0
    assert {path.name for path in out.iterdir()} == {f"{part}.onnx" for part in PARTS}
    rows = json.loads(result.read_text())["parts"]
    flops = count_flops(tiny_model(), SIZE).parts()
    table = capsys.readouterr().out
    for row, part in zip(rows, PARTS, strict=True):
        path = out / row["file"]
        nodes = len(onnx.load(path).graph.node)
        assert row == {
            "part": part,
            "file": path.name,
            "bytes": path.stat().st_size,
            "nodes": nodes,
            "flops": flops[part],
        }
        assert part in table


def test_export_chosen_parts_and_refusals(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: exit codes 0, 2 and 1; the folder holds what it held before a refusal."""
    out = tmp_path / "graphs"
    line = ["export", str(checkpoint), "--out", str(out), "--parts"]
    assert main([*line, "head, stem"]) == 0
    assert main([*line, "nose", "--overwrite"]) == 2
    assert "nose" in capsys.readouterr().err
    assert main([*line, "head"]) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert {path.name for path in tmp_path.rglob("*")} == {"graphs", "head.onnx", "stem.onnx"}


def test_build_result(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: the bundle that it left, and the cache: the second build reuses every engine."""
    out = tmp_path / "bundle"
    line = ["build", str(checkpoint), "--out", str(out), "--backend", "onnxruntime", "--precision", "fp32"]
    assert main([*line, "--max-batch", "4", "--jobs", "2"]) == 0
    assert f"{len(PARTS)} built" in capsys.readouterr().out
    assert main([*line, "--max-batch", "4", "--overwrite", "--json", "-"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["engines"] == {"built": 0, "reused": len(PARTS), "rebuilt": 0}
    assert (result["backend"], result["precision"], result["max_batch"]) == ("onnxruntime", "fp32", 4)
    assert result["bytes"] == sum(
        path.stat().st_size for folder in ("graphs", "engines") for path in (out / folder).iterdir()
    )
    assert result["verification"]["ok"] is True


def test_build_refusals(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: one line that says what is wrong, exit code 2 for the request and 1 for the job, nothing left."""
    bad = tmp_path / "bad.pth"
    bad.write_text("no checkpoint")
    cases = [
        (2, [str(checkpoint), "--backend", "abacus"], "abacus"),
        (2, [str(checkpoint), "--precision", "int1"], "int1"),
        (2, [str(checkpoint), "--jobs", "0"], "--jobs"),
        (1, [str(tmp_path / "none.pth")], "no such file"),
        (1, [str(bad)], "not a checkpoint"),
        (1, [str(checkpoint), "--arch", "resnet110"], "resnet110"),
    ]
    for code, words, said in cases:
        assert main(["build", *words, "--out", str(tmp_path / "bundle")]) == code
        assert said in capsys.readouterr().err.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["bad.pth"]


def test_inspect_prints_the_manifest(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: the manifest file; the engines load here, where they were built."""
    assert main(["inspect", str(bundle), "--json", str(tmp_path / "inspect.json")]) == 0
    text = capsys.readouterr().out
    for said in (*PARTS, "cat, dog, newt", "Nx3x24x32", "111", "60.0 %", "onnxruntime", "hashes hold", "here: runs"):
        assert said in text
    assert "manifest: its digest holds" in text
    result = json.loads((tmp_path / "inspect.json").read_text())
    assert result["integrity"] == {
        "ok": True,
        "problems": [],
        "manifest_digest_checked": True,
        "signed": False,
        "signature_checked": False,
    }
    assert result["here"]["ok"] is True
    written = json.loads((bundle / "manifest.json").read_text())
    assert result["manifest"] == {key: value for key, value in written.items() if key != "manifest_sha256"}


def test_inspect_damaged(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: every damaged file is named, in the table and in the JSON; exit code 1."""
    (bundle / "graphs/stem.onnx").write_bytes(b"x")
    (bundle / "engines/head.onnx").unlink()
    assert main(["inspect", str(bundle), "--json", str(tmp_path / "inspect.json")]) == 1
    out, err = capsys.readouterr()
    assert len(err.splitlines()) == 1
    assert out.count("damaged: ") == 2
    assert "does not run" in out
    problems = json.loads((tmp_path / "inspect.json").read_text())["integrity"]["problems"]
    assert ["stem" in problems[0], "head" in problems[1], len(problems)] == [True, True, 2]


def test_inspect_elsewhere(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: a bundle built on another machine is whole, but the backend's refusal is shown with both sides."""
    change_manifest(bundle, lambda manifest: manifest.update(fingerprint="sparc nchwc4"))
    assert main(["inspect", str(bundle)]) == 0
    text = capsys.readouterr().out
    assert "hashes hold" in text
    assert "does not run" in text
    assert "sparc" in text


def test_inspect_without_its_backend(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: an unknown backend is said, not a crash."""
    change_manifest(bundle, lambda manifest: manifest.update(backend="abacus"))
    assert main(["inspect", str(bundle)]) == 0
    assert "abacus" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("executor", "keep_fused", "said"),
    [
        ({"choice": "fused", "reason": "faster"}, False, ("no fused paths", "pass --executor chain")),
        ({"choice": "graph", "reason": "faster"}, True, ("executor 'graph'", "pass --executor chain")),
        ({"choice": "magic", "reason": "faster"}, True, ('"magic"', "pass --executor chain")),
        ({"choice": None}, True, ("got null", "pass --executor chain")),
        ({"choice": "fused", "reason": "faster"}, True, None),
        (None, False, None),
    ],
)
def test_inspect_says_whether_the_recorded_executor_runs(
    executor: dict[str, Any] | None,
    keep_fused: bool,
    said: tuple[str, ...] | None,
    bundle: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Oracle: ``bdexport.load``, which is what ``run`` does; the refusal comes with what to do."""
    change_manifest(bundle, lambda manifest: manifest.update(executor=executor))
    if not keep_fused:
        change_manifest(bundle, lambda manifest: manifest.pop("fused"))
    assert main(["inspect", str(bundle), "--json", "-"]) == 0
    out, err = capsys.readouterr()
    here = json.loads(out)["here"]
    if said is None:
        with bdexport.load(bundle) as loaded:
            assert (here["ok"], here["executor"]) == (True, loaded.executor)
        return
    with pytest.raises(BdexportError) as caught:
        bdexport.load(bundle)
    assert here == {"ok": False, "reason": str(caught.value), "executor": None}
    assert "here: does not run" in err
    assert all(part in here["reason"] for part in said)


def test_inspect_what_is_no_bundle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: exit code 1 and one line that names the path."""
    assert main(["inspect", str(tmp_path)]) == 1
    assert str(tmp_path) in capsys.readouterr().err


@pytest.mark.parametrize("backend", ["onnxruntime", "torch"])
def test_names_that_are_no_utf8(
    checkpoint: Path, backend: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: checkpoint and bundle in folders whose names hold the byte FF work as any; their JSON is UTF-8."""
    strange = tmp_path / os.fsdecode(b"r\xff")
    strange.mkdir()
    shutil.copy(checkpoint, strange / checkpoint.name)
    out, result = strange / os.fsdecode(b"b\xff"), strange / "result.json"
    line = ["build", str(strange / checkpoint.name), "--out", str(out), "--backend", backend, "--json", str(result)]
    assert main(line) == 0
    assert json.loads(result.read_text())["bundle"].endswith("r\\udcff/b\\udcff")
    assert main(["inspect", str(out)]) == 0
    assert "here: runs" in capsys.readouterr().out


def test_build_without_a_home_folder(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the bundle is there, nothing came from a cache, and a note says why, in the JSON too."""

    def homeless() -> Path:
        raise OutputError("no folder for a cache", remedy="set one")

    monkeypatch.delenv("BDEXPORT_CACHE")
    monkeypatch.setattr("bdexport.files.default_cache_folder", homeless)
    assert main(["build", str(checkpoint), "--out", str(tmp_path / "b"), "--json", str(tmp_path / "r.json")]) == 0
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["engines"]["reused"] == 0
    note = "engine cache: no folder for a cache; set one; engines are not kept for a later build"
    assert note in result["notes"]
    assert note in " ".join(capsys.readouterr().err.split())
