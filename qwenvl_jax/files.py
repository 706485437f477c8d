"""Files that no kill and no full disk spoils: replaced as a whole, or added to line by line."""

import contextlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

HALF = ".new"  # ends the name of what is being written, or what a kill has left of it


@contextlib.contextmanager
def appearing(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """Yields a place beside `path`; the file written there moves to `path` when the block ends.

    `durable`: it is on the disk by then, which takes a disk's time.

    Raises: OSError, or what the block raises; the file that was there before is as it was, and
        nothing lies beside it.
    """
    beside = path.with_name(f"{path.name}.{os.getpid()}{HALF}")  # others may write the same
    try:
        yield beside
        if durable:
            with beside.open("rb") as file:
                os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:  # an interrupt too
        beside.unlink(missing_ok=True)
        raise


def replace(path: Path, write: Callable[[Path], object]) -> None:
    """Puts what `write` writes, at the place that it is given, in the place of a file.

    Raises: as `appearing`, and what `write` raises.
    """
    with appearing(path) as beside:
        write(beside)


def replace_text(path: Path, text: str) -> None:
    """Puts the text, as UTF-8, in the place of what the file holds; raises as `replace`."""
    replace(path, lambda beside: beside.write_text(text, encoding="utf-8"))


def json_line(record: Any, default: Callable[[Any], Any] | None = None) -> str:
    """Returns JSON in one line, null for NaN and infinities, which JSON does not know.

    `default` is that of `json.dumps`.
    """
    return json.dumps(_finite(record), default=default)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Lines:
    """A file that lines are added to; those that a full disk does not take wait for the next.

    It is opened with the first line. One that a kill has left without its end gets it.
    """

    def __init__(self, path: Path):
        self.path = path
        self._descriptor: int | None = None
        self._waiting = b""

    @property
    def num_waiting(self) -> int:
        """Bytes that are not in the file yet."""
        return len(self._waiting)

    def write(self, *lines: str) -> None:
        """Raises: OSError; what could not be written stays, and comes first at the next call."""
        self._waiting += "".join(f"{line}\n" for line in lines).encode()
        self.flush()

    def flush(self) -> None:
        """Writes what waits. Raises: OSError; the rest stays."""
        if self._waiting and self._descriptor is None:
            # To the system at once, not to the disk: a kill loses nothing, a step no time.
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
            size = os.fstat(self._descriptor).st_size
            if size and os.pread(self._descriptor, 1, size - 1) != b"\n":
                self._waiting = b"\n" + self._waiting
        while self._waiting and self._descriptor is not None:
            self._waiting = self._waiting[os.write(self._descriptor, self._waiting) :]

    def close(self) -> None:
        """Closes the file; what waits is lost unless `flush` has come first."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def discard_output() -> None:
    """Sends what is still to be printed nowhere: its reader has gone, and Python would complain."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)
