"""Which subcommand the first word names, for `qwenvl` and for `qwenvl data`."""

import difflib
import sys
from collections.abc import Mapping, Sequence

from qwenvl_jax.cli.errors import SUCCESS, USAGE_ERROR


def choose(
    prog: str, commands: Mapping[str, str], argv: Sequence[str], example: str
) -> tuple[str, list[str]] | int:
    """Returns the name of a subcommand and the words after it; or an exit code, having told why."""
    argv = list(argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage(prog, commands, example))
        return SUCCESS if argv else USAGE_ERROR
    name, *rest = argv
    if name in commands:
        return name, rest
    near = difflib.get_close_matches(name, commands, n=1)
    hint = f"did you mean '{prog} {near[0]}'?" if near else f"run '{prog} --help'"
    print(
        f"{prog}: unknown command: got {name!r}, expected one of {', '.join(commands)}; {hint}",
        file=sys.stderr,
    )
    return USAGE_ERROR


def usage(prog: str, commands: Mapping[str, str], example: str) -> str:
    """Returns the help text: one line a command, and an example."""
    width = max(map(len, commands))
    lines = [f"  {name:<{width}}  {text}" for name, text in commands.items()]
    return "\n".join(
        [
            f"usage: {prog} COMMAND [options]",
            "",
            *lines,
            "",
            f"example: {example}",
            "Each command has its own --help.",
        ]
    )
