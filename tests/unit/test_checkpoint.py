"""Our own form: what is saved is what is loaded, and every wrong field and tensor is named."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from foreign_networks import lived_in

from bdexport.architecture import PolicySpec, ResNetSpec, policy_spec, resnet_spec
from bdexport.checkpoint import Checkpoint, build_model, describe, load_checkpoint, save_checkpoint
from bdexport.checkpoint.fitting import expected_shapes
from bdexport.errors import CheckpointError, OutputError, UsageError
from bdexport.models.pair import BlockDropNet
from bdexport.preprocess import Preprocess

NETWORK = ResNetSpec("cifar", "basic", (1, 2, 1), (4, 6, 8), "conv", 3, "shortcut_relu")
POLICY = PolicySpec("cifar", (1, 1), (4, 6), NETWORK.num_blocks)
STATISTICS = {"split": "validation", "images": 4, "masks": [{"mask": "1011", "count": 3, "share": 0.75}]}


def example(network: ResNetSpec = NETWORK, policy: PolicySpec | None = POLICY) -> tuple[Checkpoint, BlockDropNet]:
    torch.manual_seed(0)
    model = BlockDropNet(network, policy)
    lived_in(model)
    state = {name: tensor for name, tensor in model.state_dict().items() if policy or not name.startswith("policy.")}
    training = {"accuracy": 0.5, "history": [1, None, "x"], "policy_statistics": STATISTICS}
    preprocess = Preprocess((24, 20), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bicubic", 30)
    return Checkpoint(network, policy, preprocess, ("cat", "dog", "größer"), state, training), model


def images(size: int = 32, count: int = 4) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("whole") / "model.safetensors"
    save_checkpoint(path, example()[0])
    return path.read_bytes()


@pytest.fixture
def saved(tmp_path: Path, whole: bytes) -> Path:
    path = tmp_path / "model.safetensors"
    path.write_bytes(whole)
    return path


def rewritten(path: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """The same file with another header."""
    tensors, header = tensors_of(path), header_of(path)
    header.pop("sha256", None)  # as if saved like this by a version that wrote none
    change(header)
    safetensors.torch.save_file(tensors, path, {"bdexport": json.dumps(header)})
    return path


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    # Not load_file: its tensors are the file itself, which the tests overwrite.
    return safetensors.torch.load(path.read_bytes())


def header_of(path: Path) -> dict[str, Any]:
    with safetensors.safe_open(path, framework="pt") as file:
        header: dict[str, Any] = json.loads(file.metadata()["bdexport"])
    return header


# ---- round trips ---------------------------------------------------------------------------------------------------


def test_round_trip_is_bit_equal(saved: Path) -> None:
    """Oracle: the checkpoint that was saved, field by field and bit by bit."""
    before, _ = example()
    after = load_checkpoint(saved)
    for name in ("network", "policy", "preprocess", "class_names", "training", "form"):
        assert getattr(after, name) == getattr(before, name), name
    weights = {name: tensor for name, tensor in before.state.items() if not name.endswith("num_batches_tracked")}
    assert after.state.keys() == weights.keys()
    assert all(torch.equal(after.state[name], tensor) for name, tensor in weights.items())


def test_loaded_model_computes_the_same(saved: Path) -> None:
    """Oracle: the model whose weights were saved: same masks, equal logits."""
    _, source = example()
    loaded = build_model(load_checkpoint(saved))
    assert not loaded.training
    with torch.inference_mode():
        expected, got = source(images()), loaded(images())
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])


def flipped(content: bytes, bit: int) -> bytes:
    damaged = bytearray(content)
    damaged[bit // 8] ^= 1 << bit % 8
    return bytes(damaged)


def test_every_flipped_bit_in_the_weights_is_noticed(saved: Path, whole: bytes) -> None:
    """Oracle: CheckpointError that says damage, for 50 bits drawn from all that stand for weights."""
    begin = 8 * (8 + int.from_bytes(whole[:8], "little"))
    bits = torch.randint(begin, 8 * len(whole), (50,), generator=torch.Generator().manual_seed(5)).tolist()
    for bit in bits:
        saved.write_bytes(flipped(whole, bit))
        with pytest.raises(CheckpointError, match=r"damaged, or changed after it was saved.*SHA-256"):
            load_checkpoint(saved)


def test_a_changed_header_is_noticed(saved: Path, whole: bytes) -> None:
    """Oracle: CheckpointError for a mean that is a digit off; the same JSON written otherwise is the same header."""
    saved.write_bytes(whole.replace(b"[0.1, 0.2, 0.3]", b"[0.1, 0.2, 0.4]"))
    with pytest.raises(CheckpointError, match="SHA-256"):
        load_checkpoint(saved)
    saved.write_bytes(whole)
    header, tensors = header_of(saved), tensors_of(saved)
    text = json.dumps(dict(reversed(header.items())), indent=2)
    safetensors.torch.save_file(dict(reversed(tensors.items())), saved, {"bdexport": text})
    assert load_checkpoint(saved).sha256 == header["sha256"]


def test_the_digest_is_what_the_specification_says(saved: Path) -> None:
    """Oracle: docs/checkpoints.md, computed with numpy."""
    header = header_of(saved)
    said = header.pop("sha256")
    digest = hashlib.sha256(json.dumps(header, sort_keys=True, separators=(",", ":")).encode())
    for name, tensor in sorted(tensors_of(saved).items()):
        digest.update(f'\n"{name}" torch.float32 {list(tensor.shape)}\n'.encode() + tensor.numpy().tobytes())
    assert digest.hexdigest() == said
    assert describe(load_checkpoint(saved))["sha256"] == said


def test_an_older_file_opens_unchecked(saved: Path) -> None:
    """Oracle: the file of a version that wrote no digest: it loads, and ``describe`` says that nothing was checked."""
    ckpt = load_checkpoint(rewritten(saved, lambda header: None))
    assert describe(ckpt)["sha256"] is None


def test_a_wrong_digest_field_is_named(saved: Path) -> None:
    """Oracle: CheckpointError with the field."""
    with pytest.raises(CheckpointError, match=r"header\.sha256: got \"x\", expected 64 hexadecimal digits"):
        load_checkpoint(rewritten(saved, lambda header: header.update(sha256="x")))


def test_run_folder_stands_for_its_model(saved: Path) -> None:
    """Oracle: the file inside."""
    assert load_checkpoint(saved.parent).state.keys() == load_checkpoint(saved).state.keys()


def test_same_checkpoint_same_bytes(saved: Path) -> None:
    """Oracle: a second file of the same checkpoint."""
    again = saved.with_name("again.safetensors")
    save_checkpoint(again, example()[0])
    assert again.read_bytes() == saved.read_bytes()


@pytest.mark.parametrize("first_byte", [0x80, 0x50])
def test_header_length_that_begins_like_another_form(tmp_path: Path, first_byte: int) -> None:
    """Oracle: our own form; the file begins with a length, and its first byte can be a pickle's or a zip archive's."""
    ckpt = replace(example()[0], training={"pad": ""})
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, ckpt)
    pad = "x" * ((first_byte - path.read_bytes()[0]) % 256)
    save_checkpoint(path, replace(ckpt, training={"pad": pad}))
    assert path.read_bytes()[0] == first_byte
    assert load_checkpoint(path).training == {"pad": pad}


def test_model_does_not_share_memory_with_the_checkpoint(saved: Path) -> None:
    """Oracle: the checkpoint's tensor, after the model's was overwritten."""
    ckpt = load_checkpoint(saved)
    before = ckpt.state["network.stem.conv.weight"].clone()
    with torch.no_grad():
        build_model(ckpt).network.stem.conv.weight.zero_()
    assert torch.equal(ckpt.state["network.stem.conv.weight"], before)


def test_without_policy(tmp_path: Path) -> None:
    """Oracle: the source network; a policy is made on request only, otherwise its absence is an error."""
    ckpt, source = example(policy=None)
    path = tmp_path / "base.safetensors"
    save_checkpoint(path, ckpt)
    loaded = load_checkpoint(path)
    assert loaded.policy is None
    assert not any(name.startswith("policy.") for name in loaded.state)
    with pytest.raises(CheckpointError, match=r"no policy network; .*bdexport train --base"):
        build_model(loaded)
    model = build_model(loaded, with_policy=False)
    assert model.policy.spec == policy_spec(NETWORK)
    with torch.inference_mode():
        assert torch.equal(model.network(images()), source.network(images()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats_become_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    """Oracle: torch's own conversion of each tensor."""
    ckpt, _ = example()
    half = {name: tensor.to(dtype) for name, tensor in ckpt.state.items() if tensor.is_floating_point()}
    save_checkpoint(tmp_path / "half.safetensors", replace(ckpt, state=half))
    loaded = load_checkpoint(tmp_path / "half.safetensors")
    assert all(torch.equal(loaded.state[name], tensor.float()) for name, tensor in half.items())
    assert {tensor.dtype for tensor in loaded.state.values()} == {torch.float32}


