"""What is noted of saved arrays, and how they are read back and compared with it."""

import errno
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from qwenvl_jax.checkpoint.digest import digests
from qwenvl_jax.checkpoint.parts import Item

Record = dict[str, dict[str, Any]]  # dotted name -> {shape, dtype, digest}

_ERRORS_OF_THE_SYSTEM = (
    errno.EIO, errno.EMFILE, errno.ENFILE, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN,
    errno.ECONNRESET, errno.ECONNABORTED, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN,
)  # fmt: skip
_STATES_OF_THE_SYSTEM = (  # as tensorstore names them
    "RESOURCE_EXHAUSTED", "UNAVAILABLE", "PERMISSION_DENIED", "UNAUTHENTICATED",
    "DEADLINE_EXCEEDED",
)  # fmt: skip


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used, or a run directory without one."""


class Damaged(Exception):
    """What lies on the disk is not what was written."""


def describe(arrays: Item) -> Record:
    """Returns what to note of these arrays."""
    found = digests(arrays)
    return {
        name: {"shape": list(x.shape), "dtype": str(x.dtype), "digest": found[name]}
        for name, x in arrays.items()
    }


def sha256(record: Any) -> str:
    """Returns the digest of a record itself."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def read(action: Callable[[], Any]) -> Any:
    """Returns what Orbax reads.

    Raises: Damaged for whatever it stumbles on, but for what says nothing about the files, as too
        little memory or a storage that does not answer: setting them aside would lose the run.
    """
    try:
        return action()
    except Exception as error:  # noqa: BLE001  Orbax and tensorstore raise many kinds
        _raise_damaged(error)


def compare(arrays: Item, record: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises Damaged unless every array has the digest it was noted with."""
    for name, digest in digests(arrays).items():
        if digest != record[name]["digest"]:
            raise Damaged(f"{name} does not have the digest it was saved with")


def set_aside(folder: Path, why: str = "corrupt") -> Path:
    """Returns the new name of a folder, which ends in `.<why>`; nothing is deleted."""
    target, count = folder.with_name(f"{folder.name}.{why}"), 1
    while target.exists():
        count += 1
        target = folder.with_name(f"{folder.name}.{why}-{count}")
    folder.rename(target)
    return target


def _raise_damaged(error: Exception) -> NoReturn:
    is_systems = isinstance(error, MemoryError | PermissionError) or (
        isinstance(error, OSError) and error.errno in _ERRORS_OF_THE_SYSTEM
    )
    told = (*_STATES_OF_THE_SYSTEM, *map(os.strerror, _ERRORS_OF_THE_SYSTEM))
    if is_systems or any(words in str(error) for words in told):
        raise error
    raise Damaged(f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}") from error
