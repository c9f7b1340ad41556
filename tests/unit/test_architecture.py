"""Specs of networks by name, and what they imply."""

from __future__ import annotations

import pytest

from bdexport.architecture import (
    ResNetSpec,
    policy_spec,
    policy_spec_from_json,
    resnet_spec,
    resnet_spec_from_json,
)
from bdexport.errors import UsageError


@pytest.mark.parametrize(("name", "blocks"), [("resnet20", 9), ("resnet32", 15), ("resnet56", 27), ("resnet110", 54)])
def test_cifar_networks_have_three_equal_stages(name: str, blocks: int) -> None:
    """Oracle: He et al., 6n+2 layers are 3n blocks."""
    spec = resnet_spec(name)
    assert (spec.num_blocks, spec.name, spec.widths) == (blocks, name, (16, 32, 64))


@pytest.mark.parametrize(
    ("name", "blocks"), [("resnet18", 8), ("resnet34", 16), ("resnet50", 16), ("resnet101", 33), ("resnet152", 50)]
)
def test_imagenet_networks(name: str, blocks: int) -> None:
    """Oracle: table 1 of He et al.; 33 blocks of ResNet-101 in the text of the BlockDrop paper."""
    spec = resnet_spec(name, num_classes=1000)
    assert (spec.num_blocks, spec.name) == (blocks, name)


def test_only_shape_changes_are_transitions() -> None:
    """Oracle: stages 2 and 3 of a CIFAR network begin with a stride; a bottleneck's first block widens without one."""
    assert [b.index for b in resnet_spec("resnet32").blocks() if b.transition] == [5, 10]
    bottleneck = resnet_spec("resnet50", 1000).blocks()
    assert [b.index for b in bottleneck if b.transition] == [0, 3, 7, 13]
    assert bottleneck[0].stride == 1


@pytest.mark.parametrize("name", ["resnet33", "vgg16", "", "resnet", "resnet2"])
def test_unknown_names_are_refused(name: str) -> None:
    """Oracle: the error names what is known."""
    with pytest.raises(UsageError, match="unknown architecture"):
        resnet_spec(name)


def test_specs_survive_json() -> None:
    """Oracle: round trip."""
    spec = resnet_spec("resnet101", 1000, dropped_transition="shortcut_relu")
    assert resnet_spec_from_json(spec.to_json()) == spec
    assert policy_spec_from_json(policy_spec(spec).to_json()) == policy_spec(spec)


def test_stages_and_widths_must_agree() -> None:
    """Oracle: the constructor's own check."""
    with pytest.raises(UsageError, match="stages and widths"):
        ResNetSpec("cifar", "basic", (1, 2), (16,), "conv", 10)
