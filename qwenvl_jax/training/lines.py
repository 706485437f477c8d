"""Files that a run adds lines to for as long as it lasts, whatever the disk says meanwhile."""

from pathlib import Path


class Lines:
    """A file that lines are added to; those that a full disk does not take wait for the next."""

    def __init__(self, path: Path):
        # To the system at once, not to the disk: a kill loses nothing, a step no time.
        self._file = path.open("ab", buffering=0)
        self._waiting = b""

    @property
    def num_waiting(self) -> int:
        """Bytes that are not in the file yet."""
        return len(self._waiting)

    def write(self, line: str) -> None:
        """Raises: OSError; what could not be written stays, and comes first at the next call."""
        self._waiting += line.encode() + b"\n"
        self.flush()

    def flush(self) -> None:
        while self._waiting:
            self._waiting = self._waiting[self._file.write(self._waiting) :]

    def close(self) -> None:
        self._file.close()
