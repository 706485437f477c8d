"""The order of finite sources: which samples a packed row holds, from (seed, row number) alone.

Rows are counted from the start of training; `Packing` says of what sizes the rows of one round are.
In each round the rows are shuffled, and every size takes its samples from a walk that goes through
those samples in a new order each epoch. Any row is found without the rows before it, so resuming
costs the plan of one round, whatever the step. A sample whose size no other has keeps its row's
company in every round.

Exactness: after a whole number of rounds, the samples of a source have been used equally often, or
some once more than the others; where a round takes a source a whole number of times, equally often.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from qwenvl_jax.data.example import DataError
from qwenvl_jax.data.plan import Classes, pack_classes
from qwenvl_jax.data.shared import SharedArray
from qwenvl_jax.data.shuffle import key_of, shuffled
from qwenvl_jax.words import counted

# A source that a round does not take a whole number of times gives a size now one sample more, now
# one less, and the row keeps a place for the larger number. Sizes with fewer samples than this are
# therefore packed as the next longer size.
_MIN_TAKEN = 32
_ROWS, _CLASSES, _MEMBERS, _PLACES = range(4)  # what a key is for


class Slots(NamedTuple):
    """The samples of some rows: `row` counts these rows from 0 and never falls."""

    row: np.ndarray  # int64 [S]
    source: np.ndarray  # int64 [S]
    index: np.ndarray  # int64 [S]
    tokens: np.ndarray  # int64 [S], that the row keeps for it
    pictures: np.ndarray  # int64 [S], likewise


class _Walks(NamedTuple):
    """The walks of one source, one for each size: samples `start` to `start + size` of `members`.

    A round takes `taken` of every `total` samples; `places` is the most that a round can take.
    """

    key: np.ndarray  # int64 [W]
    start: np.ndarray  # int64 [W]
    size: np.ndarray  # int64 [W]
    places: np.ndarray  # int64 [W]
    taken: int
    total: int
    members: np.ndarray  # int32 [total], sorted by size


class Order:
    """Rows of one or more sources under both limits.

    `sizes` are int32 [N, 2] arrays of (tokens, pictures), tokens without the slots, -1 for rows
    that cannot be used. `num_taken` samples of each source make a round; None: all of it. Samples
    of different `groups`, int [N] arrays, never share a row.

    Raises: DataError where a source has no usable sample.
    """

    def __init__(
        self,
        sizes: Sequence[np.ndarray],
        *,
        slots: int,
        length: int,
        max_images: int,
        seed: int,
        num_taken: Sequence[int] | None = None,
        groups: Sequence[np.ndarray] | None = None,
    ):
        self.seed = seed
        walks = []
        for number, source in enumerate(sizes):
            group = None if groups is None else groups[number]
            members, keys = _by_size(source, group, slots, length, max_images)
            if not len(members):
                raise DataError(
                    f"source {number} has no sample that fits: got "
                    f"{counted(len(source), 'row')}, expected some of at most "
                    f"{counted(length, 'token')} and {counted(max_images, 'picture')}"
                )
            taken = len(members) if num_taken is None else num_taken[number]
            walks.append(_walks(members, keys, taken, length + 1))
        self._join(walks)
        rest, tokens = np.divmod(self._class_key, length + 1)
        group, pictures = np.divmod(rest, max_images + 1)
        self._classes = classes = Classes(tokens, pictures, self._class_places, group)
        self._packing = pack_classes(classes, length, max_images)
        self.num_rows = self._packing.num_rows  # of a round
        self.num_samples = sum(walk.taken for walk in walks)  # of a round
        self.passes = [walk.taken / walk.total for walk in walks]  # of each source in a round

    def _join(self, walks: Sequence[_Walks]) -> None:
        """Puts the walks of all sources side by side, those of one size together."""
        source = np.repeat(np.arange(len(walks)), [len(walk.key) for walk in walks])
        starts = np.cumsum([0, *(walk.total for walk in walks)])
        keys = np.concatenate([walk.key for walk in walks])
        by_key = np.lexsort((source, keys))
        self._members = SharedArray(np.concatenate([walk.members for walk in walks]))
        self._source = source[by_key]
        start = np.concatenate([walk.start for walk in walks]) + starts[source]
        self._start = start[by_key]
        self._size = np.concatenate([walk.size for walk in walks])[by_key]
        self._taken = np.array([walk.taken for walk in walks])[self._source]
        self._total = np.array([walk.total for walk in walks])[self._source]
        places = np.concatenate([walk.places for walk in walks])[by_key]
        self._first_place = np.cumsum(places) - places  # of a walk, over all sizes
        self._class_key, first = np.unique(keys[by_key], return_index=True)
        self._class_places = np.add.reduceat(places, first)
        self._class_start = np.cumsum(self._class_places) - self._class_places

    def rows(self, numbers: np.ndarray) -> Slots:
        """Returns the samples of rows given by number, int [n], in rising order."""
        rounds, places = np.divmod(np.asarray(numbers, np.int64), self.num_rows)
        found = []
        for number in np.unique(rounds).tolist():
            here = np.flatnonzero(rounds == number)
            slots = self._rows_of_round(number, places[here])
            found.append(slots._replace(row=here[slots.row]))
        joined = Slots(*(np.concatenate(part) for part in zip(*found, strict=True)))
        by_row = np.argsort(joined.row, kind="stable")
        return Slots(*(part[by_row] for part in joined))

    def _rows_of_round(self, number: int, places: np.ndarray) -> Slots:
        packing, seed = self._packing, self.seed
        shuffled_rows = shuffled(places, self.num_rows, key_of(seed, _ROWS, number))
        pattern = np.searchsorted(packing.row_start, shuffled_rows, side="right") - 1
        nth = shuffled_rows - packing.row_start[pattern]
        # from rows to their runs, from runs to their samples
        num_runs = packing.run_start[pattern + 1] - packing.run_start[pattern]
        row, within = _spread(num_runs)
        run = packing.run_start[pattern][row] + within
        of_run, within = _spread(packing.run_times[run])
        row, run = row[of_run], run[of_run]
        size = packing.run_class[run]
        place = packing.run_first[run] + nth[row] * packing.run_times[run] + within
        place = shuffled(place, self._class_places[size], key_of(seed, _CLASSES, number, size))
        place += self._class_start[size]
        walk = np.searchsorted(self._first_place, place, side="right") - 1
        step = place - self._first_place[walk]
        begin, end = self._walked(number)[walk], self._walked(number + 1)[walk]
        is_used = step < end - begin
        row, walk, place, size = row[is_used], walk[is_used], place[is_used], size[is_used]
        epoch, step = np.divmod((begin + step)[is_used], self._size[walk])
        key = key_of(seed, _MEMBERS, walk, epoch)
        member = self._start[walk] + shuffled(step, self._size[walk], key)
        # Patterns go from long to short, which rows that are read across should not.
        mixed = np.lexsort((key_of(seed, _PLACES, number, place), row))
        slots = Slots(
            row=row,
            source=self._source[walk],
            index=self._members.array[member].astype(np.int64),
            tokens=self._classes.tokens[size],
            pictures=self._classes.pictures[size],
        )
        return Slots(*(part[mixed] for part in slots))

    def _walked(self, number: int) -> np.ndarray:
        """Returns how far each walk has come before a round."""
        # floor((number * taken * size + shift) / total) without leaving 64 bits
        passes, rest = np.divmod(number * self._taken, self._total)
        key = np.asarray(key_of(self.seed, np.arange(len(self._size))))
        shift = (key >> np.uint64(2)).astype(np.int64)
        return passes * self._size + (rest * self._size + shift % self._total) // self._total


def tokens_of(sizes: np.ndarray, slots: int) -> np.ndarray:
    """Returns how many tokens samples take, int64 [N], their pictures' slots with them."""
    return sizes[:, 0].astype(np.int64) + slots * sizes[:, 1].astype(np.int64)


