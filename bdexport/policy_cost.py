"""What a bundle can gain at most: its policy runs for every image, whatever that image's path saves."""

from __future__ import annotations

from typing import Any

import numpy as np

from bdexport.bench.results import path_share
from bdexport.bundle import Manifest
from bdexport.config import LARGEST_POLICY_SHARE
from bdexport.fused import counts_of_statistics
from bdexport.parts import FULL, POLICY, mask_from_text


def policy_cost(manifest: Manifest, times: dict[str, float] | None) -> dict[str, Any]:
    """The policy's share of the full network, and how many times cheaper images are with it at most.

    ``flops_share`` and ``flops_ceiling``; with ``times`` (``policy_ms``, ``full_ms``, batch 1) also ``time_share`` and
    ``time_ceiling``: full / (policy + full x the share of its FLOPs that the paths run). Ceilings are None where the
    checkpoint counts no masks.
    """
    parts = manifest.parts
    share = parts[POLICY].flops / max(1, parts[FULL].flops)
    path = _mean_path_share(manifest)
    found: dict[str, Any] = {"flops_share": share, "flops_ceiling": None if path is None else 1 / (share + path)}
    if times is None:
        return found
    of_time = times["policy_ms"] / max(1e-6, times["full_ms"])
    ceiling = None if path is None else 1 / (of_time + path)
    return found | {"time_share": of_time, "time_ceiling": ceiling, **times}


def _mean_path_share(manifest: Manifest) -> float | None:
    counts = counts_of_statistics(manifest.policy_statistics)
    if counts is None:
        return None
    masks = np.array([mask_from_text(text, manifest.num_blocks) for text, _ in counts.counted])
    return float(np.average(path_share(masks, manifest), weights=[count for _, count in counts.counted]))


def cost_text(cost: dict[str, Any]) -> str:
    """One line for a person; a warning where the policy is dear."""
    text = f"the policy network costs {100 * cost['flops_share']:.1f} % of the full network's FLOPs"
    if cost["flops_ceiling"] is not None:
        text += f" (with its paths at most {cost['flops_ceiling']:.2f} x fewer FLOPs)"
    if "time_share" in cost:
        text += f" and {100 * cost['time_share']:.1f} % of its time at batch 1"
        text += f" ({cost['policy_ms']:.3f} of {cost['full_ms']:.3f} ms)"
    if cost.get("time_ceiling") is not None:
        text += f": at most {cost['time_ceiling']:.2f} x faster"
    dear = max(cost["flops_share"], cost.get("time_share", 0.0)) > LARGEST_POLICY_SHARE
    return f"warning: {text}" if dear else text
