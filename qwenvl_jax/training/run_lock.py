"""The lock of a run directory: one process trains in it."""

import datetime
import errno
import fcntl
import os
import socket
from pathlib import Path
from typing import IO

from qwenvl_jax.config import ConfigError
from qwenvl_jax.files import naming


class RunLock:
    """Held from the start until `close`, or until this process dies.

    Raises: ConfigError where another process holds it.
    """

    def __init__(self, run_dir: Path):
        self._run_dir, self._path = run_dir, run_dir / "lock"
        now = datetime.datetime.now().astimezone().isoformat()
        self._holder = f"process {os.getpid()} on {socket.gethostname()} since {now}\n"
        self._file = self._take()
        self._place = _place(run_dir)

    def is_lost(self) -> bool:
        """Returns whether the directory has been moved, removed, or begun in by another start.

        Where only the lock's file is gone it is made again. The file's words are compared, not its
        number, which not every network storage keeps.

        Raises: ConfigError where another process was faster.
        """
        try:
            if self._path.exists():
                return self._path.read_text(encoding="utf-8", errors="replace") != self._holder
            if _place(self._run_dir) != self._place:
                return True
            self._file, gone = self._take(), self._file
            gone.close()
        except OSError:  # a storage with troubles: it tells them to who writes
            return False
        return False

    def close(self) -> None:
        self._file.close()  # which unlocks it

    def _take(self) -> IO:
        file = self._path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                file.seek(0)
                holder = file.read().strip() or "unknown"
                file.close()
                raise ConfigError(
                    f"another process trains in {self._run_dir}: {holder}; stop it first, or "
                    "choose another run_dir"
                ) from error
            print(
                f"{self._run_dir} cannot be locked ({error.strerror}): that no other process "
                "trains in it is up to you",
                flush=True,
            )
        with naming(self._path):
            file.truncate(0)
            file.write(self._holder)
            file.flush()
        return file


def _place(folder: Path) -> tuple[int, int] | None:
    """Returns which folder a path leads to; None where there is none."""
    try:
        status = folder.stat()
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino
