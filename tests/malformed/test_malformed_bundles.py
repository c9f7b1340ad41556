"""One broken bundle at least for every rule of docs/bundle-format.md: each is refused, and the rule is named."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from manifests import change_manifest
from signing import new_keys
from tiny import tiny_checkpoint_file

from bdexport.build import build_bundle
from bdexport.bundle import open_bundle
from bdexport.config import BuildConfig
from bdexport.errors import BundleError
from bdexport.signature import SigningKey

Json = dict[str, Any]
BROKEN: list[tuple[str, str, Callable[[Path], object]]] = []  # rule, what is wrong, how to do it to a good bundle


def breaks(rule: str, what: str) -> Callable[[Callable[[Path], object]], Callable[[Path], object]]:
    def add(function: Callable[[Path], object]) -> Callable[[Path], object]:
        BROKEN.append((rule, what, function))
        return function

    return add


def breaks_manifest(rule: str, what: str, change: Callable[[Json], object]) -> None:
    """A bundle whose manifest is changed by ``change``, its digest with it, everything else as it was."""
    BROKEN.append((rule, what, lambda bundle: change_manifest(bundle, change)))


def put(**values: Any) -> Callable[[Json], object]:
    return lambda manifest: manifest.update(values)


def without(key: str) -> Callable[[Json], object]:
    return lambda manifest: manifest.pop(key)


def in_part(index: int, **values: Any) -> Callable[[Json], object]:
    return lambda manifest: manifest["parts"][index].update(values)


def in_file(index: int, kind: str, **values: Any) -> Callable[[Json], object]:
    return lambda manifest: manifest["parts"][index][kind].update(values)


def in_object(key: str, **values: Any) -> Callable[[Json], object]:
    return lambda manifest: manifest[key].update(values)


def shape(index: int, end: str, *sizes: Any) -> Callable[[Json], object]:
    return lambda manifest: manifest["parts"][index][end].update(shape=["N", *sizes])


def replace_text(old: str, new: str) -> Callable[[Path], object]:
    def apply(bundle: Path) -> None:
        text = (bundle / "manifest.json").read_text()
        assert old in text
        (bundle / "manifest.json").write_text(text.replace(old, new, 1))

    return apply


def change_text(bundle: Path, pattern: str, new: str) -> None:
    text, count = re.subn(pattern, new, (bundle / "manifest.json").read_text())
    assert count == 1
    (bundle / "manifest.json").write_text(text)


# The tiny network has blocks 0, 1 (a transition) and 2; its parts by index in the manifest:
POLICY, STEM, BLOCK_0, BLOCK_1, SHORTCUT_1, BLOCK_2, HEAD, FULL = range(8)

# ---- R1 document
breaks("R1", "no manifest")(lambda bundle: (bundle / "manifest.json").unlink())
breaks("R1", "empty manifest")(lambda bundle: (bundle / "manifest.json").write_bytes(b""))
breaks("R1", "cut off")(lambda bundle: os.truncate(bundle / "manifest.json", 700))
breaks("R1", "not UTF-8")(lambda bundle: (bundle / "manifest.json").write_bytes(b'{"schema": "\xff"}'))
breaks("R1", "NaN")(replace_text('"max_batch": null', '"max_batch": NaN'))
breaks("R1", "repeated key")(replace_text('"max_batch": null', '"max_batch": null, "max_batch": 4'))
breaks("R1", "half a surrogate pair")(replace_text('"max_batch": null', '"max_batch": "\\ud800"'))
breaks("R1", "nested without end")(lambda bundle: (bundle / "manifest.json").write_text("[" * 200_000))
breaks("R1", "nested 100 deep")(replace_text('"extra": {', '"extra": {"deep": ' + "[" * 100 + "]" * 100))
breaks("R1", "a number that becomes infinite")(replace_text('"extra": {', '"extra": {"large": 1e400'))
breaks("R1", "larger than 4 MiB")(lambda bundle: os.truncate(bundle / "manifest.json", (4 << 20) + 1))


@breaks("R1", "manifest is a link to nothing")
def _link_manifest(bundle: Path) -> None:
    (bundle / "manifest.json").unlink()
    (bundle / "manifest.json").symlink_to("other.json")


# ---- R2 version
breaks_manifest("R2", "newer in both", put(schema="bdexport-bundle/2", format_version=2))
breaks_manifest("R2", "newer number only", put(format_version=2))
breaks_manifest("R2", "newer schema only", put(schema="bdexport-bundle/7"))
breaks_manifest("R2", "newer, with keys of the future", put(format_version=3, schema="bdexport-bundle/3", parts=None))
breaks_manifest("R2", "another schema", put(schema="someone-else/1"))
breaks_manifest("R2", "no number", put(schema="bdexport-bundle/one"))
breaks_manifest("R2", "version zero", put(schema="bdexport-bundle/0", format_version=0))
breaks_manifest("R2", "version is true", put(format_version=True))

# ---- R3 keys
breaks("R3", "not an object")(lambda bundle: (bundle / "manifest.json").write_text("[]"))
for _key in ("schema", "name", "num_blocks", "preprocess", "parts", "class_names", "verification", "extra"):
    breaks_manifest("R3", f"no {_key}", without(_key))
breaks_manifest("R3", "unknown key", put(colour="red"))
breaks_manifest("R3", "unknown key in a part", in_part(STEM, colour="red"))
breaks_manifest("R3", "unknown key in a file", in_file(STEM, "graph", colour="red"))
breaks_manifest("R3", "part without flops", lambda manifest: manifest["parts"][STEM].pop("flops"))
breaks_manifest("R3", "a part that is no object", lambda manifest: manifest["parts"].append("stem"))

# ---- R4 values
breaks_manifest("R4", "name is a number", put(name=3))
breaks_manifest("R4", "name is empty", put(name=" "))
breaks_manifest("R4", "created is no time", put(created="yesterday"))
breaks_manifest("R4", "created has no offset", put(created="2026-01-01T00:00:00"))
breaks_manifest("R4", "unknown rule", put(dropped_transition="tanh"))
breaks_manifest("R4", "another layout", put(layout="NHWC"))
breaks_manifest("R4", "one class", put(class_names=["cat"]))
breaks_manifest("R4", "class names are numbers", put(class_names=[0, 1, 2]))
breaks_manifest("R4", "batch of zero", put(max_batch=0))
breaks_manifest("R4", "batch is true", put(max_batch=True))
breaks_manifest("R4", "a version is a number", in_object("versions", bdexport=1))
breaks_manifest("R4", "training is a list", put(training=[]))
breaks_manifest("R4", "executor is a string", put(executor="chain"))
breaks_manifest("R4", "negative FLOPs", in_part(STEM, flops=-1))
breaks_manifest("R4", "FLOPs are a fraction", in_part(STEM, flops=1.5))
breaks_manifest("R4", "FLOPs beyond 2^53", in_part(STEM, flops=10**400))
breaks_manifest("R4", "a class is called with an escape sequence", put(class_names=["a", "\x1b[31mb", "c"]))
breaks_manifest("R4", "a class name of two lines", put(class_names=["a", "b\nb", "c"]))
breaks_manifest("R4", "a name that is turned round", put(name="bundle\u202egpj"))
breaks_manifest("R4", "a name of two lines", put(name="bundle\nbdexport: all is well"))
breaks_manifest("R4", "a control character in a key of the training record", in_object("training", **{"a\x9bb": 1}))
breaks_manifest("R4", "checkpoint without form", lambda manifest: manifest["checkpoint"].pop("form"))

# ---- R5 blocks
breaks_manifest("R5", "no block", put(num_blocks=0, transitions=[]))
breaks_manifest("R5", "too many blocks to be true", put(num_blocks=10**12))
breaks_manifest("R5", "transition beyond the last block", put(transitions=[3]))
breaks_manifest("R5", "negative transition", put(transitions=[-1]))
breaks_manifest("R5", "transition twice", put(transitions=[1, 1]))
breaks_manifest("R5", "transition is true", put(transitions=[True]))

# ---- R6 preprocessing
breaks_manifest("R6", "no size", lambda manifest: manifest["preprocess"].pop("size"))
breaks_manifest("R6", "size of zero", in_object("preprocess", size=[0, 32]))
breaks_manifest("R6", "one size", in_object("preprocess", size=[32]))
breaks_manifest("R6", "size is a fraction", in_object("preprocess", size=[24.5, 32]))
breaks_manifest("R6", "size is a fraction's form", in_object("preprocess", size=[24.0, 32]))
breaks_manifest("R6", "a mean is true", in_object("preprocess", mean=[True, 0.5, 0.5]))
breaks_manifest("R6", "a mean beyond a double", in_object("preprocess", mean=[10**400, 0.5, 0.5]))
breaks_manifest("R6", "std of zero", in_object("preprocess", std=[1, 0, 1]))
breaks_manifest("R6", "std is text", in_object("preprocess", std=["1", "1", "1"]))
breaks_manifest("R6", "unknown resampling", in_object("preprocess", resampling="magic"))
breaks_manifest("R6", "unknown key", in_object("preprocess", colour="BGR"))
breaks_manifest("R6", "negative short side", in_object("preprocess", resize_short=-1))
breaks_manifest("R6", "short side is true", in_object("preprocess", resize_short=True))
breaks_manifest("R6", "short side too large", in_object("preprocess", resize_short=10**400))

# ---- R7 parts
breaks_manifest("R7", "a part is missing", lambda manifest: manifest["parts"].pop(BLOCK_2))
breaks_manifest("R7", "a part twice", lambda manifest: manifest["parts"].append(manifest["parts"][FULL]))
breaks_manifest("R7", "parts in another order", lambda manifest: manifest["parts"].reverse())
breaks_manifest("R7", "unknown part", in_part(BLOCK_2, name="block_99"))
breaks_manifest("R7", "a shortcut without a transition", put(transitions=[]))
breaks_manifest("R7", "more blocks than parts", put(num_blocks=4))
breaks_manifest("R7", "parts by name", lambda manifest: manifest.update(parts={"stem": {}}))

# ---- R8 paths
for _path in (
    "/etc/passwd",
    "../graphs/stem.onnx",
    "graphs/../../secret",
    "graphs/../graphs/stem.onnx",
    "./graphs/stem.onnx",
    "graphs//stem.onnx",
    "graphs/",
    "..",
    ".",
    "graphs\\stem.onnx",
    "C:/stem.onnx",
    "graphs/stem\u0000.onnx",
    "",
):
    breaks_manifest("R8", f"path {_path!r}", in_file(STEM, "graph", path=_path))

# ---- R9 one file, one use
breaks_manifest("R9", "two parts share a file", in_file(STEM, "graph", path="graphs/head.onnx"))
breaks_manifest("R9", "graph and engine share a file", in_file(STEM, "graph", path="engines/stem.json"))
breaks_manifest("R9", "equal but for case", in_file(STEM, "graph", path="graphs/HEAD.onnx"))
breaks_manifest("R9", "the manifest itself", in_file(STEM, "graph", path="manifest.json"))
breaks_manifest("R9", "its signature", in_file(STEM, "graph", path="manifest.json.minisig"))

# ---- R10 digests
breaks_manifest("R10", "short digest", in_file(STEM, "engine", sha256="abc"))
breaks_manifest("R10", "upper case", in_file(STEM, "engine", sha256="A" * 64))
breaks_manifest("R10", "newline at the end", in_file(STEM, "engine", sha256="a" * 64 + "\n"))
breaks_manifest("R10", "negative size", in_file(STEM, "engine", bytes=-1))
breaks_manifest("R10", "size is text", in_file(STEM, "engine", bytes="12"))
breaks_manifest("R10", "checkpoint's digest", in_object("checkpoint", sha256="unknown"))

# ---- R11 tensors
breaks_manifest("R11", "another input name", lambda manifest: manifest["parts"][STEM]["input"].update(name="input"))
breaks_manifest("R11", "float16", lambda manifest: manifest["parts"][STEM]["input"].update(dtype="float16"))
breaks_manifest("R11", "unknown dtype", lambda manifest: manifest["parts"][STEM]["input"].update(dtype="float33"))
breaks_manifest("R11", "batch is fixed", lambda manifest: manifest["parts"][STEM]["input"].update(shape=[1, 3, 24, 32]))
breaks_manifest("R11", "a size of zero", shape(STEM, "output", 4, 0, 32))
breaks_manifest("R11", "a size is text", shape(STEM, "output", "C", 24, 32))
breaks_manifest("R11", "policy gives too few", shape(POLICY, "output", 2))
breaks_manifest("R11", "stem takes another size", shape(STEM, "input", 3, 32, 24))
breaks_manifest("R11", "block does not take what stem gives", shape(BLOCK_0, "input", 5, 24, 32))
breaks_manifest("R11", "block changes shape, no transition", shape(BLOCK_2, "output", 8, 6, 8))
breaks_manifest("R11", "shortcut and block differ", shape(SHORTCUT_1, "output", 8, 6, 8))
breaks_manifest("R11", "head gives too few logits", shape(HEAD, "output", 2))
breaks_manifest("R11", "more classes than logits", put(class_names=["cat", "dog", "newt", "owl"]))
breaks_manifest("R11", "another image size", in_object("preprocess", size=[32, 32]))

# ---- R12 files
breaks("R12", "a graph is missing")(lambda bundle: (bundle / "graphs/stem.onnx").unlink())
breaks("R12", "an engine is missing")(lambda bundle: (bundle / "engines/stem.json").unlink())
breaks_manifest("R12", "a name that no file can have", in_file(STEM, "graph", path="a" * 5000))
breaks("R12", "all graphs are missing")(lambda bundle: shutil.rmtree(bundle / "graphs"))


@breaks("R12", "a folder in a file's place")
def _folder(bundle: Path) -> None:
    (bundle / "graphs/stem.onnx").unlink()
    (bundle / "graphs/stem.onnx").mkdir()


@breaks("R12", "a link to nothing")
def _link_file(bundle: Path) -> None:
    (bundle / "graphs/stem.onnx").unlink()
    (bundle / "graphs/stem.onnx").symlink_to("../blobs/gone")


@breaks("R12", "a link in a circle")
def _link_circle(bundle: Path) -> None:
    (bundle / "graphs/stem.onnx").unlink()
    (bundle / "graphs/stem.onnx").symlink_to("stem.onnx")


@breaks("R14", "a file more in a folder that is a link")
def _link_folder(bundle: Path) -> None:
    outside = bundle.parent / "outside"
    (bundle / "graphs").rename(outside)
    (bundle / "graphs").symlink_to(outside, target_is_directory=True)
    (outside / "more.onnx").touch()


@breaks("R13", "a link to other bytes of that length")
def _link_other(bundle: Path) -> None:
    path = bundle / "graphs/stem.onnx"
    (bundle.parent / "other").write_bytes(bytes(path.stat().st_size))
    path.unlink()
    path.symlink_to(bundle.parent / "other")


@breaks("R12", "a pipe in a file's place")
def _pipe(bundle: Path) -> None:
    (bundle / "graphs/stem.onnx").unlink()
    os.mkfifo(bundle / "graphs/stem.onnx")


# ---- R13 contents
breaks("R13", "cut off")(lambda bundle: os.truncate(bundle / "graphs/stem.onnx", 100))


@breaks("R13", "one byte is changed, size kept")
def _flip(bundle: Path) -> None:
    path = bundle / "graphs/full.onnx"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@breaks("R13", "engines of two parts exchanged")
def _exchange(bundle: Path) -> None:
    first, second = bundle / "graphs/block_00.onnx", bundle / "graphs/block_02.onnx"
    data = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(data)


breaks_manifest("R13", "another digest in the manifest", in_file(STEM, "graph", sha256=hashlib.sha256(b"").hexdigest()))

# ---- R14 nothing else
breaks("R14", "an extra file")(lambda bundle: (bundle / "notes.txt").write_text("hello"))
breaks("R14", "an extra graph")(lambda bundle: (bundle / "graphs/block_99.onnx").write_bytes(b""))
breaks("R14", "a hidden file")(lambda bundle: (bundle / "graphs/.DS_Store").write_bytes(b""))
breaks("R14", "an empty folder")(lambda bundle: (bundle / "logs").mkdir())
breaks("R14", "a name that is no UTF-8")(
    lambda bundle: Path(os.fsdecode(os.fsencode(bundle) + b"/\xff")).write_bytes(b"")
)
breaks_manifest("R14", "a graph that is not listed any more", in_part(STEM, graph=None))
breaks_manifest(
    "R12",
    "a source that is missing",
    in_part(STEM, source={"path": "sources/stem.onnx", "sha256": "0" * 64, "bytes": 1}),
)
breaks_manifest("R4", "a source that is null", in_part(STEM, source=None))

# ---- R15 policy statistics
breaks_manifest("R15", "no number of images", lambda manifest: manifest["policy_statistics"].update(images=None))
breaks_manifest(
    "R15", "masks of another K", lambda manifest: manifest["policy_statistics"]["masks"][0].update(mask="11")
)
breaks_manifest(
    "R15", "masks of other characters", lambda manifest: manifest["policy_statistics"]["masks"][0].update(mask="1x1")
)
breaks_manifest("R15", "more counted than seen", in_object("policy_statistics", images=10))
breaks_manifest("R15", "share above one", lambda manifest: manifest["policy_statistics"]["masks"][0].update(share=1.5))
breaks_manifest("R15", "count of zero", lambda manifest: manifest["policy_statistics"]["masks"][0].update(count=0))

# ---- R16 fused paths
FUSED: Json = {
    "split": "validation",
    "images": 100,
    "coverage": 0.9,
    "stored": "linked",
    "paths": [{"mask": "000", "share": 0.3}],
}
breaks_manifest("R16", "fused paths as null", put(fused=None))
breaks_manifest("R16", "coverage above one", put(fused=FUSED | {"coverage": 1.5}))
breaks_manifest("R16", "an unknown way of storing", put(fused=FUSED | {"stored": "by hand"}))
breaks_manifest("R16", "a path of another K", put(fused=FUSED | {"paths": [{"mask": "00", "share": 0.3}]}))
breaks_manifest("R16", "a path twice", put(fused=FUSED | {"paths": FUSED["paths"] * 2}))
breaks_manifest("R16", "the full network as a path", put(fused=FUSED | {"paths": [{"mask": "111", "share": 0.3}]}))
breaks_manifest(
    "R3", "a path with a key too many", put(fused=FUSED | {"paths": [{"mask": "000", "share": 0.3, "a": 1}]})
)

# ---- R17 mask mapping
MAPPING: Json = {"rule": "budget", "targets": ["000", "111"], "seen": {"010": "000"}, "facts": {}}
breaks_manifest("R17", "an unknown rule", put(mask_mapping=MAPPING | {"rule": "nearest"}))
breaks_manifest("R17", "no targets", put(mask_mapping=MAPPING | {"targets": []}))
breaks_manifest("R17", "the full network not last", put(mask_mapping=MAPPING | {"targets": ["111", "000"]}))
breaks_manifest("R17", "a target twice", put(mask_mapping=MAPPING | {"targets": ["000", "000", "111"]}))
breaks_manifest("R17", "a target of another K", put(mask_mapping=MAPPING | {"targets": ["00", "111"]}))
breaks_manifest("R17", "a seen mask of another K", put(mask_mapping=MAPPING | {"seen": {"0101": "000"}}))
breaks_manifest("R17", "a seen mask's target that is none", put(mask_mapping=MAPPING | {"seen": {"010": "011"}}))

# ---- R18 the manifest's digest
breaks("R18", "a digit of a mean")(replace_text("0.225", "0.235"))
breaks("R18", "the digest of another document")(
    lambda bundle: change_text(bundle, r'"manifest_sha256": "[0-9a-f]{64}"', f'"manifest_sha256": "{"0" * 64}"')
)
breaks("R18", "a digest that is none")(
    lambda bundle: change_text(bundle, r'"manifest_sha256": "[0-9a-f]{64}"', '"manifest_sha256": "unknown"')
)
breaks("R18", "a digest that is null")(
    lambda bundle: change_text(bundle, r'"manifest_sha256": "[0-9a-f]{64}"', '"manifest_sha256": null')
)

# ---- R19 the signature, which is asked for by a key
breaks("R19", "not signed")(lambda bundle: (bundle / "manifest.json.minisig").unlink())


@breaks("R19", "a folder in its place")
def _folder_for_signature(bundle: Path) -> None:
    (bundle / "manifest.json.minisig").unlink()
    (bundle / "manifest.json.minisig").mkdir()


breaks("R19", "an empty signature")(lambda bundle: (bundle / "manifest.json.minisig").write_bytes(b""))
breaks("R19", "a signature cut off")(lambda bundle: os.truncate(bundle / "manifest.json.minisig", 150))
breaks("R19", "a signature that is too large")(lambda bundle: os.truncate(bundle / "manifest.json.minisig", 1 << 20))
breaks("R19", "a manifest with one blank more")(
    lambda bundle: (bundle / "manifest.json").write_text((bundle / "manifest.json").read_text() + " ")
)
breaks("R19", "a manifest that is no JSON, which is not looked at")(
    lambda bundle: (bundle / "manifest.json").write_text("[" * 100)
)
breaks("R19", "another key's signature")(lambda bundle: sign(bundle, Path(bundle.parent / "other.key")))


@pytest.fixture(scope="module")
def good_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    checkpoint = tiny_checkpoint_file(folder / "tiny.safetensors")
    return build_bundle(checkpoint, folder / "bundle", config=BuildConfig("null"), cache_dir=folder / "cache").path


@pytest.fixture
def bundle(good_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good_bundle, tmp_path / "bundle"))


def sign(bundle: Path, key: Path) -> None:
    """Sign the manifest as ``minisign -Sm manifest.json`` does, with a new key at ``key`` and ``key``.pub."""
    new_keys(key)
    SigningKey(key).sign(bundle / "manifest.json.minisig", (bundle / "manifest.json").read_bytes())


def test_the_untouched_copy_is_accepted(bundle: Path) -> None:
    """Oracle: the writer; otherwise the refusals below would prove nothing."""
    assert open_bundle(bundle).manifest.num_blocks == 3


@pytest.mark.parametrize(("rule", "what", "damage"), BROKEN, ids=[f"{rule} {what}" for rule, what, _ in BROKEN])
def test_refused_with_its_rule(bundle: Path, rule: str, what: str, damage: Callable[[Path], object]) -> None:
    """Oracle: the written rule, named in one printable line together with the bundle."""
    key = bundle.parent / "own.key"
    if rule == "R19":
        sign(bundle, key)
        assert open_bundle(bundle, key.with_suffix(".pub")).manifest.num_blocks == 3
    damage(bundle)
    with pytest.raises(BundleError) as caught:
        open_bundle(bundle, key.with_suffix(".pub") if rule == "R19" else None)
    text = str(caught.value)
    assert f"[{rule}]" in text, text
    assert str(bundle) in text
    assert "\n" not in text
    text.encode("utf-8")


def test_newer_version_names_both_and_the_remedy(bundle: Path) -> None:
    """Oracle: the sentence that a user needs, even where the newer format has other keys."""
    replace_text('"format_version": 1', '"format_version": 4, "invented": 1')(bundle)
    with pytest.raises(BundleError, match=r"got version 4, expected at most 1; upgrade bdexport"):
        open_bundle(bundle)


def test_every_rule_has_an_example(repository: Path) -> None:
    """Oracle: the rule ids of the written format."""
    text = (repository / "docs" / "bundle-format.md").read_text()
    written = set(re.findall(r"^\*\*(R\d+) ", text, flags=re.MULTILINE))
    assert written == {rule for rule, _, _ in BROKEN}


def test_every_key_is_written_down(repository: Path, good_bundle: Path) -> None:
    """Oracle: the manifest that the build writes."""
    text = (repository / "docs" / "bundle-format.md").read_text()
    manifest = json.loads((good_bundle / "manifest.json").read_text())
    assert "manifest_sha256" in manifest
    described = set(re.findall(r"`([a-z_0-9]+)`", text[text.index("## Keys") :]))
    part = manifest["parts"][0]
    assert set(manifest) | set(part) | set(part["graph"]) | set(part["input"]) <= described


# ---- what reading one may cost -----------------------------------------------------------------------------------

COSTS = """
import resource, sys, time
from pathlib import Path
from bdexport.bundle import open_bundle
from bdexport.errors import BundleError

now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + (200 << 20),) * 2)
for bundle in sys.argv[1:]:
    try:
        open_bundle(bundle)
    except BundleError as error:
        print("[R1]" in str(error) or "[R3]" in str(error))
"""
LARGEST = 4 << 20
HOSTILE = {
    "far too large": b"[" + b"{}," * (20 << 20) + b"1]",
    "small objects": b"[" + b"{}," * (LARGEST // 3 - 1) + b"1]",
    "many keys": b"{" + b",".join(b'"%x":1' % number for number in range(LARGEST // 10)) + b"}",
    "deep": b"[" * LARGEST,
}


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc here")
def test_the_memory_that_a_manifest_may_take(tmp_path: Path) -> None:
    """Oracle: the kernel: a process that may take 200 MiB more than it has refuses each of them as it should."""
    for name, data in HOSTILE.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_bytes(data)
    words = [sys.executable, "-c", COSTS, *(str(tmp_path / name) for name in HOSTILE)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)
    assert (done.stdout.split(), done.stderr) == (["True"] * len(HOSTILE), "")
