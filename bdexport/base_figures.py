"""What the base reached that a network was trained from: every result is held against it first.

``full`` is the network as finetuning left it, with every block kept. What training cost shows only beside the base.
Needs neither torch nor numpy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from bdexport.errors import BdexportError
from bdexport.zoo import zoo_card, zoo_names

MEASURED, RECORDED, OF_CARD = "measured now", "recorded by train", "the zoo's card"


@dataclass(frozen=True)
class BaseFigures:
    """``accuracy`` (percent) of the base, every block kept, on ``images`` of a split.

    ``full`` and ``dynamic``: the trained network on those same images, with every block kept and under its policy (or
    whatever decides), where that is known. ``here``: those are the images that the result beside it is of.
    """

    name: str
    accuracy: float
    dataset: str
    split: str
    images: int
    how: str
    here: bool
    full: float | None = None
    dynamic: float | None = None

    def to_json(self) -> dict[str, Any]:
        """A JSON object with the fields of this class."""
        return asdict(self)

    def sentence(self) -> str:
        """``your base (NAME): 92.63 % of 10000 test images; ..``: what the trained network lost or gained on it."""
        text = f"your base ({self.name}): {self.accuracy:.2f} % of {self.images} {self.split} images, {self.how}"
        sides = (("every block kept", self.full), ("with blocks dropped", self.dynamic))
        known = [f"{what} {value:.2f} % ({points(value, self.accuracy)})" for what, value in sides if value is not None]
        return f"{text}; there {', '.join(known)}" if known else text


def points(accuracy: float, base: float) -> str:
    """``-1.22 points``."""
    return f"{accuracy - base:+.2f} points"


def known_base(
    training: Mapping[str, Any], sha256: str | None, dataset: str, split: str, images: int, mask: str | None = None
) -> BaseFigures | None:
    """What is on record about the base of a trained network, best of the very images that a result is of.

    ``training``: the checkpoint's record; ``sha256``: of its file, which a card of the zoo may be about; ``mask``: the
    one that a bundle runs for every image, about which a record of a policy, or of another mask, says nothing.
    None where nothing is known: an older version's run, or a network that was not trained from a base.
    """
    found = [one for one in (_of_card(sha256), _of_record(training)) if one is not None]
    if mask is not None and mask != _trained_mask(training):
        found = [BaseFigures(**(asdict(one) | {"dynamic": None})) for one in found]
    for one in found:
        if (one.dataset, one.split, one.images) == (dataset, split, images):
            return BaseFigures(**(asdict(one) | {"here": True}))
    return found[0] if found else None


def was_trained(training: Mapping[str, Any]) -> bool:
    """Whether a checkpoint has a base that its results could be held against."""
    return isinstance(training.get("settings"), dict) and training.get("base_measured", 0) is not None


def _of_record(training: Mapping[str, Any]) -> BaseFigures | None:
    measured, validation = training.get("base_measured"), training.get("validation")
    if not isinstance(measured, dict):
        return None
    validation = validation if isinstance(validation, dict) else {}
    dynamic: Any = validation.get("policy") or validation.get("gates") or next(iter(_fixed(validation)), {})
    return _checked(
        name=str(training.get("base") or "pretrained in the same run"),
        accuracy=measured.get("accuracy"),
        dataset=str(measured.get("dataset")),
        split=str(measured.get("split")),
        images=measured.get("images"),
        how=RECORDED,
        full=validation.get("full_accuracy"),
        dynamic=dynamic.get("accuracy") if isinstance(dynamic, dict) else None,
    )


def _trained_mask(training: Mapping[str, Any]) -> str | None:
    trained = training.get("fixed_mask")
    return str(trained.get("mask")) if isinstance(trained, dict) else None


def _fixed(validation: Mapping[str, Any]) -> list[Any]:
    fixed = validation.get("fixed")
    return list(fixed.values()) if isinstance(fixed, dict) else []


def _of_card(sha256: str | None) -> BaseFigures | None:
    for name in zoo_names() if sha256 is not None else ():
        try:
            card = zoo_card(name)
        except BdexportError:  # a damaged card is said to be so by the commands that need it
            continue
        if card["sha256"] == sha256:
            try:
                return figures_of_card(card)
            except (LookupError, TypeError, AttributeError):  # damaged, as above
                return None
    return None


def figures_of_card(card: Mapping[str, Any]) -> BaseFigures | None:
    """The network that a card's model goes back to, beside the model's own result where that is of the same images."""
    result = card["result"]
    base = card["base"].get("origin") or card["base"]
    same = (base["split"], base["images"]) == (result["split"], result["images"])
    return _checked(
        name=base["name"],
        accuracy=base["accuracy"],
        dataset=result["dataset"],
        split=base["split"],
        images=base["images"],
        how=OF_CARD,
        full=result["full"]["accuracy"] if same else None,
        dynamic=result["policy"]["accuracy"] if same else None,
    )


def _is_sound(number: Any) -> bool:
    return isinstance(number, int | float) and not isinstance(number, bool) and 0 <= number < 2**53


def _checked(*, accuracy: Any, images: Any, full: Any, dynamic: Any, **others: str) -> BaseFigures | None:
    """Records are written by others, too: without sound figures there is nothing to show."""
    numbers = [value for value in (accuracy, images, full, dynamic) if value is not None]
    if accuracy is None or not isinstance(images, int) or not all(_is_sound(number) for number in numbers):
        return None
    return BaseFigures(accuracy=accuracy, images=images, full=full, dynamic=dynamic, here=False, **others)