def test_caller_overrides(saved: Path) -> None:
    """Oracle: the values passed."""
    preprocess = Preprocess((16, 16))
    ckpt = load_checkpoint(saved, class_names=["a", "b", "c"], preprocess=preprocess, dropped_transition="shortcut")
    assert (ckpt.class_names, ckpt.preprocess) == (("a", "b", "c"), preprocess)
    assert ckpt.network.dropped_transition == "shortcut"


def test_describe_is_json_and_complete(saved: Path) -> None:
    """Oracle: the specs that were saved."""
    data = json.loads(json.dumps(describe(load_checkpoint(saved))))
    assert (data["form"], data["architecture"], data["num_blocks"]) == ("bdexport", "resnet10", 4)
    assert (data["transitions"], data["shortcut"], data["dropped_transition"]) == ([1, 3], "conv", "shortcut_relu")
    assert data["policy"] == POLICY.to_json()
    assert data["training"]["accuracy"] == 0.5
    assert data["weights"] == sum(tensor.numel() for tensor in load_checkpoint(saved).state.values())


@pytest.mark.parametrize("name", ["resnet32", "resnet50"])
def test_expected_shapes_are_the_models(name: str) -> None:
    """Oracle: the state dict of the real model; and torch's random state is not touched."""
    spec, before = resnet_spec(name), torch.random.get_rng_state()
    shapes = expected_shapes(spec, policy_spec(spec))
    assert torch.equal(torch.random.get_rng_state(), before)
    state = BlockDropNet(spec).state_dict()
    assert shapes == {name: tuple(tensor.shape) for name, tensor in state.items() if "num_batches" not in name}


