"""LCCL as a FLOPs reference: the formula, the counted convolutions, the measured zeros, and the line it prints."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import tiny_checkpoint, tiny_model
from torch.nn import functional as F

from bdexport.architecture import BlockKind, resnet_spec
from bdexport.checkpoint import save_checkpoint
from bdexport.cli.main import main
from bdexport.errors import UsageError
from bdexport.models.flops import count_flops
from bdexport.models.lccl import convolution_flops, lccl_flops, lccl_reference, zero_shares
from bdexport.models.pair import BlockDropNet
from bdexport.models.resnet import BasicBranch, Block, BottleneckBranch

SIZE = (16, 24)


def images(count: int = 5) -> torch.Tensor:
    return torch.randn(count, 3, *SIZE, generator=torch.Generator().manual_seed(0))


def test_formula_by_hand() -> None:
    """Oracle: two convolutions, by hand; full zeros leave the cheap layers and what has none."""
    convolutions, areas = np.array([900.0, 90.0]), np.array([9.0, 9.0])
    got = lccl_flops(1000.0, convolutions, areas, np.array([[0.0, 0.0], [0.5, 1.0], [1.0, 1.0]]))
    assert got.tolist() == [1000 + 110, 1000 + 110 - 540, 10 + 110]


def test_counted_convolutions_are_those_of_the_branches() -> None:
    """Oracle: the FLOPs table of ResNet-20, whose branches are nothing but two 3x3 convolutions each."""
    model = BlockDropNet(resnet_spec("resnet20")).eval()
    flops = convolution_flops(model, (32, 32))
    assert len(flops) == 18
    assert flops.reshape(9, 2).sum(axis=1).tolist() == list(count_flops(model, (32, 32)).branches)


@pytest.mark.parametrize("kind", ["basic", "bottleneck"])
def test_measured_zeros_are_those_of_the_activations(kind: BlockKind) -> None:
    """Oracle: the activations computed layer by layer, image by image."""
    model = tiny_model(block=kind, shortcut="conv")
    got = zero_shares(model, [(images()[:3], torch.zeros(3)), (images()[3:], torch.zeros(2))])
    expected = []
    with torch.no_grad():
        for image in images():
            x, row = model.network.stem(image[None]), []
            for block in model.network.blocks:
                assert isinstance(block, Block)
                branch = block.branch
                inner = F.relu(branch.bn1(branch.conv1(x)))
                x = block(x)
                if isinstance(branch, BasicBranch):
                    row += [(inner == 0).float().mean().item(), (x == 0).float().mean().item()]
                else:
                    assert isinstance(branch, BottleneckBranch)
                    row.append((F.relu(branch.bn2(branch.conv2(inner))) == 0).float().mean().item())
            expected.append(row)
    np.testing.assert_allclose(got, np.array(expected), atol=1e-6)
    assert 0 < got.min() < got.max() < 1


def test_reference_of_a_stated_share() -> None:
    """Oracle: the formula on the FLOPs table: branches at 60 %, and a ninth of them on top."""
    model = tiny_model()
    table = count_flops(model, SIZE)
    row = lccl_reference(model, [], SIZE, stated=0.4)
    branches = sum(table.branches)
    assert row["flops"]["mean"] == pytest.approx(table.full - 0.4 * branches + branches / 9)
    assert row["flops"]["std"] == 0
    assert row["zeros"] == pytest.approx(0.4)
    assert row["zeros_are"] == "stated"
    with pytest.raises(UsageError, match=r"share of zeros: got 1\.5, expected 0 to 1"):
        lccl_reference(model, [], SIZE, stated=1.5)


def test_evaluate_prints_the_reference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: the library's own figures on the same images, and the words that keep a reference from being a result."""
    from dataclasses import replace

    from bdexport.dataset import load_dataset
    from bdexport.preprocess import Preprocess

    model = tiny_model(classes=10)
    found = replace(tiny_checkpoint(model), class_names=tuple("0123456789"), preprocess=Preprocess((16, 16)))
    save_checkpoint(tmp_path / "model.safetensors", found)
    line = ["evaluate", str(tmp_path), "--dataset", "digits", "--images", "20", "--json", "-"]
    assert main([*line, "--reference", "lccl", "--reference", "lccl=0.25"]) == 0
    captured = capsys.readouterr()
    rows = json.loads(captured.out)["reference"]
    digits = load_dataset("digits", None, "test", limit=20)
    x = torch.from_numpy(found.preprocess(digits.arrays(found.preprocess)))
    expected = lccl_reference(model, [(x, torch.zeros(20))], (16, 16))
    assert rows["lccl"]["flops"]["mean"] == pytest.approx(expected["flops"]["mean"], rel=1e-4)
    assert rows["lccl=0.25"]["zeros"] == pytest.approx(0.25)
    assert "no such network is run" in captured.err
    assert captured.err.count("published: inference accelerated by 32 %") == 1


@pytest.mark.parametrize("word", ["sact", "lccl=", "lccl=x", "lccl=1.2", "lccl=nan"])
def test_unknown_references_are_refused(word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: one line, exit code 2, before the checkpoint is looked for."""
    assert main(["evaluate", str(tmp_path / "none"), "--dataset", "digits", "--reference", word]) == 2
    assert f"--reference: got '{word}'" in capsys.readouterr().err
