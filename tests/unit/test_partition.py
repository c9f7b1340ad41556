"""The parts are the network: run one after another they give what the whole model gives."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from tiny import SIZE, tiny_model

from bdexport.architecture import DroppedTransition, Shortcut, resnet_spec
from bdexport.errors import ExportError, UsageError
from bdexport.models.pair import BlockDropNet
from bdexport.partition import model_parts, part_module, part_specs, transitions
from bdexport.parts import path_parts
from bdexport.preprocess import Preprocess

SHORTCUTS: tuple[Shortcut, ...] = ("avgpool", "option_a", "zeros_last", "conv")
RULES: tuple[DroppedTransition, ...] = ("shortcut", "shortcut_relu")


@pytest.mark.parametrize(("shortcut", "rule"), list(itertools.product(SHORTCUTS, RULES)))
def test_every_path_equals_the_masked_network(shortcut: Shortcut, rule: DroppedTransition) -> None:
    """Oracle: ``ResNet.forward_masked`` for all 8 masks of a 3-block network."""
    model = tiny_model(shortcut=shortcut, rule=rule)
    x = torch.randn(2, 3, *SIZE)
    for mask in itertools.product([False, True], repeat=3):
        with torch.no_grad():
            y = x
            for part in path_parts(mask, transitions(model)):
                y = part_module(model, part)(y)
            expected = model.network.forward_masked(x, torch.tensor([mask, mask]))
        np.testing.assert_allclose(y, expected, rtol=0, atol=1e-6, err_msg=str(mask))


@pytest.mark.parametrize("rule", RULES)
def test_dropped_transition_follows_the_rule(rule: DroppedTransition) -> None:
    """Oracle: only the rule with a ReLU never gives a negative value behind a convolutional shortcut."""
    model = tiny_model(shortcut="conv", rule=rule)
    with torch.no_grad():
        y = part_module(model, "shortcut_01")(torch.rand(2, 4, *SIZE))
    assert (float(y.min()) >= 0) == (rule == "shortcut_relu")


def test_policy_and_full() -> None:
    """Oracle: the model's own policy and undropped forward."""
    model = tiny_model()
    x = torch.randn(2, 3, *SIZE)
    with torch.no_grad():
        torch.testing.assert_close(part_module(model, "policy")(x), model.policy(x))
        torch.testing.assert_close(part_module(model, "full")(x), model.network(x))
        assert 0 < float(model.policy(x).min()) <= float(model.policy(x).max()) < 1


def test_specs_of_resnet32() -> None:
    """Oracle: the shapes in the ResNet paper, table 6, for 32x32 images."""
    model = BlockDropNet(resnet_spec("resnet32")).eval()
    specs = part_specs(model, Preprocess())
    shapes = {part: (x.shape, y.shape) for part, (x, y) in specs.items()}
    assert tuple(specs) == model_parts(model)
    assert shapes["policy"] == ((3, 32, 32), (15,))
    assert shapes["stem"] == ((3, 32, 32), (16, 32, 32))
    assert shapes["block_04"] == ((16, 32, 32), (16, 32, 32))
    assert shapes["block_05"] == shapes["shortcut_05"] == ((16, 32, 32), (32, 16, 16))
    assert shapes["block_10"] == shapes["shortcut_10"] == ((32, 16, 16), (64, 8, 8))
    assert shapes["head"] == ((64, 8, 8), (10,))
    assert shapes["full"] == ((3, 32, 32), (10,))
    assert {spec.name for pair in specs.values() for spec in pair} == {"x", "y"}


def test_height_and_width_are_not_exchanged() -> None:
    """Oracle: the preprocessing's (height, width)."""
    assert part_specs(tiny_model(), Preprocess(size=SIZE))["stem"][1].shape == (4, *SIZE)


def test_image_too_odd_for_the_shortcut() -> None:
    """Oracle: pooling rounds an odd size down, the strided convolution up; the part is named."""
    with pytest.raises(ExportError, match="policy: does not run"):
        part_specs(tiny_model(shortcut="avgpool"), Preprocess(size=(25, 25)))


def test_unknown_part() -> None:
    """Oracle: a block that is no transition has no shortcut part."""
    with pytest.raises(UsageError, match="shortcut_00"):
        part_module(tiny_model(), "shortcut_00")


def test_shortcuts_that_round_down_are_refused() -> None:
    """Oracle: average pooling makes 1 row of 3, a strided convolution 2: PyTorch would add them by broadcasting."""
    model = tiny_model("imagenet", shortcut="avgpool", stages=(1, 1, 1))
    with pytest.raises(ExportError, match=r"another shape after a dropped block .*--size"):
        part_specs(model, Preprocess(size=(24, 32)))
    part_specs(model, Preprocess(size=(32, 32)))
