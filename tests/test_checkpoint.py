"""Nothing damaged is ever used, and nothing good is ever lost."""

import errno
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import NamedSharding, PartitionSpec

from qwenvl_jax.checkpoint import digest
from qwenvl_jax.checkpoint.digest import digests
from qwenvl_jax.checkpoint.record import CheckpointError
from qwenvl_jax.checkpoint.store import CheckpointStore, restore_weights
from qwenvl_jax.config import MeshConfig
from qwenvl_jax.sharding import make_mesh
from qwenvl_jax.training.state import from_items, make_layout, new_items, to_items


def weights(step: int) -> dict[str, jax.Array]:
    key = jax.random.key(step)
    return {
        "vit.blocks.kernel": jax.random.normal(key, (3, 16, 24)),
        "decoder.embed.embedding": jax.random.normal(key, (56, 8), jnp.bfloat16),
        "decoder.ln_f.scale": jnp.full((8,), float(step)),
    }


def items(step: int) -> dict[str, dict[str, jax.Array]]:
    return {"weights": weights(step), "optimizer": {"step": jnp.int32(step)}}


def saved_run(path, *steps: int) -> CheckpointStore:
    store = CheckpointStore(path, keep=3)
    for step in steps:
        store.save(step, items(step))
    store.wait()
    return store


def abstract_item(arrays: dict[str, jax.Array]) -> dict[str, jax.ShapeDtypeStruct]:
    return {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
        for name, x in arrays.items()
    }


def wanted() -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
    return {name: abstract_item(arrays) for name, arrays in items(0).items()}


def assert_same(found: dict[str, jax.Array], expected: dict[str, jax.Array]) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype, name
        np.testing.assert_array_equal(np.asarray(found[name]), np.asarray(array), err_msg=name)


# --- digests ------------------------------------------------------------------------------------


