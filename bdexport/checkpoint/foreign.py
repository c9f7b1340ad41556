"""The checkpoint forms that people have, recognised and mapped to ours.

- ``public-cifar``: a state dict, usually under "state_dict" and with DataParallel's "module." before every key;
- ``torchvision``: a bare state dict with a 7x7 first convolution (timm's ResNets have the same keys);
- ``blockdrop``: the files of the authors' code, {"resnet": .., "agent": ..}.

Defaults that a file does not tell are chosen here, each with a note that says so and how to choose otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bdexport.architecture import SHORTCUTS, DroppedTransition, PolicySpec, ResNetSpec, Shortcut
from bdexport.checkpoint.containers import parts_of, policy_state
from bdexport.checkpoint.data import Checkpoint, Form, numbered_names
from bdexport.checkpoint.fitting import expected_shapes, fit_state
from bdexport.checkpoint.reading import RawFile
from bdexport.checkpoint.recognise import Found, recognise
from bdexport.checkpoint.relatives import refuse_relatives
from bdexport.checkpoint.wishes import Wishes, preprocess_note, preprocess_with
from bdexport.errors import CheckpointError
from bdexport.preprocess import CIFAR_MEAN, CIFAR_STD, Preprocess

IMAGENET_PREPROCESS = Preprocess((224, 224), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "bilinear", 256)
GREY_MEAN, GREY_STD = (0.449, 0.449, 0.449), (0.226, 0.226, 0.226)  # the averages of ImageNet's three
# The authors' ResNet-32 for CIFAR-10 was trained on normalised images (their utils.py writes the values as n/255),
# all their other CIFAR models on pixels / 255 alone.
BLOCKDROP_R32_PREPROCESS = Preprocess(
    (32, 32), (125.3 / 255, 123.0 / 255, 113.9 / 255), (63.0 / 255, 62.1 / 255, 66.7 / 255)
)
BLOCKDROP_PREPROCESS = Preprocess((32, 32), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
NO_NAMES = "class names: the file has none; classes are numbered, in the order of the data set's; or --class-names FILE"


def checkpoint_from_foreign(raw: RawFile, wishes: Wishes) -> Checkpoint:
    """Recognise, map and check. Raises :class:`CheckpointError` naming the file and what does not fit."""
    what = str(raw.path)
    parts = parts_of(raw.content, what)
    refuse_relatives(parts.network, what)
    found = recognise(parts.network, what)
    blockdrop = parts.policy is not None or found.naming.blocks == "flat"
    form: Form = "blockdrop" if blockdrop else "public-cifar" if found.family == "cifar" else "torchvision"
    network, notes = _network_spec(found, form, wishes, what)
    tensors, bias_notes = _with_bias(parts.network, found)
    notes += bias_notes
    state = _fitted(tensors, found, network, "network.", expected_shapes(network, None), what)
    policy = None
    if parts.policy is not None:
        policy, weights, policy_notes = _policy(parts.policy, network, what)
        state |= weights
        notes += policy_notes
    assumed, reason = _preprocess(network, form, parts.grey)
    if parts.normalisation is not None:
        mean, std = parts.normalisation
        assumed, reason = preprocess_with(assumed, {"mean": mean, "std": std}), "mean and deviation stand in the file"
    preprocess = preprocess_with(assumed, wishes.preprocess)
    if parts.grey:
        _check_grey(preprocess, what)
    notes += [preprocess_note(preprocess, wishes.preprocess, reason)]
    notes += [] if wishes.class_names is not None else [NO_NAMES]
    return Checkpoint(
        network=network,
        policy=policy,
        preprocess=preprocess,
        class_names=numbered_names(network.num_classes),
        state=state,
        form=form,
        notes=(*parts.notes, *notes, _computation(network)),
    )


def _with_bias(state: Mapping[str, Any], found: Found) -> tuple[Mapping[str, Any], list[str]]:
    """A classifier without a bias is one whose bias is zero."""
    key = f"{found.naming.classifier}.bias"
    if key in state or found.classes is None:
        return state, []
    return {**state, key: torch.zeros(found.classes)}, [f"classifier: the file has no {key}; zeros take its place"]


def _computation(network: ResNetSpec) -> str:
    """What the same keys and shapes could compute otherwise, and no option changes."""
    stem = "a 3x3 stem of stride 1 without pooling"
    if network.family == "imagenet":
        stem = "a 7x7 stem of stride 2 with a 3x3 max-pool"
    stride = ", the stride of a stage in its first 3x3 convolution" if network.block == "bottleneck" else ""
    return (
        f"computation: assumed, since weights do not show it: {stem}{stride}, ReLU, batch norm's epsilon 1e-5, no "
        "anti-aliasing; --check-against LOGITS.npz or model.onnx compares it with your own"
    )


def _check_grey(preprocess: Preprocess, what: str) -> None:
    """Grey times weights is what the first convolution reads only if all three channels are normalised alike."""
    if len(set(preprocess.mean)) > 1 or len(set(preprocess.std)) > 1:
        raise CheckpointError(
            f"{what}: one input channel, and a mean or deviation for each of three",
            got=f"mean {list(preprocess.mean)}, std {list(preprocess.std)}",
            expected="the same for all channels",
            remedy="pass one number each, e.g. --mean 0.1307 --std 0.3081",
        )


def _network_spec(found: Found, form: Form, wishes: Wishes, what: str) -> tuple[ResNetSpec, list[str]]:
    if found.classes is None or found.classes < 2:
        raise CheckpointError(
            f"{what}: no classifier",
            got="no fc.weight or linear.weight" if found.classes is None else f"{found.classes} class",
            expected="a final linear layer with at least 2 classes",
            remedy="save the network together with its classifier" if found.classes is None else None,
        )
    shortcut, notes = _shortcut(found, form, wishes, what)
    network = ResNetSpec(found.family, found.block, found.stages, found.widths, shortcut, found.classes)
    rule, reason = _dropped_transition(shortcut, form, wishes)
    return replace(network, dropped_transition=rule), [*notes, reason]


def _shortcut(found: Found, form: Form, wishes: Wishes, what: str) -> tuple[Shortcut, list[str]]:
    if found.conv_shortcut or found.family == "imagenet":
        kind: Shortcut = "conv"
    else:
        kind = "avgpool" if form == "blockdrop" else "option_a"
    if wishes.shortcut in (None, kind):
        reason = "the authors' code pools" if form == "blockdrop" else "the common kind"
        other = " or ".join(name for name in SHORTCUTS if name not in (kind, "conv"))
        note = f"shortcut {kind}: assumed ({reason}), the file has no shortcut weights; or --shortcut {other}"
        if wishes.shortcut is not None:
            note = f"shortcut {kind}: asked for"
        return kind, [note] if kind != "conv" else []
    if "conv" in (kind, wishes.shortcut):
        raise CheckpointError(
            f"{what}: another shortcut than asked for",
            got=f"{'weights for' if kind == 'conv' else 'no weights for'} convolutional shortcuts",
            expected=f"shortcut {wishes.shortcut}",
        )
    assert wishes.shortcut is not None
    return wishes.shortcut, [f"shortcut {wishes.shortcut}: asked for; {kind} would have been assumed"]


def _dropped_transition(shortcut: Shortcut, form: Form, wishes: Wishes) -> tuple[DroppedTransition, str]:
    if wishes.dropped_transition is not None:
        return wishes.dropped_transition, f"dropped transition {wishes.dropped_transition}: asked for"
    rule: DroppedTransition = "shortcut"
    if form == "blockdrop":
        reason = "no ReLU after it in the authors' code"
    elif shortcut == "conv":
        # Blocks trained without dropping have never seen negative inputs. Measured on a CIFAR-10 ResNet-20: dropping
        # the stage-2 / stage-3 transition gives 19.2 % / 10.8 % accuracy without the ReLU, 54.7 % / 64.7 % with it.
        rule, reason = "shortcut_relu", "these convolutional shortcuts were never dropped in training"
    else:
        reason = "without weights it cannot turn negative"
    other = "shortcut" if rule == "shortcut_relu" else "shortcut_relu"
    return rule, f"dropped transition {rule}: assumed ({reason}); or --dropped-transition {other}"


def _fitted(
    state: Mapping[str, Any],
    found: Found,
    spec: ResNetSpec | PolicySpec,
    prefix: str,
    shapes: Mapping[str, tuple[int, ...]],
    what: str,
) -> dict[str, Tensor]:
    names = {ours: found.naming.theirs(ours.removeprefix(prefix), spec.stages) for ours in shapes}
    kind = spec.name if isinstance(spec, ResNetSpec) else "policy network"
    return fit_state(state, names, shapes, f"{what} as {kind}")


def _policy(agent: Any, network: ResNetSpec, what: str) -> tuple[PolicySpec, dict[str, Tensor], list[str]]:
    """Spec, tensors under our names, and notes, of the ``agent`` of a BlockDrop file."""
    agent = policy_state(agent, what)
    ignored = sorted({key.rpartition(".")[0] for key in agent if key.startswith(("vnet.", "features.fc."))})
    features = {
        key.removeprefix("features."): value for key, value in agent.items() if not key.startswith(tuple(ignored))
    }
    what = f"{what}: agent"
    found = recognise(features, what)
    found = replace(found, naming=replace(found.naming, classifier="logit"))
    policy = _policy_spec(found, features, network, what)
    shapes = {name: shape for name, shape in expected_shapes(network, policy).items() if name.startswith("policy.")}
    state = _fitted(features, found, policy, "policy.", shapes, what)
    return policy, state, [f"ignored in the agent: {', '.join(ignored)} (not needed to decide)"] if ignored else []


def _policy_spec(found: Found, features: Mapping[str, Any], network: ResNetSpec, what: str) -> PolicySpec:
    if found.block != "basic":
        raise CheckpointError(f"{what}: bottleneck blocks", expected="basic blocks, as in the paper's policy networks")
    weight = features.get("logit.weight")
    outputs = len(weight) if isinstance(weight, Tensor) and weight.ndim == 2 else network.num_blocks
    if outputs != network.num_blocks:
        raise CheckpointError(
            f"{what}: logit.weight decides about another number of blocks",
            got=outputs,
            expected=f"{network.num_blocks}, the blocks of the {network.name} in the same file",
        )
    imagenet = found.family == "imagenet"
    shortcut: Shortcut = "conv" if imagenet or found.conv_shortcut else "avgpool"
    # The authors' ImageNet policy pools its image 2x first (112x112); the weights do not show it.
    return PolicySpec(found.family, found.stages, found.widths, outputs, shortcut, input_pool=2 if imagenet else 1)


def _preprocess(network: ResNetSpec, form: Form, grey: bool) -> tuple[Preprocess, str]:
    """The preprocessing that is assumed, and why."""
    if network.family == "imagenet":
        usual, reason = IMAGENET_PREPROCESS, "as torchvision trains on ImageNet"
    elif form != "blockdrop":
        usual, reason = Preprocess((32, 32), CIFAR_MEAN, CIFAR_STD), "ImageNet's mean and deviation, as is common"
    elif network.stages == (5, 5, 5) and network.num_classes == 10:
        usual, reason = BLOCKDROP_R32_PREPROCESS, "CIFAR's mean and deviation, as in the authors' R32_C10"
    else:
        usual, reason = BLOCKDROP_PREPROCESS, "pixels / 255 alone, as in the authors' CIFAR models but R32_C10"
    if grey and form != "blockdrop":
        return replace(usual, mean=GREY_MEAN, std=GREY_STD), "ImageNet's mean and deviation, averaged for one channel"
    return usual, reason
