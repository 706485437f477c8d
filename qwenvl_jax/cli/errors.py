"""How a command ends: its exit code, and what a person sees when something is wrong.

Exceptions whose class is written in this package carry a message for people, and so do the
operating system's: those become one line and exit code 2. Anything else is a bug and keeps its
traceback. `QWENVL_DEBUG=1` shows the traceback of both.
"""

import os
import sys
from collections.abc import Callable, Sequence

SUCCESS = 0
USAGE_ERROR = 2
INTERRUPTED = 130  # 128 + SIGINT, as shells report it


def is_user_error(error: BaseException) -> bool:
    """Returns whether the message of `error` was written for the person at the terminal.

    Our own modules name their errors (`ConfigError`, `ImageError`, ...), so the module of the class
    tells: no list to keep, and nothing heavy to import only to compare classes.
    """
    return type(error).__module__.split(".")[0] == "qwenvl_jax" or isinstance(error, OSError)


def one_line(error: BaseException) -> str:
    """Returns the error as one line: what is wrong, what was got, how to fix it."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.strerror}: {str(error.filename)!r}"
    return " ".join(str(error).split()) or type(error).__name__


def run_command(
    name: str, command: Callable[[Sequence[str]], int], argv: Sequence[str] | None = None
) -> int:
    """Returns the exit code of `command(argv)`, after printing a wrong input as one line.

    name: what the person typed, put before the message ("infer.py", "qwenvl train").
    argv: without the program's name; None takes it from the command line.
    """
    try:
        return command(sys.argv[1:] if argv is None else argv)
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader went away (`| head`). Python would complain once more while flushing at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return SUCCESS
    except Exception as error:
        if os.environ.get("QWENVL_DEBUG") == "1" or not is_user_error(error):
            raise
        print(f"{name}: {one_line(error)}", file=sys.stderr)
        return USAGE_ERROR
