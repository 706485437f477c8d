"""What a settings class refuses when it is made, in words that name the field."""

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal, get_args, get_origin


class ConfigError(ValueError):
    """A setting that cannot be used: what is wrong, what was got, what is expected."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """A class of settings: each field must be of its type. Python itself would take anything."""

    def __post_init__(self):
        check_types(type(self), {x.name: getattr(self, x.name) for x in dataclasses.fields(self)})


def check_types(settings: type, values: Mapping[str, Any]) -> None:
    """Raises ConfigError where a value is not of the type of its field."""
    kinds = _kinds(settings)
    for name, value in values.items():
        if not _fits(value, kinds[name]):
            got, place = value, ""
            if get_origin(kinds[name]) is tuple and isinstance(value, tuple):
                item = get_args(kinds[name])[0]
                at = next(i for i, x in enumerate(value) if not _fits(x, item))
                got, place = value[at], f" as {name}[{at}]"
            raise ConfigError(
                f"{settings.__name__}.{name} must be {_told(kinds[name])}: got {got!r:.200}{place}"
            )


@functools.cache
def _kinds(settings: type) -> dict[str, Any]:
    return typing.get_type_hints(settings)


def positive(config: Any, *names: str) -> None:
    """Raises ConfigError where one of these fields is not a number above 0."""
    _check(config, names, lambda value: 0 < value < math.inf, "be positive")


def not_negative(config: Any, *names: str) -> None:
    """Raises ConfigError where one of these fields is below 0."""
    _check(config, names, lambda value: value >= 0, "not be negative")


def share(config: Any, *names: str) -> None:
    """Raises ConfigError where one of these fields is not in 0..1."""
    _check(config, names, lambda value: 0 <= value <= 1, "lie in 0..1")


def below_one(config: Any, *names: str) -> None:
    """Raises ConfigError where one of these fields is not in [0, 1)."""
    _check(config, names, lambda value: 0 <= value < 1, "be in [0, 1)")


def _check(config: Any, names: Collection[str], is_good: Callable[[Any], bool], told: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not is_good(value):  # NaN never is
            raise ConfigError(f"{type(config).__name__}.{name} must {told}: got {value}")


def unused(config: Any, place: str, names: Collection[str], under: str) -> None:
    """Raises ConfigError where one of these fields is set, and would do nothing.

    `place` is put before its name; `under` says what makes it idle, and what would use it.
    """
    for field in dataclasses.fields(config):
        if field.name in names:
            make = field.default_factory
            usual = field.default if make is dataclasses.MISSING else make()
            value = getattr(config, field.name)
            if value != usual:
                raise ConfigError(
                    f"{place}.{field.name} has no effect: got {value!r} together with {under}, or "
                    f"leave it out, which is {usual!r}"
                )


def multiple(whole: str, a: int, part: str, b: int) -> None:
    """Raises ConfigError where `a` is no multiple of `b`; `whole` and `part` are their names."""
    if a % b:
        got = f"{whole.rpartition('.')[2]}={a}, {part.rpartition('.')[2]}={b}"
        raise ConfigError(f"{whole} must be a multiple of {part}: got {got}")


def _fits(value: Any, kind: Any) -> bool:
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Literal:
        return value in parts
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is tuple:  # of any length
        return isinstance(value, tuple) and all(_fits(item, parts[0]) for item in value)
    if origin is dict:
        pairs = value.items() if isinstance(value, dict) else [(None, None)]
        return all(_fits(k, parts[0]) and _fits(v, parts[1]) for k, v in pairs)
    if kind in (int, float):  # a truth value is no number here
        return type(value) is int or type(value) is kind
    return isinstance(value, kind)


def _told(kind: Any) -> str:
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Literal:
        return "one of " + ", ".join(map(repr, parts))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_told(part) for part in parts)
    if origin is tuple:
        return f"a tuple, each item {_told(parts[0])}"
    if origin is dict:
        return f"a dict, each key {_told(parts[0])} and each value {_told(parts[1])}"
    words = {int: "a whole number", float: "a number", str: "text", bool: "True or False"}
    return words.get(kind) or ("None" if kind is type(None) else f"a {kind.__name__}")
