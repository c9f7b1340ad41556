"""Filter pruning: which filters go, what the rest computes, and that pruned networks are networks like any other."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tiny import SIZE, tiny_checkpoint, tiny_checkpoint_file, tiny_model
from torch import nn

import bdexport
from bdexport.architecture import BlockKind, ResNetSpec, resnet_spec
from bdexport.build import build_bundle
from bdexport.checkpoint import build_model, load_checkpoint, save_checkpoint
from bdexport.cli.main import main
from bdexport.config import (
    AdaptConfig,
    BuildConfig,
    CurriculumConfig,
    FinetuneConfig,
    FixedConfig,
    PolicyConfig,
    PrimeConfig,
    TrainConfig,
)
from bdexport.dataset import load_dataset
from bdexport.errors import CheckpointError
from bdexport.models.flops import count_flops
from bdexport.models.pair import BlockDropNet
from bdexport.models.resnet import Block
from bdexport.preprocess import Preprocess
from bdexport.prune import prune_checkpoint, pruned_widths, strongest_filters
from bdexport.train.pipeline import train
from bdexport.train.request import TrainRequest


def images(count: int = 6) -> torch.Tensor:
    return torch.randn(count, 3, *SIZE, generator=torch.Generator().manual_seed(1))


def smallest(weight: NDArray[np.float32], count: int) -> list[int]:
    """Indices of the filters with the smallest absolute weight sum, by sorting a list of plain numbers."""
    sums = [(float(np.abs(kernel.astype(np.float64)).sum()), index) for index, kernel in enumerate(weight)]
    return [index for _, index in sorted(sums)[:count]]


def silence(model: BlockDropNet, share: float) -> None:
    """Let the filters that should go give zeros, in place: they are there and contribute nothing."""
    for block in model.network.blocks:
        assert isinstance(block, Block)
        gone: list[int] = []
        for number in (1, 2) if block.spec.kind == "bottleneck" else (1,):
            weight = block.branch.get_submodule(f"conv{number}").weight.detach().clone()  # type: ignore[operator]
            if number == 2:
                weight[:, gone] = 0  # the kernels that read what conv1 has lost do not count
            gone = smallest(weight.numpy(), round(share * len(weight)))
            norm = block.branch.get_submodule(f"bn{number}")
            assert isinstance(norm, nn.BatchNorm2d)
            with torch.no_grad():
                norm.weight[gone] = 0
                norm.bias[gone] = 0


@pytest.mark.parametrize("kind", ["basic", "bottleneck"])
def test_pruned_network_is_the_network_with_the_weakest_filters_silent(kind: BlockKind) -> None:
    """Oracle: the unpruned network whose weakest filters' maps are set to zero; undropped, and under a mask."""
    model = tiny_model(block=kind, shortcut="conv", rule="shortcut_relu")
    pruned = build_model(prune_checkpoint(tiny_checkpoint(model), [0.5, 0.25], (), "x"))
    silent = tiny_model(block=kind, shortcut="conv", rule="shortcut_relu")
    first, *rest = silent.network.blocks
    for share, blocks in ((0.5, [first]), (0.25, rest)):
        whole = silent.network.blocks
        silent.network.blocks = nn.ModuleList(blocks)
        silence(silent, share)
        silent.network.blocks = whole
    masks = torch.tensor([[True, False, True]]).expand(6, -1)
    with torch.no_grad():
        for mask in (masks, torch.ones_like(masks)):
            got, expected = (net.network.forward_masked(images(), mask) for net in (pruned, silent))
            assert torch.allclose(got, expected, atol=1e-5), (got - expected).abs().max()
        assert not torch.allclose(model.network(images()), pruned.network(images()), atol=1e-2)