def test_digest_does_not_depend_on_the_split():
    array = weights(1)["vit.blocks.kernel"]
    whole = digests({"a": array})
    for data, fsdp, tensor in ((1, 8, 1), (2, 2, 2), (8, 1, 1)):
        mesh = make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor))
        split = NamedSharding(mesh, PartitionSpec(None, ("fsdp", "tensor"), None))
        assert digests({"a": jax.device_put(array, split)}) == whole


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int32, jnp.int8])
def test_digest_sees_every_single_bit(dtype):
    array = np.asarray(jnp.arange(5 * 3).reshape(5, 3).astype(dtype))
    before = digests({"a": jnp.asarray(array)})["a"]
    num_bytes = array.nbytes
    for bit in range(8 * num_bytes):
        raw = bytearray(array.tobytes())
        raw[bit // 8] ^= 1 << bit % 8
        changed = np.frombuffer(bytes(raw), array.dtype).reshape(array.shape)
        assert digests({"a": jnp.asarray(changed)})["a"] != before, bit


def test_large_arrays_are_looked_at_in_parts_with_the_same_digits(monkeypatch):
    """And in little memory: a model has to be digested where it barely fits."""
    arrays = {
        "layers": jax.random.normal(jax.random.key(0), (5, 6, 70)).astype(jnp.bfloat16),
        "table": jax.random.normal(jax.random.key(1), (1009, 3)),
        "row": jnp.arange(2003, dtype=jnp.int32),
    }
    whole = digests(arrays)
    mesh = make_mesh(MeshConfig(data=1, fsdp=8, tensor=1))
    split = NamedSharding(mesh, PartitionSpec(None, None, "fsdp"))
    spread = {"layers": jax.device_put(jnp.pad(arrays["layers"], ((0, 0), (0, 0), (0, 2))), split)}
    spread_whole = digests(spread)
    monkeypatch.setattr(digest, "_PART", 100)
    assert digests(arrays) == whole
    assert digests(spread) == spread_whole
    big = jnp.zeros((64, 300, 300))
    memory = digest._digest.lower(big, digest._walk(big)).compile().memory_analysis()
    assert memory.temp_size_in_bytes < big.nbytes / 20


def test_digest_sees_order_and_shape():
    array = jnp.arange(6.0).reshape(2, 3)
    variants = {"a": array, "b": array[::-1], "c": array[:, ::-1], "d": jnp.zeros((2, 3))}
    assert len(set(digests(variants).values())) == 4


# --- store --------------------------------------------------------------------------------------


def test_newest_step_comes_back_bit_equal(tmp_path):
    saved_run(tmp_path, 1, 2, 3, 4).close()
    store = CheckpointStore(tmp_path, keep=3)
    assert store.steps() == [2, 3, 4]
    step, found = store.restore_newest(wanted())
    assert step == 4
    assert_same(found["weights"], weights(4))
    assert int(found["optimizer"]["step"]) == 4
    store.close()


def test_arrays_may_be_donated_while_they_are_saved(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    overwrite = jax.jit(lambda x: jax.tree.map(jnp.zeros_like, x), donate_argnums=0)
    for step in range(1, 5):
        arrays = items(step)
        store.save(step, arrays)
        overwrite(arrays)
    store.wait()
    step, found = store.restore_newest(wanted())
    assert step == 4
    assert_same(found["weights"], weights(4))
    store.close()


def test_empty_run_has_nothing_to_restore(tmp_path):
    store = CheckpointStore(tmp_path)
    assert store.restore_newest(wanted()) is None
    store.close()


def test_one_flipped_bit_anywhere_is_never_used(tmp_path, capsys):
    saved_run(tmp_path / "good", 1, 2).close()
    newest = tmp_path / "good" / "checkpoints" / "2"
    files = sorted(p.relative_to(newest) for p in newest.rglob("*") if p.is_file())
    choose = random.Random(0)
    num_refused = 0
    for name in files:
        raw = bytearray((newest / name).read_bytes())
        if not raw:
            continue
        good, bit = bytes(raw), choose.randrange(8 * len(raw))
        raw[bit // 8] ^= 1 << bit % 8
        (newest / name).write_bytes(raw)
        store = CheckpointStore(tmp_path / "good")
        step, found = store.restore_newest(wanted())
        store.close()
        assert_same(found["weights"], weights(step))
        assert int(found["optimizer"]["step"]) == step
        aside = newest.with_name("2.corrupt")
        if step == 1:
            num_refused += 1
            assert "renamed to 2.corrupt" in capsys.readouterr().out
            aside.rename(newest)
        (newest / name).write_bytes(good)
    assert num_refused >= 3  # at least the data files of both items, and the digest record


@pytest.mark.parametrize("damage", ["empty", "cut", "remove"])
def test_files_that_lost_their_content(tmp_path, damage):
    saved_run(tmp_path, 1, 2).close()
    newest = tmp_path / "checkpoints" / "2"
    largest = max(
        (p for p in newest.rglob("*") if p.is_file()), key=lambda path: path.stat().st_size
    )
    if damage == "remove":
        largest.unlink()
    else:
        os.truncate(largest, 0 if damage == "empty" else largest.stat().st_size // 2)
    store = CheckpointStore(tmp_path)
    step, found = store.restore_newest(wanted())
    store.close()
    assert step == 1
    assert_same(found["weights"], weights(1))
    assert newest.with_name("2.corrupt").is_dir()


def damage_all(run_dir) -> None:
    for record in run_dir.glob("checkpoints/*/digest/metadata"):
        record.write_text(record.read_text().replace("0", "1"))


def test_no_good_step_left_is_an_error_and_stays_one(tmp_path):
    saved_run(tmp_path, 1, 2).close()
    damage_all(tmp_path)
    for _ in range(2):  # the second start finds no step, and must not take that for a new run
        store = CheckpointStore(tmp_path)
        with pytest.raises(CheckpointError, match="no good checkpoint is left"):
            store.restore_newest(wanted())
        store.close()
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["1.corrupt", "2.corrupt"]


def test_another_model_is_not_taken_for_damage(tmp_path):
    saved_run(tmp_path, 5).close()
    other = wanted()
    other["weights"]["decoder.ln_f.scale"] = jax.ShapeDtypeStruct(
        (9,), jnp.float32, sharding=other["weights"]["decoder.ln_f.scale"].sharding
    )
    del other["weights"]["vit.blocks.kernel"]
    store = CheckpointStore(tmp_path)
    with pytest.raises(CheckpointError, match=r"ln_f.scale: got shape \(8,\), expected \(9,\)"):
        store.restore_newest(other)
    assert store.steps() == [5]
    store.close()


def test_left_over_of_a_killed_save_is_removed(tmp_path):
    saved_run(tmp_path, 1).close()
    stale = tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp"
    stale.mkdir()
    (stale / "half").write_bytes(b"written before the kill")
    store = CheckpointStore(tmp_path)
    assert store.steps() == [1]
    # Orbax cleans up in the background and waits for that before it saves.
    store.save(2, items(2))
    store.wait()
    assert store.steps() == [1, 2]
    assert not stale.exists()
    step, found = store.restore_newest(wanted())
    assert step == 2
    assert_same(found["weights"], weights(2))
    store.close()


def test_a_checkpoint_of_format_1_is_restored_by_this_version():
    """Made by version 0.1.1 from the tiny run: every weight 0.25, step 3, one step skipped."""
    layout = make_layout(tiny.train_config(), make_mesh())
    store = CheckpointStore(Path(__file__).parent / "golden" / "run_format_1", read_only=True)
    found = store.restore_newest(to_items(layout.abstract), new_items(layout))
    store.close()
    assert found is not None
    state = from_items(found[1], layout.abstract)
    assert (int(state.step), int(state.guard.skipped), int(state.guard.seen)) == (3, 1, 0)
    assert len(state.trainable) > 40
    for path, array in state.trainable.items():
        np.testing.assert_array_equal(array, np.full(array.shape, 0.25), err_msg=path)
    assert jax.tree.structure(state) == jax.tree.structure(layout.abstract)


def test_a_save_that_cannot_make_its_folder_leaves_no_thread_behind(tmp_path, monkeypatch):
    """A thread that waits for the folder would keep the process from ending."""
    store = saved_run(tmp_path, 1)
    before = threading.enumerate()
    makedirs = os.makedirs

    def read_only(path, *args, **options):
        if Path(path).name.startswith("2."):
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        makedirs(path, *args, **options)

    monkeypatch.setattr(os, "makedirs", read_only)
    with pytest.raises(OSError, match="Read-only file system"):
        store.save(2, items(2))
    waiting = [t for t in threading.enumerate() if t not in before and not t.daemon]
    assert [t for t in waiting if "asyncio" not in t.name] == []
    monkeypatch.undo()
    store.save(3, items(3))
    store.wait()
    assert store.steps() == [1, 3]
    store.close()


# Files of a few bytes only may be written, so that every array fails as on a full disk.
NO_ROOM = """
import gc, logging, resource, sys, time
import jax.numpy as jnp
from qwenvl_jax.checkpoint.store import CheckpointStore
store = CheckpointStore(sys.argv[1])
arrays = {f"{i}": jnp.arange(5000.0) + i for i in range(20)}
resource.setrlimit(resource.RLIMIT_FSIZE, (4000, resource.RLIM_INFINITY))
try:
    store.save(1, {"weights": arrays, "optimizer": arrays, "guard": arrays})
    store.wait()
except Exception as error:
    print("RAISED", "File too large" in str(error))
gc.collect()
time.sleep(1)  # for TensorStore's threads
logging.getLogger("absl").error("something else")
"""


def test_a_save_that_fails_for_every_array_is_no_flood(tmp_path):
    """Orbax and asyncio would log each of them, with a traceback."""
    ended = subprocess.run(
        [sys.executable, "-c", NO_ROOM, str(tmp_path)],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ended.stdout == "RAISED True\n"
    (line,) = ended.stderr.splitlines()
    assert line.startswith("ERROR")
    assert "something else" in line


def test_a_save_that_fails_in_the_background(tmp_path, monkeypatch):
    """It is found at a look, hinders no other save, and leaves nothing on a full disk."""
    store = CheckpointStore(tmp_path, keep=2)
    for step in (1, 2):
        store.save(step, items(step))
        store.wait()

    def full(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(store._manager._checkpointer._handler, "finalize", full)
        store.save(3, items(3))
        while store.is_saving:
            time.sleep(0.01)
        with pytest.raises(OSError, match="No space left"):
            store.check()
    store.check()  # told once
    assert store.steps() == [1, 2]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["1", "2"]
    for step in (4, 5):
        store.save(step, items(step))
        store.wait()
    store.close()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["4", "5"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EIO, "Input/output error"),
        PermissionError(errno.EACCES, "Permission denied"),
        ValueError("UNAVAILABLE: the storage does not answer"),
        # As tensorstore tells what the system says, with names of its own for some of it.
        *(
            ValueError(f"{name}: Error reading 'a/0': {os.strerror(number)}")
            for name, number in (
                ("UNKNOWN", errno.EIO),
                ("ABORTED", errno.ESTALE),
                ("FAILED_PRECONDITION", errno.ENOTCONN),
            )
        ),
    ],
)
def test_what_the_storage_says_is_not_taken_for_damage(tmp_path, monkeypatch, error):
    saved_run(tmp_path, 1, 2).close()
    store = CheckpointStore(tmp_path)

    def fails(*args, **options):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(store._manager, "restore", fails)
        with pytest.raises(type(error), match=str(error.args[-1])):
            store.restore_newest(wanted())
    assert store.restore_newest(wanted())[0] == 2
    store.close()


def test_a_checkpoint_of_a_newer_version_is_no_damage(tmp_path, monkeypatch):
    monkeypatch.setattr("qwenvl_jax.checkpoint.store.FORMAT", 2)
    saved_run(tmp_path, 1).close()
    monkeypatch.undo()
    store = CheckpointStore(tmp_path)
    with pytest.raises(CheckpointError, match="got format 2 of its digests, expected at most 1"):
        store.restore_newest(wanted())
    assert store.steps() == [1]
    store.close()


def test_a_flipped_bit_in_the_format_is_damage(tmp_path, capsys):
    saved_run(tmp_path, 1, 2).close()
    (digest,) = (tmp_path / "checkpoints" / "2" / "digest").glob("metadata")
    noted = digest.read_text()
    assert noted.count('"format": 1') == 1
    digest.write_text(noted.replace('"format": 1', '"format": 3'))
    store = CheckpointStore(tmp_path)
    assert store.restore_newest(wanted())[0] == 1
    store.close()
    assert "the digest record itself is damaged); renamed to 2.corrupt" in capsys.readouterr().out


def overtaken(run, run_dir, monkeypatch):
    """Returns a reader of a run that saves step 4 as soon as the reader has listed the steps."""
    reader, goes_on = CheckpointStore(run_dir, read_only=True), [4]
    listed = reader.steps

    def steps():
        found = listed()
        for step in goes_on:
            run.save(step, items(step))
            run.wait()
        goes_on.clear()
        return found

    monkeypatch.setattr(reader, "steps", steps)
    return reader


def test_a_reader_follows_a_run_that_goes_on(tmp_path, monkeypatch):
    """A step that the run has removed for a newer one while it was read is no damage."""
    run = CheckpointStore(tmp_path, keep=1)
    run.save(2, items(2))
    run.wait()
    reader = overtaken(run, tmp_path, monkeypatch)
    step, found = reader.restore_newest(wanted())
    assert step == 4
    assert_same(found["weights"], weights(4))
    reader.close()
    run.close()


def test_a_reader_of_what_trains_follows_a_run_that_goes_on(tmp_path, monkeypatch):
    frozen = sorted(weights(2))[:1]
    run = CheckpointStore(tmp_path, keep=1, frozen=frozen)
    run.save(2, items(2))
    run.wait()
    reader = overtaken(run, tmp_path, monkeypatch)
    assert sorted(reader.trained()) == sorted(weights(2).keys() - frozen)
    reader.close()
    run.close()


def test_files_that_are_not_ours_stay(tmp_path):
    saved_run(tmp_path, 1).close()
    checkpoints = tmp_path / "checkpoints"
    foreign = [checkpoints / "notes.txt", checkpoints / "old" / "x", checkpoints / "99" / "x"]
    for path in foreign:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    (checkpoints / "3").write_text("mine")
    store = saved_run(tmp_path, 2, 3, 4)  # so many that the oldest is removed
    assert store.steps() == [2, 3, 4]
    step, found = store.restore_newest(wanted())
    store.close()
    assert step == 4
    assert_same(found["weights"], weights(4))
    foreign[2:] = [checkpoints / "99.foreign" / "x", checkpoints / "3.foreign"]
    assert all(path.read_text() == "mine" for path in foreign)


@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 1, 8)])
def test_restore_onto_another_mesh(tmp_path, shape):
    saved_run(tmp_path, 3).close()
    data, fsdp, tensor = shape
    mesh = make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor))
    spec = PartitionSpec(None, "fsdp", "tensor")
    sharding = {3: NamedSharding(mesh, spec), 2: NamedSharding(mesh, PartitionSpec("tensor"))}
    whole = NamedSharding(mesh, PartitionSpec())
    abstract = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding.get(x.ndim, whole))
        for name, x in weights(3).items()
    }
    found = restore_weights(tmp_path, abstract)
    assert_same(found, weights(3))
    for name, array in found.items():
        assert array.sharding.is_equivalent_to(abstract[name].sharding, array.ndim), name


