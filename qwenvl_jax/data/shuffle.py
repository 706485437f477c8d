"""Shuffling without a list: where an index goes in the permutation of a key, computed alone.

A Feistel network permutes the numbers of an even count of bits; what falls outside the range goes
through it again until it falls inside, which keeps it a permutation. The result is part of what a
run promises: other constants are another order of all data.

Source: Black and Rogaway, "Ciphers with Arbitrary Finite Domains" (2002), cycle walking.
"""

from typing import Any

import numpy as np

_ROUNDS = 8
_MIN_HALF_BITS = 3  # on fewer bits there are too few permutations of a handful of things
_U64 = np.uint64

Ints = int | np.integer | np.ndarray  # one, or an array of them


def key_of(*parts: Ints) -> np.uint64 | np.ndarray:
    """Returns a uint64 key, or an array of them, that differs where any part does."""
    key: np.uint64 | np.ndarray = _U64(len(parts))
    with np.errstate(over="ignore"):  # wrapping is meant; numpy warns of it for single numbers
        for part in parts:
            key = _scramble(key ^ np.asarray(part).astype(_U64))
    return key


def shuffled(index: Ints, count: Ints, key: Ints) -> np.ndarray:
    """Returns int64 places: for one count and key a permutation of `index` 0..count-1.

    All three may be arrays of one shape, so that many lists are shuffled at once.

    Raises: IndexError for an index outside 0..count-1.
    """
    index, count, key = np.broadcast_arrays(index, count, key)
    if np.any((index < 0) | (index >= count)):
        raise IndexError("an index to shuffle lies outside its list")
    shape = index.shape
    place, size, key = (array.reshape(-1).astype(_U64) for array in (index, count, key))
    half = np.maximum(_half_bits(size), _U64(_MIN_HALF_BITS))
    todo = np.flatnonzero(size > 1)  # one thing stays where it is
    while todo.size:
        moved = _permute(place[todo], half[todo], key[todo])
        place[todo] = moved
        todo = todo[moved >= size[todo]]
    return place.astype(np.int64).reshape(shape)


def _half_bits(size: np.ndarray) -> np.ndarray:
    """Returns half of the bits, rounded up, that the numbers below `size` take."""
    bits = np.frexp(np.maximum(size, _U64(1)).astype(np.float64))[1]  # 2^(bits-1) <= size < 2^bits
    return ((bits + 1) // 2).astype(_U64)


def _permute(value: np.ndarray, half: np.ndarray, key: np.ndarray) -> np.ndarray:
    mask = (_U64(1) << half) - _U64(1)
    left, right = value >> half, value & mask
    for round_key in _scramble(key + np.arange(_ROUNDS, dtype=_U64)[:, None]):
        left, right = right, left ^ (_scramble(right ^ round_key) & mask)
    return (left << half) | right


def _scramble(value: np.uint64 | np.ndarray) -> Any:
    """Returns 64 bits that all depend on all bits of `value` (the finisher of SplitMix64)."""
    value = value + _U64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> _U64(30))) * _U64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> _U64(27))) * _U64(0x94D049BB133111EB)
    return value ^ (value >> _U64(31))
