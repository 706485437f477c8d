"""The installed command `qwenvl`: picks the subcommand's module and calls its `main(argv)`.

A subcommand is imported only when it is called, so that `qwenvl --help` answers at once and never
starts an accelerator.

    qwenvl infer --image street.jpg "What is parked on the left?"
"""

import difflib
import importlib
import sys
from collections.abc import Sequence

from qwenvl_jax.cli.errors import SUCCESS, USAGE_ERROR, run_command

COMMANDS = {
    "infer": "answer one prompt about pictures, and draw the boxes of the answer",
    "chat": "talk about pictures over several turns, in the terminal",
    "train": "run or resume one training config",
    "convert": "read released PyTorch folders, or write them",
    "eval": "score a model on drawn scenes that no training run has seen",
    "demo": "show the shipped model at work, and write one picture of it",
}


def usage() -> str:
    """Returns the help text: one line a command, and an example."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            "usage: qwenvl COMMAND [options]",
            "",
            *lines,
            "",
            "example: qwenvl infer --image street.jpg 'What is parked on the left?'",
            "Each command has its own --help.",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 for success, 2 for wrong input, 130 when interrupted."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return SUCCESS if argv else USAGE_ERROR
    name, *rest = argv
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean 'qwenvl {near[0]}'?" if near else "run 'qwenvl --help'"
        print(
            f"qwenvl: unknown command: got {name!r}, expected one of {', '.join(COMMANDS)}; {hint}",
            file=sys.stderr,
        )
        return USAGE_ERROR

    def command(argv: Sequence[str]) -> int:
        return importlib.import_module(f"qwenvl_jax.cli.{name}").main(argv)

    return run_command(f"qwenvl {name}", command, rest)


if __name__ == "__main__":
    sys.exit(main())
