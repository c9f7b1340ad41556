"""``load_checkpoint``: any form that is known, with what the caller knows better put over the defaults."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast, get_args

from bdexport.architecture import DroppedTransition, ResNetSpec, Shortcut, resnet_spec
from bdexport.checkpoint.data import Checkpoint, listed
from bdexport.checkpoint.foreign import checkpoint_from_foreign
from bdexport.checkpoint.own import checkpoint_from_own
from bdexport.checkpoint.reading import read_raw
from bdexport.checkpoint.wishes import PreprocessWish, Wishes, preprocess_text, preprocess_with
from bdexport.errors import CheckpointError, UsageError


def load_checkpoint(
    path: str | Path,
    *,
    arch: str | None = None,
    shortcut: Shortcut | None = None,
    dropped_transition: DroppedTransition | None = None,
    class_names: Sequence[str] | None = None,
    preprocess: PreprocessWish | None = None,
) -> Checkpoint:
    """Load our own form, a public CIFAR ResNet, a torchvision state dict, or a file of the authors' BlockDrop code.

    ``path``: a file, a run folder (then its ``model.safetensors``), or ``zoo:NAME``. ``arch``: the architecture that
    the caller expects, e.g. ``resnet32``. The other arguments take the place of what the file says or of the form's
    default, and the checkpoint's notes say so; ``preprocess`` may name some fields only, as in
    ``{"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}``. ``shortcut`` can only choose between the kinds without
    weights, and not for our own form, which says it itself.
    Raises :class:`CheckpointError` when the file cannot be read, recognised or fitted, and UsageError on unknown names.
    """
    checked_shortcut(shortcut)
    checked_rule(dropped_transition)
    raw = read_raw(Path(path))
    wishes = Wishes(shortcut, dropped_transition, preprocess, None if class_names is None else tuple(class_names))
    what = str(raw.path)
    if raw.header is None:
        ckpt = checkpoint_from_foreign(raw, wishes)
    else:
        ckpt = _corrected(checkpoint_from_own(raw), wishes, what)
    _check_arch(arch, ckpt.network, what)
    return ckpt if wishes.class_names is None else _with_class_names(ckpt, wishes.class_names, what)


def checked_shortcut(word: str | None) -> Shortcut | None:
    """``word``, if it is a kind of shortcut or None. Raises UsageError."""
    _check_choice("shortcut", word, get_args(Shortcut))
    return cast("Shortcut | None", word)


def checked_rule(word: str | None) -> DroppedTransition | None:
    """``word``, if it is a rule for dropped transitions or None. Raises UsageError."""
    _check_choice("dropped transition", word, get_args(DroppedTransition))
    return cast("DroppedTransition | None", word)


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


def _corrected(ckpt: Checkpoint, wishes: Wishes, what: str) -> Checkpoint:
    """Our own form says everything itself; what the caller says otherwise takes its place, and is said."""
    notes, network, rule = [], ckpt.network, wishes.dropped_transition
    if wishes.shortcut not in (None, network.shortcut):
        raise CheckpointError(
            f"{what}: another shortcut than asked for",
            got=network.shortcut,
            expected=wishes.shortcut,
            remedy="leave --shortcut out: this checkpoint says it itself",
        )
    if rule is not None and rule != network.dropped_transition:
        notes.append(f"dropped transition {rule}: asked for; the checkpoint says {network.dropped_transition}")
        network = replace(network, dropped_transition=rule)
    preprocess = preprocess_with(ckpt.preprocess, wishes.preprocess)
    if preprocess != ckpt.preprocess:
        before = preprocess_text(ckpt.preprocess)
        notes.append(f"preprocessing: {preprocess_text(preprocess)}: asked for; the checkpoint says {before}")
    return replace(ckpt, network=network, preprocess=preprocess, notes=(*ckpt.notes, *notes))


def _with_class_names(ckpt: Checkpoint, names: tuple[str, ...], what: str) -> Checkpoint:
    if len(names) != ckpt.network.num_classes:
        raise CheckpointError(
            f"{what}: class names do not match",
            got=f"{len(names)} names",
            expected=ckpt.network.num_classes,
            remedy="name one class a line, in the order of the network's outputs",
        )
    if names == ckpt.class_names:
        return ckpt
    note = f"class names: asked for ({listed(names)})"
    if ckpt.form == "bdexport":
        note += f"; the checkpoint says {listed(ckpt.class_names)}"
    return replace(ckpt, class_names=names, notes=(*ckpt.notes, note))
