"""Ranges of steps whose batches are passed over, written `A:B`, both ends included."""

import re
from collections.abc import Iterable, Sequence

from qwenvl_jax.config import ConfigError

SkipRange = tuple[int, int]  # first and last step


def parse_skips(texts: Sequence[str]) -> list[SkipRange]:
    """Returns the ranges. Raises: ConfigError for what is no `A:B` with 1 <= A <= B."""
    ranges = []
    for text in texts:
        match = re.fullmatch(r"(\d+):(\d+)", text)
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            raise ConfigError(
                f"skip_steps is not A:B: got {text!r}, expected two step numbers with "
                "1 <= A <= B, as in 1200:1400"
            )
        ranges.append((int(match[1]), int(match[2])))
    return ranges


def joined(ranges: Iterable[SkipRange]) -> list[SkipRange]:
    """Returns the same steps as ordered ranges that do not touch.

    >>> joined([(7, 9), (1, 3), (4, 5)])
    [(1, 5), (7, 9)]
    """
    result: list[SkipRange] = []
    for first, last in sorted(ranges):
        if result and first <= result[-1][1] + 1:
            result[-1] = (result[-1][0], max(last, result[-1][1]))
        else:
            result.append((first, last))
    return result


def last_skipped(step: int, ranges: Iterable[SkipRange]) -> int | None:
    """Returns the last step of the range that `step` lies in, or None."""
    return next((last for first, last in ranges if first <= step <= last), None)
