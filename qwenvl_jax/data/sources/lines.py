"""Text files cut into byte ranges, so that many processes read one large file.

A range owns the lines that begin in it. A line is named by the byte where it begins, since nobody
counts the lines before a range.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

RANGE = 64 * 2**20  # bytes
MAX_LINE = 64 * 2**20  # bytes; a longer one is cut

_SHARD = re.compile(r"(.*)\[(\d+):(\d+)\]", re.DOTALL)


def ranges(files: Sequence[Path], root: Path, size: int = RANGE) -> list[str]:
    """Returns shard names "file[start:end]" that cover the files."""
    shards = []
    for path in files:
        length = path.stat().st_size
        name = path.relative_to(root).as_posix()
        shards += [f"{name}[{i}:{min(i + size, length)}]" for i in range(0, length, size)]
    return shards


def read_lines(shard: str, root: Path) -> Iterator[tuple[int, bytes]]:
    """Yields the first byte's place and the bytes of each line that begins in a range."""
    name, start, end = split(shard)
    with (root / name).open("rb") as file:
        if start:
            file.seek(start - 1)
            _end_of_line(file)
        while (place := file.tell()) < end and (line := file.readline(MAX_LINE)):
            yield place, line
            if not line.endswith(b"\n"):
                _end_of_line(file)


def split(shard: str) -> tuple[str, int, int]:
    """Returns file name, start and end of a range's name."""
    match = _SHARD.fullmatch(shard)
    if match is None:
        raise ValueError(f"not a range of a file: got {shard!r}, expected name[start:end]")
    return match[1], int(match[2]), int(match[3])


def _end_of_line(file) -> None:
    while (part := file.readline(MAX_LINE)) and not part.endswith(b"\n"):
        continue
