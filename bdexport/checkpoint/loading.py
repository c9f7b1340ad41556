"""``load_checkpoint``: any form that is known, with what the caller knows better put over the defaults."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

from bdexport.architecture import DroppedTransition, ResNetSpec, Shortcut, resnet_spec
from bdexport.checkpoint.data import Checkpoint
from bdexport.checkpoint.foreign import Wishes, checkpoint_from_foreign
from bdexport.checkpoint.own import checkpoint_from_own
from bdexport.checkpoint.reading import read_raw
from bdexport.errors import CheckpointError, UsageError
from bdexport.preprocess import Preprocess


def load_checkpoint(
    path: str | Path,
    *,
    arch: str | None = None,
    shortcut: Shortcut | None = None,
    dropped_transition: DroppedTransition | None = None,
    class_names: Sequence[str] | None = None,
    preprocess: Preprocess | None = None,
) -> Checkpoint:
    """Load our own form, a public CIFAR ResNet, a torchvision state dict, or a file of the authors' BlockDrop code.

    ``path``: a file, a run folder (then its ``model.safetensors``), or ``zoo:NAME``. ``arch``: the architecture that
    the caller expects, e.g. ``resnet32``. The other arguments take the place of what the file says or of the form's
    default; ``shortcut`` can only choose between the kinds without weights, and not for our own form, which says it
    itself.
    Raises :class:`CheckpointError` when the file cannot be read, recognised or fitted, and UsageError on unknown names.
    """
    _check_choice("shortcut", shortcut, get_args(Shortcut))
    _check_choice("dropped transition", dropped_transition, get_args(DroppedTransition))
    raw = read_raw(Path(path))
    if raw.header is None:
        ckpt = checkpoint_from_foreign(raw, Wishes(shortcut, dropped_transition))
    else:
        ckpt = checkpoint_from_own(raw)
    what = str(raw.path)
    _check_arch(arch, ckpt.network, what)
    ckpt = _with_network(ckpt, shortcut, dropped_transition, what)
    if class_names is not None:
        ckpt = _with_class_names(ckpt, tuple(class_names), what)
    return ckpt if preprocess is None else replace(ckpt, preprocess=preprocess)


def _check_choice(what: str, value: str | None, options: tuple[str, ...]) -> None:
    if value is not None and value not in options:
        raise UsageError(f"unknown {what}", got=repr(value), expected=f"one of {', '.join(options)}")


def _check_arch(arch: str | None, network: ResNetSpec, what: str) -> None:
    if arch is None or arch.strip().lower().replace("-", "") == network.name:
        return
    resnet_spec(arch)  # a name that is no architecture at all is a wrong request, not a wrong file
    raise CheckpointError(
        f"{what}: another architecture than asked for",
        got=f"{network.name} (stages {list(network.stages)}, told from its weights)",
        expected=arch,
        remedy=f"pass --arch {network.name} or another checkpoint",
    )


def _with_network(ckpt: Checkpoint, shortcut: Shortcut | None, rule: DroppedTransition | None, what: str) -> Checkpoint:
    if shortcut is not None and shortcut != ckpt.network.shortcut:
        raise CheckpointError(f"{what}: another shortcut than asked for", got=ckpt.network.shortcut, expected=shortcut)
    if rule is None:
        return ckpt
    return replace(ckpt, network=replace(ckpt.network, dropped_transition=rule))


def _with_class_names(ckpt: Checkpoint, names: tuple[str, ...], what: str) -> Checkpoint:
    if len(names) != ckpt.network.num_classes:
        raise CheckpointError(
            f"{what}: class names do not match", got=f"{len(names)} names", expected=ckpt.network.num_classes
        )
    return replace(ckpt, class_names=names)
