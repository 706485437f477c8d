"""The order of finite sources: every sample once an epoch, rows from (seed, number) alone."""

import itertools
from collections import Counter

import numpy as np
import paper_mixture
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenvl_jax.data.example import DataError
from qwenvl_jax.data.mixture import MIN_ROUND, STAGE_2_SAMPLES, samples_per_round
from qwenvl_jax.data.order import Order
from qwenvl_jax.data.plan import Classes, pack_classes
from qwenvl_jax.data.shuffle import key_of, shuffled

SLOTS, LENGTH, MAX_IMAGES = 256, 2048, 7

# --- shuffling -----------------------------------------------------------------------------------


@given(count=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
@settings(max_examples=40, deadline=None)
def test_shuffling_is_a_permutation(count, key):
    places = shuffled(np.arange(count), count, np.uint64(key))
    assert np.array_equal(np.sort(places), np.arange(count))


def test_many_lists_are_shuffled_at_once_as_each_alone():
    counts = np.array([1, 2, 3, 64, 1000, 2**40])
    keys = key_of(3, np.arange(6))
    together = shuffled(counts - 1, counts, keys)
    alone = [int(shuffled(int(c) - 1, int(c), k)) for c, k in zip(counts, keys, strict=True)]
    assert together.tolist() == alone
    assert (together < counts).all()


def test_all_orders_of_three_are_about_as_frequent():
    keys = np.asarray(key_of(5, np.arange(3000)))
    orders = Counter(map(tuple, shuffled(np.arange(3), 3, keys[:, None]).tolist()))
    assert len(orders) == 6
    assert max(orders.values()) < 1.25 * min(orders.values())


def test_an_order_that_runs_have_been_made_in_stays():
    assert shuffled(np.arange(7), 7, key_of(1, 2)).tolist() == [6, 1, 3, 0, 5, 2, 4]


def test_an_index_outside_its_list_is_an_error():
    with pytest.raises(IndexError, match="outside its list"):
        shuffled(3, 3, key_of(1))


# --- packing of sizes ----------------------------------------------------------------------------

some_classes = st.lists(
    st.tuples(st.integers(1, 23), st.integers(0, 3), st.integers(1, 50), st.integers(0, 1)),
    min_size=1,
    max_size=25,
    unique_by=lambda size: (size[0], size[1], size[3]),
)


@settings(max_examples=80, deadline=None)
@given(sizes=some_classes, max_images=st.integers(3, 6))
def test_planned_rows_keep_both_limits_and_hold_each_sample_once(sizes, max_images):
    classes = Classes(*(np.array(column, np.int64) for column in zip(*sizes, strict=True)))
    packing = pack_classes(classes, 23, max_images)
    numbers: dict[int, list[int]] = {}
    for pattern, (first, end) in enumerate(itertools.pairwise(packing.row_start.tolist())):
        runs = range(packing.run_start[pattern], packing.run_start[pattern + 1])
        of = packing.run_class[runs]
        times = packing.run_times[runs]
        assert (classes.tokens[of] * times).sum() <= 23
        assert (classes.pictures[of] * times).sum() <= max_images
        assert len(set(classes.group[of].tolist())) == 1
        for j, run in itertools.product(range(end - first), runs):
            start = int(packing.run_first[run] + j * packing.run_times[run])
            held = range(start, start + int(packing.run_times[run]))
            numbers.setdefault(int(packing.run_class[run]), []).extend(held)
    for number, count in enumerate(classes.count.tolist()):
        assert sorted(numbers[number]) == list(range(count))


# --- one source ----------------------------------------------------------------------------------


def sizes_of(tokens, pictures) -> np.ndarray:
    return np.stack([tokens, pictures], axis=1).astype(np.int32)


def some_sizes(count: int, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    pictures = random.integers(0, 3, count)
    return sizes_of(random.integers(2, 900, count) + 2 * pictures, pictures)


def order_of(*sizes: np.ndarray, seed: int = 0, **changes) -> Order:
    limits = {"slots": SLOTS, "length": LENGTH, "max_images": MAX_IMAGES}
    return Order(sizes, seed=seed, **(limits | changes))


def pairs(order: Order, first: int, end: int) -> list[tuple[int, int, int]]:
    slots = order.rows(np.arange(first, end))
    return list(zip(*(part.tolist() for part in slots[:3]), strict=True))


def test_every_usable_sample_comes_once_an_epoch_and_fits():
    sizes = some_sizes(700)
    sizes[[3, 50]] = -1
    sizes[77] = (2049, 0)
    sizes[78] = (5, 8)
    order = order_of(sizes)
    for epoch in (0, 1, 12345):
        rows = order.rows(np.arange(epoch * order.num_rows, (epoch + 1) * order.num_rows))
        assert sorted(rows.index.tolist()) == sorted(set(range(700)) - {3, 50, 77, 78})
        tokens = sizes[rows.index, 0] + SLOTS * sizes[rows.index, 1]
        assert np.bincount(rows.row, tokens).max() <= LENGTH
        assert np.bincount(rows.row, sizes[rows.index, 1]).max() <= MAX_IMAGES
        assert set(rows.row.tolist()) == set(range(order.num_rows))
        assert np.array_equal(rows.tokens, tokens)
        assert np.array_equal(rows.pictures, sizes[rows.index, 1])


def test_epochs_and_seeds_are_in_different_orders_of_as_many_rows():
    sizes = some_sizes(300)
    orders = [order_of(sizes), order_of(sizes, seed=1)]
    assert orders[0].num_rows == orders[1].num_rows
    starts = [pairs(order, 0, 20) for order in orders]
    later = pairs(orders[0], orders[0].num_rows, orders[0].num_rows + 20)
    assert starts[0] != starts[1]
    assert starts[0] != later
    assert pairs(order_of(sizes), 0, 20) == starts[0]


def test_samples_of_a_row_change_partners():
    order = order_of(np.repeat(some_sizes(30), 10, axis=0))
    rows = order.rows(np.arange(2 * order.num_rows))
    shared = Counter(
        frozenset(rows.index[rows.row == row].tolist()) for row in range(2 * order.num_rows)
    )
    assert np.mean([count == 1 for count in shared.values()]) > 0.9


def test_rows_asked_for_together_or_alone_are_the_same():
    order = order_of(some_sizes(60))
    numbers = np.array([0, 3, order.num_rows - 1, order.num_rows, 10**12])
    together = order.rows(numbers)
    for place, number in enumerate(numbers):
        alone = order.rows(np.array([number]))
        here = together.row == place
        assert np.array_equal(together.index[here], alone.index)


def test_a_source_of_one_sample_is_repeated():
    order = order_of(sizes_of([9], [1]))
    assert order.num_rows == 1
    assert pairs(order, 5, 8) == [(0, 0, 0), (1, 0, 0), (2, 0, 0)]


def test_a_source_without_usable_samples_is_refused():
    with pytest.raises(DataError, match=r"source 1 has no sample that fits: got 2 rows"):
        order_of(some_sizes(5), sizes_of([-1, 2049], [-1, 0]))


def test_groups_do_not_share_rows():
    sizes = some_sizes(200)
    groups = np.arange(200) % 3
    rows = order_of(sizes, groups=[groups])
    held = rows.rows(np.arange(rows.num_rows))
    for row in range(rows.num_rows):
        assert len(set(groups[held.index[held.row == row]].tolist())) == 1
    assert sorted(held.index.tolist()) == list(range(200))


# --- mixtures ------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    counts=st.lists(st.integers(1, 120), min_size=1, max_size=4),
    taken=st.lists(st.integers(1, 200), min_size=4, max_size=4),
    rounds=st.integers(1, 7),
)
def test_after_whole_rounds_a_source_is_used_evenly(counts, taken, rounds):
    sizes = [some_sizes(count, number) for number, count in enumerate(counts)]
    order = order_of(*sizes, num_taken=taken[: len(counts)], seed=3)
    held = order.rows(np.arange(rounds * order.num_rows))
    for number, count in enumerate(counts):
        uses = np.bincount(held.index[held.source == number], minlength=count)
        passes = rounds * taken[number] / count
        assert set(uses.tolist()) <= {int(np.floor(passes)), int(np.ceil(passes))}


def test_shares_of_the_samples():
    sizes = [1_000, 50_000, 200_000]
    assert samples_per_round(sizes, [3.0, 5.0, 7.4], "counts", 1.0) == [3, 5, 7]
    by_size = samples_per_round(sizes, [1.0, 2.0, 1.0], "temperature", 1.0)
    assert by_size == samples_per_round(sizes, [1e3, 1e5, 2e5], "weights", 1.0)
    by_weight = samples_per_round(sizes, [1.0, 1.0, 2.0], "weights", 1.0)
    assert by_weight == [1_000, 1_000, 2_000]
    assert samples_per_round([100, 90_000], [1.0, 1.0], "weights", 1.0) == [600, 600]
    assert MIN_ROUND <= 1200
    assert samples_per_round([90_000, 360_000], [1.0, 1.0], "temperature", 2.0) == [90_000, 180_000]
    assert samples_per_round([12], [5.0], "weights", 1.0) == [12]


def test_the_papers_mixture_fills_its_rows():
    sizes = paper_mixture.task_sizes(60_000)
    lengths = {task: size[:, 0] + SLOTS * size[:, 1] for task, size in sizes.items()}
    usable = [int((length <= LENGTH).sum()) for length in lengths.values()]
    taken = samples_per_round(usable, list(STAGE_2_SAMPLES.values()), "weights", 1.0)
    order = order_of(*sizes.values(), num_taken=taken)
    held = order.rows(np.arange(order.num_rows))
    tokens = sum(
        length[held.index[held.source == number]].sum()
        for number, length in enumerate(lengths.values())
    )
    assert tokens / (order.num_rows * LENGTH) > 0.97
    share = np.bincount(held.source) / len(held.source)
    expected = np.array(list(STAGE_2_SAMPLES.values())) / sum(STAGE_2_SAMPLES.values())
    assert share == pytest.approx(expected, abs=0.002)
