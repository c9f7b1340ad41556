"""The JSON in the header of our own checkpoint files: written, and read back with every field checked.

The text of a file is not trusted: each field has its type and range, unknown fields are refused, and every complaint
names the field. ``docs/checkpoints.md`` is the specification.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast, get_args

import torch
from torch import Tensor

from bdexport.architecture import (
    BlockKind,
    DroppedTransition,
    Family,
    GateKind,
    GateSpec,
    PolicySpec,
    ResNetSpec,
    Shortcut,
)
from bdexport.checkpoint.fitting import shown
from bdexport.checkpoint.recognise import MAX_BLOCKS_PER_STAGE, MAX_CLASSES, MAX_STAGES, MAX_WIDTH
from bdexport.class_names import EXPECTED, name_problem
from bdexport.errors import BdexportError, CheckpointError
from bdexport.json_text import MalformedError, parse_json
from bdexport.preprocess import Preprocess, Resampling

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Header:
    """Everything of a checkpoint but its tensors. ``sha256``: what :func:`content_sha256` gave when it was saved."""

    network: ResNetSpec
    policy: PolicySpec | None
    preprocess: Preprocess
    class_names: tuple[str, ...]
    training: dict[str, Any]
    gates: GateSpec | None = None
    sha256: str | None = None


def header_to_text(header: Header) -> str:
    """JSON that :func:`header_from_text` reads back. Raises :class:`CheckpointError` on what JSON cannot hold."""
    data = {
        "format_version": FORMAT_VERSION,
        "network": header.network.to_json(),
        "policy": header.policy.to_json() if header.policy is not None else None,
        "preprocess": header.preprocess.to_json(),
        "class_names": list(header.class_names),
        "training": header.training,
    }
    if header.gates is not None:
        data["gates"] = header.gates.to_json()
    if header.sha256 is not None:
        data["sha256"] = header.sha256
    try:
        return json.dumps(data, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"checkpoint field training: not plain JSON ({error})") from error


def header_from_text(text: str, source: str) -> Header:
    """Check and read a header. Raises :class:`CheckpointError` naming ``source``, the field, and what it should be."""
    try:
        data = parse_json(text.encode("utf-8", "surrogatepass"))
    except MalformedError as error:
        remedy = "copy the checkpoint again"
        raise CheckpointError(f"{source}: the header is not JSON ({error})", remedy=remedy) from error
    top = _Field(f"{source}: header", data)
    _check_version(top)
    names = ("format_version", "network", "policy", "preprocess", "class_names", "training")
    fields = top.object(*names, optional=("gates", "sha256"))
    try:
        network = _network(fields["network"])
        policy = _policy(fields["policy"], network)
        gates = _gates(fields["gates"], policy) if "gates" in fields else None
        preprocess = _preprocess(fields["preprocess"])
    except CheckpointError:
        raise
    except BdexportError as error:  # the specs' own checks: stages against widths, mean and deviation
        raise CheckpointError(f"{source}: header: {error}") from error
    class_names = _class_names(fields["class_names"], network)
    training = _training(fields["training"], network)
    digest = _sha256(fields["sha256"]) if "sha256" in fields else None
    return Header(network, policy, preprocess, class_names, training, gates, digest)


def content_sha256(text: str, tensors: Mapping[str, Tensor]) -> str:
    """Hex SHA-256 over a header's text, without its own ``sha256``, and over the tensors: names, types, shapes, bytes.

    However the same JSON is written, and in whatever order the tensors stand, the digest is the same.
    """
    data = parse_json(text.encode())
    data.pop("sha256", None)
    digest = hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":")).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\n{json.dumps(name)} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


@dataclass(frozen=True)
class _Field:
    """A JSON value and the place where it stands."""

    where: str
    value: Any

    def wrong(self, expected: str) -> CheckpointError:
        return CheckpointError(self.where, got=shown(json.dumps(self.value), 60), expected=expected)

    def object(self, *names: str, optional: tuple[str, ...] = (), more: bool = False) -> dict[str, _Field]:
        """The fields of an object that has exactly these names and perhaps ``optional`` ones, or with ``more`` any."""
        if not isinstance(self.value, dict):
            raise self.wrong("an object")
        missing = [name for name in names if name not in self.value]
        unknown = [shown(name) for name in self.value if name not in (*names, *optional) and not more]
        if missing or unknown:
            problem = f"missing {', '.join(missing)}" if missing else f"unknown {', '.join(unknown[:10])}"
            raise CheckpointError(self.where, got=problem, expected=f"the fields {', '.join(names)}")
        present = [*names, *(name for name in optional if name in self.value)]
        return {name: _Field(f"{self.where}.{name}", self.value[name]) for name in present}

    def items(self, low: int, high: int) -> list[_Field]:
        if not isinstance(self.value, list) or not low <= len(self.value) <= high:
            raise self.wrong(f"a list of {low}{f' to {high}' if high != low else ''} values")
        return [_Field(f"{self.where}[{index}]", value) for index, value in enumerate(self.value)]

    def integer(self, low: int, high: int) -> int:
        if not isinstance(self.value, int) or isinstance(self.value, bool) or not low <= self.value <= high:
            raise self.wrong(f"an integer in {low}..{high}")
        return self.value

    def number(self, low: float, high: float) -> float:
        if not isinstance(self.value, int | float) or isinstance(self.value, bool) or not low <= self.value <= high:
            raise self.wrong(f"a number in {low:g}..{high:g}")
        return float(self.value)

    def choice(self, options: Iterable[str]) -> str:
        options = tuple(options)
        if not isinstance(self.value, str) or self.value not in options:
            raise self.wrong(f"one of {', '.join(options)}")
        return self.value

    def text(self, limit: int = 200) -> str:
        if not isinstance(self.value, str) or not self.value or len(self.value) > limit or not self.value.isprintable():
            raise self.wrong(f"printable text of 1..{limit} characters")
        return self.value

    def class_name(self) -> str:
        problem = name_problem(self.value)
        if problem is not None:
            raise CheckpointError(self.where, got=f"{shown(json.dumps(self.value), 60)} ({problem})", expected=EXPECTED)
        return cast(str, self.value)


def _check_version(top: _Field) -> None:
    """First of all: a newer format may have other fields, and the user should hear that and nothing else."""
    if not isinstance(top.value, dict) or "format_version" not in top.value:
        raise CheckpointError(top.where, got="no format_version", expected="an object with format_version")
    version = _Field(f"{top.where}.format_version", top.value["format_version"]).integer(1, 10**9)
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{top.where}.format_version: written by a newer bdexport",
            got=version,
            expected=f"at most {FORMAT_VERSION}",
            remedy="upgrade bdexport",
        )


def _network(field: _Field) -> ResNetSpec:
    names = ("family", "block", "stages", "widths", "shortcut", "num_classes", "dropped_transition")
    fields = field.object(*names, optional=("inner_widths",))
    return ResNetSpec(
        family=cast(Family, fields["family"].choice(get_args(Family))),
        block=cast(BlockKind, fields["block"].choice(get_args(BlockKind))),
        stages=_stages(fields["stages"]),
        widths=_widths(fields["widths"]),
        shortcut=cast(Shortcut, fields["shortcut"].choice(get_args(Shortcut))),
        num_classes=fields["num_classes"].integer(2, MAX_CLASSES),
        dropped_transition=cast(DroppedTransition, fields["dropped_transition"].choice(get_args(DroppedTransition))),
        inner_widths=_inner_widths(fields["inner_widths"]) if "inner_widths" in fields else None,
    )


def _policy(field: _Field, network: ResNetSpec) -> PolicySpec | None:
    if field.value is None:
        return None
    names = ("family", "stages", "widths", "num_blocks", "shortcut", "input_pool")
    fields = field.object(*names, optional=("hidden", "stem_stride"))
    policy = PolicySpec(
        family=cast(Family, fields["family"].choice(get_args(Family))),
        stages=_stages(fields["stages"]),
        widths=_widths(fields["widths"]),
        num_blocks=fields["num_blocks"].integer(network.num_blocks, network.num_blocks),
        shortcut=cast(Shortcut, fields["shortcut"].choice(get_args(Shortcut))),
        input_pool=fields["input_pool"].integer(1, 16),
        hidden=fields["hidden"].integer(1, MAX_WIDTH) if "hidden" in fields else 0,
        stem_stride=fields["stem_stride"].integer(2, 16) if "stem_stride" in fields else 1,
    )
    policy.backbone()  # raises when stages and widths do not fit
    return policy


def _gates(field: _Field, policy: PolicySpec | None) -> GateSpec:
    if policy is not None:
        raise CheckpointError(field.where, got="gates beside a policy", expected="one of the two: both decide")
    fields = field.object("kind", "margin")
    kind = cast(GateKind, fields["kind"].choice(get_args(GateKind)))
    if kind == "sequential" and fields["margin"].value is not None:
        raise fields["margin"].wrong("null: these gates have none")
    return GateSpec(kind, None if kind == "sequential" else fields["margin"].number(1e-6, 0.5))


def _sha256(field: _Field) -> str:
    if not isinstance(field.value, str) or not re.fullmatch("[0-9a-f]{64}", field.value):
        raise field.wrong("64 hexadecimal digits")
    return field.value


def _stages(field: _Field) -> tuple[int, ...]:
    return tuple(item.integer(1, MAX_BLOCKS_PER_STAGE) for item in field.items(1, MAX_STAGES))


def _widths(field: _Field) -> tuple[int, ...]:
    return tuple(item.integer(1, MAX_WIDTH) for item in field.items(1, MAX_STAGES))


def _inner_widths(field: _Field) -> tuple[int, ...]:
    return tuple(item.integer(1, MAX_WIDTH) for item in field.items(1, MAX_STAGES * MAX_BLOCKS_PER_STAGE))


def _preprocess(field: _Field) -> Preprocess:
    fields = field.object("size", "mean", "std", "resampling", "resize_short")
    height, width = (item.integer(1, 4096) for item in fields["size"].items(2, 2))
    short = fields["resize_short"]
    return Preprocess(
        size=(height, width),
        mean=_triple(fields["mean"], -1e6),
        std=_triple(fields["std"], 1e-6),
        resampling=cast(Resampling, fields["resampling"].choice(get_args(Resampling))),
        resize_short=None if short.value is None else short.integer(1, 8192),
    )


def _triple(field: _Field, low: float) -> tuple[float, float, float]:
    red, green, blue = (item.number(low, 1e6) for item in field.items(3, 3))
    return red, green, blue


def _class_names(field: _Field, network: ResNetSpec) -> tuple[str, ...]:
    if isinstance(field.value, list) and len(field.value) != network.num_classes:
        raise CheckpointError(
            field.where, got=f"{len(field.value)} names", expected=f"{network.num_classes}, the network's classes"
        )
    return tuple(item.class_name() for item in field.items(network.num_classes, network.num_classes))


def _training(field: _Field, network: ResNetSpec) -> dict[str, Any]:
    """Any object; checked is what is used in it: the policy statistics and the fixed mask."""
    if not isinstance(field.value, dict):
        raise field.wrong("an object")
    if field.value.get("policy_statistics") is not None:
        statistics = _Field(f"{field.where}.policy_statistics", field.value["policy_statistics"])
        _check_statistics(statistics, network.num_blocks)
    if field.value.get("fixed_mask") is not None:
        _check_fixed_mask(_Field(f"{field.where}.fixed_mask", field.value["fixed_mask"]), network.num_blocks)
    return field.value


def _check_fixed_mask(field: _Field, num_blocks: int) -> None:
    fields = field.object("mask", "kept", more=True)
    text = fields["mask"].text(max(200, num_blocks))
    if not set(text) - {"0", "1"} and len(text) != num_blocks:
        raise fields["mask"].wrong(f"the name of a rule, or {num_blocks} characters, each 0 or 1")
    if fields["kept"].value is not None:
        fields["kept"].integer(0, num_blocks)


def _check_statistics(field: _Field, num_blocks: int) -> None:
    fields = field.object("split", "images", "masks", more=True)
    fields["split"].text()
    images = fields["images"].integer(1, 10**12)
    for item in fields["masks"].items(0, 10**7):
        mask = item.object("mask", "count", "share")
        text = mask["mask"].text(num_blocks)
        if len(text) != num_blocks or set(text) - {"0", "1"}:
            raise mask["mask"].wrong(f"{num_blocks} characters, each 0 or 1")
        mask["count"].integer(1, images)
        mask["share"].number(0.0, 1.0)