def test_reading_weights_changes_nothing_in_the_run(tmp_path):
    saved_run(tmp_path, 1, 2).close()
    record = tmp_path / "checkpoints" / "2" / "digest" / "metadata"
    record.write_text(record.read_text().replace("0", "1"))
    found = restore_weights(tmp_path, wanted()["weights"])
    assert_same(found, weights(1))
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["1", "2"]


def test_no_checkpoint_to_take_weights_from(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoints in"):
        restore_weights(tmp_path, wanted()["weights"])
    CheckpointStore(tmp_path).close()
    with pytest.raises(CheckpointError, match="no finished checkpoint"):
        restore_weights(tmp_path, wanted()["weights"])


# --- weights that do not train ------------------------------------------------------------------

STILL = ("vit.blocks.kernel", "decoder.embed.embedding")


def items_with_still(step: int) -> dict[str, dict[str, jax.Array]]:
    """Returns the items of a run that trains one array only."""
    still = {name: weights(0)[name] for name in STILL}
    return items(step) | {"weights": weights(step) | still}


def saved_with_still(path, *steps: int) -> None:
    store = CheckpointStore(path, keep=3, frozen=STILL)
    for step in steps:
        store.save(step, items_with_still(step))
    store.close()


def files_of(folder: Path) -> dict[str, tuple[bytes, int]]:
    found = [path for path in folder.rglob("*") if path.is_file()]
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in found
    }


