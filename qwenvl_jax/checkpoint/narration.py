"""What Orbax, asyncio and TensorStore print beside what they raise."""

import functools
import logging
import sys
import traceback

_RAISED_TOO = (  # words in the log's lines of errors that a save raises
    "_SignalingThread.run() raised", "exception was never retrieved", "Failed to write metadata",
    "in background save thread", "Save Finalize thread",
)  # fmt: skip


@functools.cache
def leave_only_news() -> None:
    """Keeps them from narrating every save, and every array of a save that fails.

    On a full disk these are thousands of lines a save. What a person must know, the error says.
    """
    logging.getLogger("absl").setLevel(logging.ERROR)
    for narrator in ("absl", "asyncio"):
        logging.getLogger(narrator).addFilter(_is_news)
    sys.unraisablehook = functools.partial(_tell_others, sys.unraisablehook)


def _is_news(record: logging.LogRecord) -> bool:
    return not any(words in str(record.msg) for words in _RAISED_TOO)


def _tell_others(hook, unraisable) -> None:
    """Drops what TensorStore meets when it ends the writes that a failed save no longer awaits."""
    called = [frame.name for frame in traceback.extract_tb(unraisable.exc_traceback)]
    if called != ["call_soon_threadsafe", "_check_closed"]:
        hook(unraisable)
