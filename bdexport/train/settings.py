"""Settings from names: ``--set finetune.batch=256`` and the like, checked against the dataclasses' own types."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from bdexport.errors import UsageError

Settings = TypeVar("Settings")


def with_setting(settings: Settings, path: str, value: Any) -> Settings:
    """``settings`` with one named field changed; ``path`` is dotted, ``value`` a text or a value of the right type."""
    assert is_dataclass(settings)
    assert not isinstance(settings, type)
    head, _, rest = path.partition(".")
    names = [field.name for field in fields(settings)]
    if head not in names:
        raise UsageError("unknown setting", got=repr(path), expected=f"one of {', '.join(names)}")
    current = getattr(settings, head)
    if is_dataclass(current):
        if not rest:
            inner = ", ".join(f"{head}.{field.name}" for field in fields(current))
            raise UsageError("not one setting but a group", got=repr(path), expected=f"one of {inner}")
        return replace(settings, **{head: with_setting(current, rest, value)})
    if rest:
        raise UsageError("unknown setting", got=repr(path))
    kind = get_type_hints(type(settings))[head]
    return replace(settings, **{head: _converted(path, value, kind)})


def with_assignments(settings: Settings, assignments: list[str]) -> Settings:
    """``settings`` with every ``name=value`` applied in order."""
    for assignment in assignments:
        path, equals, value = assignment.partition("=")
        if not equals:
            raise UsageError("--set", got=repr(assignment), expected="NAME=VALUE, e.g. finetune.batch=256")
        settings = with_setting(settings, path.strip(), value.strip())
    return settings


def _converted(path: str, value: Any, kind: Any) -> Any:
    options = get_args(kind) if get_origin(kind) in (Union, type(int | None)) else (kind,)
    if type(None) in options and (value is None or str(value).lower() in ("none", "null", "")):
        return None
    wanted = next(option for option in options if option is not type(None))
    if get_origin(wanted) is Literal:
        if value not in get_args(wanted):
            raise UsageError(path, got=repr(value), expected=f"one of {', '.join(get_args(wanted))}")
        return value
    try:
        converted = wanted(value)
    except (TypeError, ValueError):
        raise UsageError(path, got=repr(value), expected=wanted.__name__) from None
    # initial_keep_logit alone may be negative; every other number is a count, a rate or a weight.
    lowest = -100.0 if path.endswith("initial_keep_logit") else 0.0
    if isinstance(converted, float | int) and not lowest <= converted < float("inf"):
        raise UsageError(path, got=repr(value), expected="a finite number, not negative")
    return converted
