"""Files that are no checkpoint, or a damaged or dangerous one: each has its own one-line error, and none runs code."""

from __future__ import annotations

import io
import os
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from foreign_networks import PublicResNet
from torch import nn

from bdexport.checkpoint import load_checkpoint
from bdexport.errors import CheckpointError


@pytest.fixture(scope="module")
def state() -> dict[str, Any]:
    return dict(PublicResNet((1, 1), (4, 8), 3).state_dict())


def refused(path: Path) -> str:
    """The message of the error, which is one line and names the file."""
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(path)
    text = str(error.value)
    assert str(path) in text
    assert "\n" not in text
    assert "\x1b" not in text
    assert error.value.exit_code == 1
    return text


def torch_bytes(content: object, old: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=not old)
    return buffer.getvalue()


# ---- code ----------------------------------------------------------------------------------------------------------


class Shell:
    """Pickles as a call of ``os.system``."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (self.command,)


@pytest.mark.parametrize("old", [False, True], ids=["zip", "before-1.6"])
@pytest.mark.parametrize("where", ["whole", "entry", "key"])
def test_code_is_not_run(tmp_path: Path, state: dict[str, Any], old: bool, where: str) -> None:
    """Oracle: the marker file, which exists once the same pickle is loaded without protection, is not made by us."""
    marker = tmp_path / "marker"
    shell: Any = Shell(f"touch {marker}")
    content = {"whole": shell, "entry": {"state_dict": state, "extra": shell}, "key": {**state, shell: 1}}[where]
    path = tmp_path / "model.th"
    path.write_bytes(torch_bytes(content, old))
    text = refused(path)
    assert not marker.exists()
    assert "would run code" in text
    assert "asks for posix.system" in text
    assert "torch.save(model.state_dict(), FILE)" in text
    torch.load(path, weights_only=False)
    assert marker.exists()


@pytest.mark.parametrize(("protocol", "reason"), [(2, "asks for posix.system"), (4, "not plain weights")])
def test_plain_pickle_is_not_run(tmp_path: Path, protocol: int, reason: str) -> None:
    """Oracle: as above, for a pickle that torch did not write; a harmless one is refused for what it is."""
    marker = tmp_path / "marker"
    (tmp_path / "evil.pt").write_bytes(pickle.dumps(Shell(f"touch {marker}"), protocol))
    assert reason in refused(tmp_path / "evil.pt")
    assert not marker.exists()
    (tmp_path / "plain.pt").write_bytes(pickle.dumps({"a": 1}, protocol=2))
    assert "not one written by torch.save" in refused(tmp_path / "plain.pt")


@pytest.mark.parametrize("old", [False, True], ids=["zip", "before-1.6"])
def test_whole_module_is_refused_with_its_class(tmp_path: Path, old: bool) -> None:
    """Oracle: the class that the file asks for stands in the message, and what to save instead."""
    (tmp_path / "model.pt").write_bytes(torch_bytes(nn.Linear(2, 2), old))
    text = refused(tmp_path / "model.pt")
    assert "asks for torch.nn.modules.linear.Linear" in text
    assert "torch.save(model.state_dict(), FILE)" in text


def test_torchscript_is_refused(tmp_path: Path, state: dict[str, Any]) -> None:
    """Oracle: an archive with a program's entries is called a program."""
    path = tmp_path / "model.pt"
    path.write_bytes(torch_bytes(state, old=False))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/constants.pkl", b"")
    assert "TorchScript program" in refused(path)


# ---- damage --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("old", [False, True], ids=["zip", "before-1.6"])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.5, 0.9, 0.999])
def test_truncated_torch_file(tmp_path: Path, state: dict[str, Any], old: bool, share: float) -> None:
    """Oracle: cut anywhere, the file is called damaged, and what to do about it."""
    whole = torch_bytes({"state_dict": state}, old)
    (tmp_path / "model.th").write_bytes(whole[: int(len(whole) * share)])
    text = refused(tmp_path / "model.th")
    assert "truncated or damaged torch file" in text
    assert "download it again" in text


@pytest.mark.parametrize("keep", [4, 8, 9, 60, -1])
def test_truncated_safetensors(tmp_path: Path, state: dict[str, Any], keep: int) -> None:
    """Oracle: cut in the length, the header or the data, the file is called damaged."""
    whole = safetensors.torch.save(state)
    (tmp_path / "model.safetensors").write_bytes(whole[:keep])
    assert "damaged safetensors file" in refused(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    "content",
    [
        struct.pack("<Q", 2**40) + b"{}",
        struct.pack("<Q", 8) + b"{broken}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 61) + b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,999999999]}}'[:61],
    ],
    ids=["length", "json", "list", "offsets"],
)
def test_damaged_safetensors_header(tmp_path: Path, content: bytes) -> None:
    """Oracle: the reason that the reader gives, in one line."""
    (tmp_path / "model.safetensors").write_bytes(content)
    assert "damaged safetensors file" in refused(tmp_path / "model.safetensors")


