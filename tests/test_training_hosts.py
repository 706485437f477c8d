"""Copies that must be equal, and processes that must agree."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from qwenvl_jax.config import MeshConfig
from qwenvl_jax.sharding import make_mesh
from qwenvl_jax.training import stop
from qwenvl_jax.training.faults import change_one_copy
from qwenvl_jax.training.hosts import (
    HostLost,
    HostsDiffer,
    check_agreement,
    check_copies,
    telling_the_lost,
)


def arrays() -> dict[str, jax.Array]:
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))

    def put(*spec) -> jax.Array:
        array = np.arange(32, dtype=np.float32).reshape(4, 8)
        return jax.device_put(array, NamedSharding(mesh, PartitionSpec(*spec)))

    return {
        "whole": put(),
        "split in two": put("fsdp"),
        "split over all": put(("data", "fsdp"), "tensor"),
    }


@pytest.fixture(autouse=True)
def mesh_context():
    """Sets the run's mesh, as the loop does."""
    with jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))):
        yield


def test_equal_copies_pass():
    assert check_copies(arrays()) is None


@pytest.mark.parametrize("path", ["whole", "split in two"])
def test_a_copy_that_differs_is_named_with_its_device(path):
    held = arrays()
    held[path] = change_one_copy(held[path])
    with pytest.raises(HostsDiffer, match=rf"copies of {path} are not equal .*7: [0-9a-f]{{16}}"):
        check_copies(held)


def test_what_has_no_copy_cannot_differ():
    held = arrays()
    held["split over all"] = change_one_copy(held["split over all"])
    check_copies(held)


def test_processes_that_differ_are_told_by_name(monkeypatch):
    def gather(ours):
        theirs = ours.copy()
        if ours.ndim == 2:
            theirs[1, 2:] += 1
        return np.stack([ours, ours, theirs])

    monkeypatch.setattr(jax, "process_count", lambda: 3)
    monkeypatch.setattr("jax.experimental.multihost_utils.process_allgather", gather)
    with pytest.raises(HostsDiffer, match=r"from process 0 in the commit on processes \[2\]"):
        check_agreement({"inputs": "a", "the commit": "b", "step": "c"})


@pytest.mark.parametrize(
    ("lacks", "told"),
    [(0, r"something that this process does not have on .*\[1\]"), (1, r"step on .*\[1\]")],
)
def test_processes_that_have_other_settings_are_told(monkeypatch, lacks, told):
    """Process `lacks` has one setting less than the other; both gather as many rows."""
    shapes = []

    def gather(ours):
        shapes.append(ours.shape)
        if ours.ndim == 1:
            return np.stack([ours, ours + 1 - 2 * lacks])
        theirs = ours.copy()
        theirs[-1] = 0 if lacks else 7
        return np.stack([ours, theirs])

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr("jax.experimental.multihost_utils.process_allgather", gather)
    with pytest.raises(HostsDiffer, match=told):
        check_agreement({"inputs": "a", "the commit": "b", "step": "c"})
    assert shapes == [(1,), (4 - lacks, 4)]


def test_one_process_agrees_with_itself():
    assert check_agreement({"the commit": "b"}) is None


def test_processes_without_facts_agree(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(
        "jax.experimental.multihost_utils.process_allgather", lambda ours: np.stack([ours, ours])
    )
    assert check_agreement({}) is None


def test_a_stop_counts_from_what_was_under_way_when_the_processes_agreed(monkeypatch):
    clock = iter([10.0, 20.0, 30.0, 75.0])  # an evaluation between the last two
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(stop, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(
        "jax.experimental.multihost_utils.reached_preemption_sync_point", lambda tick: tick == 3
    )
    request = stop.StopRequest()
    assert [request.reached(tick) for tick in (1, 2, 3)] == [None, None, "SIGTERM"]
    assert request.asked_at == 30.0


GONE = "UNKNOWN: Gloo AllGather failed: Connection closed by peer\nand more"


@pytest.mark.parametrize("kind", [jax.errors.JaxRuntimeError, ValueError])
def test_a_process_that_is_gone_is_told_in_one_line(monkeypatch, kind):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    told = r"another process .* Start all .* by peer$"
    with pytest.raises(HostLost, match=told), telling_the_lost():
        raise kind(GONE)


@pytest.mark.parametrize(("count", "text"), [(1, GONE), (2, "INTERNAL: a bug")])
def test_other_errors_stay_what_they_are(monkeypatch, count, text):
    monkeypatch.setattr(jax, "process_count", lambda: count)
    with pytest.raises(jax.errors.JaxRuntimeError), telling_the_lost():
        raise jax.errors.JaxRuntimeError(text)