def flip_a_bit_of_the_frozen(path) -> Path:
    """Damages the largest frozen array, and returns the folder that holds it."""
    (folder,) = (path / "frozen").iterdir()
    chunks = [file for file in folder.rglob("*") if file.is_file() and file.name[0].isdigit()]
    largest = max(chunks, key=lambda file: file.stat().st_size)
    raw = bytearray(largest.read_bytes())
    raw[100] ^= 4
    largest.write_bytes(raw)
    return folder


def test_frozen_weights_are_written_once(tmp_path):
    saved_with_still(tmp_path, 1)
    (folder,) = (tmp_path / "frozen").iterdir()
    before = files_of(folder)
    assert sum(len(raw) for raw, _ in before.values()) > 3 * 16 * 24 * 4
    saved_with_still(tmp_path, 2, 3)  # another process
    assert files_of(tmp_path / "frozen") == {f"{folder.name}/{k}": v for k, v in before.items()}
    step_files = (tmp_path / "checkpoints" / "3" / "weights").rglob("*")
    assert sum(file.stat().st_size for file in step_files if file.is_file()) < 3 * 16 * 24 * 4
    store = CheckpointStore(tmp_path)
    step, found = store.restore_newest(wanted())
    store.close()
    assert step == 3
    assert_same(found["weights"], items_with_still(3)["weights"])
    assert_same(restore_weights(tmp_path, wanted()["weights"]), items_with_still(3)["weights"])


