"""The networks in torch: masked execution and FLOPs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from bdexport.architecture import ResNetSpec, policy_spec, resnet_spec
from bdexport.errors import UsageError
from bdexport.models.flops import count_flops
from bdexport.models.pair import BlockDropNet
from bdexport.models.resnet import ROW_MULTIPLE, Block, ResNet

TINY = ResNetSpec("cifar", "basic", (2, 2, 2), (8, 16, 16), "option_a", 10)


def blocks_of(network: ResNet) -> list[Block]:
    return [block for block in network.blocks if isinstance(block, Block)]


def one_by_one(network: ResNet, images: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """The definition, image by image: relu(shortcut + branch) if kept, else the shortcut."""
    logits = []
    for image, mask in zip(images, masks, strict=True):
        x = network.stem(image[None])
        for block, keep in zip(blocks_of(network), mask, strict=True):
            shortcut = block.shortcut(x)
            if keep:
                x = F.relu(shortcut + block.branch(x))
            else:
                x = F.relu(shortcut) if block.relu_when_dropped else shortcut
        logits.append(network.head(x))
    return torch.cat(logits)


@pytest.mark.parametrize("shortcut", ["avgpool", "option_a", "zeros_last", "conv"])
@pytest.mark.parametrize("rule", ["shortcut", "shortcut_relu"])
@pytest.mark.parametrize("kind", ["basic", "bottleneck"])
def test_masked_batch_equals_the_definition(shortcut: str, rule: str, kind: str) -> None:
    """Oracle: the definition applied image by image, for random masks and for all kept and all dropped."""
    torch.manual_seed(0)
    spec = ResNetSpec("cifar", kind, (2, 2, 2), (8, 8, 16), shortcut, 10, rule)  # type: ignore[arg-type]
    network = ResNet(spec).eval()
    images = torch.randn(ROW_MULTIPLE + 5, 3, 16, 16)
    masks = torch.rand(len(images), spec.num_blocks) < 0.5
    masks[0], masks[1] = True, False
    with torch.no_grad():
        expected, got = one_by_one(network, images, masks), network.forward_masked(images, masks)
    assert torch.allclose(got, expected, atol=1e-5), (got - expected).abs().max()


def test_a_masked_batch_reads_its_masks_once() -> None:
    """Oracle: the operations that torch runs: no block looks for its images, for which a GPU would be waited for."""
    network = ResNet(TINY).eval()
    masks = torch.rand(8, 6) < 0.5
    with torch.no_grad(), torch.profiler.profile() as profiled:
        network.forward_masked(torch.randn(8, 3, 16, 16), masks)
    names = [event.name for event in profiled.events()]
    assert names.count("aten::argsort") == 1
    assert not {"aten::nonzero", "aten::item"} & set(names)


def test_gradients_reach_only_the_blocks_that_run() -> None:
    """Oracle: a block that no image keeps has no gradient; one that some keep has."""
    network = ResNet(TINY)
    masks = torch.ones(4, 6, dtype=torch.bool)
    masks[:, 1] = False
    masks[:2, 2] = False
    network.forward_masked(torch.randn(4, 3, 16, 16), masks).sum().backward()  # type: ignore[no-untyped-call]
    gradients = [block.branch.conv1.weight.grad for block in blocks_of(network)]
    assert gradients[1] is None
    assert gradients[2] is not None
    assert gradients[2].abs().sum() > 0


def test_batch_norm_sees_only_images_that_keep_the_block() -> None:
    """Oracle: images that drop a block leave its running statistics as they were."""
    network = ResNet(TINY).train()
    masks = torch.ones(4, 6, dtype=torch.bool)
    masks[:, 3] = False
    network.forward_masked(torch.randn(4, 3, 16, 16), masks)
    assert blocks_of(network)[3].branch.bn1.num_batches_tracked == 0
    assert blocks_of(network)[4].branch.bn1.num_batches_tracked == 1


@pytest.mark.parametrize(
    ("name", "classes", "size", "full", "policy"),
    [
        ("resnet32", 10, 32, 1.377e8, 2.448e7),
        ("resnet110", 10, 32, 5.058e8, 2.448e7),
        ("resnet101", 1000, 224, 1.560e10, 4.72e8),
    ],
)
def test_flops_are_the_papers(name: str, classes: int, size: int, full: float, policy: float) -> None:
    """Oracle: the published counts (2 x multiply-accumulates)."""
    table = count_flops(BlockDropNet(resnet_spec(name, classes)), (size, size))
    assert table.full == pytest.approx(full, rel=2e-3)
    assert table.policy == pytest.approx(policy, rel=2e-2)


def test_flops_of_masks() -> None:
    """Oracle: all kept is the full network plus the policy; all dropped leaves stem, shortcuts, head and policy."""
    table = count_flops(BlockDropNet(TINY), (16, 16))
    masks = np.array([[True] * 6, [False] * 6])
    kept, dropped = table.of_masks(masks)
    assert kept == table.full + table.policy
    assert dropped == table.policy + table.stem + table.head + sum(table.shortcuts)
    assert table.of_masks(masks, with_policy=False)[0] == table.full


def test_policy_of_half_resolution_costs_a_quarter() -> None:
    """Oracle: FLOPs of convolutions scale with the pixels."""
    spec = resnet_spec("resnet32")
    half = BlockDropNet(spec, policy_spec(spec).__class__(**{**vars(policy_spec(spec)), "input_pool": 2}))
    whole = BlockDropNet(spec)
    assert count_flops(half, (32, 32)).policy == pytest.approx(count_flops(whole, (32, 32)).policy / 4, rel=0.01)


def test_policy_with_a_strided_stem_sees_every_pixel_at_a_quarter_of_the_cost() -> None:
    """Oracles: FLOPs of all but the stem scale with its outputs' pixels; the gradient with respect to the image."""
    spec = resnet_spec("resnet32")
    strided = BlockDropNet(spec, replace(policy_spec(spec), stem_stride=2))
    assert count_flops(strided, (32, 32)).policy < count_flops(BlockDropNet(spec), (32, 32)).policy / 3.5
    image = torch.rand(1, 3, 32, 32, requires_grad=True)
    strided.policy.eval().stem(image).square().sum().backward()
    assert image.grad is not None
    assert (image.grad != 0).any(dim=1).all()


def test_imagenet_policies_have_a_stem_of_their_own() -> None:
    """Oracle: what is refused, and the remedy named."""
    with pytest.raises(UsageError, match=r"stem_stride.*input_pool=2"):
        replace(policy_spec(resnet_spec("resnet50")), stem_stride=2)


def test_counting_leaves_the_model_as_it_was() -> None:
    """Oracle: training mode and hooks are restored."""
    model = BlockDropNet(TINY).train()
    count_flops(model, (16, 16))
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())
