"""Files that ask for more than they are worth: refused in one line, within the memory and time of docs/limits.md."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import hostile_files
import numpy as np
import pytest
import torch
from foreign_networks import PublicResNet
from hostile_files import CIFAR, REFERENCE, SAFETENSORS, SLOW, TORCH
from hostile_reader import COSTS
from image_cases import HOSTILE, LARGE, LISTS, ORDINARY, PERMITTED
from test_dataset import WRITERS, batch

from bdexport import limits
from bdexport.checkpoint import load_checkpoint
from bdexport.dataset.pickles import read_pickle
from bdexport.errors import CheckpointError, DatasetError
from bdexport.image_files import FORMATS
from bdexport.limits import MIB

PAGE = Path(__file__).parents[2] / "docs" / "limits.md"
KINDS: dict[str, Mapping[str, Callable[[], bytes]]] = {
    "torch": TORCH,
    "safetensors": SAFETENSORS,
    "reference": REFERENCE,
    "cifar": CIFAR,
    "image": HOSTILE | LARGE,
    "list": LISTS,
}
LATE = {("image", name) for name in LARGE} | {("list", name) for name in LISTS if name != "lists"}
HONEST = "honest: "
OUT_OF_MEMORY = ("MemoryError", "memory", "allocat", "bad_alloc")

Outcomes = dict[tuple[str, str], tuple[str, float]]


def network() -> PublicResNet:
    torch.manual_seed(0)
    return PublicResNet((1, 1, 1), (8, 16, 32), 10)


def read_all(folder: Path) -> Outcomes:
    """What became of every file, in a process of its own."""
    torch.save(network().state_dict(), folder / "MODEL.th")
    script = Path(__file__).with_name("hostile_reader.py")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    command = [sys.executable, str(script), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    return {(kind, name): (said, seconds) for kind, name, said, seconds in rows}


def written(folder: Path, slow: bool) -> dict[tuple[str, str], Path]:
    paths = {}
    for kind, table in KINDS.items():
        (folder / kind).mkdir()
        for name, make in table.items():
            if ((kind, name) in LATE or name in SLOW) == slow:
                paths[kind, name] = folder / kind / name
                paths[kind, name].write_bytes(make())
    return paths


def honest(folder: Path) -> dict[tuple[str, str], Path]:
    """What people save, beside the hostile files."""
    torch.manual_seed(0)
    state = dict(PublicResNet((1, 1, 1), (64, 128, 256), 10).state_dict())
    numbers = {name: value for name, value in state.items() if value.is_floating_point()}
    flat = torch.cat([value.flatten() for value in numbers.values()])
    sizes = [value.numel() for value in numbers.values()]
    views = {name: part.view(numbers[name].shape) for name, part in zip(numbers, torch.split(flat, sizes), strict=True)}
    adam = {index: {"step": torch.tensor(1.0), "exp_avg": value.clone()} for index, value in enumerate(state.values())}
    small = {index: {"step": index, "lr": [0.1, index], "name": f"layer {index}"} for index in range(2_000)}
    forms: dict[str, Any] = {
        "state": state,
        "views of one buffer": views,
        "half": {name: value.half() for name, value in numbers.items()},
        "bfloat16": {name: value.bfloat16() for name, value in numbers.items()},
        "float8": {name: value.to(torch.float8_e5m2) for name, value in numbers.items()},
        "parameters": {name: torch.nn.Parameter(value) for name, value in numbers.items()},
        "arrays": {name: value.numpy() for name, value in numbers.items()},
        "expanded, small": state | {"bn1.bias": torch.zeros(1).expand(64)},
        "optimiser and copies": {"state_dict": state, "ema": state, "best": dict(state), "optimizer": {"state": adam}},
        "many small entries": {"state_dict": state, "optimizer": {"state": small, "param_groups": [{"params": [0]}]}},
        "other kinds": {"state_dict": state, "seen": {1, 2}, "raw": bytearray(b"x"), "c": 1j, "size": torch.Size([1])},
    }
    paths: dict[tuple[str, str], Path] = {}
    for name, content in forms.items():
        paths["torch", f"{HONEST}{name}"] = folder / "torch" / f"{HONEST}{name}"
        torch.save(content, folder / "torch" / f"{HONEST}{name}")
        if name != "float8":  # torch cannot read it in the old form
            paths["torch", f"{HONEST}{name}, old"] = folder / "torch" / f"{HONEST}{name}, old"
            torch.save(content, paths["torch", f"{HONEST}{name}, old"], _use_new_zipfile_serialization=False)
    for name, draw in ORDINARY.items():
        paths["image", f"{HONEST}{name}"] = folder / "image" / f"{HONEST}{name}"
        draw(paths["image", f"{HONEST}{name}"])
    for name, make in PERMITTED.items():
        paths["image", f"{HONEST}{name}"] = folder / "image" / f"{HONEST}{name}"
        paths["image", f"{HONEST}{name}"].write_bytes(make())
    for name, write in WRITERS.items():
        paths["cifar", f"{HONEST}{name}"] = folder / "cifar" / f"{HONEST}{name}"
        paths["cifar", f"{HONEST}{name}"].write_bytes(write(batch(1000, 0)))
    return paths


def check(outcomes: Outcomes, paths: Mapping[tuple[str, str], Path]) -> None:
    assert outcomes.keys() == paths.keys()
    for (kind, name), (said, seconds) in outcomes.items():
        assert not any(word in said for word in OUT_OF_MEMORY), f"{kind}, {name}: {said}"
        assert seconds < COSTS[kind].seconds, f"{kind}, {name}: {seconds} s"


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """Of the hostile files that are quick to read, and of the honest ones: one process for all."""
    if sys.platform != "linux":
        pytest.skip("address space is limited on Linux")
    folder = tmp_path_factory.mktemp("files")
    paths = written(folder, slow=False) | honest(folder)
    outcomes = read_all(folder)
    check(outcomes, paths)
    return outcomes


def test_hostile_files_are_refused_within_the_limits(outcomes: Outcomes) -> None:
    """Oracle: CheckpointError or DatasetError in one line, in a process that has no more memory than the table says."""
    hostile = {key: said for key, (said, _) in outcomes.items() if not key[1].startswith(HONEST)}
    assert len(hostile) > 50
    for (kind, name), said in hostile.items():
        assert said.startswith("refused: "), f"{kind}, {name}: {said}"
        assert f"{kind}/{name}" in said
        assert "\n" not in said


def test_honest_files_are_read_within_the_limits(outcomes: Outcomes) -> None:
    """Oracle: accepted, in the same process: every form that people save, of a network of a few megabytes."""
    kept = {name: said for (_, name), (said, _) in outcomes.items() if name.startswith(HONEST)}
    assert len(kept) > 20
    assert {name: said for name, said in kept.items() if said != "accepted"} == {}


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="address space is limited on Linux")
def test_files_at_the_limits_cost_what_the_table_says(tmp_path: Path) -> None:
    """Oracle: the table, for files that ask for as much as is allowed, or a little more."""
    paths = written(tmp_path, slow=True)
    check(read_all(tmp_path), paths)


def test_a_repeated_tensor_is_named_with_the_remedy(tmp_path: Path) -> None:
    """Oracle: torch's own file of an expanded tensor: the tensor's name and what to call before saving."""
    path = tmp_path / "model.pt"
    torch.save({"state_dict": {"layer1.0.conv1.weight": torch.zeros(1).expand(1000, 1000)}}, path)
    with pytest.raises(CheckpointError, match=r"layer1\.0\.conv1\.weight.*repeats them.*\.contiguous\(\)"):
        load_checkpoint(path)
    torch.save({"w": torch.nn.Parameter(torch.zeros(1).expand(1000, 1000))}, path)
    with pytest.raises(CheckpointError, match=r"tensor 'w' has"):
        load_checkpoint(path)


@pytest.mark.parametrize("name", hostile_files.KEYS)
def test_keys_that_can_share_a_hash_are_refused(tmp_path: Path, name: str) -> None:
    """Oracle: Python's rule for the hashes of numbers, of which a file could hold many of one hash."""
    path = tmp_path / "model.pt"
    path.write_bytes(hostile_files.torch_zip(hostile_files.with_key(hostile_files.KEYS[name])))
    with pytest.raises(CheckpointError, match="a key that is neither a text nor an ordinary number"):
        load_checkpoint(path)
    if name not in ("complex number", "shape"):  # its names are refused in any place
        path.write_bytes(hostile_files.with_key(hostile_files.KEYS[name]))
        with pytest.raises(DatasetError, match="a key that is neither a text nor an ordinary number"):
            read_pickle(path)