def test_a_run_that_freezes_other_weights_half_way(tmp_path):
    saved_with_still(tmp_path, 1)
    store = CheckpointStore(tmp_path, keep=3)
    store.save(2, items(2))
    store.close()
    store = CheckpointStore(tmp_path, keep=3, frozen=["decoder.ln_f.scale"])
    store.save(3, items(3))
    store.wait()
    for step in (3, 2, 1):
        found = store.restore_newest(wanted())
        assert found is not None
        assert found[0] == step
        assert_same(
            found[1]["weights"], (items_with_still if step == 1 else items)(step)["weights"]
        )
        (tmp_path / "checkpoints" / str(step)).rename(tmp_path / f"away {step}")
        store.close()
        store = CheckpointStore(tmp_path, keep=3)
    store.close()
    assert len(list((tmp_path / "frozen").iterdir())) == 2


def test_damaged_frozen_weights_are_taken_from_where_the_run_began(tmp_path, capsys):
    saved_with_still(tmp_path, 1, 2)
    folder = flip_a_bit_of_the_frozen(tmp_path)
    for read_only in (False, True):
        store = CheckpointStore(tmp_path, read_only=read_only)
        with pytest.raises(CheckpointError, match=r"frozen/.* is damaged \(.* restore a copy"):
            store.restore_newest(wanted())
        store.close()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["1", "2"]

    store = CheckpointStore(tmp_path, frozen=STILL)
    with pytest.raises(CheckpointError, match=r"cannot stand for it: \S+ does not"):
        store.restore_newest(wanted(), spare=lambda: weights(1))
    step, found = store.restore_newest(wanted(), spare=lambda: weights(0))
    assert step == 2
    assert_same(found["weights"], items_with_still(2)["weights"])
    said = capsys.readouterr().out
    assert f"renamed to {folder.name}.corrupt and taken from where the run began" in said
    store.save(3, items_with_still(3))
    store.close()
    assert_same(restore_weights(tmp_path, wanted()["weights"]), items_with_still(3)["weights"])


