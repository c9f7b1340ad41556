"""What a checkpoint holds, and the model that is built from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import Tensor

from bdexport.architecture import GateSpec, PolicySpec, ResNetSpec
from bdexport.checkpoint.fitting import fit_own
from bdexport.dataset import Dataset, is_numbered
from bdexport.errors import CheckpointError
from bdexport.models.pair import BlockDropNet
from bdexport.preprocess import Preprocess

Form = Literal["bdexport", "public-cifar", "torchvision", "blockdrop"]


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """Weights with everything that is needed to use them.

    ``state``: float32 CPU tensors under the names of ``BlockDropNet.state_dict()`` (``network.stem.conv.weight``,
    ``policy.fc.weight``), without the ``num_batches_tracked`` counters, which inference does not need, and without
    ``policy.*`` when ``policy`` is None. ``gates``: of a comparison system that decides inside the network, its weights
    under ``gates.*``; None for all others. ``training``: JSON object, how it was trained and with which result.
    ``form``: the form of the file that it was read from. ``notes``: what loading assumed or left out, and why, and what
    the caller put in the place of what the file says; each begins with what it is about. ``sha256``: the digest of
    header and tensors that the file has and was checked against; None where it has none, and nothing was checked.
    """

    network: ResNetSpec
    policy: PolicySpec | None
    preprocess: Preprocess
    class_names: tuple[str, ...]
    state: dict[str, Tensor]
    training: dict[str, Any] = field(default_factory=dict)
    form: Form = "bdexport"
    notes: tuple[str, ...] = ()
    gates: GateSpec | None = None
    sha256: str | None = None


def build_model(ckpt: Checkpoint, with_policy: bool = True) -> BlockDropNet:
    """The networks with the checkpoint's weights, float32 on the CPU, in eval mode.

    A checkpoint without a policy is refused with :class:`CheckpointError` unless ``with_policy=False`` says that the
    policy is not needed or will be trained: the model then has a freshly initialised one (torch's global generator).
    """
    if ckpt.gates is not None and with_policy:
        raise CheckpointError(
            f"this {ckpt.network.name} checkpoint decides inside the network ({ckpt.gates.kind}), not by a policy "
            "network beforehand: it has no policy to build or shift",
            remedy="bdexport evaluate and export take it; for a policy, bdexport train --method blockdrop",
        )
    if ckpt.policy is None and with_policy:
        raise CheckpointError(
            f"this {ckpt.network.name} checkpoint has no policy network",
            remedy="train one: bdexport train --base CHECKPOINT --out RUN",
        )
    state = fit_own(ckpt.state, ckpt.network, ckpt.policy, ckpt.network.name, ckpt.gates)
    model = BlockDropNet(ckpt.network, ckpt.policy, ckpt.gates)
    model.load_state_dict(state, strict=False)  # fit_own has checked every key; only an absent policy's are missing
    return model.eval()


def named_by(ckpt: Checkpoint, dataset: Dataset | None) -> Checkpoint:
    """A foreign checkpoint, whose classes have no names, with those of the data set that it is used with."""
    count = ckpt.network.num_classes
    if dataset is None or ckpt.form == "bdexport" or not is_numbered(ckpt.class_names):
        return ckpt
    if len(dataset.class_names) != count or is_numbered(dataset.class_names):
        return ckpt
    note = f"class names: those of {dataset.name}, in its order ({listed(dataset.class_names)}); the file has none"
    notes = [text for text in ckpt.notes if not text.startswith("class names:")]
    return replace(ckpt, class_names=dataset.class_names, notes=(*notes, note))


def numbered_names(count: int) -> tuple[str, ...]:
    """What classes without names are called: "0", "1", .."""
    return tuple(str(index) for index in range(count))


def listed(names: Sequence[str], most: int = 3) -> str:
    """The first names, for a note."""
    return ", ".join(names[:most]) + (", .." if len(names) > most else "")


def loading_record(ckpt: Checkpoint) -> dict[str, Any]:
    """What a checkpoint was taken for, for the JSON result of a command; ``class_names``: null where it has none."""
    whole = describe(ckpt)
    names = None if is_numbered(ckpt.class_names) else list(ckpt.class_names)
    kept = ("form", "architecture", "shortcut", "dropped_transition", "preprocess", "sha256")
    return {name: whole[name] for name in kept} | {"class_names": names, "notes": list(ckpt.notes)}


def describe(ckpt: Checkpoint) -> dict[str, Any]:
    """What the checkpoint is, as a JSON object for people and programs."""
    network = ckpt.network
    return {
        "form": ckpt.form,
        "architecture": network.name,
        "family": network.family,
        "block": network.block,
        "stages": list(network.stages),
        "widths": list(network.widths),
        "inner_widths": None if network.inner_widths is None else list(network.inner_widths),
        "num_blocks": network.num_blocks,
        "transitions": [block.index for block in network.blocks() if block.transition],
        "shortcut": network.shortcut,
        "dropped_transition": network.dropped_transition,
        "num_classes": network.num_classes,
        "class_names": list(ckpt.class_names),
        "preprocess": ckpt.preprocess.to_json(),
        "policy": ckpt.policy.to_json() if ckpt.policy is not None else None,
        "gates": ckpt.gates.to_json() if ckpt.gates is not None else None,
        "weights": sum(tensor.numel() for tensor in ckpt.state.values()),
        "training": ckpt.training,
        "sha256": ckpt.sha256,
        "notes": list(ckpt.notes),
    }
