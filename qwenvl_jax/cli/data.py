"""`qwenvl data COMMAND`: tools that prepare training data, check them, and let a person see them.

Each command is a module of its own, imported only when it is called.

    qwenvl data lint my.json
"""

import importlib
from collections.abc import Sequence

from qwenvl_jax.cli.errors import run_command
from qwenvl_jax.cli.subcommands import choose

COMMANDS = {
    "prepare": "turn any source into ArrayRecord files with an index",
    "inspect": "write a page of samples as pictures, with boxes, text and loss",
    "lint": "list every problem of a fine-tuning file at once",
    "stats": "print lengths, pictures, tasks, and how well they would pack",
}
_EXAMPLE = "qwenvl data lint my.json"


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code of the chosen command."""
    return run_command("data", _run, argv)


def _run(argv: Sequence[str]) -> int:
    chosen = choose("qwenvl data", COMMANDS, argv, _EXAMPLE)
    if isinstance(chosen, int):
        return chosen
    name, rest = chosen
    return importlib.import_module(f"qwenvl_jax.cli.data_{name}").main(rest)
