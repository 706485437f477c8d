"""One pass over all rows of a source, in this process or spread over several, with progress."""

import concurrent.futures
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from qwenvl_jax.config import ConfigError

Result = TypeVar("Result")

_CHUNK = 512  # rows
_ROWS_A_PROCESS = 4096  # fewer are done before another process has started
_AHEAD = 4  # chunks a process: what is waiting stays small

_work: Callable[[range], Any] | None = None  # of a worker process


def pass_over(
    work: Callable[[range], Result], num_rows: int, processes: int | None, name: str
) -> Iterator[Result]:
    """Yields `work(rows)` for runs of rows, in order.

    `work` is pickled once a process. `processes` None is as many as there are cores, but one where
    the rows are few. Progress goes to the terminal's error stream as a bar, elsewhere as lines.

    Raises: ConfigError for a number of processes that cannot be; what `work` raises.
    """
    if processes is not None and processes <= 0:
        raise ConfigError(f"--processes must be positive: got {processes}")
    if processes is None:
        processes = max(1, min(os.cpu_count() or 1, num_rows // _ROWS_A_PROCESS))
    chunks = [range(i, min(i + _CHUNK, num_rows)) for i in range(0, num_rows, _CHUNK)]
    results = map(work, chunks) if processes == 1 else _spread(work, chunks, processes)
    return _told(results, chunks, num_rows, name)


def _spread(
    work: Callable[[range], Result], chunks: list[range], processes: int
) -> Iterator[Result]:
    # Not forked: the tokenizer's and the terminal's threads would be copied half-way.
    context = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(processes, context, _start, (work,))
    waiting: list[concurrent.futures.Future] = []
    try:
        for chunk in chunks:
            waiting.append(pool.submit(_call, chunk))
            if len(waiting) >= _AHEAD * processes:
                yield waiting.pop(0).result()
        while waiting:
            yield waiting.pop(0).result()
    finally:
        pool.shutdown(cancel_futures=True)


def _start(work: Callable[[range], Any]) -> None:
    global _work  # noqa: PLW0603 - what a worker keeps between its calls
    _work = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent tells the person


def _call(chunk: range) -> Any:
    assert _work is not None  # `_start` ran before
    return _work(chunk)


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
