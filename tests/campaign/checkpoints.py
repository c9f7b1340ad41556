"""Damaged and hostile checkpoints: our own form, PyTorch's zip and its older form, safetensors of others.

A damaged checkpoint of our own form is refused, or gives the same tensors bit for bit. The other forms have no digest:
they are refused, or give a whole network. Hostile files must not run code and not take more memory than is allowed.
"""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, ClassVar

import safetensors.torch
import torch
from foreign_networks import PublicResNet, lived_in
from tiny import tiny_checkpoint_file

from bdexport.checkpoint import load_checkpoint
from campaign.cases import Kind, Tally, attempt, once
from campaign.mutations import damage_file, damaged, odd_text
from campaign.networks import model_of
from campaign.pickles import hostile_pickle, hostile_storage_pickle

OWN, ZIP, OLD, FOREIGN = "own.safetensors", "zip.pt", "old.pt", "foreign.safetensors"

AS_IT_IS = "as it is"


class Checkpoints(Kind):
    """Four files of one network."""

    name: ClassVar[str] = "checkpoints"
    about: ClassVar[str] = "checkpoints with damage, bombs, and pickles that ask for code"
    share: ClassVar[float] = 1.5
    memory_mb: ClassVar[int | None] = 300

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        torch.set_num_threads(1)
        with once(folder / "good") as making:
            if making is not None:
                tiny_checkpoint_file(making / OWN, model_of(0))
                state = public_state()
                torch.save(state, making / ZIP)
                torch.save({"state_dict": state, "epoch": 3}, making / OLD, _use_new_zipfile_serialization=False)
                safetensors.torch.save_file({name: value.clone() for name, value in state.items()}, making / FOREIGN)
        self.good = folder / "good"
        self.state = load_checkpoint(self.good / OWN).state
        self.shapes = {name: value.shape for name, value in self.state.items()}

    def case(self, random: Random, scratch: Path) -> Tally:
        """Change one of the files and load it."""
        name = random.choice((OWN, OWN, ZIP, OLD, FOREIGN))
        path, tally = scratch / name, Tally()
        path.write_bytes((self.good / name).read_bytes())
        hows: dict[str, list[Callable[[Path, Random], str]]] = {
            OWN: [_as_it_is, damage_file, damage_file, _odd_header, _claimed_sizes],
            FOREIGN: [_as_it_is, damage_file, _odd_header, _claimed_sizes],
            ZIP: [_as_it_is, damage_file, _hostile_zip, _hostile_zip, _huge_views, _deflated],
            OLD: [_as_it_is, damage_file, _hostile_old],
        }
        what = f"{name} {random.choice(hows[name])(path, random)}"
        loaded = attempt(tally, what, lambda: load_checkpoint(path))
        if loaded is None:
            if what.endswith(AS_IT_IS):
                tally.failures.append(f"{what}: refused")
            return tally
        if name == OWN:
            same = loaded.state.keys() == self.state.keys() and all(
                torch.equal(value, self.state[key]) for key, value in loaded.state.items()
            )
            tally.check(same, f"{what}: damage was accepted, and tensors are others")
        else:
            finite = all(bool(torch.isfinite(value).all()) for value in loaded.state.values())
            tally.check(finite, f"{what}: accepted with tensors that are not finite")
        return tally


def public_state() -> dict[str, torch.Tensor]:
    """The tensors of a public CIFAR ResNet with three blocks."""
    torch.manual_seed(0)
    return dict(lived_in(PublicResNet((1, 1, 1), (16, 32, 64), 10)).state_dict())


def _as_it_is(_path: Path, _random: Random) -> str:
    return AS_IT_IS


def _header_of(data: bytes) -> tuple[dict[str, Any], bytes]:
    """The JSON header of a safetensors file and the bytes behind it."""
    length = struct.unpack("<Q", data[:8])[0]
    header: dict[str, Any] = json.loads(data[8 : 8 + length])
    return header, data[8 + length :]


def _odd_header(path: Path, random: Random) -> str:
    header, rest = _header_of(path.read_bytes())
    inner = header.get("__metadata__", {})
    if inner and random.random() < 0.7:
        key = next(iter(inner))
        inner[key] = odd_text(json.loads(inner[key]), random).decode("utf-8", "replace")
        text = json.dumps(header).encode()
    else:
        text = odd_text(header, random)
    path.write_bytes(struct.pack("<Q", len(text)) + text + rest)
    return "odd header"


def _claimed_sizes(path: Path, random: Random) -> str:
    header, rest = _header_of(path.read_bytes())
    name = random.choice([name for name in header if name != "__metadata__"])
    entry = header[name]
    match random.randrange(4):
        case 0:
            entry["shape"] = [random.choice((1 << 33, 1 << 62, 0)), *entry["shape"][1:]]
        case 1:
            entry["data_offsets"][1] = random.choice((1 << 40, 0, len(rest) + 1))
        case 2:
            entry["data_offsets"][0] = random.choice((1, 1 << 40))
        case _:
            entry["dtype"] = random.choice(("F64", "I8", "BF16", "BOOL", "F8_E4M3", "X"))
    text = json.dumps(header).encode()
    length = random.choice((len(text), len(text), 1 << 40, 1 << 63))
    path.write_bytes(struct.pack("<Q", length) + text + rest)
    return "claims other sizes"


def _rewritten(path: Path, change: Callable[[str, bytes], bytes], compression: int = zipfile.ZIP_STORED) -> None:
    """Write the zip again with other content."""
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, change(name, data))


def _hostile_zip(path: Path, random: Random) -> str:
    seed = random.getrandbits(32)

    def change(name: str, data: bytes) -> bytes:
        if not name.endswith("data.pkl"):
            return data
        own = Random(seed)
        return damaged(data, own) if own.random() < 0.4 else hostile_pickle(own)

    _rewritten(path, change)
    return "hostile pickle"


def _huge_views(path: Path, random: Random) -> str:
    """Tensors that are views of a few bytes and claim gigabytes."""
    rows = random.choice((10**6, 10**8, 10**10))
    state = OrderedDict(public_state())
    name = random.choice([name for name in state if state[name].dim() > 0])
    how = random.randrange(3)
    if how == 0:
        state[name] = torch.zeros(1).expand(rows, *state[name].shape)
    elif how == 1:
        state["extra.weight"] = torch.zeros(1, 1).expand(rows, 16)
    else:
        state |= {f"module.{number}": torch.zeros(1).expand(rows) for number in range(50)}
    torch.save(state, path)
    return f"a view that claims {rows:,} rows"


def _deflated(path: Path, random: Random) -> str:
    large = bytes(random.choice((1 << 20, 1 << 28)))
    seed = random.getrandbits(32)

    def change(name: str, data: bytes) -> bytes:
        return large if name.endswith("/data/0") or (seed % 2 and name.endswith("data.pkl")) else data

    _rewritten(path, change, zipfile.ZIP_DEFLATED)
    return "deflated members"


def _hostile_old(path: Path, random: Random) -> str:
    if random.random() < 0.5:
        path.write_bytes(damaged(path.read_bytes(), random))
        return "damaged old form"
    content = io.BytesIO()
    for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}):
        pickle.dump(value, content, protocol=2)
    content.write(hostile_storage_pickle(random) if random.random() < 0.5 else hostile_pickle(random))
    path.write_bytes(content.getvalue())
    return "hostile old form"
