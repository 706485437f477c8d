"""How a command ends: its exit code, and what a person sees when something is wrong.

Messages written for people become one line and exit code 2: those of this package and those of the
operating system. Anything else is a bug and keeps its traceback. `QWENVL_DEBUG=1` shows the
traceback of both.
"""

import codecs
import dis
import io
import os
import sys
from collections.abc import Callable, Sequence

from qwenvl_jax.cli.devices import leave_out_absent_tpu

SUCCESS = 0
USAGE_ERROR = 2
INTERRUPTED = 130  # 128 + SIGINT, as shells report it


def is_user_error(error: BaseException) -> bool:
    """Returns whether the message of `error` was written for the person at the terminal.

    True for the operating system's errors, for error classes of this package (`ConfigError`, ...)
    and for a ValueError that a `raise` of this package made; `int("x")` in our code is a bug.
    """
    if isinstance(error, OSError) or _is_ours(type(error).__module__):
        return True
    return isinstance(error, ValueError) and _is_raised_by_us(error)


def _is_ours(module: str) -> bool:
    return module.split(".")[0] == "qwenvl_jax"


def _is_raised_by_us(error: BaseException) -> bool:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None or not _is_ours(trace.tb_frame.f_globals.get("__name__", "")):
        return False
    return trace.tb_frame.f_code.co_code[trace.tb_lasti] == dis.opmap["RAISE_VARARGS"]


def one_line(error: BaseException) -> str:
    """Returns the error as one line: what is wrong, what was got, how to fix it."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.strerror}: {str(error.filename)!r}"
    return " ".join(str(error).split()) or type(error).__name__


def _print_every_character() -> None:
    r"""Lets a character that standard output's encoding lacks be printed as `\u4e2d`."""
    out = sys.stdout
    if not isinstance(out, io.TextIOWrapper) or codecs.lookup(out.encoding).name == "utf-8":
        return
    if out.errors in ("strict", "surrogateescape"):  # else somebody has decided
        out.reconfigure(errors="backslashreplace")


def run_command(
    name: str, command: Callable[[Sequence[str]], int], argv: Sequence[str] | None = None
) -> int:
    """Returns the exit code of `command(argv)`, after printing a wrong input as one line.

    name: what the person typed, put before the message ("infer", "train").
    argv: without the program's name; None takes it from the command line.
    """
    leave_out_absent_tpu()
    _print_every_character()
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
