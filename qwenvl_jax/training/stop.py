"""Asking a run to stop: SIGTERM or Ctrl-C, on one process or on any of many."""

import os
import signal
import threading
from typing import Any

import jax
from jax.experimental import multihost_utils


class StopRequest:
    """Notes the first SIGTERM or Ctrl-C in `signal`; the second one ends the process at once.

    With several processes jax's own service carries a SIGTERM of any of them to all, which then
    stop at the same step; Ctrl-C is passed on as SIGTERM.
    """

    def __init__(self):
        self.signal: str | None = None
        self._before: dict[int, Any] = {}
        self._is_alone = jax.process_count() == 1

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():  # elsewhere Python refuses
            ours = (signal.SIGTERM, signal.SIGINT) if self._is_alone else (signal.SIGINT,)
            for number in ours:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def reached(self, tick: int) -> str | None:
        """Returns what asked to stop, once all processes are to stop here; else None.

        `tick` counts the calls: the processes agree on one that none of them has passed.
        """
        if self._is_alone:
            return self.signal
        return "SIGTERM" if multihost_utils.reached_preemption_sync_point(tick) else None

    def _note(self, number: int, _frame: Any) -> None:
        if self.signal is not None:
            os._exit(128 + number)
        self.signal = signal.Signals(number).name
        if not self._is_alone:
            os.kill(os.getpid(), signal.SIGTERM)
