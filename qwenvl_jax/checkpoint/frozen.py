"""The weights of a run that do not train: written once, and shared by all of its checkpoints.

    run_dir/frozen/<digest>/    an ordinary Orbax checkpoint of a flat dict

The folder is named by what it holds. With LoRA at full size a checkpoint thus takes 1.5 GB, and not
21.
"""

import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import orbax.checkpoint as ocp

from qwenvl_jax.checkpoint.parts import Item, restore_in_parts
from qwenvl_jax.checkpoint.record import (
    CheckpointError,
    Damaged,
    Record,
    compare,
    describe,
    read,
    set_aside,
    sha256,
)

Spare = Callable[[], Item]  # the weights that the run began with, read or drawn once more

FROZEN = "frozen"
# On one device an array would be one file, of gigabytes, copied whole when it is written.
_CHUNK_BYTES = 64 << 20


class FrozenFolder:
    """`run_dir/frozen`: reads and writes what does not train."""

    def __init__(self, run_dir: Path):
        self._directory = run_dir / FROZEN
        # Looked up before anyone writes, so that all processes see the same.
        self._written = {path.name for path in self._directory.glob("*")}
        self._record: Record = {}

    def keep(self, arrays: Item) -> Record:
        """Returns the record of these arrays, written if they are not yet; all processes call it.

        In one process the same names must mean the same values: they are looked at once.
        """
        if self._record.keys() != arrays.keys():
            self._record = describe(arrays)
        name = _name(self._record)
        # One process alone looks again: somebody may have removed them.
        is_gone = jax.process_count() == 1 and not (self._directory / name).is_dir()
        if name not in self._written or is_gone:
            self._write(name, arrays)
        return self._record

    def _write(self, name: str, arrays: Item) -> None:
        """Writes the arrays into a new folder; all processes call it."""
        try:
            with ocp.Checkpointer(_handler()) as checkpointer:
                each = {path: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES) for path in arrays}
                args = ocp.args.PyTreeSave(dict(arrays), save_args=each)
                checkpointer.save(self._directory / name, args=args)
        except Exception:
            if jax.process_count() == 1:  # others may still be writing
                self.clean()
            raise
        self._written.add(name)

    def clean(self) -> None:
        """Removes what a save has left that was killed, or met a full disk."""
        for half in self._directory.glob("*.orbax-checkpoint-tmp*"):
            shutil.rmtree(half, ignore_errors=True)

    def restore(self, record: Record, wanted: Item, spare: Spare | None) -> Item:
        """Returns the arrays of a record, placed as `wanted` says.

        A damaged folder is renamed, and what it held taken from `spare`, if that is the same, and
        written again: a finished run saves no more, and cannot be loaded without it.

        Raises:
            CheckpointError: damaged, and no spare or another one. All checkpoints of a run need
                these arrays, so none of them is set aside for it.
        """
        folder = self._directory / _name(record)
        try:
            arrays = read(lambda: _read(folder, wanted))
            compare(arrays, record)
        except Damaged as reason:
            if spare is None:
                raise CheckpointError(
                    f"{folder} is damaged ({reason}), and every checkpoint of this run needs the "
                    "weights in it: restore a copy; or go on with the run, which looks for them "
                    "where it began"
                ) from reason
            arrays = self._again(folder, record, spare, reason)
        return arrays

    def _again(self, folder: Path, record: Record, spare: Spare, reason: Damaged) -> Item:
        """Returns the record's arrays from the run's beginning, which stand in the folder again.

        A disk that does not take them is told: the run can go on, and the next save tries again.
        """
        try:
            arrays = spare()
            arrays = {name: arrays[name] for name in record}
            compare(arrays, record)
        except Exception as error:
            raise CheckpointError(
                f"{folder} is damaged ({reason}), and what the run began with cannot stand for it: "
                f"{error}; restore a copy of the folder, or of `init`"
            ) from error
        if jax.process_index() == 0:
            done = f"renamed to {set_aside(folder).name} and " if folder.exists() else ""
            print(
                f"frozen weights {folder} are damaged ({reason}); {done}taken from where the run "
                "began",
                flush=True,
            )
        self._written.discard(folder.name)
        try:
            self._write(folder.name, arrays)
        except Exception as error:  # noqa: BLE001  a full disk has many names
            print(
                f"FROZEN WEIGHTS NOT WRITTEN AGAIN: {error}; until they are, only the same command "
                "can read this run",
                flush=True,
            )
        return arrays


def _read(folder: Path, wanted: Item) -> Item:
    with ocp.Checkpointer(_handler()) as checkpointer:
        return restore_in_parts(lambda args: checkpointer.restore(folder, args=args), wanted)


def _name(record: Record) -> str:
    return sha256(record)[:16]


def _handler() -> ocp.PyTreeCheckpointHandler:
    # Plain files: Orbax's database would gather them in memory first.
    return ocp.PyTreeCheckpointHandler(use_compression=False, use_ocdbt=False)
