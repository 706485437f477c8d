"""Files that no kill and no full disk spoils: replaced as a whole, or added to line by line.

And how they are read back, should something else have spoilt them.
"""

import contextlib
import errno
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from qwenvl_jax.checks import ConfigError

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
        with naming(path):
            yield beside
            if durable:
                with beside.open("rb") as file:
                    os.fsync(file.fileno())
            os.replace(beside, path)
    except BaseException:  # an interrupt too
        beside.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Has an OSError of the block name the file: that of a full disk names none by itself."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
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


def is_full_disk(error: Exception) -> bool:
    """Whether a write failed for want of space, or of more of it than a quota allows."""
    return _full(error) is not None


def why_not_written(error: Exception, folder: Path) -> str:
    """Returns what a person must know of a write into `folder` that failed."""
    return f"{full}: {str(folder)!r}" if (full := _full(error)) else str(error)


def _full(error: Exception) -> str | None:
    """Returns the system's words for a full disk, if this error has them."""
    # TensorStore and Orbax have no class of their own for what the system says.
    for number in (errno.ENOSPC, errno.EDQUOT):
        if getattr(error, "errno", None) == number or os.strerror(number) in str(error):
            return os.strerror(number)
    return None


def read_text(path: Path, way_out: str) -> str:
    """Returns the text of a file. Raises: ConfigError, which ends with `way_out`: no UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is damaged: expected UTF-8, got {error}; {way_out}") from error


def read_object(path: Path, way_out: str) -> dict[str, Any]:
    """Returns the JSON object in a file. Raises: ConfigError, which ends with `way_out`."""
    try:
        found = json.loads(read_text(path, way_out))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ConfigError(f"{path} is not readable as JSON: {error}; {way_out}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path} is damaged: expected an object, got {found!r:.60}; {way_out}")
    return found


def read_records(path: Path, way_out: str) -> list[dict[str, Any]]:
    """Returns the objects of a JSON lines file; a line that is cut short is left out.

    A run under way may be writing the last one, and a kill may have left one.

    Raises: ConfigError, which ends with `way_out`, where a whole line holds something else.
    """
    records = []
    for number, line in enumerate(read_text(path, way_out).splitlines(), start=1):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if not isinstance(record, dict):
            raise ConfigError(
                f"{path} is damaged: expected an object in line {number}, got {line!r:.60}; "
                f"{way_out}"
            )
        records.append(record)
    return records


def json_text(record: Any) -> str:
    """Returns JSON for a file that people read too."""
    return json.dumps(record, indent=1) + "\n"


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
        with naming(self.path):
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


def name_for(process: int, name: str) -> str:
    """Returns the name of one process's own file of lines.

    A shared disk does not join what several write into one. The first process has the plain name.
    """
    return f"{process}-{name}" if process else name


def discard_output() -> None:
    """Sends what is still to be printed nowhere: its reader has gone, and Python would complain."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)
