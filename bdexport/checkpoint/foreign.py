"""The checkpoint forms that people have, recognised and mapped to ours.

- ``public-cifar``: a state dict, usually under "state_dict" and with DataParallel's "module." before every key;
- ``torchvision``: a bare state dict with a 7x7 first convolution (timm's ResNets have the same keys);
- ``blockdrop``: the files of the authors' code, {"resnet": .., "agent": ..}.

Defaults that a file does not tell are chosen here, each with a note that says so and how to choose otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from bdexport.architecture import DroppedTransition, PolicySpec, ResNetSpec, Shortcut
from bdexport.checkpoint.data import Checkpoint, Form
from bdexport.checkpoint.fitting import expected_shapes, fit_state, shown
from bdexport.checkpoint.reading import RawFile
from bdexport.checkpoint.recognise import Found, recognise
from bdexport.errors import CheckpointError
from bdexport.preprocess import CIFAR_MEAN, CIFAR_STD, Preprocess

CONTAINERS = ("state_dict", "model_state_dict", "model", "net")
WRAPPERS = ("module.", "_orig_mod.", "model.")  # put before every key by DataParallel, torch.compile, trainers
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
IMAGENET_PREPROCESS = Preprocess((224, 224), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "bilinear", 256)
# The authors' ResNet-32 for CIFAR-10 was trained on normalised images (their utils.py writes the values as n/255),
# all their other CIFAR models on pixels / 255 alone.
BLOCKDROP_R32_PREPROCESS = Preprocess(
    (32, 32), (125.3 / 255, 123.0 / 255, 113.9 / 255), (63.0 / 255, 62.1 / 255, 66.7 / 255)
)
BLOCKDROP_PREPROCESS = Preprocess((32, 32), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


@dataclass(frozen=True)
class Wishes:
    """What the caller chose instead of the defaults; None leaves it to the file."""

    shortcut: Shortcut | None = None
    dropped_transition: DroppedTransition | None = None


@dataclass(frozen=True)
class _Parts:
    network: Mapping[str, Any]
    policy: Mapping[str, Any] | None
    from_blockdrop: bool


def checkpoint_from_foreign(raw: RawFile, wishes: Wishes) -> Checkpoint:
    """Recognise, map and check. Raises :class:`CheckpointError` naming the file and what does not fit."""
    what = str(raw.path)
    parts = _split(raw.content, what)
    network_state = _unwrapped(parts.network)
    found = recognise(network_state, what)
    blockdrop = parts.from_blockdrop or found.naming.blocks == "flat"
    form: Form = "blockdrop" if blockdrop else "public-cifar" if found.family == "cifar" else "torchvision"
    network, notes = _network_spec(found, form, wishes, what)
    state = _fitted(network_state, found, network, "network.", expected_shapes(network, None), what)
    policy = None
    if parts.policy is not None:
        policy, policy_state, policy_notes = _policy(parts.policy, network, what)
        state |= policy_state
        notes += policy_notes
    preprocess, reason = _preprocess(network, form)
    return Checkpoint(
        network=network,
        policy=policy,
        preprocess=preprocess,
        class_names=default_class_names(network),
        state=state,
        form=form,
        notes=(*notes, reason),
    )


def default_class_names(network: ResNetSpec) -> tuple[str, ...]:
    """CIFAR-10's names for a CIFAR network with ten classes, otherwise "0", "1", .."""
    if network.family == "cifar" and network.num_classes == len(CIFAR10_CLASSES):
        return CIFAR10_CLASSES
    return tuple(str(index) for index in range(network.num_classes))


def _split(content: Any, what: str) -> _Parts:
    """Find the state dicts inside the containers that trainers put around them."""
    for _ in range(3):
        if not isinstance(content, Mapping):
            raise CheckpointError(f"{what}: no state dict", got=type(content).__name__, expected="tensors by name")
        if isinstance(content.get("resnet"), Mapping):
            return _Parts(content["resnet"], content.get("agent"), from_blockdrop=True)
        inner = next((content[key] for key in CONTAINERS if isinstance(content.get(key), Mapping)), None)
        if isinstance(content.get("agent"), Mapping) or _is_policy(content if inner is None else inner):
            raise CheckpointError(
                f"{what}: a BlockDrop policy without its network",
                expected='both, as the finetuning script saves them: {"resnet": .., "agent": ..}',
                remedy="add the network's state dict under the key resnet and save the file again",
            )
        if inner is None:
            break
        content = inner
    if not any(isinstance(value, Tensor) for value in content.values()):
        keys = ", ".join(shown(str(key)) for key in list(content)[:10]) or "nothing"
        raise CheckpointError(f"{what}: no state dict inside", got=keys, expected="tensors by name")
    return _Parts(content, None, from_blockdrop=False)


