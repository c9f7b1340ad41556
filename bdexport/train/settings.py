"""Settings from names: ``--set finetune.batch=256`` and the like, checked against their types and ranges."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from difflib import get_close_matches
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from bdexport.checkpoint.recognise import MAX_BLOCKS_PER_STAGE, MAX_WIDTH
from bdexport.config import TrainConfig
from bdexport.errors import UsageError

Settings = TypeVar("Settings")

ANY = float("inf")
HIGHEST = 1e30  # what diverges is stopped with advice; beyond that, float32 itself overflows
RANGES: dict[str, tuple[float, float]] = {  # both ends allowed; what is not listed is anything from 0 on
    "seed": (0, 2**63 - 1),  # what torch's generators take
    "distillation_temperature": (0.01, 1000),
    "evaluation_batch": (1, ANY),
    "augment.shift": (0, 512),
    "pretrain.batch": (1, ANY),
    "prime.batch": (1, ANY),
    "adapt.batch": (1, ANY),
    "adapt.keep_low": (0, 1),
    "adapt.keep_high": (0, 1),
    "adapt.full_share": (0, 1),
    "adapt.final_rate": (0, 1),
    "adapt.order_images": (1, ANY),
    "curriculum.batch": (1, ANY),
    "curriculum.epoch_share": (0, 1),
    "curriculum.blocks_per_epoch": (1, ANY),
    "finetune.batch": (1, ANY),
    "finetune.policy_share": (0, 1),
    "finetune.full_share": (0, 0.99),  # the policy learns nothing from images that run every block
    "finetune.level_share": (0, 0.99),
    "fixed.search_images": (1, ANY),
    "halting.margin": (1e-6, 0.5),
    "halting.initial_logit": (-100, 100),
    "policy.samples": (1, 1000),
    "policy.temperature": (0.01, 100),
    "policy.cuts": (2, 1000),
    "policy.hidden": (0, 4096),
    "policy.memory": (1, 10**7),
    "policy.lessons": (1, 1000),
    "policy.input_pool": (1, 16),
    "policy.stem_stride": (1, 16),
    "policy.initial_keep_logit": (-100, 100),
    "policy.wrong_prediction_penalty": (0, 1e6),
    **{f"{name}learning_rate": (0, HIGHEST) for name in ("curriculum.", "finetune.network_", "finetune.policy_")},
}


OPTION_OF = {  # settings that an option of ``bdexport train`` sets: what its user has typed
    "method": "--method",
    "seed": "--seed",
    "precision": "--precision",
    "fixed.mask": "--mask",
    "fixed.kept": "--kept",
    "distillation_weight": "--distillation",
    "policy.wrong_prediction_penalty": "--gamma",
    "policy.target_blocks": "--target-blocks",
    "policy.exploration_bound": "--alpha",
    "policy.finetune_bound_start": "--alpha",
    "policy.finetune_bound_end": "--alpha",
    "policy.estimator": "--estimator",
    "policy.samples": "--samples",
    "augment.mirror": "--mirror",
    "augment.shift": "--shift",
    "policy.reward": "--reward",
    **{f"{phase}.epochs": f"--{phase}-epochs" for phase in ("pretrain", "prime", "adapt", "curriculum", "finetune")},
    **{f"{phase}.batch": "--batch" for phase in ("pretrain", "prime", "adapt", "curriculum", "finetune")},
}


def how_to_set(path: str) -> str:
    """The remedy for a wrong value of a setting: what sets it."""
    option = f"{OPTION_OF[path]} or " if path in OPTION_OF else ""
    return f"it is set by {option}--set {path}=VALUE"


def check_ranges(config: TrainConfig) -> None:
    """Raise :class:`UsageError` naming the first number that no run can work with."""
    for path, (low, high) in RANGES.items():
        group, _, name = path.rpartition(".")
        value = getattr(getattr(config, group) if group else config, name)
        if value is not None and not low <= value <= high:
            expected = f"at least {low:g}" if high == ANY else f"{low:g} to {high:g}"
            raise UsageError(path, got=value, expected=expected, remedy=how_to_set(path))
    if config.adapt.keep_low > config.adapt.keep_high:
        raise UsageError(
            "adapt.keep_low",
            got=config.adapt.keep_low,
            expected=f"at most adapt.keep_high, which is {config.adapt.keep_high}",
            remedy=how_to_set("adapt.keep_low"),
        )
    shares = config.finetune.full_share + config.finetune.level_share
    if shares > 0.99:
        raise UsageError(
            "finetune.full_share + finetune.level_share",
            got=round(shares, 4),
            expected="at most 0.99: the policy learns from the rest",
            remedy="lower one of them with --set finetune.full_share=VALUE or --set finetune.level_share=VALUE",
        )


def per_stage(path: str, text: str, stages: int) -> tuple[int, ...]:
    """``"24,48,96"`` -> (24, 48, 96): the setting ``path``; raises UsageError unless it fits so many stages."""
    most = {"policy.widths": MAX_WIDTH, "policy.stages": MAX_BLOCKS_PER_STAGE}[path]
    words = [word.strip() for word in text.split(",")]
    if len(words) != stages or not all(word.isdecimal() and 1 <= int(word) <= most for word in words):
        example = ",".join("1" * stages)
        expected = f"{stages} numbers from 1 to {most}, like {example}"
        raise UsageError(path, got=repr(text), expected=expected, remedy=how_to_set(path))
    return tuple(int(word) for word in words)


def with_setting(settings: Settings, path: str, value: Any) -> Settings:
    """``settings`` with one named field changed; ``path`` is dotted, ``value`` a text or a value of the right type."""
    return _with_field(settings, path, value, path)


def _with_field(settings: Settings, path: str, value: Any, whole: str) -> Settings:
    """:func:`with_setting` at one level; ``whole`` is the name as it was given, for messages."""
    assert is_dataclass(settings)
    assert not isinstance(settings, type)
    head, _, rest = path.partition(".")
    names = [field.name for field in fields(settings)]
    if head not in names:
        raise UsageError(
            "unknown setting", got=repr(whole), expected=f"one of {', '.join(names)}", remedy=_meant(whole)
        )
    current = getattr(settings, head)
    if is_dataclass(current):
        if not rest:
            inner = ", ".join(f"{head}.{field.name}" for field in fields(current))
            raise UsageError("not one setting but a group", got=repr(path), expected=f"one of {inner}")
        return replace(settings, **{head: _with_field(current, rest, value, whole)})
    if rest:
        raise UsageError("unknown setting", got=repr(whole), expected=head, remedy=_meant(whole))
    kind = get_type_hints(type(settings))[head]
    return replace(settings, **{head: _converted(whole, value, kind)})


def _meant(path: str) -> str | None:
    """The settings of any group that ``path`` is most like; None where it is like none."""
    config = TrainConfig()
    groups = {field.name: getattr(config, field.name) for field in fields(config)}
    known = [name for name, value in groups.items() if not is_dataclass(value)]
    known += [
        f"{group}.{field.name}"
        for group, value in groups.items()
        if is_dataclass(value) and not isinstance(value, type)
        for field in fields(value)
    ]
    last = path.rpartition(".")[2]
    similar = [name for name in known if name.rpartition(".")[2] == last] or get_close_matches(path, known, n=3)
    return f"did you mean {' or '.join(similar)}?" if similar else None


def with_assignments(settings: Settings, assignments: list[str]) -> Settings:
    """``settings`` with every ``name=value`` applied in order."""
    for assignment in assignments:
        path, equals, value = assignment.partition("=")
        if not equals:
            raise UsageError("--set", got=repr(assignment), expected="NAME=VALUE, e.g. finetune.batch=256")
        if path.strip() == "preset":
            raise UsageError("--set preset", got=repr(value), remedy="choose a preset with --preset")
        settings = with_setting(settings, path.strip(), value.strip())
    return settings


def _converted(path: str, value: Any, kind: Any) -> Any:
    options = get_args(kind) if get_origin(kind) in (Union, type(int | None)) else (kind,)
    if type(None) in options and (value is None or str(value).lower() in ("none", "null", "")):
        return None
    wanted = next(option for option in options if option is not type(None))
    if get_origin(wanted) is Literal:
        if value not in get_args(wanted):
            expected = f"one of {', '.join(get_args(wanted))}"
            raise UsageError(path, got=repr(value), expected=expected, remedy=how_to_set(path))
        return value
    if wanted is bool:
        return _boolean(path, value)
    try:
        converted = wanted(value)
    except (TypeError, ValueError):
        expected = {int: "a whole number", float: "a number"}.get(wanted, "text")
        raise UsageError(path, got=repr(value), expected=expected, remedy=how_to_set(path)) from None
    # A number is a count, a rate or a weight, but for those that RANGES lets be negative.
    lowest = min(0.0, RANGES.get(path, (0.0, ANY))[0])
    highest = HIGHEST if isinstance(converted, float) else ANY
    if isinstance(converted, float | int) and not lowest <= converted <= highest:
        expected = "a finite number, not negative" if lowest == 0 else f"a finite number, at least {lowest:g}"
        if highest < converted < ANY:
            expected = f"at most {highest:g}"
        raise UsageError(path, got=repr(value), expected=expected, remedy=how_to_set(path))
    return converted


def _boolean(path: str, value: Any) -> bool:
    """``bool("false")`` is true; a setting's text is read as it is meant."""
    words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    try:
        return words[str(value).lower()]
    except KeyError:
        raise UsageError(path, got=repr(value), expected="true or false", remedy=how_to_set(path)) from None
