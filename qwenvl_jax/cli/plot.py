"""`qwenvl plot RUN`: the curves of a training run, running or finished, as a PNG."""

import dataclasses
from collections.abc import Sequence
from typing import Annotated

import tyro

from qwenvl_jax.cli.errors import SUCCESS, run_command
from qwenvl_jax.cli.options import parse_options

_DESCRIPTION = """Draw loss, rate and gradient norm of a training run, running or finished.

example: qwenvl plot runs/nano/stage1 --output stage1.png"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]  # its directory
    output: str | None = None  # the PNG to write; RUN/curves.png if left out


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code of the command."""
    return run_command("qwenvl plot", _run, argv)


def _run(argv: Sequence[str]) -> int:
    from qwenvl_jax.training.plot import draw_curves

    options = parse_options(Options, argv, prog="qwenvl plot", description=_DESCRIPTION)
    print(draw_curves(options.run, options.output))
    return SUCCESS