def test_sets_of_one_hash_are_refused(tmp_path: Path) -> None:
    """Oracle: the same rule, for what ``set`` is called with."""
    path = tmp_path / "model.pt"
    path.write_bytes(TORCH["set of one hash"]())
    with pytest.raises(CheckpointError, match=r"calls builtins\.set"):
        load_checkpoint(path)


@pytest.mark.parametrize("name", ["items", "keys", "get", "values", "elements"])
def test_a_state_hides_no_method_of_a_dict(tmp_path: Path, name: str) -> None:
    """Oracle: CheckpointError with the attribute's name, where calling the method later on would fail."""
    path = tmp_path / "model.pt"
    path.write_bytes(hostile_files.torch_zip(hostile_files.with_attribute(name)))
    with pytest.raises(CheckpointError, match=f"sets the attribute {name} of a dict"):
        load_checkpoint(path)


@pytest.mark.parametrize("name", ["detach", "is_floating_point", "data"])
def test_a_state_hides_no_method_of_a_tensor(tmp_path: Path, name: str) -> None:
    """Oracle: CheckpointError with the attribute's name, where calling the method later on would fail."""
    path = tmp_path / "model.pt"
    path.write_bytes(hostile_files.torch_zip(hostile_files.tensor_with_attribute(name)))
    with pytest.raises(CheckpointError, match=f"sets the attribute {name} of a tensor"):
        load_checkpoint(path)


