"""The one error of this room, and what every request is checked for."""

import dataclasses
import operator
from typing import Any

import numpy as np

from qwenvl_jax.checks import ConfigError, Settings


class InputError(ValueError):
    """A request that cannot be answered as it is: what is wrong, got, expected, how to fix it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RequestOptions(Settings):
    """Options of a request: NumPy's numbers become Python's, and what does not fit is refused.

    Raises:
        InputError: a value of another type, by name.
    """

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, np.generic):
                object.__setattr__(self, field.name, value.item())
        try:
            super().__post_init__()
        except ConfigError as error:
            raise InputError(str(error)) from None


def whole_number(name: str, value: Any) -> int:
    """Returns the value as an int; InputError, with this name, where it is no whole number."""
    try:
        return operator.index(value)
    except TypeError:
        raise InputError(f"{name} must be a whole number: got {value!r:.80}") from None
