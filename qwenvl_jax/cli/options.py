"""Command-line words to a dataclass of options, with wrong ones told as every other error is."""

import contextlib
import io
from collections.abc import Sequence
from typing import TypeVar

from qwenvl_jax.config import ConfigError

Options = TypeVar("Options")

_BOX_SIDES = "\u2502 "
_BOX_RULE = {"\u2500"}
_BOX_ENDS = "\u256d\u2570"  # the lines with the title and the bottom


def parse_options(
    kind: type[Options],
    argv: Sequence[str],
    prog: str,
    description: str | None = None,
    default: Options | None = None,
) -> Options:
    """Returns the options that the words set; fields left out keep their defaults.

    `default` is an instance to take them from. `--help` prints and exits, as everywhere.

    Raises:
        ConfigError: an option that does not exist (with the nearest name) or does not fit.
    """
    import tyro

    start = tyro.MISSING_NONPROP if default is None else default
    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told):
            return tyro.cli(
                kind, args=list(argv), prog=prog, description=description, default=start
            )
    except SystemExit as end:
        if not end.code:  # --help
            raise
        raise ConfigError(unboxed(told.getvalue())) from None


def unboxed(text: str) -> str:
    """Returns what tyro put into a box as one line."""
    parts = [" ".join(line.strip(_BOX_SIDES).split()) for line in text.splitlines()]
    parts = ["; " if set(part) == _BOX_RULE else f"{part} " for part in parts if part]
    inside = [part for part in parts if part[0] not in _BOX_ENDS]
    return "".join(inside).replace(" ; ", "; ").strip() or text.strip()
