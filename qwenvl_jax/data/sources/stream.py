"""Rows as they lie on disk: files that are read from front to back, and what was wrong with them.

A web set is too large to be read in any order before it is prepared. A `Stream` names its shards,
and reads each on its own and in a stable order, so that shards can be read by many processes.
"""

import dataclasses
import hashlib
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from qwenvl_jax.data.example import DataError
from qwenvl_jax.data.record import Record, Source


class Refusal(DataError):
    """A row that is left out: `key` names it, `reason` is the short word that is counted."""

    def __init__(self, key: str, reason: str, detail: str):
        super().__init__(key, reason, detail)
        self.key, self.reason, self.detail = key, reason, detail

    def __str__(self) -> str:
        return f"row {self.key}: {self.detail}"


@runtime_checkable
class Stream(Protocol):
    """Rows in shards; picklable, so that a process can be handed one."""

    @property
    def fingerprint(self) -> str:
        """Digest of what is read and how: another one means that the data have changed."""
        ...

    def shards(self) -> list[str]:
        """Returns the names of the shards, in order."""
        ...

    def read(self, shard: str) -> Iterator[Record | DataError]:
        """Yields the rows of a shard, and an error in the place of each that cannot be read.

        Raises: OSError where the file itself cannot be read, which may pass; DataError where it
        is not what the stream reads.
        """
        ...


class InRanges(NamedTuple):
    """Rows `start` to `end` of a Source as a Stream, cut into index ranges.

    Shard "0:100" holds the first hundred rows of the source.
    """

    source: Source
    rows_per_shard: int
    end: int
    start: int = 0

    @property
    def fingerprint(self) -> str:
        digest = self.source.fingerprint
        return f"{digest} from row {self.start}" if self.start else digest

    @property
    def pictures(self) -> Path | None:
        """The folder of pictures that lie apart from the rows."""
        return getattr(self.source, "pictures", None)

    def shards(self) -> list[str]:
        starts = range(self.start, self.end, self.rows_per_shard)
        return [f"{i}:{min(i + self.rows_per_shard, self.end)}" for i in starts]

    def read(self, shard: str) -> Iterator[Record | DataError]:
        start, end = map(int, shard.split(":"))
        for index in range(start, end):
            try:
                row = self.source[index]
            except Refusal as refusal:
                row = refusal
            except DataError as error:
                row = Refusal(f"#{index}", "unreadable row", str(error))
            yield row


class First(NamedTuple):
    """The first so many rows of a Stream, as one shard: a look at a set before all of it."""

    stream: Stream
    num_rows: int

    @property
    def fingerprint(self) -> str:
        return self.stream.fingerprint

    @property
    def pictures(self) -> Path | None:
        """The folder of pictures that lie apart from the rows."""
        return getattr(self.stream, "pictures", None)

    def shards(self) -> list[str]:
        return [f"first {self.num_rows}"]

    def read(self, shard: str) -> Iterator[Record | DataError]:
        rows = itertools.chain.from_iterable(map(self.stream.read, self.stream.shards()))
        return itertools.islice(rows, self.num_rows)


@dataclasses.dataclass(frozen=True)
class FoundFiles:
    """A file, or the files below a folder with one of the endings; looked for each time.

    Raises: DataError where there is none.
    """

    path: Path
    endings: tuple[str, ...]

    def __post_init__(self) -> None:
        find_files(self.path, self.endings)

    @property
    def root(self) -> Path:
        """What names are relative to."""
        return self.path.parent if self.path.is_file() else self.path

    def paths(self) -> list[Path]:
        return find_files(self.path, self.endings)

    def names(self) -> list[str]:
        return [path.relative_to(self.root).as_posix() for path in self.paths()]

    def fingerprint(self, **settings: Any) -> str:
        return files_fingerprint(self.paths(), self.root, **settings)


def find_files(path: Path, endings: Sequence[str]) -> list[Path]:
    """Returns the file itself, or the files below a folder with one of the endings, sorted.

    Raises: DataError where there is none.
    """
    if path.is_file():
        return [path]
    files = sorted(p for p in files_below(path) if p.name.lower().endswith(tuple(endings)))
    if not files:
        what = "no such file or folder" if not path.exists() else "a folder without any"
        raise DataError(f"{path} holds no {' or '.join(endings)} files: got {what}; check the path")
    return files


def files_below(path: Path) -> Iterator[Path]:
    """Yields the files below a folder, behind links too; a folder that is met again is left out."""
    seen = set()
    for folder, inner, names in os.walk(path, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            inner.clear()
            continue
        seen.add(real)
        yield from (file for name in names if (file := Path(folder, name)).is_file())


def files_fingerprint(files: Sequence[Path], root: Path, **settings: Any) -> str:
    """Returns a digest of names, sizes and times of files, and of how they are read.

    The names are relative to `root`, so that a folder may be moved.
    """
    seen = [(p.relative_to(root).as_posix(), p.stat()) for p in files]
    facts = [[name, stat.st_size, stat.st_mtime_ns] for name, stat in seen]
    text = json.dumps([facts, settings], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
