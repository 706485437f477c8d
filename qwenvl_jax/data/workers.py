"""Work spread over processes that end with this one, however it ends."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from typing import Any, TypeVar, cast

Item = TypeVar("Item")
Result = TypeVar("Result")

_AHEAD = 4  # items a process: what is waiting stays small

_work: Callable[[Any], Any] | None = None  # of a worker process: sent once, not with each item


class WorkerKilled(RuntimeError):
    """A worker process has ended in the middle of its work, and no error of Python says why."""

    def __init__(self) -> None:
        super().__init__("a worker process was killed, as the system does when memory runs out")


def parted(num_rows: int, size: int) -> list[range]:
    """Returns all rows in runs of so many, the last one maybe shorter: each an item of `spread`."""
    return [range(i, min(i + size, num_rows)) for i in range(0, num_rows, size)]


def spread(
    work: Callable[[Item], Result],
    items: Iterable[Item],
    num_workers: int,
    *,
    in_order: bool = True,
) -> Iterator[Result]:
    """Yields `work(item)` of every item, made by so many processes; else as they come.

    `work` is pickled once a process. The processes are spawned: a fork would copy threads in the
    middle of their work.

    Raises: WorkerKilled; what `work` raises.
    """
    context = multiprocessing.get_context("spawn")
    lives, held = cast("tuple[Connection, Connection]", context.Pipe(duplex=False))
    pool = ProcessPoolExecutor(num_workers, context, _start, (work, lives))
    waiting: list[Future[Result]] = []
    try:
        for item in items:
            waiting.append(pool.submit(_call, item))
            if len(waiting) >= _AHEAD * num_workers:
                yield _next(waiting, in_order)
        while waiting:
            yield _next(waiting, in_order)
    except BrokenProcessPool as error:
        raise WorkerKilled from error
    finally:
        held.close()
        pool.shutdown(cancel_futures=True)


def _next(waiting: "list[Future[Result]]", in_order: bool) -> Result:
    """Returns the first result, or one that is there first, and takes it off the list."""
    if in_order:
        return waiting.pop(0).result()
    done = wait(waiting, return_when=FIRST_COMPLETED).done.pop()
    waiting.remove(done)
    return done.result()


# --- in a worker process --------------------------------------------------------------------------


def _start(work: Callable[[Any], Any], parent_lives: Connection) -> None:
    global _work  # noqa: PLW0603 - a pool's initializer has no other place
    _work = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it too, and stops us
    threading.Thread(target=_end_with, args=(parent_lives,), daemon=True).start()


def _end_with(parent_lives: Connection) -> None:
    """Waits for the other end to be closed, by the parent or by its death, and ends the process."""
    parent_lives.poll(None)
    os._exit(1)  # nothing is lost: what is not whole has no name yet, or went to the parent


def _call(item: Any) -> Any:
    assert _work is not None  # `_start` ran before
    return _work(item)
