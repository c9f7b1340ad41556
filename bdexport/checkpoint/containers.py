"""From what a file holds to the tensors of one network: containers, prefixes, entries that belong to something else.

Nothing is left aside silently: each decision comes with a note, and what is not understood stays in the state, where
:func:`bdexport.checkpoint.fitting.fit_state` lists it as extra.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bdexport.checkpoint.fitting import shown
from bdexport.errors import CheckpointError
from bdexport.pickled_arrays import PickledArray

CONTAINERS = ("state_dict", "model_state_dict", "model_state", "model", "net", "network", "weights", "params", "module")
AVERAGED = ("state_dict_ema", "model_ema", "ema_state_dict", "model_ema_state_dict", "ema_model", "ema")
WRAPPERS = ("module.", "_orig_mod.", "model.")  # put before every key by DataParallel, torch.compile, trainers
FIRST_BLOCK = ("layer1.0.conv1.weight", "blocks.0.0.conv1.weight")  # tells where in a model the network begins
NOT_THE_NETWORK = re.compile(  # first words of keys that trainers save beside a network
    r"(criterion|criteria|metrics?|acc|accuracy|top[15])(_\w+)?|loss\w*|(train|val|valid|test)_\w+"
    r"|\w+_(criterion|loss|metrics?|accuracy)|n_averaged"
)
NORMALISER = re.compile(r"((?:module\.)?(?:\w+\.)?)(mean|mu)")  # of a buffer; the deviation is std or sigma
AVERAGED_NAME = re.compile(r"(^|[._])(ema|averaged|shadow|momentum)([._]|$)")
LUMA = (0.299, 0.587, 0.114)  # ITU-R 601: what Pillow and torchvision make grey of red, green and blue with


@dataclass(frozen=True)
class Parts:
    """``network``: its tensors without prefixes. ``policy``: a BlockDrop agent's state dict. ``grey``: one channel.

    ``normalisation``: mean and deviation, three numbers each, of a layer that normalises before the network.
    """

    network: dict[str, Any]
    policy: Any | None
    notes: tuple[str, ...]
    grey: bool
    normalisation: tuple[tuple[float, ...], tuple[float, ...]] | None


def parts_of(content: Any, what: str) -> Parts:
    """Find the network in what a file holds. Raises :class:`CheckpointError` where there is none, or more than one."""
    notes: list[str] = []
    state, policy = _inner(content, notes, what)
    tensors = _with_tensors(state)
    normalisation = _normalisation(tensors)
    network = _network_of(tensors, notes, what)
    network, grey = _as_rgb(network)
    if grey:
        weights = " + ".join(f"{weight} {name}" for weight, name in zip(LUMA, ("red", "green", "blue"), strict=True))
        notes.append(f"one input channel: the first convolution reads grey = {weights}, folded into its weights")
    return Parts(network, policy, tuple(notes), grey, normalisation)


def policy_state(agent: Any, what: str) -> dict[str, Any]:
    """The tensors of a BlockDrop agent without the prefixes before all keys."""
    if not isinstance(agent, Mapping):
        raise CheckpointError(f"{what}: agent", got=type(agent).__name__, expected="the policy's state dict")
    return _as_rgb(_without_wrappers(_with_tensors(agent)), "features.conv1.weight")[0]


def _inner(content: Any, notes: list[str], what: str) -> tuple[Mapping[Any, Any], Any | None]:
    """The state dict inside the containers that trainers put around it, and the agent beside it."""
    for _ in range(4):
        if not isinstance(content, Mapping):
            raise CheckpointError(f"{what}: no state dict", got=type(content).__name__, expected="tensors by name")
        if isinstance(content.get("resnet"), Mapping):
            return content["resnet"], content.get("agent")
        key = _container(content, notes)
        if isinstance(content.get("agent"), Mapping) or _is_policy(content if key is None else content[key]):
            raise CheckpointError(
                f"{what}: a BlockDrop policy without its network",
                expected='both, as the finetuning script saves them: {"resnet": .., "agent": ..}',
                remedy="add the network's state dict under the key resnet and save the file again",
            )
        if key is None:
            break
        content = content[key]
    if not _holds_tensors(content):
        keys = ", ".join(shown(str(key)) for key in list(content)[:10]) or "nothing"
        raise CheckpointError(
            f"{what}: no state dict inside",
            got=keys,
            expected=f"tensors by name, or one of {', '.join(CONTAINERS[:5])} with them",
        )
    return content, None


def _container(content: Mapping[Any, Any], notes: list[str]) -> str | None:
    """The key under which the state dict stands; averaged weights only where there are no others."""
    plain = next((key for key in CONTAINERS if isinstance(content.get(key), Mapping)), None)
    averaged = next((key for key in AVERAGED if isinstance(content.get(key), Mapping)), None)
    if plain is None and averaged is None:  # under a name of the trainer's own
        inside = [key for key, value in content.items() if isinstance(value, Mapping) and _holds_tensors(value)]
        return inside[0] if len(inside) == 1 and not _holds_tensors(content) else None
    if plain is None:
        if averaged is not None:
            notes.append(f"averaged weights ({averaged}) are used: the file holds no others")
        return averaged
    if averaged is not None:
        notes.append(
            f"the weights under {plain} are used; the averaged ones beside them ({averaged}) are not: they often are "
            "better, and a file that holds them alone is read"
        )
    return plain


def _holds_tensors(content: Mapping[Any, Any]) -> bool:
    return any(isinstance(value, Tensor | PickledArray) for value in content.values())


def _is_policy(state: Mapping[str, Any]) -> bool:
    names = {str(key).removeprefix("module.") for key in state}
    return "logit.weight" in names and any(name.startswith("features.") for name in names)


def _with_tensors(state: Mapping[Any, Any]) -> dict[str, Any]:
    """Keys as text, numpy's arrays as tensors."""
    arrays = {id(value): value for value in state.values() if isinstance(value, PickledArray)}
    made = {key: _tensor(value) for key, value in arrays.items()}  # once, in however many places one stands
    return {str(key): made.get(id(value), value) for key, value in state.items()}


