"""What a policy network costs beside the network that it decides about, and which one is taken by default.

The policy runs for every image: of what dropping blocks saves, its own cost is lost. The paper's costs 3 % of
ResNet-101, but a quarter of ResNet-18 on small images.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from bdexport.architecture import PolicySpec, ResNetSpec, policy_spec
from bdexport.config import LARGEST_POLICY_SHARE
from bdexport.models.flops import FlopsTable, count_flops
from bdexport.models.pair import BlockDropNet

POOLS = (2, 4)  # times that the image is pooled before the policy sees it
WIDTHS = (64, 48, 32, 24, 16)  # channels of its first stage; each stage has twice as many as the one before


def fitting_policy(network: ResNetSpec, image_size: tuple[int, int]) -> PolicySpec:
    """The largest policy of the paper's form for an ImageNet network that costs at most 5 % of it.

    Varied are the image's pooling and the channels. Where none is as cheap, the cheapest.
    """
    paper = policy_spec(network)
    sizes = []
    for pool in POOLS:
        for width in WIDTHS:
            spec = replace(paper, input_pool=pool, widths=tuple(width * 2**stage for stage in range(4)))
            try:
                sizes.append((policy_share(network, spec, image_size), spec))
            except RuntimeError:  # the pooled image cannot be halved as often
                continue
    fitting = [pair for pair in sizes if pair[0] <= LARGEST_POLICY_SHARE]
    if fitting:
        return max(fitting, key=lambda pair: pair[0])[1]
    return min(sizes, key=lambda pair: pair[0])[1] if sizes else paper


def policy_share(network: ResNetSpec, policy: PolicySpec, image_size: tuple[int, int]) -> float:
    """The policy's FLOPs over those of the network with every block kept."""
    with torch.random.fork_rng(devices=[]):
        table = count_flops(BlockDropNet(network, policy), image_size)
    return table.policy / table.full


def ceiling(table: FlopsTable, blocks: float) -> float:
    """How many times fewer FLOPs a network costs with its policy and, on average, so many blocks kept."""
    kept = blocks / len(table.branches)
    return table.full / (table.policy + table.full - (1 - kept) * sum(table.branches))


def cost_text(table: FlopsTable, blocks: float | None) -> str:
    """One line for a person: the policy's share, and what is left to be gained; a warning above 5 %."""
    share = table.policy / table.full
    text = f"the policy network costs {100 * share:.1f} % of the full network's FLOPs"
    if blocks is not None:
        most = ceiling(table, blocks)
        text += f": at {blocks:.1f} of {len(table.branches)} blocks on average at most {most:.2f} x fewer FLOPs"
    if share > LARGEST_POLICY_SHARE:
        text = f"warning: {text}; a smaller one: train --fresh-policy --set policy.input_pool=4, or fewer policy.widths"
    return text
