"""Checks of fields: a ValueError names the field, its value and what is allowed."""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import NoReturn


def refuse(name: str, value: object, allowed: str) -> NoReturn:
    raise ValueError(f"{name} is {value!r}; it must be {allowed}")


def number(name: str, value: object, low: float, high: float = math.inf, *, optional: bool = False) -> None:
    """A finite number from `low` to `high`, or None where it is optional."""
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high or value == math.inf:
        limits = f"of at least {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
        refuse(name, value, f"{'null or ' * optional}a number {limits}")


def whole(name: str, value: object, low: int, high: int | None = None, *, optional: bool = False) -> None:
    """A whole number from `low` to `high`, or None where it is optional."""
    if value is None and optional:
        return
    fits = isinstance(value, int) and not isinstance(value, bool) and value >= low and (high is None or value <= high)
    if not fits:
        limits = f"from {low}" if high is None else f"from {low} to {high}"
        refuse(name, value, f"{'null or ' * optional}a whole number {limits}")


def choice(name: str, value: object, allowed: Iterable[str], *, optional: bool = False) -> None:
    allowed = tuple(allowed)
    if value not in allowed and not (value is None and optional):
        refuse(name, value, f"{'null or ' * optional}one of {', '.join(allowed)}")


def flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        refuse(name, value, "true or false")


def text(name: str, value: object, *, optional: bool = False) -> None:
    if not isinstance(value, str) and not (value is None and optional):
        refuse(name, value, f"{'null or ' * optional}text")


def names(name: str, value: object, allowed: Sequence[str] | None = None) -> tuple[str, ...]:
    """A list of names, each kept once; `allowed` says which there are."""
    if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
        refuse(name, value, "a list of names")
    for item in value if allowed is not None else ():
        choice(name, item, allowed or ())
    return tuple(dict.fromkeys(value))


def known_fields(what: str, values: Iterable[str], kind: type | Iterable[str]) -> None:
    """Keys that are all fields of a dataclass, and all that have no default; or all among the names given."""
    fields = dataclasses.fields(kind) if isinstance(kind, type) else ()
    allowed = [item.name for item in fields] if isinstance(kind, type) else list(kind)
    if unknown := [key for key in values if key not in allowed]:
        raise ValueError(f"{what} has no field {unknown[0]!r}; its fields are {', '.join(allowed)}")
    for item in fields:
        if item.default is item.default_factory is dataclasses.MISSING and item.name not in values:
            raise ValueError(f"{what} needs the field {item.name!r}")
