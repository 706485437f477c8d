"""Asking a run to stop: SIGTERM or Ctrl-C, on one process or on any of many."""

import contextlib
import os
import signal
import threading
import time
from typing import Any

import jax
from jax.experimental import multihost_utils


def grace(seconds: float, given: float) -> str:
    """Returns a line: how long a stop took, or would take, and whether that is soon enough."""
    told = f"a stop takes {seconds:.1f} s"
    if seconds <= given:
        return f"{told}, within guard.grace_seconds={given:g}"
    return (
        f"{told}, LONGER THAN guard.grace_seconds={given:g}: a process killed before that goes on "
        "from its newest checkpoint; raise both the machine's grace time and this setting, or save "
        "more often (checkpoint.every_steps)"
    )


class StopRequest:
    """Notes the first SIGTERM or Ctrl-C in `signal`; the second one ends the process at once.

    `asked_at` is when, by the monotonic clock.

    With several processes jax's own service carries a SIGTERM of any of them to all, which then
    stop at the same step; Ctrl-C is passed on as SIGTERM. When it came they are not told, so what
    was under way when they agreed, as an evaluation, counts for the stop.
    """

    def __init__(self):
        self.signal: str | None = None
        self.asked_at: float | None = None
        self._before: dict[int, Any] = {}
        self._is_alone = jax.process_count() == 1
        self._looked_at = time.monotonic()

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():  # elsewhere Python refuses
            ours = (signal.SIGTERM, signal.SIGINT) if self._is_alone else (signal.SIGINT,)
            for number in ours:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def is_asked(self) -> bool:
        """Whether this process stops as soon as it can; several agree on a step, by `reached`."""
        return self._is_alone and self.signal is not None

    def reached(self, tick: int) -> str | None:
        """Returns what asked to stop, once all processes are to stop here; else None.

        `tick` counts the calls: the processes agree on one that none of them has passed.
        """
        if self._is_alone:
            return self.signal
        before, self._looked_at = self._looked_at, time.monotonic()
        if not multihost_utils.reached_preemption_sync_point(tick):
            return None
        self.asked_at = self.asked_at or before  # jax keeps the signal's own time
        return "SIGTERM"

    def _note(self, number: int, _frame: Any) -> None:
        if self.signal is not None:
            os._exit(128 + number)
        self.signal, self.asked_at = signal.Signals(number).name, time.monotonic()
        # Not by print: a handler may run inside of one.
        with contextlib.suppress(BrokenPipeError):  # Ctrl-C has ended who read it (`2>&1 | tee`)
            os.write(
                2, f"{self.signal}: stops after this step; a second one ends at once\n".encode()
            )
        if not self._is_alone:
            os.kill(os.getpid(), signal.SIGTERM)
