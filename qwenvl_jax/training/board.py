"""The curves of a run for TensorBoard, in a file that the loop itself writes.

tensorboardX has a thread for that, and a queue of ten events before it. A full disk ends the
thread, and then the queue stays full, and whoever writes waits for ever.
"""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

_FLUSH_SECONDS = 30


class Board:
    """One file of events; its methods raise OSError, after which it is of no more use."""

    def __init__(self, folder: Path, first_step: int):
        """Hides what earlier files say of steps from `first_step` on.

        Raises: ImportError without tensorboardX.
        """
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2

        folder.mkdir(exist_ok=True)
        self._made: Any = event_pb2
        self._writer = EventsWriter(str(folder / "events"))
        start = self._made.SessionLog(status=self._made.SessionLog.START)
        self._writer.write_event(self._made.Event(step=first_step, session_log=start))
        self._flushed = 0.0

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        from tensorboardX.summary import scalar

        for name, value in values.items():
            self._add(scalar(name, value), step)

    def picture(self, name: str, picture_YXC: np.ndarray, step: int) -> None:
        from tensorboardX.summary import image

        self._add(image(name, picture_YXC, dataformats="HWC"), step)

    def close(self) -> None:
        self._writer.close()

    def _add(self, summary: Any, step: int) -> None:
        now = time.time()
        self._writer.write_event(self._made.Event(wall_time=now, step=step, summary=summary))
        if now - self._flushed > _FLUSH_SECONDS:
            self._writer.flush()
            self._flushed = now
