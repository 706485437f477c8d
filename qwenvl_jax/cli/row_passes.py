"""One pass over all rows of a source, in this process or spread over several, with progress."""

import os
import sys
from collections.abc import Callable, Iterator
from typing import TypeVar

from qwenvl_jax.config import ConfigError
from qwenvl_jax.data.workers import WorkerKilled, parted, spread

Result = TypeVar("Result")

_CHUNK = 512  # rows
_ROWS_A_PROCESS = 4096  # fewer are done before another process has started


def pass_over(
    work: Callable[[range], Result], num_rows: int, processes: int | None, name: str
) -> Iterator[Result]:
    """Yields `work(rows)` for runs of rows, in order.

    `processes` None is as many as there are cores, but one where the rows are few. Progress goes to
    the terminal's error stream as a bar, elsewhere as lines.

    Raises: ConfigError for a number of processes that cannot be, and where one was killed; what
    `work` raises.
    """
    if processes is not None and processes <= 0:
        raise ConfigError(f"--processes must be positive: got {processes}")
    if processes is None:
        processes = max(1, min(os.cpu_count() or 1, num_rows // _ROWS_A_PROCESS))
    chunks = parted(num_rows, _CHUNK)
    results = map(work, chunks) if processes == 1 else _spread(work, chunks, processes)
    return _told(results, chunks, num_rows, name)


def _spread(
    work: Callable[[range], Result], chunks: list[range], processes: int
) -> Iterator[Result]:
    try:
        yield from spread(work, chunks, processes)
    except WorkerKilled as error:
        raise ConfigError(f"{error}; use a smaller --processes") from error


def _told(
    results: Iterator[Result], chunks: list[range], num_rows: int, name: str
) -> Iterator[Result]:
    """Yields the results, saying how far they are."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

        columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            bar = progress.add_task(name, total=num_rows)
            for chunk, result in zip(chunks, results, strict=True):
                yield result
                progress.update(bar, completed=chunk.stop)
        return
    tenths = 0
    for chunk, result in zip(chunks, results, strict=True):
        yield result
        if num_rows > _ROWS_A_PROCESS and chunk.stop * 10 // num_rows > tenths:
            tenths = chunk.stop * 10 // num_rows
            print(f"{name}: {chunk.stop} of {num_rows}", file=sys.stderr)
