"""What trainers put around and beside a network: read where it is harmless, refused by its family where it is another.

Networks are written out in foreign_networks.py, or here in plain torch, and saved as their trainers save them.
"""

from __future__ import annotations

import argparse
import collections
import datetime
import pickle
import types
from collections.abc import Callable
from pathlib import Path, PureWindowsPath
from typing import Any

import numpy as np
import pytest
import torch
from foreign_networks import PublicResNet, lived_in
from torch import Tensor, nn

from bdexport.checkpoint import Checkpoint, build_model, load_checkpoint
from bdexport.checkpoint.beside import Aside
from bdexport.checkpoint.containers import LUMA
from bdexport.errors import CheckpointError
from bdexport.pickled_arrays import PickledArray

SMALL = ((1, 2, 1), (4, 8, 16))
State = dict[str, Any]


def images(count: int = 3, size: int = 32, channels: int = 3) -> Tensor:
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(1))


def network(seed: int = 0, **options: Any) -> PublicResNet:
    torch.manual_seed(seed)
    model = lived_in(PublicResNet(*SMALL, 5, **options))
    assert isinstance(model, PublicResNet)
    return model


def stored(path: Path, content: object, old: bool = False) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=not old)
    return path


def logits_of(ckpt: Checkpoint, x: Tensor) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = build_model(ckpt, with_policy=False).network(x)
    return logits


def under(prefix: str, state: State) -> State:
    return {prefix + key: value for key, value in state.items()}


# ---- beside the weights --------------------------------------------------------------------------------------------


def beside() -> dict[str, Any]:
    """What people save next to their weights."""
    counts: collections.defaultdict[str, list[int]] = collections.defaultdict(list)
    counts["epochs"].append(3)
    return {
        "best_acc": np.float64(93.2),
        "epoch": np.int64(7),
        "best": np.bool_(True),
        "curve": np.linspace(0, 1, 6, dtype=np.float32).reshape(2, 3),
        "none": np.zeros((0, 3)),
        "random": np.random.get_state(),
        "args": argparse.Namespace(lr=0.1, out=Path("/data/runs"), inner=argparse.Namespace(depth=np.int32(20))),
        "config": types.SimpleNamespace(name="x"),
        "path": PureWindowsPath("c:/runs"),
        "when": datetime.datetime(2024, 5, 1, tzinfo=datetime.UTC),
        "took": datetime.timedelta(hours=3),
        "counts": counts,
        "last": collections.deque([1, 2], maxlen=2),
        "torch": torch.__version__,
        "kind": np.dtype("float32"),
    }


@pytest.mark.parametrize("old", [False, True], ids=["zip", "before-1.6"])
def test_numbers_options_and_paths_beside_the_weights(tmp_path: Path, old: bool) -> None:
    """Oracle: the logits of the network that was saved: none of that is code, and none of it hides the weights."""
    source = network()
    path = stored(tmp_path / "model.pth", {"state_dict": source.state_dict(), **beside()}, old)
    with torch.inference_mode():
        torch.testing.assert_close(logits_of(load_checkpoint(path), images()), source(images()), rtol=1e-4, atol=1e-4)


def test_weights_as_arrays_of_numpy(tmp_path: Path) -> None:
    """Oracle: the source's logits, from a state dict whose tensors are numpy arrays of either byte order."""
    source = network()
    state = {key: value.numpy().astype(">f4") if "conv" in key else value.numpy() for key, value in
             source.state_dict().items()}  # fmt: skip
    path = stored(tmp_path / "model.pth", {"model": state})
    with torch.inference_mode():
        torch.testing.assert_close(logits_of(load_checkpoint(path), images()), source(images()), rtol=1e-4, atol=1e-4)


class Unknown:
    """A class that no list knows."""


def test_other_classes_are_still_refused(tmp_path: Path) -> None:
    """Oracle: the list of names; a class beside them is refused by its name, and nothing of it is made."""
    path = stored(tmp_path / "model.pth", {"state_dict": network().state_dict(), "trainer": Unknown()})
    with pytest.raises(CheckpointError, match=r"would run code from the file: it asks for \w*\.?.*Unknown"):
        load_checkpoint(path)


class _Lying:
    """A pickle that rebuilds an array with the parts that are given, as ``ndarray.__reduce__`` would."""

    def __init__(self, code: str, state: tuple[object, ...]) -> None:
        self.code, self.state = code, state

    def __reduce__(self) -> tuple[object, ...]:
        scalar = np.float32(0).__reduce__()[0]  # numpy's own function, under the name that this numpy has for it
        return scalar, (_Kind(self.code), *self.state)


