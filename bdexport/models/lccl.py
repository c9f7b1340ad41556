"""LCCL as a FLOPs reference: what low-cost collaborative layers could spare; no such network is built or trained here.

X. Dong, J. Huang, Y. Yang, S. Yan, *More is Less: A More Complicated Network with Less Inference Complexity*, CVPR
2017: beside a convolution runs a cheap one whose ReLU output is multiplied with it, element by element. Where the cheap
one gives zero, the costly one need not be computed. With a 1x1 convolution as the cheap one, a convolution of F FLOPs
with a k x k kernel then costs (1 - z) F + F / k^2, where z is the share of zeros.

How large z is can only be measured on a network trained that way, or bounded: here z is stated by the caller, or it is
the share of each convolution's outputs that the given network's own ReLU sets to zero, as if the cheap layers foresaw
exactly those. That leaves the outputs and the accuracy as they are; a network trained for it may be sparser.

As in the authors' code, every 3x3 convolution inside a residual block has such a layer, the stem and the shortcuts have
none; nor have a bottleneck's 1x1 convolutions, for which it would cost as much as they do. Their pre-activation blocks
have a ReLU before each convolution, ours behind: the last convolution of a basic block is counted by the zeros of the
block's output.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bdexport.errors import UsageError
from bdexport.models.flops import count_flops
from bdexport.models.pair import BlockDropNet
from bdexport.models.resnet import BasicBranch, Block, BottleneckBranch, dtype_device

PUBLISHED = {  # the abstract's figure; those of single networks are not repeated here
    "inference_accelerated_percent": 32.0,
    "source": "Dong et al., CVPR 2017, abstract: the average over their networks",
}


@dataclass(frozen=True)
class _Site:
    """A convolution that would get a collaborative layer, and the module whose output tells what the ReLU keeps."""

    convolution: nn.Conv2d
    sign_of: nn.Module


def _sites(model: BlockDropNet) -> list[_Site]:
    sites = []
    for block in model.network.blocks:
        assert isinstance(block, Block)
        if isinstance(block.branch, BasicBranch):
            sites += [_Site(block.branch.conv1, block.branch.bn1), _Site(block.branch.conv2, block)]
        else:
            assert isinstance(block.branch, BottleneckBranch)
            sites.append(_Site(block.branch.conv2, block.branch.bn2))
    return sites


@contextmanager
def _outputs(modules: list[nn.Module]) -> Iterator[dict[int, Tensor]]:
    """What each of ``modules`` gave in the latest forward pass, by its place in the list."""
    latest: dict[int, Tensor] = {}

    def hook(place: int) -> Any:
        return lambda _module, _inputs, output: latest.__setitem__(place, output)

    handles = [module.register_forward_hook(hook(place)) for place, module in enumerate(modules)]
    try:
        yield latest
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def convolution_flops(model: BlockDropNet, image_size: tuple[int, int]) -> NDArray[np.float64]:
    """FLOPs (2 x multiply-accumulates) of one image in each of the L convolutions that LCCL applies to, (L,)."""
    layers = [site.convolution for site in _sites(model)]
    dtype, device = dtype_device(model)
    with _outputs(list(layers)) as outputs:
        model.network(torch.zeros(1, 3, *image_size, dtype=dtype, device=device))
        sizes = [outputs[place][0].numel() for place in range(len(layers))]
    kernels = [layer.in_channels * layer.kernel_size[0] * layer.kernel_size[1] for layer in layers]
    return 2.0 * np.array(sizes, dtype=np.float64) * np.array(kernels, dtype=np.float64)


@torch.no_grad()
def zero_shares(model: BlockDropNet, batches: Iterable[tuple[Tensor, Tensor]]) -> NDArray[np.float64]:
    """Share of zeros behind each of the L convolutions for each of N images, (N, L); the model must be in eval mode."""
    sites = _sites(model)
    rows = []
    with _outputs([site.sign_of for site in sites]) as outputs:
        for images, _labels in batches:
            model.network(images)
            shares = [(outputs[place] <= 0).float().flatten(1).mean(dim=1) for place in range(len(sites))]
            rows.append(torch.stack(shares, dim=1).double().cpu().numpy())
    return np.concatenate(rows)


def lccl_flops(
    full: float, convolutions: NDArray[np.float64], kernel_areas: NDArray[np.float64], zeros: NDArray[np.float64]
) -> NDArray[np.float64]:
    """FLOPs per image, (N,), of a network of ``full`` FLOPs with a 1x1 LCCL at each of L convolutions.

    ``convolutions`` (L,): their FLOPs; ``kernel_areas`` (L,): k^2; ``zeros`` (N, L): the shares that need no computing.
    """
    return full - zeros @ convolutions + float((convolutions / kernel_areas).sum())


def lccl_reference(
    model: BlockDropNet,
    batches: Iterable[tuple[Tensor, Tensor]],
    image_size: tuple[int, int],
    stated: float | None = None,
) -> dict[str, Any]:
    """The reference as ``evaluate --json`` writes it: FLOPs mean and deviation over images, zero shares, what it is.

    ``stated``: the share of zeros everywhere; None: measured on ``batches``. The model must be in eval mode. Raises
    :class:`UsageError` for a share outside 0..1.
    """
    if stated is not None and not 0 <= stated <= 1:
        raise UsageError("reference lccl: share of zeros", got=stated, expected="0 to 1")
    convolutions = convolution_flops(model, image_size)
    areas = np.array([float(np.prod(site.convolution.kernel_size)) for site in _sites(model)])
    zeros = zero_shares(model, batches) if stated is None else np.full((1, len(convolutions)), stated)
    full = count_flops(model, image_size).full
    flops = lccl_flops(full, convolutions, areas, zeros)
    return {
        "flops": {"mean": float(flops.mean()), "std": float(flops.std())},
        "saved_percent": float(100 * (1 - flops.mean() / full)),
        # Weighted by what a zero saves, as the FLOPs are.
        "zeros": float((zeros @ convolutions).mean() / convolutions.sum()),
        "zeros_by_layer": [float(share) for share in zeros.mean(axis=0)],
        "zeros_are": "measured behind the ReLUs of this network" if stated is None else "stated",
        "collaborative_layer": "1x1 convolution",
        "published": PUBLISHED,
    }
