"""Networks with the same keys and shapes that compute something else: they load, and --check-against finds them out.

Each look-alike is written out in plain torch, on top of foreign_networks.py; its logits are the reference.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from foreign_networks import PublicResNet, lived_in
from torch import Tensor, nn
from torch.nn import functional as F

from bdexport.checkpoint import build_model, load_checkpoint
from bdexport.checkpoint.against import check_against
from bdexport.dataset import Dataset
from bdexport.errors import CheckpointError, VerificationError
from bdexport.preprocess import Preprocess

HALVES = Preprocess((32, 32), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def network(**options: Any) -> PublicResNet:
    torch.manual_seed(0)
    model = lived_in(PublicResNet((2, 1, 1), (4, 8, 16), 5, **options))
    assert isinstance(model, PublicResNet)
    return model


def pixels(count: int = 6, size: int = 32) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def logits_of(source: nn.Module, inputs: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    with torch.inference_mode():
        logits: np.ndarray[Any, Any] = source(torch.from_numpy(inputs)).numpy()
    return logits


def checked(path: Path, reference: Path, dataset: Dataset | None = None, **options: Any) -> dict[str, Any]:
    ckpt = load_checkpoint(path, **options)
    return check_against(build_model(ckpt, with_policy=False), ckpt, reference, dataset)


def saved(tmp_path: Path, source: nn.Module, size: int = 32) -> tuple[Path, Path]:
    """The look-alike's file, and its logits for inputs that are preprocessed already."""
    torch.save(source.state_dict(), tmp_path / "model.pth")
    inputs = HALVES.normalise(pixels(size=size))
    np.savez(tmp_path / "logits.npz", inputs=inputs, logits=logits_of(source, inputs))
    return tmp_path / "model.pth", tmp_path / "logits.npz"


# ---- the look-alikes -----------------------------------------------------------------------------------------------


class PooledStem(PublicResNet):
    def seed(self, x: Tensor) -> Tensor:
        return F.max_pool2d(super().seed(x), 3, 2, padding=1)


class WholeStem(PublicResNet):
    def seed(self, x: Tensor) -> Tensor:
        return F.relu(self.bn1(self.conv1(x)))


class SwishStem(PublicResNet):
    """Every ReLU is a SiLU: of the stem, inside the blocks and behind them."""

    def forward(self, x: Tensor) -> Tensor:
        relu = F.relu
        F.relu = F.silu
        try:
            return super().forward(x)
        finally:
            F.relu = relu


class ZerosLast(nn.Module):
    def __init__(self, extra: int) -> None:
        super().__init__()
        self.extra = extra

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, self.extra))


def like(alike: type[PublicResNet], **options: Any) -> PublicResNet:
    source = alike((2, 1, 1), (4, 8, 16), 5, **options)
    source.load_state_dict(network(**options).state_dict())
    return source.eval()


def early_stride() -> PublicResNet:
    source = network(imagenet=True, bottleneck=True, kind="conv", shortcut="downsample", classifier="fc")
    for stage in (source.layer2, source.layer3):
        assert isinstance(stage, nn.Sequential)
        for name, stride in (("conv1", (2, 2)), ("conv2", (1, 1))):
            conv = stage[0].get_submodule(name)
            assert isinstance(conv, nn.Conv2d)
            conv.stride = stride
    return source


def with_epsilon() -> PublicResNet:
    source = network()
    for layer in source.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.eps = 1e-3
            assert layer.running_var is not None
            layer.running_var *= 0.01  # as narrow as in trained networks, where the epsilon tells
    return source


def zeros_last() -> PublicResNet:
    source = network()
    for stage, extra in ((source.layer2, 4), (source.layer3, 8)):
        assert isinstance(stage, nn.Sequential)
        stage[0].shortcut = ZerosLast(extra)
    return source


IMAGENET = {"imagenet": True, "kind": "conv", "shortcut": "downsample", "classifier": "fc"}
ALIKE: dict[str, tuple[Callable[[], PublicResNet], str]] = {
    "3x3 stem with max-pool": (lambda: like(PooledStem), "a 3x3 stem of stride 1 with a 3x3 max-pool"),
    "7x7 stem without": (lambda: like(WholeStem, **IMAGENET), "a 7x7 stem of stride 2 without max-pool"),
    "ResNet v1": (early_stride, "first 1x1 convolution"),
    "SiLU": (lambda: like(SwishStem), "SiLU instead of ReLU"),
    "epsilon": (with_epsilon, "batch norm's epsilon 0.001"),
    "zeros at the end": (zeros_last, "pass --shortcut zeros_last"),
    "pooled shortcut": (lambda: network(kind="avgpool"), "pass --shortcut avgpool"),
}


@pytest.mark.parametrize(("make", "difference"), list(ALIKE.values()), ids=list(ALIKE))
def test_a_look_alike_is_found_out(tmp_path: Path, make: Callable[[], PublicResNet], difference: str) -> None:
    """Oracle: the look-alike's own logits: they are not met, and the message says by how much and what is different."""
    path, reference = saved(tmp_path, make(), size=64)
    with pytest.raises(VerificationError, match=r"got differences up to .*same class for \d of 6") as error:
        checked(path, reference)
    assert difference in str(error.value)


@pytest.mark.parametrize("options", [{}, {"kind": "conv"}, IMAGENET], ids=["option_a", "conv", "imagenet"])
def test_the_network_that_was_assumed_passes(tmp_path: Path, options: dict[str, Any]) -> None:
    """Oracle: the same arithmetic, written independently."""
    path, reference = saved(tmp_path, network(**options), size=64)
    record = checked(path, reference)
    assert record["max_logit_difference"] < 0.1 * record["tolerance"]
    assert (record["images"], record["same_class"]) == (6, 6)