def test_lost_frozen_weights_are_written_again_by_the_restore(tmp_path, capsys):
    saved_with_still(tmp_path, 1)
    (folder,) = (tmp_path / "frozen").iterdir()
    folder.rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="every checkpoint of this run needs the weights"):
        restore_weights(tmp_path, wanted()["weights"])
    store = CheckpointStore(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("orbax.checkpoint.Checkpointer.save", full)
        _, found = store.restore_newest(wanted(), spare=lambda: weights(0))
    assert_same(found["weights"], items_with_still(1)["weights"])
    assert "NOT WRITTEN AGAIN: [Errno 28] No space left" in capsys.readouterr().out
    # A finished run saves no more: what reads the weights needs them now.
    assert store.restore_newest(wanted(), spare=lambda: weights(0)) is not None
    store.close()
    assert_same(restore_weights(tmp_path, wanted()["weights"]), items_with_still(1)["weights"])


def full(*_args, **_kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_left_over_of_killed_frozen_weights_is_replaced(tmp_path):
    saved_with_still(tmp_path, 1)
    shutil.rmtree(tmp_path / "checkpoints")
    (folder,) = (tmp_path / "frozen").iterdir()
    stale = folder.with_name(f"{folder.name}.orbax-checkpoint-tmp")
    folder.rename(stale)
    (stale / "half").write_bytes(b"written before the kill")
    saved_with_still(tmp_path, 1)
    assert list((tmp_path / "frozen").iterdir()) == [folder]
    assert_same(restore_weights(tmp_path, wanted()["weights"]), items_with_still(1)["weights"])


@pytest.mark.parametrize(("shape", "at_once"), [((1, 8, 1), 1 << 30), ((2, 2, 2), 1)])
def test_frozen_weights_go_onto_another_mesh(tmp_path, shape, at_once, monkeypatch):
    monkeypatch.setattr("qwenvl_jax.checkpoint.parts._READ_BYTES", at_once)  # 1: one by one
    saved_with_still(tmp_path, 3)
    data, fsdp, tensor = shape
    mesh = make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor))
    split = NamedSharding(mesh, PartitionSpec("fsdp"))
    whole = NamedSharding(mesh, PartitionSpec())
    abstract = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=split if x.ndim == 2 else whole)
        for name, x in weights(3).items()
    }
    found = restore_weights(tmp_path, abstract)
    assert_same(found, items_with_still(3)["weights"])
    # And from there, by another number of devices, into the same folder.
    store = CheckpointStore(tmp_path, frozen=STILL)
    store.save(4, {"weights": found, "optimizer": {"step": jnp.int32(4)}})
    store.close()
    assert len(list((tmp_path / "frozen").iterdir())) == 1


def test_digests_of_many_arrays_on_many_devices_do_not_wait_for_each_other():
    """Sums over devices of several programs at once were a deadlock on a CPU."""
    mesh = make_mesh(MeshConfig(data=1, fsdp=8, tensor=1))
    halves = NamedSharding(mesh, PartitionSpec("fsdp"))
    arrays = {f"{i}": np.arange(64 + i % 3 * 8, dtype=np.float32) + i for i in range(150)}
    placed = {name: jax.device_put(array, halves) for name, array in arrays.items()}
    assert digests(placed) == digests({name: jnp.asarray(x) for name, x in arrays.items()})


def test_frozen_weights_that_somebody_removed_are_written_again(tmp_path):
    frozen = sorted(weights(2))[:1]
    store = CheckpointStore(tmp_path, frozen=frozen)
    store.save(2, items(2))
    store.wait()
    shutil.rmtree(tmp_path / "frozen")
    store.save(3, items(2))
    store.wait()
    _, found = store.restore_newest(wanted())
    assert_same(found["weights"], weights(2))
    store.close()