def test_a_flipped_bit_in_the_weights_is_seen(tmp_path: Path, state: dict[str, Any]) -> None:
    """Oracle: the zip archive's own checksums, which torch.load does not compare: it would load other weights."""
    path = tmp_path / "flipped.pt"
    torch.save(state, path)
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
    content[largest.header_offset + largest.file_size // 2] ^= 1
    path.write_bytes(content)
    assert "damaged" in refused(path)
    assert "checksum" in refused(path)


@pytest.mark.parametrize("old", [False, True], ids=["zip", "before-1.6"])
def test_scrambled_torch_file(tmp_path: Path, state: dict[str, Any], old: bool) -> None:
    """Oracle: whatever 60 overwritten bytes hit, the result is a checkpoint or a CheckpointError, nothing else."""
    whole = torch_bytes({"state_dict": state}, old)
    generator = torch.Generator().manual_seed(0)
    messages = []
    for number in range(60):
        damaged = bytearray(whole)
        for place in torch.randint(len(whole), (60,), generator=generator).tolist():
            damaged[place] = (damaged[place] + 1 + number) % 256
        path = tmp_path / f"{number}.th"
        path.write_bytes(damaged)
        try:
            load_checkpoint(path)
        except CheckpointError as error:
            messages.append(str(error))
    assert messages
    assert not any("\n" in message for message in messages)


# ---- no checkpoint at all ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.th", b"", "the file is empty"),
        ("a.safetensors", b"", "the file is empty"),
        ("a.pt", b"epoch,accuracy\n1,0.5\n", "not a checkpoint: got a text file, expected a .safetensors file or"),
        ("a.pt", "Übergröße\n".encode() * 40, "got a text file"),
        ("a.pt", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
        ("a.pt", bytes(range(1, 256)) * 3, "got a file of an unknown kind"),
        ("a.tar.gz", b"\x1f\x8b\x08\x00" + bytes(20), "gzip archive (unpack it first)"),
        ("a.safetensors", b"hello world, no tensors here", "damaged safetensors file"),
    ],
)
def test_other_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    """Oracle: the sentence that says what the file is."""
    (tmp_path / name).write_bytes(content)
    assert message in refused(tmp_path / name)


def test_zip_that_is_no_checkpoint(tmp_path: Path) -> None:
    """Oracle: the sentence that says so."""
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("notes.txt", "hello")
    assert "a zip archive that holds no checkpoint" in refused(tmp_path / "a.zip")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "no state dict: got list"),
        (torch.ones(3), "no state dict: got Tensor"),
        ({}, "no state dict inside: got nothing"),
        ({"epoch": 3, "state_dict": None}, "no state dict inside: got epoch, state_dict"),
        ({"state_dict": {}}, "no state dict inside: got nothing"),
        ({"a.weight": torch.ones(2)}, "not a ResNet in a form that is known: got 1 keys: a.weight"),
        ({"a": {"b": {"c": torch.ones(2)}}}, "no state dict inside: got a"),
        ({"agent": 3, "resnet": {"conv1.weight": 1}}, "not a ResNet"),
    ],
)
def test_other_contents(tmp_path: Path, content: object, message: str) -> None:
    """Oracle: the sentence that says what was found."""
    torch.save(content, tmp_path / "a.pt")
    assert message in refused(tmp_path / "a.pt")


def test_places(tmp_path: Path) -> None:
    """Oracle: each wrong place has its own sentence."""
    assert "no such file" in refused(tmp_path / "missing.pt")
    assert "a folder without model.safetensors" in refused(tmp_path)
    (tmp_path / "manifest.json").write_text("{}")
    assert "this is a bundle" in refused(tmp_path)
    assert "cannot be read (Not a directory)" in refused(tmp_path / "manifest.json" / "x.pt")


@contextmanager
def without_rights() -> Iterator[None]:
    """For root, to whom everything is readable: be nobody for a while."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_file_without_permission(tmp_path: Path, state: dict[str, Any]) -> None:
    """Oracle: the operating system's own words."""
    path = tmp_path / "model.pt"
    torch.save(state, path)
    load_checkpoint(path)  # everything that is imported on use is there now
    path.chmod(0)
    with without_rights():
        text = refused(path)
    assert "cannot be read (Permission denied)" in text
