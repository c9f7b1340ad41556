"""The network on a CUDA device computes what it computes on the CPU."""

from __future__ import annotations

import pytest
import torch
from gpu_cases import DEVICE, DRY_RUN

from bdexport.architecture import resnet_spec
from bdexport.models.pair import BlockDropNet

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def needs_cuda() -> None:
    if not torch.cuda.is_available() and not DRY_RUN:
        pytest.skip(f"torch {torch.__version__} cannot use a CUDA device here")


def test_masked_forward_agrees_with_the_cpu() -> None:
    """Oracle: the CPU's logits for the same weights, images and masks; TF32 off, since it keeps 10 bits only."""
    torch.manual_seed(0)
    model = BlockDropNet(resnet_spec("resnet20")).eval()
    images, masks = torch.randn(32, 3, 32, 32), torch.rand(32, 9) < 0.5
    with torch.no_grad(), torch.backends.cudnn.flags(allow_tf32=False):  # for matrix products it is off by default
        expected = model.network.forward_masked(images, masks)
        model.to(DEVICE)
        got = model.network.forward_masked(images.to(DEVICE), masks.to(DEVICE)).cpu()
    difference = (got - expected).abs()
    assert difference.max() <= 1e-3 * expected.abs().max(), f"max {difference.max()}, mean {difference.mean()}"