def is_usable(sizes: np.ndarray, slots: int, length: int, max_images: int) -> np.ndarray:
    """Returns which samples, of sizes [N, 2] in ids and pictures, a row can hold: bool [N]."""
    fits = (tokens_of(sizes, slots) <= length) & (sizes[:, 1] <= max_images)
    return (sizes[:, 0] > 0) & fits


def _by_size(
    sizes: np.ndarray, group: np.ndarray | None, slots: int, length: int, max_images: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns (members, keys): the usable samples sorted by key, which holds their size."""
    tokens = tokens_of(sizes, slots)
    members = np.flatnonzero(is_usable(sizes, slots, length, max_images)).astype(np.int32)
    key = sizes[members, 1].astype(np.int64)
    if group is not None:
        key += group[members].astype(np.int64) * (max_images + 1)
    key = key * (length + 1) + tokens[members]
    # sorting numbers of 16 bits takes a tenth of the time
    narrow = key.astype(np.uint16) if key.size and key.max() < 2**16 else key
    by_key = np.argsort(narrow, kind="stable")
    return members[by_key], key[by_key]


def _walks(members: np.ndarray, keys: np.ndarray, taken: int, base: int) -> _Walks:
    """Returns the walks of one source; `base` parts a key into tokens and the rest."""
    key, size = np.unique(keys, return_counts=True)
    total = len(members)
    if taken % total:
        key, size = _merged(key, size, -(-_MIN_TAKEN * total // taken), base)
    return _Walks(
        key=key,
        start=np.cumsum(size) - size,
        size=size,
        places=-(-size * taken // total),
        taken=taken,
        total=total,
        members=members,
    )


def _merged(
    key: np.ndarray, size: np.ndarray, least: int, base: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns sizes joined with the next longer ones until each has `least` samples."""
    joined: list[list[int]] = []
    for one, count in zip(key[::-1].tolist(), size[::-1].tolist(), strict=True):
        if joined and joined[-1][1] < least and joined[-1][0] // base == one // base:
            joined[-1][1] += count
        else:
            joined.append([one, count])
    found = np.array(joined[::-1], np.int64)
    return found[:, 0], found[:, 1]


def _spread(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns (owner, place): each owner as often as its count says, and 0, 1, ... within it."""
    owner = np.repeat(np.arange(len(counts)), counts)
    return owner, np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
