"""The installed command `qwenvl`: picks the subcommand's module and calls its `main(argv)`.

A subcommand is imported only when it is called, so that `qwenvl --help` answers at once and never
starts an accelerator.

    qwenvl infer --image street.jpg "What is parked on the left?"
"""

import importlib
from collections.abc import Sequence
from typing import NoReturn

import qwenvl_jax
from qwenvl_jax.cli.errors import SUCCESS, leave, run_command
from qwenvl_jax.cli.subcommands import choose

COMMANDS = {
    "infer": "answer one prompt about pictures, and draw the boxes of the answer",
    "chat": "talk about pictures over several turns, in the terminal",
    "train": "run or resume one training config",
    "convert": "read released PyTorch folders, or write them",
    "eval": "score a model on drawn scenes that no training run has seen",
    "plot": "draw the curves of a training run",
    "demo": "show the shipped model at work, and write one picture of it",
    "plan": "compile a training run for a TPU pod that is not there: does it fit, how fast",
    "data": "prepare training data, check them, and look at them",
}
_EXAMPLE = "qwenvl infer --image street.jpg 'What is parked on the left?'"


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 for success, 2 for wrong input, 130 when interrupted."""
    return run_command("qwenvl", _run, argv)


def _run(argv: Sequence[str]) -> int:
    if list(argv) == ["--version"]:
        print(f"qwenvl-jax {qwenvl_jax.__version__}")
        return SUCCESS
    chosen = choose("qwenvl", COMMANDS, argv, _EXAMPLE)
    if isinstance(chosen, int):
        return chosen
    name, rest = chosen
    return importlib.import_module(f"qwenvl_jax.cli.{name}").main(rest)


def start() -> NoReturn:
    """What the installed command calls."""
    leave(main())


if __name__ == "__main__":
    start()
