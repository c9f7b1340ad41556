"""Mask quantisation: every mask that the policy draws is replaced by one of a few that run as one engine.

``cover``: by the cheapest target that keeps at least the blocks that the mask keeps; the full network is always one.
``budget``: masks that were seen on the calibration set by the targets that were found for them within a loss of
accuracy, any other mask as ``cover`` has it. Applied by the run time after the policy. Numpy only.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bdexport.bundle_checks import Reader, rule_error
from bdexport.fused import MOST_FUSED, checked_mask
from bdexport.parts import Masks, mask_from_text

COVER, BUDGET = "cover", "budget"
RULES = (COVER, BUDGET)
CACHED_MASKS = 65_536  # per mapping; a few hundred bytes each


@dataclass(frozen=True)
class MaskMapping:
    """``targets``: the masks that may run, cheapest first, the full network last; ``seen``: mask -> target, by name.

    ``facts``: what was measured when it was made (accuracy, blocks, the table that it was chosen from); not read.
    """

    rule: str
    targets: tuple[str, ...]
    seen: dict[str, str] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As the manifest has it; :func:`mapping_from_json` reads it back."""
        return {"rule": self.rule, "targets": list(self.targets), "seen": self.seen, "facts": self.facts}


class MaskMapper:
    """Applies a mapping; may be called from several threads."""

    def __init__(self, mapping: MaskMapping, num_blocks: int) -> None:
        self._targets = np.array([mask_from_text(text, num_blocks) for text in mapping.targets])
        self._known = {
            mask_from_text(mask, num_blocks).tobytes(): mapping.targets.index(target)
            for mask, target in mapping.seen.items()
        }

    def __call__(self, masks: Masks) -> Masks:
        """What runs instead of ``masks`` (N, K): bool (N, K), fresh."""
        if len(masks) == 1:
            only: Masks = self._targets[[self._target(masks[0])]]
            return only
        rows, inverse = np.unique(masks, axis=0, return_inverse=True)
        found: Masks = self._targets[[self._target(row) for row in rows]][inverse.reshape(-1)]
        return found

    def _target(self, mask: Masks) -> int:
        key = mask.tobytes()
        number = self._known.get(key)
        if number is None:
            number = cover_target(mask, self._targets)
            if len(self._known) < CACHED_MASKS:
                self._known[key] = number
        return number


def cover_target(mask: Masks, targets: Masks) -> int:
    """The first of ``targets`` (T, K), cheapest first, that keeps every block that ``mask`` (K,) keeps."""
    return int((targets | ~mask).all(axis=1).argmax())


def mapping_from_json(data: Any, num_blocks: int, where: str) -> MaskMapping:
    """Inverse of :meth:`MaskMapping.to_json`. Raises BundleError (R17)."""
    reader = Reader(data, f"{where}: mask_mapping")
    targets = reader.texts("targets", 1, "R17")
    mapping = MaskMapping(
        reader.choice("rule", RULES, "R17"),
        targets,
        reader.text_mapping("seen", "R17"),
        reader.mapping("facts", "R17"),
    )
    reader.finish()
    for text in (*targets, *mapping.seen):
        checked_mask(text, num_blocks, reader.where, "R17")
    if targets[-1] != "1" * num_blocks or len(set(targets)) != len(targets) or len(targets) > MOST_FUSED + 1:
        expected = f"distinct masks, at most {MOST_FUSED} and the one that keeps every block, which comes last"
        raise rule_error("R17", f"{reader.where}: targets", got=targets, expected=expected)
    unknown = sorted(set(mapping.seen.values()) - set(targets))
    if unknown:
        raise rule_error("R17", f"{reader.where}: seen", got=unknown, expected="values that are among the targets")
    return mapping
