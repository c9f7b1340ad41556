"""The forms that people have, against networks written out independently with their keys (foreign_networks.py)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from foreign_networks import AuthorsPolicy, AuthorsResNet, PublicResNet, lived_in
from torch import Tensor, nn

from bdexport.checkpoint import Checkpoint, build_model, describe, load_checkpoint, save_checkpoint
from bdexport.errors import CheckpointError
from bdexport.models.pair import BlockDropNet
from bdexport.models.resnet import Block
from bdexport.preprocess import Preprocess

SMALL = ((2, 1, 3), (4, 8, 16))  # stages, widths
IMAGENET_MEAN = (0.485, 0.456, 0.406)
State = dict[str, Any]


def images(size: int, count: int = 3) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def public(classes: int = 10, **options: Any) -> PublicResNet:
    torch.manual_seed(0)
    model = lived_in(PublicResNet(*SMALL, classes, **options))
    assert isinstance(model, PublicResNet)
    return model


def stored(path: Path, content: object, old: bool = False) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=not old)
    return path


def same_logits(model: BlockDropNet, source: nn.Module, size: int) -> None:
    with torch.inference_mode():
        torch.testing.assert_close(model.network(images(size)), source(images(size)), rtol=1e-4, atol=1e-4)


def loaded_model(path: Path, **options: Any) -> tuple[Checkpoint, BlockDropNet]:
    ckpt = load_checkpoint(path, **options)
    return ckpt, build_model(ckpt, with_policy=ckpt.policy is not None)


# ---- public CIFAR networks -----------------------------------------------------------------------------------------


def parallel(state: State) -> State:
    return {"module." + key: value for key, value in state.items()}


@pytest.mark.parametrize("old", [False, True], ids=["zip", "before-1.6"])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"state_dict": parallel(state), "best_prec1": 92.78},
        lambda state: {"epoch": 3, "state_dict": state, "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]}},
        lambda state: {"model": state},
        lambda state: {"net": parallel(state), "acc": 93.0, "epoch": 7},
        lambda state: {"model_state_dict": OrderedDict(state)},
        lambda state: {"model": {"state_dict": {"_orig_mod." + key: value for key, value in state.items()}}},
        lambda state: state,
    ],
    ids=["state_dict-module", "state_dict", "model", "net-module", "model_state_dict", "nested-compiled", "bare"],
)
def test_public_cifar_in_every_container(tmp_path: Path, wrap: Callable[[State], object], old: bool) -> None:
    """Oracle: the logits of the network that was saved."""
    source = public()
    ckpt, model = loaded_model(stored(tmp_path / "model.th", wrap(source.state_dict()), old))
    assert (ckpt.form, ckpt.network.family, ckpt.network.shortcut) == ("public-cifar", "cifar", "option_a")
    assert (ckpt.network.stages, ckpt.network.widths, ckpt.network.name) == (*SMALL, "resnet14")
    assert ckpt.class_names == tuple("0123456789")  # a guess at names would be a contract that nobody made
    assert ckpt.preprocess == Preprocess((32, 32), IMAGENET_MEAN, (0.229, 0.224, 0.225))
    same_logits(model, source, 32)


@pytest.mark.parametrize("shortcut", ["shortcut", "downsample"])
@pytest.mark.parametrize("classifier", ["linear", "fc"])
@pytest.mark.parametrize("bottleneck", [False, True])
def test_public_cifar_with_convolutional_shortcuts(
    tmp_path: Path, shortcut: str, classifier: str, bottleneck: bool
) -> None:
    """Oracle: the source's logits; a transition never dropped in training gets a ReLU when it is."""
    source = public(100, kind="conv", shortcut=shortcut, classifier=classifier, bottleneck=bottleneck)
    ckpt, model = loaded_model(stored(tmp_path / "model.pt", source.state_dict()))
    assert (ckpt.network.shortcut, ckpt.network.dropped_transition) == ("conv", "shortcut_relu")
    assert ckpt.class_names == tuple(str(number) for number in range(100))
    assert any("shortcut_relu" in note for note in ckpt.notes)
    same_logits(model, source, 32)
    with torch.inference_mode():
        before, transition = torch.randn(2, ckpt.network.blocks()[2].in_channels, 8, 8), model.network.blocks[2]
        assert isinstance(transition, Block)
        assert torch.equal(transition.dropped(before), torch.relu(transition.shortcut(before)))