def test_strongest_filters_are_those_of_largest_l1_norm() -> None:
    """Oracle: by hand; of equal ones the first stays, and the order of the rest does not change."""
    weight = torch.tensor([1.0, -3.0, 2.0, -2.0]).reshape(4, 1, 1, 1)
    assert strongest_filters(weight, 2).tolist() == [1, 2]
    assert strongest_filters(weight, 3).tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("depth", "ratios", "layers", "flops", "share"),
    [
        (56, (0.1, 0.1, 0.1), (16, 20, 38, 54), 1.12e8, 10.4),
        (56, (0.6, 0.3, 0.1), (16, 18, 20, 34, 38, 54), 9.09e7, 27.6),
        (110, (0.5, 0.0, 0.0), (36,), 2.13e8, 15.9),
        (110, (0.5, 0.4, 0.3), (36, 38, 74), 1.55e8, 38.6),
    ],
)
def test_flops_are_the_published_ones(
    depth: int, ratios: tuple[float, ...], layers: tuple[int, ...], flops: float, share: float
) -> None:
    """Oracle: Li et al. 2017, Table 1, which counts multiply-accumulates (ours are two FLOPs) and layers from the stem.

    Layer 2 k + 2 is the first convolution of block k.
    """
    spec = resnet_spec(f"resnet{depth}")
    widths = pruned_widths(spec, ratios, [(layer - 2) // 2 for layer in layers])
    full, pruned = (
        count_flops(BlockDropNet(network), (32, 32)).full for network in (spec, replace(spec, inner_widths=widths))
    )
    assert pruned / 2 == pytest.approx(flops, rel=5e-3)
    assert 100 * (1 - pruned / full) == pytest.approx(share, abs=0.1)


def test_saved_and_loaded_again(tmp_path: Path) -> None:
    """Oracle: the checkpoint that was saved; its policy decides as before, and its statistics are still there."""
    source = tiny_checkpoint(tiny_model())
    pruned = prune_checkpoint(source, [0.5, 0.5], {1}, "base.safetensors")
    path = tmp_path / "pruned.safetensors"
    save_checkpoint(path, pruned)
    loaded = load_checkpoint(path)
    assert loaded.network == pruned.network == replace(source.network, inner_widths=(2, 8, 4))
    assert all(torch.equal(loaded.state[name], tensor) for name, tensor in pruned.state.items())
    assert loaded.training["policy_statistics"] == source.training["policy_statistics"]
    assert loaded.training["base_training"] == {"accuracy": 0.9}
    with torch.no_grad():
        assert torch.equal(build_model(loaded).policy(images()), tiny_model().policy(images()))


def test_pruned_twice_is_pruned_from_what_is_left() -> None:
    """Oracle: 8 filters, a quarter of them, and a third of the rest, each rounded up."""
    once = prune_checkpoint(tiny_checkpoint(tiny_model()), [0.0, 0.25], (), "x")
    assert once.network.inner_widths == (4, 6, 6)
    assert prune_checkpoint(once, [0.0, 1 / 3], (), "y").network.inner_widths == (4, 4, 4)


def test_a_pruned_checkpoint_does_not_keep_the_digest_of_its_base(tmp_path: Path) -> None:
    """Oracle: the digest is of a file that was read; other weights have none until they are saved and read."""
    path = tmp_path / "base.safetensors"
    save_checkpoint(path, tiny_checkpoint(tiny_model()))
    base = load_checkpoint(path)
    assert base.sha256 is not None
    pruned = prune_checkpoint(base, [0.0, 0.25], (), "x")
    assert pruned.sha256 is None
    save_checkpoint(path, pruned)
    assert load_checkpoint(path).sha256 not in (None, base.sha256)


def test_ordinary_files_say_nothing_of_inner_widths() -> None:
    """Oracle: the form of files written before there was pruning."""
    spec = ResNetSpec("cifar", "basic", (1,), (4,), "option_a", 3)
    assert "inner_widths" not in spec.to_json()


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        ([2, 8], "inner_widths do not fit: got .2, 8., expected 3 positive numbers"),
        ([2, 8, 0], r"network\.inner_widths\[2\]: got 0"),
        ([2, 8, 3], r"3 keys? of another shape|keys of another shape"),
        (None, r"network\.inner_widths: got null"),
        ([2, 8, 1e9], r"network\.inner_widths\[2\]"),
    ],
)
def test_wrong_inner_widths_in_a_file_are_named(widths: list[float] | None, message: str, tmp_path: Path) -> None:
    """Oracle: CheckpointError with file and field, for widths that fit neither the blocks nor the tensors."""
    import safetensors.torch

    path = tmp_path / "pruned.safetensors"
    save_checkpoint(path, prune_checkpoint(tiny_checkpoint(tiny_model()), [0.5, 0.5], {1}, "x"))
    with safetensors.safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["bdexport"])
    header.pop("sha256")
    header["network"]["inner_widths"] = widths
    safetensors.torch.save_file(safetensors.torch.load(path.read_bytes()), path, {"bdexport": json.dumps(header)})
    with pytest.raises(CheckpointError, match=message) as error:
        load_checkpoint(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("kind", "backend"), [("basic", "onnxruntime"), ("bottleneck", "onnxruntime"), ("bottleneck", "torch")]
)
def test_a_bundle_of_pruned_blocks_computes_what_the_model_computes(
    kind: BlockKind, backend: str, tmp_path: Path
) -> None:
    """Oracle: torch, dynamic and undropped, through the run-time half; the FLOP counter."""
    pruned = prune_checkpoint(tiny_checkpoint(tiny_model(block=kind, shortcut="conv")), [0.5, 0.3], (), "x")
    save_checkpoint(tmp_path / "pruned.safetensors", pruned)
    bundle = build_bundle(tmp_path / "pruned.safetensors", tmp_path / "bundle", config=BuildConfig(backend))
    assert bundle.manifest.verification is not None
    assert bundle.manifest.verification["ok"] is True
    model = build_model(pruned)
    pixels = np.random.default_rng(0).integers(0, 256, (5, *SIZE, 3), dtype=np.uint8)
    x = torch.from_numpy(bundle.manifest.preprocess(pixels))
    with bdexport.load(bundle.path) as orchestrator, torch.no_grad():
        result, full = orchestrator(pixels), orchestrator.full(pixels)
        logits, masks = model(x)
        np.testing.assert_array_equal(result.masks, masks.numpy())
        np.testing.assert_allclose(result.logits, logits.numpy(), rtol=0, atol=1e-4)
        np.testing.assert_allclose(full.logits, model.network(x).numpy(), rtol=0, atol=1e-4)
    assert bundle.manifest.parts["full"].flops == count_flops(model, SIZE).full
    assert bundle.manifest.network["inner_widths"] == list(pruned.network.inner_widths or ())