class _Kind:
    def __init__(self, code: str) -> None:
        self.code = code

    def __reduce__(self) -> tuple[object, ...]:
        return np.dtype, (self.code, False, True)


@pytest.mark.parametrize(("code", "content"), [("O", b"\x01" * 8), ("V8", b"\x01" * 8), ("f8", b"\x01"), ("U2", b"ab")])
def test_arrays_that_lie_are_refused(tmp_path: Path, code: str, content: bytes) -> None:
    """Oracle: numpy's own loader would take these bytes for pointers, or read beyond them; here they are refused."""
    path = stored(tmp_path / "model.pth", {"state_dict": network().state_dict(), "best": _Lying(code, (content,))})
    with pytest.raises(CheckpointError, match=r"not plain weights|damaged"):
        load_checkpoint(path)


def test_builders_keep_nothing() -> None:
    """Oracle: what a pickle gives to a stand-in has no effect, whatever it is."""
    aside = Aside("rm", command=1)
    aside.__setstate__({"a": 1})
    assert vars(aside) == {}
    with pytest.raises(pickle.UnpicklingError):
        PickledArray().__setstate__((1, (10**9, 10**9), "f8", False, b""))


# ---- prefixes, strays, averaged weights ----------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["backbone.", "net.", "resnet.", "model.", "module.encoder.", "student.net."])
@pytest.mark.parametrize(
    "strays",
    [
        {},
        {"criterion.weight": torch.ones(5)},
        {"train_acc.correct": torch.ones(()), "loss_fn.pos_weight": torch.ones(5)},
    ],
    ids=["alone", "criterion", "metrics"],
)
def test_prefixes_and_stray_keys(tmp_path: Path, prefix: str, strays: State) -> None:
    """Oracle: the source's logits; a note names what was left aside."""
    source = network(classifier="fc")
    path = stored(tmp_path / "model.ckpt", {"state_dict": under(prefix, source.state_dict()) | strays, "epoch": 3})
    ckpt = load_checkpoint(path)
    with torch.inference_mode():
        torch.testing.assert_close(logits_of(ckpt, images()), source(images()), rtol=1e-4, atol=1e-4)
    aside = [note for note in ckpt.notes if note.startswith("left aside")]
    assert all(key in aside[0] for key in strays)
    assert len(aside) == bool(strays)


def test_stray_key_beside_a_bare_state_dict(tmp_path: Path) -> None:
    """Oracle: the source's logits; under DataParallel the stray key has its prefix, too."""
    source = network()
    state = under("module.", {**source.state_dict(), "criterion.weight": torch.ones(5)})
    ckpt = load_checkpoint(stored(tmp_path / "model.pth", state))
    with torch.inference_mode():
        torch.testing.assert_close(logits_of(ckpt, images()), source(images()), rtol=1e-4, atol=1e-4)
    assert any("criterion.weight" in note for note in ckpt.notes)


def test_classifier_beside_a_backbone(tmp_path: Path) -> None:
    """Oracle: the source's logits, from keys as OpenMMLab's classifiers have them."""
    source = network(classifier="fc")
    state = {
        ("head." if key.startswith("fc.") else "backbone.") + key: value for key, value in source.state_dict().items()
    }
    ckpt = load_checkpoint(stored(tmp_path / "model.pth", {"state_dict": state}))
    with torch.inference_mode():
        torch.testing.assert_close(logits_of(ckpt, images()), source(images()), rtol=1e-4, atol=1e-4)
    assert any("head.fc" in note for note in ckpt.notes)


def test_a_layer_that_normalises(tmp_path: Path) -> None:
    """Oracle: the mean and deviation that the model itself holds, instead of a guess; its logits for the pixels."""
    source = network()
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.4, 0.5, 0.6])
    state = {"normalize.mean": mean[None, :, None, None], "normalize.std": std[None, :, None, None]}
    ckpt = load_checkpoint(stored(tmp_path / "m.pth", state | under("model.", source.state_dict())))
    pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    raw = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255
    with torch.inference_mode():
        expected = source((raw - mean[:, None, None]) / std[:, None, None])
        got = logits_of(ckpt, torch.from_numpy(ckpt.preprocess(pixels)))
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert any("mean 0.1 0.2 0.3" in note and "stand in the file" in note for note in ckpt.notes)


