"""Tensors by name -> exactly the tensors that the network needs; whatever does not fit is listed key by key."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from bdexport.architecture import GateSpec, PolicySpec, ResNetSpec
from bdexport.errors import CheckpointError
from bdexport.models.pair import BlockDropNet

LISTED_KEYS = 10  # keys named in one message; the rest are counted
COUNTER = "num_batches_tracked"  # batch norm's step counter: no weight, absent from files before torch 0.4.1

Shape = tuple[int, ...]


class _ShapesOnly(TorchFunctionMode):
    """Leaves out random initialisation: on tensors without memory it would only load torch's compiler (2 s)."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0] if func is Tensor.normal_ else func(*args, **(kwargs or {}))


def expected_shapes(network: ResNetSpec, policy: PolicySpec | None, gates: GateSpec | None = None) -> dict[str, Shape]:
    """Name -> shape of every tensor of ``BlockDropNet.state_dict()`` but the counters; no memory is taken."""
    with torch.device("meta"), _ShapesOnly():
        model = BlockDropNet(network, policy, gates)
    return {
        name: tuple(tensor.shape)
        for name, tensor in model.state_dict().items()
        if not name.endswith(COUNTER) and (policy is not None or not name.startswith("policy."))
    }


def fit_state(
    found: Mapping[str, Any], names: Mapping[str, str], shapes: Mapping[str, Shape], what: str
) -> dict[str, Tensor]:
    """The tensors of ``found`` under our names: float32, CPU, contiguous, memory of their own.

    ``names``: our name -> the name in ``found``; ``shapes``: our name -> expected shape; ``what`` opens the messages.
    Raises :class:`CheckpointError` listing missing, extra and misshapen keys, or naming a tensor that is not finite.
    """
    found = {key: value for key, value in found.items() if not key.endswith(COUNTER)}
    for key, value in found.items():
        _check_kind(key, value, what)
    missing = [theirs for theirs in names.values() if theirs not in found]
    extra = sorted(found.keys() - set(names.values()))
    misshapen = [
        f"{shown(theirs)} has {list(found[theirs].shape)}, not {list(shapes[ours])}"
        for ours, theirs in names.items()
        if theirs in found and tuple(found[theirs].shape) != shapes[ours]
    ]
    problems = [
        *_listed("missing", map(shown, missing)),
        *_listed("extra", map(shown, extra)),
        *_listed("of another shape", misshapen),
    ]
    if problems:
        raise CheckpointError(f"{what}: the weights do not fit: " + "; ".join(problems))
    return {ours: _float32(found[theirs], f"{what}: {shown(theirs)}") for ours, theirs in names.items()}


def fit_own(
    found: Mapping[str, Any],
    network: ResNetSpec,
    policy: PolicySpec | None,
    what: str,
    gates: GateSpec | None = None,
) -> dict[str, Tensor]:
    """:func:`fit_state` for tensors that already have our names."""
    shapes = expected_shapes(network, policy, gates)
    return fit_state(found, {name: name for name in shapes}, shapes, what)


def shown(text: str, limit: int = 100) -> str:
    """A name from a file, made fit for one line of a terminal."""
    text = text if text.isprintable() else ascii(text)
    return text if len(text) <= limit else text[:limit] + ".."


def _listed(kind: str, items: Iterable[str]) -> list[str]:
    items = list(items)
    if not items:
        return []
    rest = f", and {len(items) - LISTED_KEYS} more" if len(items) > LISTED_KEYS else ""
    return [f"{len(items)} {'key' if len(items) == 1 else 'keys'} {kind} ({', '.join(items[:LISTED_KEYS])}{rest})"]


def _check_kind(key: str, value: Any, what: str) -> None:
    if not isinstance(value, Tensor):
        kind: object = type(value).__name__
    elif value.layout != torch.strided or value.is_quantized or value.device.type != "cpu":
        kind = f"a tensor of kind {value.layout}, {value.dtype}, {value.device.type}"
    elif not value.is_floating_point():
        kind = f"a tensor of {value.dtype}"
    else:
        return
    raise CheckpointError(f"{what}: {shown(key)}", got=kind, expected="a dense tensor of floating-point numbers")


def _float32(tensor: Tensor, what: str) -> Tensor:
    # A copy, always: tensors from a file may share memory with each other or with the file itself.
    out = torch.empty(tensor.shape, dtype=torch.float32)
    out.copy_(tensor.detach())
    if not bool(torch.isfinite(out).all()):
        bad = int((~torch.isfinite(out)).sum())
        raise CheckpointError(what, got=f"{bad} of {out.numel()} values not finite", expected="finite float32 numbers")
    return out