def _normalisation(state: dict[str, Any]) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Mean and deviation of a layer that normalises pixels in 0..1, taken out of ``state``; None where none does."""
    for key in state:
        match = NORMALISER.fullmatch(key)
        other = None if match is None else f"{match.group(1) or ''}{'std' if match.group(2) == 'mean' else 'sigma'}"
        if match is None or other not in state:
            continue
        values = [state[name].flatten().tolist() if _three_numbers(state[name]) else [] for name in (key, other)]
        if [len(numbers) for numbers in values] != [3, 3] or max(map(max, values)) > 1:
            continue
        if min(values[0]) >= 0 and min(values[1]) > 0:
            del state[key], state[other]
            return tuple(values[0]), tuple(values[1])
    return None


def _three_numbers(value: Any) -> bool:
    return _is_dense(value) and value.numel() == 3 and bool(torch.isfinite(value).all())


def _is_dense(value: Any) -> bool:
    """Whether it is a tensor of floating-point numbers that are there: not sparse, and not of a kind without memory."""
    dense = isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == "cpu"
    return dense and value.is_floating_point()


def _tensor(value: Any) -> Any:
    if not isinstance(value, PickledArray) or value.array is None:
        return value
    # Bytes of the other order are turned; a copy, since the array's memory is the pickle's own and read-only.
    return torch.from_numpy(value.array.astype(value.array.dtype.newbyteorder("=")))


def _without_wrappers(state: dict[str, Any]) -> dict[str, Any]:
    while state:
        prefix = next((prefix for prefix in WRAPPERS if all(key.startswith(prefix) for key in state)), None)
        if prefix is None:
            break
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _network_of(state: dict[str, Any], notes: list[str], what: str) -> dict[str, Any]:
    """The tensors of the network alone, under the names that it gives them itself."""
    prefix, averaged = _prefixes(state, what)
    if prefix is None:
        return _without_wrappers(state)
    if averaged:
        notes.append(f"the weights under {prefix or 'no prefix'} are used, the averaged ones ({averaged[0]}) are not")
        state = {key: value for key, value in state.items() if not key.startswith(averaged)}
    network = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    rest = {key: value for key, value in state.items() if not key.startswith(prefix)}
    if not _linear_modules(network):
        network |= _classifier_of(rest, notes)
    network |= rest
    aside = [key for key in network if _left_aside(key)]
    if aside:
        more = f" and {len(aside) - 3} more" if len(aside) > 3 else ""
        notes.append(f"left aside, no part of the network: {', '.join(map(shown, aside[:3]))}{more}")
    return {key: value for key, value in network.items() if key not in aside}


def _prefixes(state: Mapping[str, Any], what: str) -> tuple[str | None, tuple[str, ...]]:
    """What stands before the network's own names, None where no first block is found; and before averaged copies."""
    found = sorted({key.removesuffix(end) for key in state for end in FIRST_BLOCK if key.endswith(end)})
    found = [prefix for prefix in found if not prefix or prefix.endswith(".")]
    plain = [prefix for prefix in found if not AVERAGED_NAME.search(prefix.rstrip("."))]
    if len(plain) == 1:
        return plain[0], tuple(prefix for prefix in found if prefix != plain[0])
    if len(found) > 1:
        raise CheckpointError(
            f"{what}: more than one network",
            got=f"the prefixes {', '.join(shown(prefix) or 'none' for prefix in found[:5])}",
            expected="one network in a file",
            remedy="save the one that you mean alone: torch.save(model.NAME.state_dict(), FILE)",
        )
    return (found[0] if found else None), ()


def _left_aside(key: str) -> bool:
    return NOT_THE_NETWORK.fullmatch(key.partition(".")[0]) is not None


def _linear_modules(state: Mapping[str, Any]) -> list[str]:
    return [key.removesuffix(".weight") for key, value in state.items() if _is_linear(key, value)]


def _is_linear(key: str, value: Any) -> bool:
    return key.endswith(".weight") and isinstance(value, Tensor) and value.ndim == 2


def _classifier_of(rest: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    """The one linear layer beside a backbone, taken out of ``rest`` under the name fc; nothing where there is none."""
    modules = [name for name in _linear_modules(rest) if not _left_aside(name)]
    if len(modules) != 1:
        return {}
    notes.append(f"classifier: {shown(modules[0])}, which stands beside the network")
    present = [leaf for leaf in ("weight", "bias") if f"{modules[0]}.{leaf}" in rest]
    return {f"fc.{leaf}": rest.pop(f"{modules[0]}.{leaf}") for leaf in present}


def _as_rgb(state: dict[str, Any], key: str = "conv1.weight") -> tuple[dict[str, Any], bool]:
    """A network of one input channel as the same network that reads RGB: each colour counts as it does in grey."""
    weight = state.get(key)
    if weight is None or not _is_dense(weight) or weight.ndim != 4 or weight.shape[1] != 1:
        return state, False
    return {**state, key: weight * torch.tensor(LUMA, dtype=weight.dtype)[None, :, None, None]}, True