def test_a_classifier_without_bias_and_a_container_of_its_own_name(tmp_path: Path) -> None:
    """Oracle: the source's logits, whose last layer adds nothing; the note says so."""
    source = network()
    source.linear = nn.Linear(16, 5, bias=False)
    ckpt = load_checkpoint(stored(tmp_path / "m.pth", {"checkpoint": source.state_dict(), "optim": {"lr": 0.1}}))
    with torch.inference_mode():
        torch.testing.assert_close(logits_of(ckpt, images()), source(images()), rtol=1e-4, atol=1e-4)
    assert any("no linear.bias" in note for note in ckpt.notes)


def test_what_is_not_understood_is_not_dropped(tmp_path: Path) -> None:
    """Oracle: a layer between backbone and head changes what is computed: it is listed, not left aside."""
    state = under("backbone.", network(classifier="fc").state_dict()) | {"neck.weight": torch.ones(16)}
    with pytest.raises(CheckpointError, match=r"1 key extra \(neck\.weight\)"):
        load_checkpoint(stored(tmp_path / "model.pth", state))


@pytest.mark.parametrize("dropout", [0, 1])
def test_dropout_before_the_classifier(tmp_path: Path, dropout: int) -> None:
    """Oracle: the source's logits in eval mode, from ``fc.0.weight`` and ``fc.1.weight``."""
    source = network(classifier="fc")
    classifier = source.get_submodule("fc")
    source.fc = nn.Sequential(nn.Dropout(0.3), classifier) if dropout else nn.Sequential(classifier)
    state = source.state_dict()
    assert f"fc.{dropout}.weight" in state
    with torch.inference_mode():
        expected = source.eval()(images())
        torch.testing.assert_close(
            logits_of(load_checkpoint(stored(tmp_path / "m.pth", state)), images()), expected, rtol=1e-4, atol=1e-4
        )


def test_a_head_of_two_layers_is_refused(tmp_path: Path) -> None:
    """Oracle: both layers by name; taking the last one alone would compute something else."""
    source = network(classifier="fc")
    source.fc = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 5))
    with pytest.raises(CheckpointError, match=r"2 linear layers: got fc\.0, fc\.2"):
        load_checkpoint(stored(tmp_path / "m.pth", source.state_dict()))


