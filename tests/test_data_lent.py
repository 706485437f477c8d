"""Memory of pictures that is lent from one process to another."""

import gc
import multiprocessing
import pickle

import numpy as np
import pytest

from qwenvl_jax.data.example import Batch
from qwenvl_jax.data.lent import Borrower, LendingCanvases, can_lend

SHAPE = (2, 3, 4, 4, 3)
pytestmark = pytest.mark.skipif(not can_lend(), reason="needs Linux's files without a name")


def batch_of(images: np.ndarray) -> Batch:
    return Batch(*[np.zeros((2, 5), np.int32)] * 5, images, np.zeros((2, 3), np.int32))


def send(canvases: LendingCanvases, value: int) -> Batch:
    """Returns what arrives elsewhere of a batch whose pictures all hold a value."""
    canvas = canvases.take()
    canvas[...] = value
    return pickle.loads(pickle.dumps(canvases.lend(batch_of(canvas))))


def place(canvases: LendingCanvases) -> int:
    """Returns where the next canvas will be."""
    place = canvases.take().ctypes.data
    gc.collect()
    return place


def test_pictures_arrive_and_their_memory_is_used_again_only_when_no_view_is_left():
    canvases, borrower = LendingCanvases(SHAPE), Borrower()
    first_place = place(canvases)
    sent = send(canvases, 7)
    assert len(pickle.dumps(sent)) < 2000
    assert place(canvases) != first_place, "on its way"
    arrived = borrower.open(sent)
    view = arrived.images[1, 2:].reshape(-1)[::2]
    assert arrived.images.shape == SHAPE
    assert arrived.images.dtype == np.uint8
    np.testing.assert_array_equal(arrived.images, 7)
    del arrived
    gc.collect()
    assert place(canvases) != first_place, "a view is left"
    second = borrower.open(send(canvases, 8))
    np.testing.assert_array_equal(view, 7)
    np.testing.assert_array_equal(second.images, 8)
    del view
    gc.collect()
    assert place(canvases) == first_place
    third = borrower.open(send(canvases, 9))
    np.testing.assert_array_equal(third.images, 9)
    np.testing.assert_array_equal(second.images, 8)


def test_other_arrays_travel_whole():
    canvases = LendingCanvases(SHAPE)
    own = batch_of(np.ones(SHAPE, np.uint8))
    assert canvases.lend(own) is own
    assert Borrower().open(own) is own
    empty = LendingCanvases((2, 0, 4, 4, 3))
    without = batch_of(empty.take())
    assert empty.lend(without) is without
    assert without.images.shape == (2, 0, 4, 4, 3)


def _lend(canvases: LendingCanvases, sends, stop) -> None:
    for value in range(4):
        canvas = canvases.take()
        canvas[...] = value
        sends.put(canvases.lend(batch_of(canvas)))
    stop.wait()


def test_pictures_outlive_the_process_that_made_them():
    context = multiprocessing.get_context("spawn")
    sends, stop, borrower = context.Queue(), context.Event(), Borrower()
    maker = context.Process(target=_lend, args=(LendingCanvases(SHAPE), sends, stop))
    maker.start()
    arrived = [borrower.open(sends.get(timeout=60)) for _ in range(4)]
    stop.set()
    maker.join(60)
    assert maker.exitcode == 0
    for value, batch in enumerate(arrived):
        np.testing.assert_array_equal(batch.images, value)