# ---- requests that do not fit --------------------------------------------------------------------------------------


def test_architecture_is_checked(saved: Path) -> None:
    """Oracle: both sides stand in the message; an unknown name is wrong usage."""
    assert load_checkpoint(saved, arch="ResNet-10").network.name == "resnet10"
    with pytest.raises(CheckpointError, match=r"got resnet10 .*expected resnet32"):
        load_checkpoint(saved, arch="resnet32")
    with pytest.raises(UsageError, match="vgg16"):
        load_checkpoint(saved, arch="vgg16")


def test_class_count_is_checked(saved: Path) -> None:
    """Oracle: both counts stand in the message."""
    with pytest.raises(CheckpointError, match="got 2 names, expected 3"):
        load_checkpoint(saved, class_names=["a", "b"])


def test_shortcut_cannot_contradict_the_file(saved: Path) -> None:
    """Oracle: both kinds stand in the message; an unknown kind is wrong usage."""
    with pytest.raises(CheckpointError, match="got conv, expected avgpool"):
        load_checkpoint(saved, shortcut="avgpool")
    with pytest.raises(UsageError, match="unknown shortcut: got 'pool'"):
        load_checkpoint(saved, shortcut="pool")  # type: ignore[arg-type]


# ---- what is not written -------------------------------------------------------------------------------------------


