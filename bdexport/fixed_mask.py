"""A bundle of one fixed mask: the network of any checkpoint, and that mask in the place of its policy."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from bdexport.checkpoint import Checkpoint, build_model
from bdexport.errors import UsageError
from bdexport.evaluate import distribute_k_mask, first_k_mask
from bdexport.models.pair import BlockDropNet
from bdexport.parts import mask_from_text, mask_to_text

KEY = "fixed_mask"  # in the manifest's ``extra``
SPLIT = "all"  # of what the mask is counted on: it is every image's


def chosen_mask(wanted: str | None, checkpoint: Checkpoint) -> str | None:
    """The mask to build for: as asked, or the one that a network without a policy was finetuned under; None: a policy.

    Raises :class:`UsageError` for a text that is no mask of this network, or keeps nothing.
    """
    num_blocks = checkpoint.network.num_blocks
    if wanted is None:
        return None if checkpoint.policy is not None else _trained_under(checkpoint)
    if len(wanted) != num_blocks or set(wanted) - {"0", "1"} or "1" not in wanted:
        raise UsageError(
            "--mask",
            got=repr(wanted),
            expected=f"{num_blocks} characters, each 0 or 1 and one 1 at least: block 0 first",
            remedy="'bdexport train' and 'bdexport inspect' show masks; 'bdexport evaluate --fixed MASK' tries one",
        )
    return wanted


def _trained_under(checkpoint: Checkpoint) -> str | None:
    """Of a run with --method fixed: its mask, unless every image had another one."""
    trained: Any = checkpoint.training.get("fixed_mask")
    if not isinstance(trained, dict) or not isinstance(trained.get("mask"), str):
        return None
    name, kept, network = str(trained["mask"]), trained.get("kept"), checkpoint.network
    if not set(name) - {"0", "1"} and len(name) == network.num_blocks:
        return name
    if name == "first-k" and isinstance(kept, int):
        return mask_to_text(first_k_mask(network.num_blocks, kept))
    if name == "distribute-k" and isinstance(kept, int):
        return mask_to_text(distribute_k_mask(network.num_blocks, kept, network.stages))
    return None


def model_with_mask(checkpoint: Checkpoint, mask: str) -> BlockDropNet:
    """The checkpoint's network in eval mode, and ``mask`` in the place of what decides in it."""
    state = {name: tensor for name, tensor in checkpoint.state.items() if name.startswith("network.")}
    model = build_model(replace(checkpoint, policy=None, gates=None, state=state), with_policy=False)
    model.set_mask(mask_from_text(mask, len(mask)).tolist())
    return model.eval()


def with_mask(checkpoint: Checkpoint, mask: str) -> Checkpoint:
    """The checkpoint with the statistics of a policy that gives every image ``mask``."""
    statistics = {"split": SPLIT, "images": 1, "masks": [{"mask": mask, "count": 1, "share": 1.0}]}
    return replace(checkpoint, policy=None, training=checkpoint.training | {"policy_statistics": statistics})
