"""The one error of this room."""


class InputError(ValueError):
    """A request that cannot be answered as it is: what is wrong, got, expected, how to fix it."""