def poisoned(ckpt: Checkpoint, value: float) -> Checkpoint:
    tensor = ckpt.state["network.blocks.2.branch.conv2.weight"].clone()
    tensor.view(-1)[7] = value
    return replace(ckpt, state=ckpt.state | {"network.blocks.2.branch.conv2.weight": tensor})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda ckpt: poisoned(ckpt, float("nan")),
            r"blocks\.2\.branch\.conv2\.weight: got 1 of \d+ values not finite",
        ),
        (
            lambda ckpt: poisoned(ckpt, float("-inf")),
            r"blocks\.2\.branch\.conv2\.weight: got 1 of \d+ values not finite",
        ),
        (lambda ckpt: replace(ckpt, class_names=("a",)), "class_names: got 1 names, expected 3"),
        (lambda ckpt: replace(ckpt, training={"loss": float("nan")}), "training: not plain JSON"),
        (lambda ckpt: replace(ckpt, training={"path": Path("x")}), "training: not plain JSON"),
        (
            lambda ckpt: replace(ckpt, state={}),
            r"the weights do not fit: 84 keys missing \(network\.stem\.conv\.weight, ",
        ),
        (lambda ckpt: replace(ckpt, policy=replace(POLICY, num_blocks=5)), r"policy\.num_blocks: got 5"),
    ],
)
def test_what_would_not_load_is_not_written(
    tmp_path: Path, change: Callable[[Checkpoint], Checkpoint], message: str
) -> None:
    """Oracle: the message names the field, and the older file stays as it was."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"older")
    with pytest.raises(CheckpointError, match=message):
        save_checkpoint(path, change(example()[0]))
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]
    assert path.read_bytes() == b"older"


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    """Oracle: a folder in the file's place, a file in the folder's, and another suffix."""
    ckpt, _ = example()
    (tmp_path / "taken.safetensors").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"taken\.safetensors: cannot be written"):
        save_checkpoint(tmp_path / "taken.safetensors", ckpt)
    with pytest.raises(OutputError, match="cannot be written"):
        save_checkpoint(tmp_path / "file" / "model.safetensors", ckpt)
    with pytest.raises(CheckpointError, match=r"got suffix '\.pt', expected \.safetensors"):
        save_checkpoint(tmp_path / "model.pt", ckpt)
    assert not list(tmp_path.glob("**/*.partial"))


# ---- headers that do not hold --------------------------------------------------------------------------------------


def put(*place: str | int, value: object) -> Callable[[dict[str, Any]], None]:
    def change(header: dict[str, Any]) -> None:
        target: Any = header
        for step in place[:-1]:
            target = target[step]
        target[place[-1]] = value

    return change


def take(*place: str) -> Callable[[dict[str, Any]], None]:
    def change(header: dict[str, Any]) -> None:
        target = header
        for step in place[:-1]:
            target = target[step]
        del target[place[-1]]

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("format_version", value=2), "newer bdexport: got 2, expected at most 1; upgrade"),
        (put("format_version", value="1"), 'format_version: got "1"'),
        (put("format_version", value=True), "format_version: got true"),
        (take("format_version"), "got no format_version"),
        (take("network"), "got missing network"),
        (put("colour", value=1), "got unknown colour"),
        (put("network", value=[1]), r"header\.network: got \[1\], expected an object"),
        (take("network", "shortcut"), r"network: got missing shortcut"),
        (put("network", "family", value="mnist"), r'network\.family: got "mnist", expected one of cifar, imagenet'),
        (put("network", "block", value=None), r"network\.block: got null"),
        (put("network", "stages", value=[1, 2]), r"stages and widths do not fit"),
        (put("network", "stages", value=[]), r"network\.stages: got \[\]"),
        (put("network", "stages", 0, value=10**9), r"network\.stages\[0\]: got 1000000000, expected an integer in"),
        (put("network", "stages", 0, value=1.0), r"network\.stages\[0\]: got 1\.0"),
        (put("network", "widths", 1, value=-6), r"network\.widths\[1\]: got -6"),
        (put("network", "num_classes", value=1), r"network\.num_classes: got 1"),
        (put("network", "dropped_transition", value="relu"), r"network\.dropped_transition"),
        (put("policy", "num_blocks", value=9), r"policy\.num_blocks: got 9, expected an integer in 4\.\.4"),
        (put("policy", "input_pool", value=0), r"policy\.input_pool: got 0"),
        (put("policy", "stem_stride", value=1), r"policy\.stem_stride: got 1"),
        (put("policy", "widths", value=[4]), "stages and widths do not fit"),
        (put("policy", value=False), r"header\.policy: got false, expected an object"),
        (put("preprocess", "size", value=[32]), r"preprocess\.size: got \[32\], expected a list of 2 values"),
        (put("preprocess", "size", 0, value=5000), r"preprocess\.size\[0\]: got 5000"),
        (put("preprocess", "std", 2, value=0), r"preprocess\.std\[2\]: got 0"),
        (put("preprocess", "mean", 0, value="0.5"), r'preprocess\.mean\[0\]: got "0\.5"'),
        (put("preprocess", "resampling", value="nearest"), r"preprocess\.resampling"),
        (put("preprocess", "resize_short", value=-1), r"preprocess\.resize_short: got -1"),
        (put("class_names", value=["a", "b"]), "class_names: got 2 names, expected 3"),
        (put("class_names", 1, value="a\x1b[2Jb"), r"class_names\[1\]: got .*u001b.*expected ordinary text"),
        (put("class_names", 1, value=7), r"class_names\[1\]: got 7"),
        (put("training", value=[]), r"header\.training: got \[\], expected an object"),
        (put("training", "policy_statistics", "images", value=0), r"policy_statistics\.images: got 0"),
        (put("training", "policy_statistics", "masks", 0, "mask", value="10110"), r"masks\[0\]\.mask: got \"10110\""),
        (put("training", "policy_statistics", "masks", 0, "share", value=1.5), r"masks\[0\]\.share: got 1\.5"),
        (put("training", "fixed_mask", value={"mask": "1", "kept": 1}), r"fixed_mask\.mask: got \"1\""),
        (put("training", "fixed_mask", value={"mask": "first-k", "kept": 10**380}), r"fixed_mask\.kept: got 1000"),
        (put("training", "fixed_mask", value={"mask": [1, [0]], "kept": 1}), r"fixed_mask\.mask: got \[1, \[0\]\]"),
        (put("training", "fixed_mask", value="101"), r"fixed_mask: got \"101\", expected an object"),
    ],
)
def test_header_fields_are_checked(saved: Path, change: Callable[[dict[str, Any]], object], message: str) -> None:
    """Oracle: one line that names the file and the field."""
    with pytest.raises(CheckpointError, match=message) as error:
        load_checkpoint(rewritten(saved, change))
    assert str(saved) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, '{"format_version": NaN}', "null", '"text"'])
def test_header_that_is_no_json_object(saved: Path, text: str) -> None:
    """Oracle: CheckpointError naming the file, whatever the text."""
    safetensors.torch.save_file(tensors_of(saved), saved, {"bdexport": text})
    with pytest.raises(CheckpointError, match="header"):
        load_checkpoint(saved)


# ---- tensors that do not fit ---------------------------------------------------------------------------------------


def with_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    tensors, header = tensors_of(path), header_of(path)
    header.pop("sha256", None)
    change(tensors)
    safetensors.torch.save_file(tensors, path, {"bdexport": json.dumps(header)})
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("policy.fc.bias"), r"1 key missing \(policy\.fc\.bias\)"),
        (lambda t: t.update({"new.weight": torch.ones(1)}), r"1 key extra \(new\.weight\)"),
        (lambda t: t.update({"a\nb": torch.ones(1)}), r"1 key extra \('a\\nb'\)"),
        (
            lambda t: t.update({"network.head.fc.weight": torch.ones(5, 8)}),
            r"1 key of another shape \(network\.head\.fc\.weight has \[5, 8\], not \[3, 8\]\)",
        ),
        (
            lambda t: t.update({"network.head.fc.bias": torch.ones(3, dtype=torch.int64)}),
            r"network\.head\.fc\.bias: got a tensor of torch\.int64, expected a dense tensor of floating",
        ),
        (
            lambda t: t.update({"network.head.fc.bias": torch.tensor([1.0, float("nan"), float("inf")])}),
            r"network\.head\.fc\.bias: got 2 of 3 values not finite",
        ),
        (
            lambda t: t.update({"network.head.fc.bias": torch.full((3,), 1e300, dtype=torch.float64)}),
            r"network\.head\.fc\.bias: got 3 of 3 values not finite, expected finite float32",
        ),
    ],
)
def test_tensors_are_checked(saved: Path, change: Callable[[dict[str, torch.Tensor]], object], message: str) -> None:
    """Oracle: the message names the key."""
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(with_tensors(saved, change))


def test_many_keys_are_listed_and_counted(saved: Path) -> None:
    """Oracle: ten keys by name, the number of all, and the number that is left out."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.startswith("network.blocks.1.")]:
            del tensors[name]

    with pytest.raises(CheckpointError) as error:
        load_checkpoint(with_tensors(saved, change))
    text = str(error.value)
    assert "15 keys missing (" in text
    assert text.count("network.blocks.1.") == 10
    assert "and 5 more)" in text