@pytest.mark.parametrize("key", ["state_dict_ema", "model_ema", "ema_state_dict"])
def test_averaged_weights_alone_and_beside_others(tmp_path: Path, key: str) -> None:
    """Oracle: alone they are read; beside others, the others are, and the note says which."""
    plain, averaged = network(0), network(1)
    alone = load_checkpoint(stored(tmp_path / "alone.pth", {key: averaged.state_dict(), "epoch": 1}))
    both = load_checkpoint(
        stored(tmp_path / "both.pth", {"state_dict": plain.state_dict(), key: averaged.state_dict()})
    )
    with torch.inference_mode():
        torch.testing.assert_close(logits_of(alone, images()), averaged(images()), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(logits_of(both, images()), plain(images()), rtol=1e-4, atol=1e-4)
    assert any(key in note and "are used" in note for note in alone.notes)
    assert any(key in note and "are not" in note for note in both.notes)


def test_averaged_copy_under_a_prefix(tmp_path: Path) -> None:
    """Oracle: the trained weights' logits; two networks of which none is an average are refused by their prefixes."""
    plain, averaged = network(0), network(1)
    state = under("model.", plain.state_dict()) | under("ema_model.module.", averaged.state_dict())
    ckpt = load_checkpoint(stored(tmp_path / "a.ckpt", {"state_dict": state}))
    with torch.inference_mode():
        torch.testing.assert_close(logits_of(ckpt, images()), plain(images()), rtol=1e-4, atol=1e-4)
    assert any("ema_model.module." in note and "are not" in note for note in ckpt.notes)
    state = under("student.", plain.state_dict()) | under("encoder.", averaged.state_dict())
    with pytest.raises(CheckpointError, match=r"more than one network: got the prefixes encoder\., student\."):
        load_checkpoint(stored(tmp_path / "b.ckpt", {"state_dict": state}))


# ---- one input channel ---------------------------------------------------------------------------------------------


def test_one_input_channel(tmp_path: Path) -> None:
    """Oracle: the source's logits for the grey image that Pillow's weights make of the colours."""
    source = network()
    source.conv1 = nn.Conv2d(1, 4, 3, padding=1, bias=False)
    path = stored(tmp_path / "grey.pth", source.state_dict())
    ckpt = load_checkpoint(path, preprocess={"mean": (0.5,) * 3, "std": (0.25,) * 3})
    grey = (images() * torch.tensor(LUMA)[:, None, None]).sum(dim=1, keepdim=True)
    with torch.inference_mode():
        torch.testing.assert_close(logits_of(ckpt, images()), source(grey), rtol=1e-4, atol=1e-4)
    assert any("one input channel" in note for note in ckpt.notes)
    assert len(set(load_checkpoint(path).preprocess.mean)) == 1
    with pytest.raises(CheckpointError, match=r"one input channel.*--mean 0\.1307"):
        load_checkpoint(path, preprocess={"mean": (0.4, 0.5, 0.6)})


# ---- other networks ------------------------------------------------------------------------------------------------


class PreActivation(nn.Module):
    """conv1, blocks of bn-relu-conv, a last bn: ResNet v2 with the usual names."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.layer1 = nn.Sequential(self.block(4, 4))
        self.layer2 = nn.Sequential(self.block(4, 8))
        self.bn = nn.BatchNorm2d(8)
        self.linear = nn.Linear(8, 5)

    @staticmethod
    def block(inputs: int, outputs: int) -> nn.Module:
        block = nn.Module()
        block.bn1, block.conv1 = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, outputs, 3, bias=False)
        block.bn2, block.conv2 = nn.BatchNorm2d(outputs), nn.Conv2d(outputs, outputs, 3, bias=False)
        return block


def squeezed(state: State) -> State:
    return {**state, "layer1.0.se.fc1.weight": torch.ones(1, 4), "layer1.0.se.fc2.weight": torch.ones(4, 1)}


def group_normed(state: State) -> State:
    return {key: value for key, value in state.items() if "running" not in key and "num_batches" not in key}


def deep_stem(state: State) -> State:
    state = {key: value for key, value in state.items() if not key.startswith("conv1.")}
    return {"conv1.0.weight": torch.ones(2, 3, 3, 3), "conv1.3.weight": torch.ones(2, 2, 3, 3), **state}


OTHERS: list[tuple[str, Callable[[State], State], str]] = [
    ("SE", squeezed, "channel attention .*got keys such as layer1.0.se.fc1.weight"),
    ("GroupNorm", group_normed, "group norm .*layer1.0.bn1.weight without layer1.0.bn1.running_mean"),
    ("deep stem", deep_stem, "a deep stem .*conv1.0.weight"),
    ("pre-activation", lambda _: PreActivation().state_dict(), "a pre-activation ResNet .*layer2.0.bn1.weight"),
    ("biases", lambda state: {**state, "layer1.0.conv1.bias": torch.ones(4)}, "whose convolutions have biases"),
    (
        "ViT",
        lambda _: {"cls_token": torch.ones(1, 1, 8), "blocks.0.attn.qkv.weight": torch.ones(24, 8)},
        r"a vision transformer \(ViT, DeiT\)",
    ),
    (
        "torchvision ViT",
        lambda _: {"class_token": torch.ones(1, 1, 8), "conv_proj.weight": torch.ones(8, 3, 4, 4)},
        "a vision transformer",
    ),
    (
        "ConvNeXt",
        lambda _: {"downsample_layers.0.0.weight": torch.ones(8, 3, 4, 4), "stages.0.0.gamma": torch.ones(8)},
        "a ConvNeXt",
    ),
    (
        "timm ConvNeXt",
        lambda _: {"stem.0.weight": torch.ones(8, 3, 4, 4), "stages.0.blocks.0.conv_dw.weight": torch.ones(8, 1, 7, 7)},
        "a ConvNeXt",
    ),
    ("VGG", lambda _: {"features.0.weight": torch.ones(8, 3, 3, 3), "classifier.0.weight": torch.ones(5, 8)}, "a VGG"),
    (
        "Hugging Face",
        lambda _: {"resnet.embedder.embedder.convolution.weight": torch.ones(8, 3, 7, 7)},
        "under the names of Hugging Face",
    ),
]


@pytest.mark.parametrize(("change", "message"), [row[1:] for row in OTHERS], ids=[row[0] for row in OTHERS])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_other_networks_are_refused_by_their_family(
    tmp_path: Path, change: Callable[[State], State], message: str, prefix: str
) -> None:
    """Oracle: one line that names the family, the key that shows it, and the next step; no list of all keys."""
    path = stored(tmp_path / "model.pth", {"state_dict": under(prefix, change(network().state_dict()))})
    with pytest.raises(CheckpointError, match=message) as error:
        load_checkpoint(path)
    text = str(error.value)
    assert "\n" not in text
    assert len(text) < 500 + len(str(path))
    assert "bdexport train --arch" in text