@pytest.mark.parametrize("old", [False, True])
def test_what_trainers_keep_beside_the_weights_is_read(tmp_path: Path, old: bool) -> None:
    """Oracle: torch's own files with a scheduler of milestones, ranges, an Ellipsis, marked parameters, small keys."""
    torch.manual_seed(0)
    model = network()
    optimiser = torch.optim.SGD(model.parameters(), 0.1)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimiser, [3, 5, 5])
    parameters = {name: torch.nn.Parameter(value.float()) for name, value in model.state_dict().items()}
    parameters["conv1.weight"].no_decay = True  # type: ignore[attr-defined]
    content = {
        "state_dict": parameters,
        "lr_scheduler": scheduler.state_dict(),
        "beside": [range(3), slice(1), ..., np.complex64(1), {1: "a", -2: "b", 0.5: "c", ("a", 1): "d"}, {(1, 2), 3}],
    }
    torch.save(content, tmp_path / "model.pt", _use_new_zipfile_serialization=not old)
    read = load_checkpoint(tmp_path / "model.pt").state
    assert torch.equal(read["network.stem.conv.weight"], model.state_dict()["conv1.weight"])


def test_too_many_places_say_what_to_do(tmp_path: Path) -> None:
    """Oracle: a tensor of half precision, 20 MB, at four keys: as float32 it is eight times the file."""
    shared = torch.zeros(10_000_000, dtype=torch.half)
    places = {key: {"x": shared} for key in "abcd"}
    torch.save({"state_dict": network().state_dict(), **places}, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=r"counted at each place.*save what stands in several places once"):
        load_checkpoint(tmp_path / "model.pt")


def test_what_is_large_is_not_read(tmp_path: Path) -> None:
    """Oracle: a file without content whose size is beyond the limit: the limit stands in the message."""
    path = tmp_path / "model.pt"
    path.write_bytes(hostile_files.torch_zip(b"N."))
    os.truncate(path, limits.CHECKPOINT_FILE + 1)
    with pytest.raises(CheckpointError, match=f"too large.*at most {limits.CHECKPOINT_FILE:,}"):
        load_checkpoint(path)


@pytest.mark.skipif(os.name != "posix", reason="named pipes")
def test_a_pipe_is_no_file(tmp_path: Path) -> None:
    """Oracle: an error at once, where opening would wait for somebody who writes."""
    os.mkfifo(tmp_path / "data_batch_1")
    with pytest.raises(CheckpointError, match="not a regular file"):
        load_checkpoint(tmp_path / "data_batch_1")
    with pytest.raises(DatasetError, match="not a regular file"):
        read_pickle(tmp_path / "data_batch_1")


def test_the_page_has_the_numbers() -> None:
    """Oracle: the constants in bdexport/limits.py."""
    page = PAGE.read_text(encoding="utf-8")
    rows = {line.split("|")[1].strip(): line for line in page.splitlines() if line.startswith("| ")}
    sizes = {"torch": limits.CHECKPOINT_FILE, "safetensors": limits.CHECKPOINT_FILE, "cifar": limits.CIFAR_FILE}
    names = {"torch": "torch checkpoint", "safetensors": "`.safetensors`", "cifar": "CIFAR's pickles"}
    names |= {"reference": "`.npz` with logits", "image": "image", "list": "calibration list"}
    sizes |= {"image": limits.FILE_BYTES_PER_PIXEL * limits.MAX_PIXELS, "list": limits.MAX_LIST_BYTES}
    for kind, cost in COSTS.items():
        row = rows[names[kind]]
        assert f"{cost.memory // MIB:,} MiB" in row, kind
        assert f"{cost.times} times" in row or cost.times == 1, kind
        assert f"{cost.seconds} s" in row, kind
        assert f"{sizes.get(kind, limits.REFERENCE_ARRAYS) // MIB:,} MiB" in row, kind
    said = {
        *(f"{limits.PICKLE_VALUES:,} ", f"{limits.PICKLE_NESTING} deep", f"{limits.PICKLE_NAME:,} characters"),
        f"more than {limits.PICKLE_ARGUMENTS} arguments",
        *(f"{limits.PICKLE_INTEGER} bytes", f"{limits.GROWTH} times the file", f"{limits.GROWTH_FLOOR // MIB} MiB"),
        *(f"{limits.REPEATED_TENSOR // MIB} MiB", f"{limits.CHECKPOINT_DIRECTORY // MIB} MiB"),
        *(f"{limits.SAFETENSORS_HEADER // MIB} MiB", f"{limits.MAX_PIXELS:,} pixels", f"{limits.MAX_JPEG_SCANS} scans"),
        *(f"{limits.MIN_IMAGE_BYTES // MIB} MiB", f"{limits.MAX_LIST_ENTRIES:,} images"),
        *(f"{limits.MAX_FOLDER_ENTRIES:,} entries", f"{limits.MAX_NAMES_BYTES // MIB} MiB of class names"),
        *(f"{limits.MAX_RESULT_BYTES // MIB} MiB", *FORMATS),
    }
    assert [text for text in said if text not in page] == []