def test_the_choice_that_is_named_passes(tmp_path: Path) -> None:
    """Oracle: the remedy of the message, for both kinds of look-alike that can be chosen."""
    path, reference = saved(tmp_path, network(kind="avgpool"))
    checked(path, reference, shortcut="avgpool")
    path, reference = saved(tmp_path, zeros_last())
    checked(path, reference, shortcut="zeros_last")


def test_images_check_the_preprocessing(tmp_path: Path) -> None:
    """Oracle: logits of images that the owner normalised by 0.5; the message names that, and with it they are met."""
    source = network()
    torch.save(source.state_dict(), tmp_path / "model.pth")
    images = pixels()
    np.savez(tmp_path / "logits.npz", images=images, logits=logits_of(source, HALVES(images)))
    with pytest.raises(VerificationError, match=r"pass --mean 0\.5,0\.5,0\.5 --std 0\.5,0\.5,0\.5"):
        checked(tmp_path / "model.pth", tmp_path / "logits.npz")
    record = checked(tmp_path / "model.pth", tmp_path / "logits.npz", preprocess=HALVES)
    assert "preprocessing included" in record["inputs"]


def test_a_rounded_reference(tmp_path: Path) -> None:
    """Oracle: the same network in bfloat16: not the same numbers, and what they may come from."""
    path, reference = saved(tmp_path, network(kind="conv"))
    inputs = HALVES.normalise(pixels())
    logits = network(kind="conv").bfloat16()(torch.from_numpy(inputs).bfloat16()).float().detach().numpy()
    np.savez(reference, inputs=inputs, logits=logits)
    with pytest.raises(VerificationError, match="TF32 or half precision"):
        checked(path, reference)


def test_logits_of_the_first_images_of_a_data_set(tmp_path: Path) -> None:
    """Oracle: the source's logits for the data set's images; without a data set, what is missing is said."""
    source, images = network(), pixels(8)
    torch.save(source.state_dict(), tmp_path / "model.pth")
    np.savez(tmp_path / "logits.npz", logits=logits_of(source, HALVES(images[:5])))
    dataset = Dataset("folder", "test", tuple("abcde"), np.zeros(8, np.int64), images)
    assert checked(tmp_path / "model.pth", tmp_path / "logits.npz", dataset, preprocess=HALVES)["images"] == 5
    with pytest.raises(CheckpointError, match="logits alone"):
        checked(tmp_path / "model.pth", tmp_path / "logits.npz")


@pytest.mark.filterwarnings("ignore")  # of torch's older exporter, which takes 0.1 s
@pytest.mark.parametrize(("channels", "batch"), [(3, None), (1, None), (3, 4)], ids=["rgb", "grey", "fixed-batch"])
def test_an_onnx_graph(tmp_path: Path, channels: int, batch: int | None) -> None:
    """Oracle: the graph that torch exports of the source, and of a look-alike."""
    source, other = with_epsilon(), with_epsilon()
    for layer in source.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.eps = 1e-5
    for model in (source, other):
        if channels == 1:
            torch.manual_seed(3)
            model.conv1 = nn.Conv2d(1, 4, 3, padding=1, bias=False)
    torch.save(source.state_dict(), tmp_path / "model.pth")
    for name, model in (("same", source), ("other", other)):
        torch.onnx.export(
            model.eval(),
            (torch.zeros(batch or 2, channels, 32, 32),),
            str(tmp_path / f"{name}.onnx"),
            dynamo=False,
            input_names=["x"],
            dynamic_axes=None if batch else {"x": {0: "n"}},
        )
    assert checked(tmp_path / "model.pth", tmp_path / "same.onnx")["images"] == 16
    with pytest.raises(VerificationError, match=r"epsilon 0\.001"):
        checked(tmp_path / "model.pth", tmp_path / "other.onnx")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.zeros((2, 5))}, "no logits"),
        ({"logits": np.zeros((2, 7)), "inputs": np.zeros((2, 3, 32, 32))}, r"logits: got float64 \(2, 7\)"),
        ({"logits": np.full((2, 5), 0.2), "inputs": np.zeros((2, 3, 32, 32))}, "probabilities.*leave the softmax out"),
        ({"logits": np.full((2, 5), np.nan), "inputs": np.zeros((2, 3, 32, 32))}, "not finite"),
        ({"logits": np.ones((2, 5)), "images": np.zeros((2, 32, 32, 3))}, r"images: got float64"),
        ({"logits": np.ones((2, 5)), "inputs": np.zeros((3, 3, 32, 32))}, r"inputs: got float64 \(3, 3, 32, 32\)"),
        ({"logits": np.array([{}, {}], dtype=object)}, "damaged, or no .npz of numbers"),
    ],
)
def test_references_that_are_none(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    """Oracle: the sentence that says what is wrong with the reference; a pickle inside it is not read."""
    torch.save(network().state_dict(), tmp_path / "model.pth")
    np.savez(tmp_path / "logits.npz", allow_pickle=True, **arrays)
    with pytest.raises(CheckpointError, match=message):
        checked(tmp_path / "model.pth", tmp_path / "logits.npz")


@pytest.mark.parametrize(
    ("name", "content"), [("a.txt", b"1,2,3"), ("a.onnx", b"not a graph"), ("a.npz", b"PK\x03\x04")]
)
def test_files_that_are_no_reference(tmp_path: Path, name: str, content: bytes) -> None:
    """Oracle: one CheckpointError that names the file."""
    torch.save(network().state_dict(), tmp_path / "model.pth")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=name):
        checked(tmp_path / "model.pth", tmp_path / name)
    with pytest.raises(CheckpointError, match="cannot be read"):
        checked(tmp_path / "model.pth", tmp_path / "missing.npz")
