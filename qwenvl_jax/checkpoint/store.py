"""Saving and restoring a run: Orbax, plus our own digest of every array.

A checkpoint is a step number and named items, each a flat dict from a dotted name to an array:
`weights` is the model, `optimizer` the rest of the training state. Beside them lies `digest`,
written in the same atomic commit: name -> shape, dtype, fingerprint. Orbax alone restores a file
with a flipped bit without a word; here a checkpoint counts only when every digest agrees.

Weights that do not train lie beside the checkpoints (`frozen.py`); each of these has their digests.
"""

import contextlib
import shutil
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from qwenvl_jax.checkpoint.frozen import FROZEN, FrozenFolder, Spare
from qwenvl_jax.checkpoint.narration import leave_only_news
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

FORMAT = 1  # of the digest record; raised when an older one can no longer be read
_DIGEST = "digest"
_WEIGHTS = "weights"
_ITEMS = (_WEIGHTS, "optimizer", "guard")
_PARTS = (_DIGEST, *_ITEMS, "_CHECKPOINT_METADATA")  # of a checkpoint's folder


class CheckpointStore:
    """The checkpoints of one run directory: `run_dir/checkpoints/<step>/`."""

    def __init__(
        self,
        run_dir: str | Path,
        *,
        keep: int | None = None,
        frozen: Collection[str] = (),
        read_only: bool = False,
    ):
        """`keep` newest steps stay; None keeps all. `read_only` never creates or renames.

        `frozen` names weights that stay as they are for as long as this store lives: its first
        save writes them, and waits for it, and later ones refer to them.
        """
        self._still = frozenset(frozen)
        self._directory = Path(run_dir).resolve() / "checkpoints"
        self._read_only = read_only
        if read_only and not self._directory.is_dir():
            raise CheckpointError(f"no checkpoints in {run_dir}: expected a folder `checkpoints`")
        if not read_only:
            self._set_foreign_aside()
        self._frozen = FrozenFolder(self._directory.parent)
        if not read_only and jax.process_index() == 0:
            self._frozen.clean()
        leave_only_news()
        self._manager = ocp.CheckpointManager(
            self._directory,
            # Weights and moments hardly compress, and the step waits for the cores that try.
            item_handlers={
                _DIGEST: ocp.JsonCheckpointHandler(),
                **{name: ocp.PyTreeCheckpointHandler(use_compression=False) for name in _ITEMS},
            },
            options=ocp.CheckpointManagerOptions(
                max_to_keep=None if read_only else keep,
                create=not read_only,
                cleanup_tmp_directories=not read_only,  # else every kill leaves one behind
                read_only=read_only,
                enable_async_checkpointing=not read_only,
                # Made in the background, a folder that cannot be made leaves Orbax's threads
                # waiting for it, and the process with them: ten minutes after it was to end.
                async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
            ),
        )

    def steps(self) -> list[int]:
        """Returns the committed steps, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, items: Mapping[str, Item]) -> None:
        """Starts saving; the arrays may be donated as soon as this returns.

        Raises:
            Exception: whatever makes this save fail, or made the one before it fail in the
                background: `wait` for that one to tell them apart.
        """
        weights = items[_WEIGHTS]
        still = {name: x for name, x in weights.items() if name in self._still}
        changing = {name: x for name, x in weights.items() if name not in still}
        items = {**items, _WEIGHTS: changing}
        record = {name: describe(arrays) for name, arrays in items.items()}
        if still:
            record[FROZEN] = self._frozen.keep(still)
        payload = {"format": FORMAT, "items": record, "sha256": sha256(record)}
        payload["whole"] = _digest_of_all(payload)
        parts: dict[str, Any] = {
            name: ocp.args.PyTreeSave(dict(arrays)) for name, arrays in items.items()
        }
        parts[_DIGEST] = ocp.args.JsonSave(payload)
        # Forced: otherwise a folder named after a later step, whoever made it, silences every save.
        with self._clean_if_it_fails():
            is_saved = self._manager.save(step, args=ocp.args.Composite(**parts), force=True)
        if not is_saved:
            raise CheckpointError(
                f"step {step} was not saved in {self._directory}: Orbax refused it"
            )

    @property
    def is_saving(self) -> bool:
        """Whether a save is under way in the background."""
        return self._manager.is_saving_in_progress()

    def check(self) -> None:
        """Raises what a save that has ended in the background has met, if anything, once."""
        # Orbax's own check finds nothing: the thread that ends the save has taken the error.
        if not self.is_saving:
            self.wait()

    def wait(self) -> None:
        """Returns when no save is under way; raises what the save has met, once."""
        with self._clean_if_it_fails():
            self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()

    def restore_newest(
        self,
        wanted: Mapping[str, Item],
        defaults: Mapping[str, Item] | None = None,
        *,
        any_dtype: bool = False,
        spare: Spare | None = None,
    ) -> tuple[int, dict[str, Item]] | None:
        """Returns (step, items) of the newest step whose digests agree; None if there is no step.

        `wanted` holds ShapeDtypeStructs with shardings, which need not be those of the save. With
        `any_dtype` their dtypes do not count either: arrays come back as they were saved.
        `defaults` holds arrays for items that checkpoints of older versions do not have, `spare`
        returns the weights that the run began with, should frozen ones be damaged.
        Damaged steps are renamed `<step>.corrupt` and reported, never deleted; a read-only store
        only reports them.

        Raises:
            CheckpointError: there are steps and none is good, or names or shapes are not `wanted`,
                or frozen weights are damaged.
        """
        steps = []
        for step in self._newest_first():
            steps.append(step)
            try:
                return step, self._restore(step, wanted, defaults or {}, any_dtype, spare)
            except Damaged as reason:
                if not self._is_gone(step):
                    self._set_aside(step, reason)
        aside = sorted(path.name for path in self._directory.glob("*.corrupt*"))
        if steps or aside:
            raise CheckpointError(
                f"no good checkpoint is left in {self._directory}: all of {sorted(steps)} are "
                f"damaged, set aside {aside}; a run never starts over by itself: restore a copy, "
                "or choose another run_dir"
            )
        return None

    def trained(self) -> Item:
        """Returns the trained weights of the newest step that can be read, as ShapeDtypeStructs.

        Raises: CheckpointError where there is none, or none that tells them from frozen ones.
        """
        for step in self._newest_first():
            try:
                record = self._read_record(step)
            except Damaged:
                continue
            if FROZEN not in record:
                raise CheckpointError(
                    f"{self._directory / str(step)} does not say what is frozen: either nothing "
                    "is, or the checkpoint is of an older version, and the run must go on for a "
                    "step first"
                )
            noted = record[_WEIGHTS].items()
            return {name: jax.ShapeDtypeStruct(tuple(x["shape"]), x["dtype"]) for name, x in noted}
        raise CheckpointError(f"no finished checkpoint in {self._directory}")

    def _newest_first(self) -> Iterator[int]:
        """Yields the steps, newest first, and what a run that goes on saves while one is read."""
        steps, tried = self.steps(), set[int]()
        while left := [step for step in steps if step not in tried]:
            tried.add(left[-1])
            yield left[-1]
            if self._is_gone(left[-1]):
                self._manager.reload()
                steps = self.steps()

    def _is_gone(self, step: int) -> bool:
        """Whether the run that is being read has removed a step for a newer one."""
        return self._read_only and not (self._directory / str(step)).exists()

    @contextlib.contextmanager
    def _clean_if_it_fails(self) -> Iterator[None]:
        """Removes what a failed save has left on the disk, which may be full, and counts again.

        Orbax forgets a step that is to go when the save begins, and removes it when that ends well.
        """
        try:
            yield
        except Exception:
            # Not with several processes: reading the directory is something they do together, and
            # an error need not be everyone's. The next start cleans up.
            if jax.process_count() == 1:
                for half in self._directory.glob("*.orbax-checkpoint-tmp*"):
                    shutil.rmtree(half, ignore_errors=True)
                self._manager.reload()
            raise

    def _restore(
        self,
        step: int,
        wanted: Mapping[str, Item],
        defaults: Mapping[str, Item],
        any_dtype: bool,
        spare: Spare | None,
    ) -> dict[str, Item]:
        record = self._read_record(step)
        still = record.pop(FROZEN, {})
        if not still.keys() & wanted[_WEIGHTS].keys():
            still = {}  # what trains is asked for alone
        whole = {**record, _WEIGHTS: record.get(_WEIGHTS, {}) | still}
        old = {name: dict(item) for name, item in defaults.items() if name not in record}
        wanted = {name: arrays for name, arrays in wanted.items() if name not in old}
        if any_dtype:
            wanted = {name: _as_saved(item, whole.get(name, {})) for name, item in wanted.items()}
        for name, arrays in wanted.items():
            _check_names(f"{self._directory / str(step)} item {name!r}", arrays, whole.get(name))
        items = {}
        for name, arrays in wanted.items():
            own = {path: x for path, x in arrays.items() if path in record[name]}
            items[name] = self._read_item(step, name, own)
            compare(items[name], record[name])
        if still:
            beside = {path: wanted[_WEIGHTS][path] for path in still}
            items[_WEIGHTS] = items[_WEIGHTS] | self._frozen.restore(still, beside, spare)
        return items | old

    def _read_item(self, step: int, name: str, wanted: Item) -> Item:
        def restore(args: ocp.args.PyTreeRestore) -> Item:
            return self._manager.restore(step, args=ocp.args.Composite(**{name: args}))[name]

        return read(lambda: restore_in_parts(restore, wanted))

    def _read_record(self, step: int) -> dict[str, Record]:
        """Returns item -> name -> {shape, dtype, digest}; checked against its own sha256."""
        args = ocp.args.Composite(**{_DIGEST: ocp.args.JsonRestore()})
        payload = read(lambda: self._manager.restore(step, args=args)[_DIGEST])
        found = payload.get("format", FORMAT) if isinstance(payload, dict) else FORMAT
        if found != FORMAT and payload.get("whole", "") == _digest_of_all(payload):
            raise CheckpointError(
                f"{self._directory / str(step)} was saved by a newer version: got format "
                f"{found} of its digests, expected at most {FORMAT}; update qwenvl-jax"
            )
        record, noted = read(lambda: (payload["items"], payload["sha256"]))
        if sha256(record) != noted or found != FORMAT:
            raise Damaged("the digest record itself is damaged")
        return record

    def _set_foreign_aside(self) -> None:
        """Renames what is called as a step and holds nothing of a checkpoint.

        Orbax would count folders among the checkpoints to keep, and remove them in turn; a file it
        would write over.
        """
        if jax.process_index() == 0 and self._directory.is_dir():
            for path in list(self._directory.iterdir()):
                if path.name.isdigit() and not any((path / name).exists() for name in _PARTS):
                    target = set_aside(path, "foreign")
                    print(f"{path} is no checkpoint; renamed to {target.name}", flush=True)
        _wait_for_the_first()

    def _set_aside(self, step: int, reason: Damaged) -> None:
        source = self._directory / str(step)
        if self._read_only:
            print(f"checkpoint {source} is damaged ({reason}); trying an older one", flush=True)
            return
        if jax.process_index() == 0:
            target = set_aside(source)
            print(
                f"checkpoint {source} is damaged ({reason}); renamed to {target.name}", flush=True
            )
        _wait_for_the_first()
        self._manager.reload()


def restore_weights(run_dir: str | Path, abstract: Item) -> Item:
    """Returns the model weights of a run's newest good checkpoint, by dotted path.

    `abstract` maps each path to a ShapeDtypeStruct with its sharding, whose dtype does not count:
    the arrays have those of the run, which are not the same where frozen ones are kept in bfloat16.
    Nothing else of the checkpoint is read, and nothing in the run directory is changed.

    Raises:
        CheckpointError: no checkpoint, none good, or another model's names and shapes.
    """
    with contextlib.closing(CheckpointStore(run_dir, read_only=True)) as store:
        found = store.restore_newest({_WEIGHTS: abstract}, any_dtype=True)
    if found is None:
        raise CheckpointError(f"no finished checkpoint in {run_dir}/checkpoints")
    return found[1][_WEIGHTS]


def restore_trained(run_dir: str | Path) -> Item:
    """Returns the weights that a run trains, of its newest good checkpoint, on the first device.

    Frozen ones are not read.

    Raises:
        CheckpointError: as `restore_weights`; or nothing is frozen.
    """
    with contextlib.closing(CheckpointStore(run_dir, read_only=True)) as store:
        found = store.restore_newest({_WEIGHTS: store.trained()})
    assert found is not None  # it has the step that `trained` has read
    return found[1][_WEIGHTS]


def _digest_of_all(payload: Mapping[str, Any]) -> str:
    """Returns the digest of a record with its format: tells a newer one from a flipped bit."""
    return sha256({name: value for name, value in payload.items() if name != "whole"})


def _wait_for_the_first() -> None:
    """Returns on every process once the first one, which alone renames, is here too."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("checkpoints are named as they are")