def _is_policy(state: Mapping[str, Any]) -> bool:
    names = {str(key).removeprefix("module.") for key in state}
    return "logit.weight" in names and any(name.startswith("features.") for name in names)


def _unwrapped(state: Mapping[Any, Any]) -> dict[str, Any]:
    """Keys as text, without the prefixes that wrappers put before all of them."""
    state = {str(key): value for key, value in state.items()}
    while state:
        prefix = next((prefix for prefix in WRAPPERS if all(key.startswith(prefix) for key in state)), None)
        if prefix is None:
            break
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _network_spec(found: Found, form: Form, wishes: Wishes, what: str) -> tuple[ResNetSpec, list[str]]:
    if found.classes is None or found.classes < 2:
        raise CheckpointError(
            f"{what}: no classifier",
            got="no fc.weight or linear.weight" if found.classes is None else f"{found.classes} class",
            expected="a final linear layer with at least 2 classes",
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
        reason = "and the authors' code pools" if form == "blockdrop" else "and this is the common kind"
        other = "option_a" if kind == "avgpool" else "avgpool"
        note = f"shortcut {kind}: the file has no shortcut weights, {reason}; choose {other} if that is wrong"
        return kind, [note] if kind != "conv" and wishes.shortcut is None else []
    if "conv" in (kind, wishes.shortcut):
        raise CheckpointError(
            f"{what}: another shortcut than asked for",
            got=f"{'weights for' if kind == 'conv' else 'no weights for'} convolutional shortcuts",
            expected=f"shortcut {wishes.shortcut}",
        )
    assert wishes.shortcut is not None
    return wishes.shortcut, []


def _dropped_transition(shortcut: Shortcut, form: Form, wishes: Wishes) -> tuple[DroppedTransition, str]:
    if wishes.dropped_transition is not None:
        return wishes.dropped_transition, f"dropped transition {wishes.dropped_transition}: asked for"
    if form == "blockdrop":
        return "shortcut", "dropped transition shortcut: no ReLU after it in the authors' code"
    if shortcut == "conv":
        # Blocks trained without dropping have never seen negative inputs. Measured on a CIFAR-10 ResNet-20: dropping
        # the stage-2 / stage-3 transition gives 19.2 % / 10.8 % accuracy without the ReLU, 54.7 % / 64.7 % with it.
        return "shortcut_relu", "dropped transition shortcut_relu: these convolutional shortcuts were never dropped"
    return "shortcut", "dropped transition shortcut: without weights it cannot turn negative"


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


def _policy(
    agent: Mapping[str, Any], network: ResNetSpec, what: str
) -> tuple[PolicySpec, dict[str, Tensor], list[str]]:
    """Spec, tensors under our names, and notes, of the ``agent`` of a BlockDrop file."""
    if not isinstance(agent, Mapping):
        raise CheckpointError(f"{what}: agent", got=type(agent).__name__, expected="the policy's state dict")
    agent = _unwrapped(agent)
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


def _preprocess(network: ResNetSpec, form: Form) -> tuple[Preprocess, str]:
    if network.family == "imagenet":
        return IMAGENET_PREPROCESS, "preprocessing: short side to 256, centre 224x224, ImageNet mean and deviation"
    if form != "blockdrop":
        return Preprocess((32, 32), CIFAR_MEAN, CIFAR_STD), "preprocessing: ImageNet mean and deviation, as is common"
    if network.stages == (5, 5, 5) and network.num_classes == 10:
        return BLOCKDROP_R32_PREPROCESS, "preprocessing: CIFAR mean and deviation, as in the authors' R32_C10"
    return BLOCKDROP_PREPROCESS, "preprocessing: pixels / 255 alone, as in the authors' CIFAR models but R32_C10"
