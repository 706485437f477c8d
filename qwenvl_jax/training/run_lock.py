"""The lock of a run directory: one process trains in it."""

import errno
import fcntl
import os
import socket
from pathlib import Path
from typing import IO

from qwenvl_jax.config import ConfigError
from qwenvl_jax.files import naming

_Place = tuple[int, int]  # device and number of a file or folder, whatever it is called


class RunLock:
    """Held from the start until `close`, or until this process dies.

    Raises: ConfigError where another process holds it.
    """

    def __init__(self, run_dir: Path):
        self._run_dir, self._file = run_dir, _take(run_dir)
        self._place = _place(run_dir)

    def is_lost(self) -> bool:
        """Returns whether the directory has been moved, removed, or begun in by another start.

        Where only the lock's file is gone it is made again.

        Raises: ConfigError where another process was faster.
        """
        try:
            if _place(self._run_dir / "lock") == _place(self._file.fileno()):
                return False
            if (self._run_dir / "lock").exists() or _place(self._run_dir) != self._place:
                return True
            self._file, gone = _take(self._run_dir), self._file
            gone.close()
        except OSError:  # a storage with troubles: it tells them to who writes
            return False
        return False

    def close(self) -> None:
        self._file.close()  # which unlocks it


def _place(path: Path | int) -> _Place | None:
    """Returns where a path or an open file lies; None where there is nothing."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino


def _take(run_dir: Path) -> IO:
    file = (run_dir / "lock").open("a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            print(
                f"{run_dir} cannot be locked ({error.strerror}): that no other process trains in "
                "it is up to you",
                flush=True,
            )
            return file
        file.seek(0)
        holder = file.read().strip() or "unknown"
        file.close()
        raise ConfigError(
            f"another process trains in {run_dir}: {holder}; stop it first, or choose another "
            "run_dir"
        ) from error
    with naming(run_dir / "lock"):
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
    return file