def test_tensors_that_are_not_the_networks_are_refused() -> None:
    """Oracle: the list of keys that do not fit, not a wrong result."""
    ckpt = tiny_checkpoint(tiny_model())
    state = ckpt.state | {"network.blocks.0.branch.conv1.weight": torch.ones(3, 4, 3, 3)}
    with pytest.raises(CheckpointError, match="1 key of another shape"):
        prune_checkpoint(replace(ckpt, state=state), [0.5, 0.5], (), "x")


# ---- finetuning ----------------------------------------------------------------------------------------------------


class Notes:
    """Keeps the notes of a run; shows nothing."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    @contextmanager
    def epoch(self, _title: str, _steps: int) -> Iterator[Callable[[], None]]:
        yield lambda: None

    def line(self, row: dict[str, Any]) -> None:
        """Not looked at."""

    def note(self, text: str) -> None:
        self.notes.append(text)


FINETUNING = TrainConfig(
    precision="fp32",
    recalibrate_images=0,
    adapt=AdaptConfig(epochs=0),
    curriculum=CurriculumConfig(epochs=0),
    finetune=FinetuneConfig(epochs=1, batch=64, policy_learning_rate=0.0),
    # Of a fresh policy, which this must not be:
    prime=PrimeConfig(epochs=1),
    policy=PolicyConfig(initial_keep_logit=-3.0, order_images=10),
)


def finetuned(tmp_path: Path, config: TrainConfig) -> tuple[Path, Notes]:
    """A pruned network with a policy, finetuned on digits for an epoch; run folder and notes."""
    model = tiny_model(classes=10)
    source = replace(tiny_checkpoint(model), class_names=tuple("0123456789"), preprocess=Preprocess((16, 16)))
    pruned = prune_checkpoint(source, [0.5, 0.5], {1}, "base.safetensors")
    save_checkpoint(tmp_path / "pruned.safetensors", pruned)
    initial = load_checkpoint(tmp_path / "pruned.safetensors")
    request = TrainRequest(
        network=initial.network,
        preprocess=initial.preprocess,
        train=load_dataset("digits", None, "train", limit=256),
        validation=load_dataset("digits", None, "validation", limit=64),
        out=tmp_path / "run",
        initial=initial,
        device="cpu",
    )
    reporter = Notes()
    train(request, config, reporter)
    return tmp_path / "run", reporter


def test_finetuning_goes_on_with_the_policy_of_the_pruned_checkpoint(tmp_path: Path) -> None:
    """Oracle: with a policy learning rate of 0, the policy's weights are bit for bit the base's; the network learns."""
    run, reporter = finetuned(tmp_path, FINETUNING)
    before, after = load_checkpoint(tmp_path / "pruned.safetensors"), load_checkpoint(run)
    assert after.network == before.network
    assert after.network.inner_widths == (2, 8, 4)
    for name in ("policy.fc.weight", "policy.fc.bias", "policy.blocks.0.branch.conv1.weight"):
        assert torch.equal(after.state[name], before.state[name]), name
    name = "network.blocks.0.branch.conv1.weight"
    assert not torch.equal(after.state[name], before.state[name])
    assert not any("teacher" in note for note in reporter.notes)


def test_pruned_alone_finetunes_with_every_block_kept(tmp_path: Path) -> None:
    """Oracle: the fixed mask of ones is in the record, there is no policy, and the warning names the teacher."""
    config = replace(FINETUNING, method="fixed", fixed=FixedConfig(mask="111"), distillation_weight=1.0)
    run, reporter = finetuned(tmp_path, config)
    found = load_checkpoint(run)
    assert found.policy is None
    assert found.network.inner_widths == (2, 8, 4)
    assert found.training["validation"]["fixed"]["111"]["blocks_used"]["mean"] == 3
    assert any("the teacher is the pruned base itself" in note for note in reporter.notes)


# ---- the command ---------------------------------------------------------------------------------------------------


def test_command_prunes_and_says_what_is_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: the checkpoint on disk, and the FLOP counter on its model."""
    source, out = tiny_checkpoint_file(tmp_path / "base.safetensors"), tmp_path / "pruned.safetensors"
    line = ["prune", str(source), "--per-stage", "0.5,0.25", "--skip-blocks", "1", "--out", str(out), "--json", "-"]
    assert main(line) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    found = load_checkpoint(out)
    assert found.network.inner_widths == (2, 8, 6)
    assert result["pruned"]["inner_widths"] == [2, 8, 6]
    assert result["after"]["flops"] == count_flops(build_model(found), SIZE).full < result["before"]["flops"]
    assert result["has_policy"]
    assert "8>6" in captured.err


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ([], 2, "how much to prune: --ratio or --per-stage: got neither; pass one"),
        (["--ratio", "0.5", "--per-stage", "0.5,0.5"], 2, "got both; leave one of them out"),
        (["--ratio", "1"], 2, "pruning ratio: got 1.0, expected at least 0, below 1"),
        (["--ratio", "-0.1"], 2, "pruning ratio: got -0.1"),
        (["--ratio", "nan"], 2, "pruning ratio: got nan"),
        (["--ratio", "0"], 2, "no filter would be removed"),
        (["--ratio", "0.9"], 2, "block 0: nothing left: got 0.9 of 4 filters to remove, rounded up"),
        (["--per-stage", "0.5"], 2, "pruning ratios: got 1, expected 2, one for each stage"),
        (["--per-stage", "0.5,x"], 2, "--per-stage: got '0.5,x'"),
        (["--ratio", "0.5", "--skip-blocks", "3"], 2, "--skip-blocks: got '3', expected block numbers in 0..2"),
        (["--ratio", "0.5", "--skip-blocks", "2-1"], 2, "--skip-blocks: got '2-1'"),
        (["--ratio", "0.5", "--skip-blocks", "0-2"], 2, "no filter would be removed"),
        (["--ratio", "0.5", "--arch", "resnet32"], 1, "another architecture than asked for"),
    ],
)
def test_command_refuses_what_makes_no_sense(
    words: list[str], code: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: one line on stderr, the exit code, and no file."""
    source, out = tiny_checkpoint_file(tmp_path / "base.safetensors"), tmp_path / "pruned.safetensors"
    assert main(["prune", str(source), "--out", str(out), *words]) == code
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert not out.exists()


def test_command_replaces_no_file_unless_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: the old file's bytes, and the new ones with --overwrite."""
    source = tiny_checkpoint_file(tmp_path / "base.safetensors")
    before = source.read_bytes()
    line = ["prune", str(source), "--ratio", "0.5", "--out", str(source)]
    assert main(line) == 1
    assert "exists already" in capsys.readouterr().err
    assert source.read_bytes() == before
    assert main([*line, "--overwrite"]) == 0
    assert load_checkpoint(source).network.inner_widths == (2, 4, 4)
