"""Planned packing: which sizes share a row, from the counts of sizes alone.

A class is a size, (tokens, pictures), and how many samples have it. Rows are found for classes, not
for samples: largest first, each into the fullest row that still has room, whole runs of equal
rows at once. So ten million samples take as long as their few thousand sizes do, and the number of
rows depends on the counts only. Which sample of a class comes where is for `order.py` to say.

Source: best fit decreasing (Johnson, 1973), here with a second limit.
"""

import bisect
from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np


class Classes(NamedTuple):
    """Samples by size. Classes of different `group` never share a row."""

    tokens: np.ndarray  # int64 [C], at least 1 and at most a row's length
    pictures: np.ndarray  # int64 [C]
    count: np.ndarray  # int64 [C], at least 1
    group: np.ndarray  # int64 [C]


class Packing(NamedTuple):
    """Rows by pattern: row r is of the pattern p with `row_start[p] <= r < row_start[p + 1]`.

    A pattern is the runs `run_start[p]` to `run_start[p + 1]`, each of `run_times` samples of one
    class. In row `row_start[p] + j` a run holds the samples of its class with the numbers
    `run_first + j * run_times` and the `run_times - 1` after it: together each number once.
    """

    row_start: np.ndarray  # int64 [P + 1]
    run_start: np.ndarray  # int64 [P + 1]
    run_class: np.ndarray  # int64 [R]
    run_times: np.ndarray  # int64 [R]
    run_first: np.ndarray  # int64 [R]

    @property
    def num_rows(self) -> int:
        return int(self.row_start[-1])


def pack_classes(classes: Classes, length: int, max_images: int) -> Packing:
    """Returns rows that hold every sample of every class once and keep both limits."""
    patterns: list[tuple[int, list[tuple[int, int]]]] = []
    for group in np.unique(classes.group):
        rows = _OpenRows(length, max_images)
        members = np.flatnonzero(classes.group == group)
        largest_first = np.lexsort((-classes.pictures[members], -classes.tokens[members]))
        for number in members[largest_first].tolist():
            rows.add(
                number,
                int(classes.tokens[number]),
                int(classes.pictures[number]),
                int(classes.count[number]),
            )
        patterns += rows.patterns()
    return _packing(patterns)


def _packing(patterns: Iterable[tuple[int, list[tuple[int, int]]]]) -> Packing:
    row_start, run_start = [0], [0]
    run_class: list[int] = []
    run_times: list[int] = []
    run_first: list[int] = []
    given: defaultdict[int, int] = defaultdict(int)
    for num_rows, runs in patterns:
        row_start.append(row_start[-1] + num_rows)
        run_start.append(run_start[-1] + len(runs))
        for number, times in runs:
            run_class.append(number)
            run_times.append(times)
            run_first.append(given[number])
            given[number] += times * num_rows
    columns = (row_start, run_start, run_class, run_times, run_first)
    return Packing(*(np.array(column, np.int64) for column in columns))


class _OpenRows:
    """Rows under way. Those of equal content are kept as one entry with their number."""

    def __init__(self, length: int, max_images: int):
        self._length, self._max_images = length, max_images
        # A run is added to the run before it in its row, so that rows share their beginnings.
        self._runs: list[tuple[int, int, int]] = []  # (run before or -1, class, times)
        self._rows: defaultdict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
        self._room: list[list[int]] = [[] for _ in range(max_images + 1)]  # by pictures left

    def add(self, number: int, tokens: int, pictures: int, count: int) -> None:
        """Puts `count` samples of a class into the fullest rows that hold them, or into new."""
        while count:
            left = self._fullest(tokens, pictures)
            if left is None:
                left, last, num_rows = (self._length, self._max_images), -1, count
            else:
                last, num_rows = self._take(left)
            times = left[0] // tokens
            if pictures:
                times = min(times, left[1] // pictures)
            num_full = min(num_rows, count // times)
            self._extend(left, last, number, (tokens, pictures), times, num_full)
            count -= num_full * times
            num_rows -= num_full
            if num_rows and count:  # fewer than a whole run: one row more
                self._extend(left, last, number, (tokens, pictures), count, 1)
                count, num_rows = 0, num_rows - 1
            if last >= 0:
                self._put(left, last, num_rows)

    def patterns(self) -> list[tuple[int, list[tuple[int, int]]]]:
        """Returns (number of rows, runs as (class, times)) of all rows, in a fixed order."""
        found = []
        for left in sorted(self._rows):
            for last, num_rows in self._rows[left]:
                runs = []
                while last >= 0:
                    last, number, times = self._runs[last]
                    runs.append((number, times))
                found.append((num_rows, runs[::-1]))
        return found

    def _fullest(self, tokens: int, pictures: int) -> tuple[int, int] | None:
        fitting = []
        for images_left in range(pictures, self._max_images + 1):
            room = self._room[images_left]
            if (place := bisect.bisect_left(room, tokens)) < len(room):
                fitting.append((room[place], images_left))
        return min(fitting, default=None)

    def _take(self, left: tuple[int, int]) -> tuple[int, int]:
        taken = self._rows[left].pop()
        if not self._rows[left]:
            del self._rows[left]
            room = self._room[left[1]]
            room.pop(bisect.bisect_left(room, left[0]))
        return taken

    def _put(self, left: tuple[int, int], last: int, num_rows: int) -> None:
        if num_rows:
            if left not in self._rows:
                bisect.insort(self._room[left[1]], left[0])
            self._rows[left].append((last, num_rows))

    def _extend(
        self,
        left: tuple[int, int],
        last: int,
        number: int,
        size: tuple[int, int],
        times: int,
        num_rows: int,
    ) -> None:
        if num_rows:
            self._runs.append((last, number, times))
            rest = (left[0] - times * size[0], left[1] - times * size[1])
            self._put(rest, len(self._runs) - 1, num_rows)
