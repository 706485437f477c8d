"""How a command ends: its exit code, and what a person sees when something is wrong.

Messages written for people become one line and exit code 2: those of this package and those of the
operating system. Anything else is a bug and keeps its traceback. `QWENVL_DEBUG=1` shows the
traceback of both.
"""

import codecs
import contextlib
import dis
import io
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn

from qwenvl_jax.cli.devices import leave_out_absent_tpu
from qwenvl_jax.files import discard_output

SUCCESS = 0
BUG = 1  # as Python itself ends
USAGE_ERROR = 2
INTERRUPTED = 130  # 128 + SIGINT, as shells report it

_is_work_cut = threading.Event()


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


def _open_closed_streams() -> None:
    """Puts the null device in the place of standard streams that are closed (`2>&-`).

    Python has None there. The numbers of the closed ones are the lowest that are free, so that the
    streams get their own back, and no file that is opened later takes what others print.
    """
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            file = io.FileIO(os.devnull, "r" if name == "stdin" else "w")
            os.set_inheritable(file.fileno(), True)  # or a worker process would be without again
            text = io.TextIOWrapper(file, encoding="utf-8", errors="backslashreplace")
            setattr(sys, name, text)


def run_command(
    name: str, command: Callable[[Sequence[str]], int], argv: Sequence[str] | None = None
) -> int:
    """Returns the exit code of `command(argv)`, after printing a wrong input as one line.

    name: what the person typed, put before the message ("infer", "train").
    argv: without the program's name; None takes it from the command line.
    """
    leave_out_absent_tpu()
    _open_closed_streams()
    _print_every_character()
    try:
        with _dropped_interrupts_sent_again():
            code = _told(name, command, sys.argv[1:] if argv is None else argv)
    except SystemExit:  # after `--help`
        code = _flushed(name, SUCCESS)
        if code == SUCCESS:
            raise
        return code
    return _flushed(name, code)


def _told(name: str, command: Callable[[Sequence[str]], int], argv: Sequence[str]) -> int:
    try:
        return command(argv)
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader went away (`| head`)
        discard_output()
        return SUCCESS
    except Exception as error:
        if os.environ.get("QWENVL_DEBUG") == "1" or not is_user_error(error):
            if not has_cut_work():
                raise
            # `leave` does not wait for that work, as the end of Python after a raise would.
            sys.excepthook(type(error), error, error.__traceback__)
            return BUG
        print(f"{name}: {one_line(error)}", file=sys.stderr)
        return USAGE_ERROR


@contextlib.contextmanager
def _dropped_interrupts_sent_again() -> Iterator[None]:
    """Sends an interrupt again that Python has dropped.

    It drops what is raised in destructors and in callbacks of the garbage collector, of which jax
    has one: while much is loaded or compiled, Ctrl-C often arrives there.
    """
    before = sys.unraisablehook

    def hook(dropped: "sys.UnraisableHookArgs") -> None:
        if dropped.exc_type is not KeyboardInterrupt:
            before(dropped)
            return
        # From elsewhere and later: raised in here it would be dropped as well.
        again = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT))
        again.daemon = True
        again.start()

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before


@contextlib.contextmanager
def interrupted_by(*numbers: int) -> Iterator[None]:
    """Has these signals end the block as Ctrl-C does, so that it cleans up; not those ignored."""
    ends = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, signal.default_int_handler) for number in ends}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _flushed(name: str, code: int) -> int:
    """Returns the exit code once all that was printed has left; Python would do it unguarded."""
    try:
        sys.stdout.flush()
    except OSError as error:
        discard_output()
        if code == SUCCESS and not isinstance(error, BrokenPipeError):
            why = error.strerror or one_line(error)
            print(
                f"{name}: standard output cannot be written: {why}; send it to another place",
                file=sys.stderr,
            )
            return USAGE_ERROR
    return code


def note_cut_work() -> None:
    """Says that threads may still be in work that nobody wants any more; for `leave`."""
    _is_work_cut.set()


def has_cut_work() -> bool:
    """Returns whether `note_cut_work` was called."""
    return _is_work_cut.is_set()


def leave(code: int) -> NoReturn:
    """Ends the process of a command with its exit code.

    An interrupt may leave jax compiling in threads of its own. They would be cut by the usual end
    of an interpreter, which they answer with a segmentation fault. For a thread that hangs in a
    read it would wait without end. In both cases the process ends at once.
    """
    is_cut = code == INTERRUPTED or has_cut_work()
    if is_cut and "jax" in sys.modules:
        for child in multiprocessing.active_children():  # as the usual end does
            child.terminate()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