def test_pooled_shortcut_can_be_chosen(tmp_path: Path) -> None:
    """Oracle: the source's logits; with the default they differ, for the weights do not show the kind."""
    source = public(kind="avgpool")
    path = stored(tmp_path / "model.pt", source.state_dict())
    _, wrong = loaded_model(path)
    ckpt, model = loaded_model(path, shortcut="avgpool")
    assert (ckpt.network.shortcut, ckpt.network.dropped_transition) == ("avgpool", "shortcut")
    same_logits(model, source, 32)
    with torch.inference_mode():
        assert not torch.allclose(wrong.network(images(32)), source(images(32)), atol=1e-3)


def test_batch_counters_are_not_needed(tmp_path: Path) -> None:
    """Oracle: the source's logits, from a file without num_batches_tracked, as torch wrote before 0.4.1."""
    source = public()
    state = {key: value for key, value in source.state_dict().items() if "num_batches" not in key}
    same_logits(loaded_model(stored(tmp_path / "model.th", state, old=True))[1], source, 32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats(tmp_path: Path, dtype: torch.dtype) -> None:
    """Oracle: the source converted to that type and back to float32."""
    source = public().to(dtype)
    path = stored(tmp_path / "model.pt", source.state_dict())
    same_logits(loaded_model(path)[1], source.float(), 32)


def test_foreign_to_own_and_back(tmp_path: Path) -> None:
    """Oracle: the same state and specs after saving in our form; the form is ours then."""
    first = load_checkpoint(stored(tmp_path / "model.pt", public().state_dict()))
    save_checkpoint(tmp_path / "own.safetensors", first)
    second = load_checkpoint(tmp_path / "own.safetensors", arch="resnet14")
    assert (second.network, second.preprocess, second.form) == (first.network, first.preprocess, "bdexport")
    assert all(torch.equal(second.state[name], tensor) for name, tensor in first.state.items())


@pytest.mark.parametrize(("name", "blocks"), [("resnet32-d509ac18.th", 15), ("resnet56-4bfd9763.th", 27)])
def test_real_files_of_2018(shared: Path, name: str, blocks: int) -> None:
    """Oracle: the independently written network with the file's own tensors: same logits."""
    path = shared / "checkpoints" / name
    state = torch.load(path, weights_only=True, map_location="cpu")["state_dict"]
    source = PublicResNet((blocks // 3,) * 3, (16, 32, 64), 10).eval()
    missing, extra = source.load_state_dict(
        {key.removeprefix("module."): value for key, value in state.items()}, strict=False
    )
    assert not extra
    assert all(key.endswith("num_batches_tracked") for key in missing)
    ckpt, model = loaded_model(path, arch=name.partition("-")[0])
    assert (ckpt.network.num_blocks, ckpt.policy, ckpt.form) == (blocks, None, "public-cifar")
    same_logits(model, source, 32)


# ---- torchvision ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "stages", "bottleneck"), [("resnet18", (2, 2, 2, 2), False), ("resnet50", (3, 4, 6, 3), True)]
)
def test_torchvision(tmp_path: Path, name: str, stages: tuple[int, ...], bottleneck: bool) -> None:
    """Oracle: the source's logits, full width."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"kind": "conv", "shortcut": "downsample", "classifier": "fc"}
    source = lived_in(PublicResNet(stages, (64, 128, 256, 512), 20, imagenet=True, bottleneck=bottleneck, **options))
    ckpt, model = loaded_model(stored(tmp_path / "model.pth", source.state_dict()), arch=name)
    assert (ckpt.form, ckpt.network.family, ckpt.network.name) == ("torchvision", "imagenet", name)
    assert (ckpt.network.shortcut, ckpt.network.dropped_transition) == ("conv", "shortcut_relu")
    assert ckpt.preprocess == Preprocess((224, 224), IMAGENET_MEAN, (0.229, 0.224, 0.225), "bilinear", 256)
    assert next(block.index for block in ckpt.network.blocks() if block.transition) == (0 if bottleneck else 2)
    same_logits(model, source, 64)


def test_torchvision_keys_in_safetensors(tmp_path: Path) -> None:
    """Oracle: the source's logits, from a .safetensors file without our header, as model hubs keep them."""
    source = public(imagenet=True, kind="conv", shortcut="downsample", classifier="fc")
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(source.state_dict(), path)
    ckpt, model = loaded_model(path)
    assert ckpt.form == "torchvision"
    same_logits(model, source, 64)


@pytest.mark.parametrize(
    ("width", "groups", "kind"), [(8, 4, "ResNeXt"), (8, 1, "Wide ResNet")], ids=["grouped", "wide"]
)
def test_relatives_are_refused(tmp_path: Path, width: int, groups: int, kind: str) -> None:
    """Oracle: the message says which relative it is and which key shows it."""
    source = public(imagenet=True, bottleneck=True, kind="conv", shortcut="downsample", classifier="fc")
    state: State = source.state_dict()
    for key, tensor in source.state_dict().items():  # stage 1 has outer width 16, made of 4 inner channels
        if key.startswith("layer1.") and "downsample" not in key and (".conv" in key or ".bn1" in key or ".bn2" in key):
            outer, inner = ".conv3" in key, (tensor.shape[1] if tensor.ndim == 4 else 0)
            shape = [tensor.shape[0] if outer else width, *([inner, *tensor.shape[2:]] if inner else [])]
            if ".conv2" in key:
                shape[1] = width // groups
            elif ".conv3" in key:
                shape[1] = width
            state[key] = torch.ones(shape)
    with pytest.raises(CheckpointError, match=rf"layer1\.0\.conv[23]\.weight: .*{kind}.* not supported"):
        load_checkpoint(stored(tmp_path / "model.pth", state))


# ---- the authors' BlockDrop code -----------------------------------------------------------------------------------


def authors(imagenet: bool, bottleneck: bool = False, classes: int = 10) -> tuple[AuthorsResNet, AuthorsPolicy]:
    torch.manual_seed(0)
    network = lived_in(AuthorsResNet(*SMALL, classes, imagenet, bottleneck))
    policy = lived_in(AuthorsPolicy((1, 1, 1), (4, 8, 16), sum(SMALL[0]), imagenet), seed=1)
    assert isinstance(network, AuthorsResNet)
    assert isinstance(policy, AuthorsPolicy)
    with torch.no_grad():  # each block kept by about half of the images, so that masks differ
        policy.logit.bias.sub_(policy(images(64 if imagenet else 32, 16)).logit().mean(dim=0))
    return network, policy


def blockdrop_file(path: Path, network: nn.Module, policy: nn.Module | None) -> Path:
    agent = {} if policy is None else {"agent": policy.state_dict()}
    return stored(path, {"resnet": network.state_dict(), **agent, "epoch": 3, "acc": 0.9, "reward": 0.5}, old=True)


@pytest.mark.parametrize(("imagenet", "bottleneck", "size"), [(False, False, 32), (True, False, 64), (True, True, 64)])
def test_blockdrop_with_policy(tmp_path: Path, imagenet: bool, bottleneck: bool, size: int) -> None:
    """Oracle: the source pair: keep-probabilities, masks, and the logits image by image along each image's own path."""
    network, policy = authors(imagenet, bottleneck)
    ckpt, model = loaded_model(blockdrop_file(tmp_path / "ckpt_E_3.t7", network, policy))
    assert (ckpt.form, ckpt.network.dropped_transition) == ("blockdrop", "shortcut")
    assert ckpt.network.shortcut == ("conv" if imagenet else "avgpool")
    assert ckpt.policy is not None
    assert (ckpt.policy.num_blocks, ckpt.policy.input_pool) == (6, 2 if imagenet else 1)
    assert any("vnet" in note and "ignored" in note for note in ckpt.notes)
    x = images(size, 16)
    with torch.inference_mode():
        probabilities = policy(x)
        logits, masks = model(x)
        torch.testing.assert_close(model.policy(x), probabilities, rtol=1e-4, atol=1e-5)
        assert torch.equal(masks, probabilities >= 0.5)
        paths = [network(image[None], mask.tolist())[0] for image, mask in zip(x, masks, strict=True)]
        torch.testing.assert_close(logits, torch.stack(paths), rtol=1e-4, atol=1e-4)
    assert len(masks.unique(dim=0)) > 1
    same_logits(model, network, size)


def test_blockdrop_legacy_and_parallel_keys(tmp_path: Path) -> None:
    """Oracle: the same tensors as without: DataParallel's prefix, and the classifier that old agents still carry."""
    network, policy = authors(False)
    plain = load_checkpoint(blockdrop_file(tmp_path / "plain.t7", network, policy))
    agent = {**policy.state_dict(), "features.fc.weight": torch.ones(10, 16), "features.fc.bias": torch.ones(10)}
    content = {"resnet": parallel(network.state_dict()), "agent": parallel(agent)}
    other = load_checkpoint(stored(tmp_path / "parallel.t7", content))
    assert any("features.fc" in note for note in other.notes)
    assert all(torch.equal(other.state[name], tensor) for name, tensor in plain.state.items())


def test_blockdrop_agent_with_torchvision_names(tmp_path: Path) -> None:
    """Oracle: the keep-probabilities of the source; its features are a PublicResNet without classifier."""
    network, _ = authors(False)
    torch.manual_seed(2)
    features = lived_in(PublicResNet((1, 1), (4, 8), 2, kind="avgpool", classifier="fc"))
    assert isinstance(features, PublicResNet)
    features.fc = nn.Identity()
    logit = nn.Linear(8, 6)
    agent = {f"features.{key}": value for key, value in features.state_dict().items()}
    agent |= {f"logit.{key}": value for key, value in logit.state_dict().items()}
    _, model = loaded_model(stored(tmp_path / "x.t7", {"resnet": network.state_dict(), "agent": agent}))
    with torch.inference_mode():
        torch.testing.assert_close(model.policy(images(32)), logit(features(images(32))).sigmoid())


def test_blockdrop_network_alone(tmp_path: Path) -> None:
    """Oracle: the source's logits, from a bare state dict with the authors' names."""
    network, _ = authors(False)
    ckpt, model = loaded_model(stored(tmp_path / "x.pt", network.state_dict()))
    assert (ckpt.form, ckpt.policy, ckpt.network.shortcut) == ("blockdrop", None, "avgpool")
    same_logits(model, network, 32)


@pytest.mark.parametrize(
    ("stages", "classes", "mean"), [((5, 5, 5), 10, 125.3 / 255), ((5, 5, 5), 100, 0.0), ((6, 6, 6), 10, 0.0)]
)
def test_blockdrop_preprocessing(tmp_path: Path, stages: tuple[int, ...], classes: int, mean: float) -> None:
    """Oracle: the authors' utils.py: only their ResNet-32 for CIFAR-10 subtracts a mean."""
    network = AuthorsResNet(stages, (4, 8, 16), classes, imagenet=False)
    preprocess = load_checkpoint(blockdrop_file(tmp_path / "x.t7", network, None)).preprocess
    assert preprocess.mean[0] == pytest.approx(mean)
    assert (preprocess.std == (1.0, 1.0, 1.0)) == (mean == 0.0)
    assert preprocess.size == (32, 32)


@pytest.mark.parametrize("key", ["agent", "net"])
def test_policy_without_network(tmp_path: Path, key: str) -> None:
    """Oracle: the curriculum script saves the agent alone; the message says what is missing and how to add it."""
    path = stored(tmp_path / "x.t7", {key: authors(False)[1].state_dict(), "epoch": 1})
    with pytest.raises(CheckpointError, match=r"policy without its network.*under the key resnet"):
        load_checkpoint(path)


def test_policy_for_another_network(tmp_path: Path) -> None:
    """Oracle: both numbers of blocks stand in the message."""
    network, _ = authors(False)
    policy = AuthorsPolicy((1, 1, 1), (4, 8, 16), 15, imagenet=False)
    with pytest.raises(CheckpointError, match=r"agent: logit\.weight .*got 15, expected 6"):
        load_checkpoint(blockdrop_file(tmp_path / "x.t7", network, policy))


def test_dropped_transition_can_be_chosen(tmp_path: Path) -> None:
    """Oracle: the rule that was passed, in both directions."""
    network, policy = authors(True)
    path = blockdrop_file(tmp_path / "x.t7", network, policy)
    assert load_checkpoint(path, dropped_transition="shortcut_relu").network.dropped_transition == "shortcut_relu"
    path = stored(tmp_path / "y.pt", public(kind="conv").state_dict())
    assert load_checkpoint(path, dropped_transition="shortcut").network.dropped_transition == "shortcut"


def test_describe_tells_what_was_assumed(tmp_path: Path) -> None:
    """Oracle: the notes name the shortcut, the rule and the preprocessing."""
    notes = " | ".join(describe(load_checkpoint(stored(tmp_path / "x.pt", public().state_dict())))["notes"])
    assert "shortcut option_a" in notes
    assert "--shortcut avgpool" in notes
    assert "dropped transition shortcut" in notes
    assert "preprocessing" in notes


# ---- weights that do not fit ---------------------------------------------------------------------------------------


def without(*keys: str) -> Callable[[State], State]:
    return lambda state: {key: value for key, value in state.items() if not key.startswith(keys)}


def changed(key: str, value: object) -> Callable[[State], State]:
    return lambda state: {**state, key: value}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("layer3.1.bn2.weight"), r"as resnet14: .*1 key missing \(layer3\.1\.bn2\.weight\)"),
        (without("layer3.1."), r"10 keys missing \(layer3\.1\.conv1\.weight, "),
        (without("layer2."), r"keys missing \(layer2\.0\.|key missing \(layer2\.0\.conv1\.weight\)"),
        (without("linear."), r"no classifier: got no fc\.weight or linear\.weight"),
        (without("conv1."), "not a ResNet in a form that is known"),
        (without("conv1.", "bn1.", "layer"), "not a ResNet in a form that is known: got 2 keys: linear"),
        (changed("layer1.0.scale", torch.ones(2)), r"1 key extra \(layer1\.0\.scale\)"),
        (changed("linear.weight", torch.ones(10, 15)), r"linear\.weight has \[10, 15\], not \[10, 16\]"),
        (changed("linear.weight", torch.ones(1, 16)), "no classifier: got 1 class, expected .*at least 2"),
        (changed("linear.weight", torch.ones(16)), r"linear\.weight: got shape \[16\], expected 2 dimensions"),
        (changed("conv1.weight", torch.ones(4, 2, 3, 3)), r"conv1\.weight: got 2 input channels, expected 3 .*, or 1"),
        (changed("conv1.weight", torch.ones(4, 3, 5, 5)), r"got 5x5, expected 3x3 .* or 7x7"),
        (
            changed("layer1.0.bn1.bias", torch.full((4,), torch.inf)),
            r"layer1\.0\.bn1\.bias: got 4 of 4 values not finite",
        ),
        (changed("layer1.0.bn1.bias", torch.ones(4).int()), r"layer1\.0\.bn1\.bias: got a tensor of torch\.int32"),
        (changed("layer1.0.bn1.bias", torch.ones(4).to_sparse()), r"bn1\.bias: got a tensor of kind torch\.sparse_coo"),
        (changed("layer1.0.bn1.bias", {"value": 1}), r"layer1\.0\.bn1\.bias: got dict, expected a dense tensor"),
        (changed("layer1.0.conv1.weight", 3), r"layer1\.0\.conv1\.weight: got int, expected a tensor"),
        (changed("layer9999.0.conv1.weight", torch.ones(1)), "too deep: got 9999 stages"),
        (changed("layer1.9999.conv1.weight", torch.ones(1)), "too deep: got 3 stages, up to 10000 blocks"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, change: Callable[[State], State], message: str) -> None:
    """Oracle: one line with the file's name and the file's own name of the key."""
    path = stored(tmp_path / "model.th", {"state_dict": parallel(change(public().state_dict()))})
    with pytest.raises(CheckpointError, match=message) as error:
        load_checkpoint(path)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


def test_shortcut_that_contradicts_the_weights(tmp_path: Path) -> None:
    """Oracle: both sides stand in the message."""
    with pytest.raises(CheckpointError, match="got weights for convolutional shortcuts, expected shortcut option_a"):
        load_checkpoint(stored(tmp_path / "a.pt", public(kind="conv").state_dict()), shortcut="option_a")
    with pytest.raises(CheckpointError, match="got no weights for convolutional shortcuts, expected shortcut conv"):
        load_checkpoint(stored(tmp_path / "b.pt", public().state_dict()), shortcut="conv")


def test_half_of_the_shortcuts_missing(tmp_path: Path) -> None:
    """Oracle: the missing shortcut's keys by name, not a guess at another kind."""
    state = without("layer2.0.shortcut.")(public(kind="conv").state_dict())
    with pytest.raises(CheckpointError, match=r"5 keys missing \(layer2\.0\.shortcut\.0\.weight, "):
        load_checkpoint(stored(tmp_path / "a.pt", state))