def _as_saved(wanted: Item, saved: Mapping[str, Any]) -> Item:
    """Returns the same names with the dtypes that a checkpoint's record has for them."""
    return {
        name: jax.ShapeDtypeStruct(x.shape, saved[name]["dtype"], sharding=x.sharding)
        if name in saved
        else x
        for name, x in wanted.items()
    }


def _check_names(where: str, wanted: Item, saved: Mapping[str, Any] | None) -> None:
    """Raises when the checkpoint is of another model: that is no damage, and nothing is renamed."""
    if saved is None:
        raise CheckpointError(f"{where} is missing: this is no checkpoint of a training run")
    problems = [f"{name}: not wanted" for name in sorted(set(saved) - set(wanted))]
    for name, array in sorted(wanted.items()):
        if name not in saved:
            problems.append(f"{name}: missing")
        elif tuple(saved[name]["shape"]) != tuple(array.shape):
            problems.append(
                f"{name}: got shape {tuple(saved[name]['shape'])}, expected {tuple(array.shape)}"
            )
        elif np.dtype(saved[name]["dtype"]) != np.dtype(array.dtype):
            problems.append(f"{name}: got {saved[name]['dtype']}, expected {array.dtype}")
    if problems:
        listed = "; ".join(problems[:5]) + (" ..." if len(problems) > 5 else "")
        raise CheckpointError(
            f"{where} does not fit this config in {len(problems)} of {len(wanted)} arrays: "
            f"{listed}; use the model sizes, `lora`, `parameters` and `frozen_dtype` of its run; "
            "for others of the last three start a new run with --init; other sizes cannot use it"
        )
