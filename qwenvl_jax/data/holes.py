"""Samples that cannot be used: counted by reason, listed once each, and too many stop the run."""

import json
import math
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from qwenvl_jax.data.example import DataError
from qwenvl_jax.files import Lines, read_text

QUARANTINE = "quarantine.jsonl"
# A rate is judged with this much grace, so that one bad sample among the first few stops no run,
_GRACE_SAMPLES, _GRACE_SIGMAS = 3, 3
# and over samples enough for about this many bad ones, so that a good year hides no bad day.
_WINDOW_BAD = 100


class Hole(NamedTuple):
    """A sample that is left out of its row, whose place stays padding."""

    key: str
    reason: str  # one of a few: "row", "sample", "length", "picture"
    detail: str  # the whole message
    source: str = ""  # the path of its source, as the config gives it: keys are unique in there


class Tally:
    """Counts samples and holes since this start, and writes each hole to a file once."""

    def __init__(self, max_bad_fraction: float, file: Path | None = None):
        """`file` gets one JSON line a hole: its fields and the step. Lines in it stay.

        Raises: ConfigError where they are no text.
        """
        self._limit = max_bad_fraction
        self._lines = None if file is None else Lines(file)
        self._listed = _keys(file) if file is not None else set()
        self._recent_samples = self._recent_bad = 0.0  # halved when the window is full
        self.reasons: Counter[str] = Counter()

    @property
    def num_bad(self) -> int:
        return self.reasons.total()

    def add(self, step: int, num_samples: int, holes: Iterable[Hole]) -> None:
        """Counts the samples of one step. Raises: DataError where too many have been bad."""
        holes = list(holes)
        self.reasons.update(hole.reason for hole in holes)
        self.list(step, holes)
        self._recent_samples += num_samples
        self._recent_bad += len(holes)
        expected = self._limit * self._recent_samples
        grace = _GRACE_SIGMAS * math.sqrt(expected) + _GRACE_SAMPLES if self._limit else 0
        if holes and self._recent_bad > expected + grace:
            bad, seen = round(self._recent_bad), round(self._recent_samples)
            listed = "" if self._lines is None else f" ({self._lines.path} lists them)"
            told = f"one of them: {holes[-1].detail}; mend them{listed}"
            raise DataError(too_many(bad, seen, self._limit, told))
        if expected > _WINDOW_BAD:
            self._recent_samples, self._recent_bad = self._recent_samples / 2, self._recent_bad / 2

    def list(self, step: int, holes: Iterable[Hole]) -> None:
        """Writes the holes that have not been listed yet; a full disk gets them with later ones.

        They are counted in any case, so a run need not end for a line of this list.
        """
        found = {(hole.source, hole.key): hole for hole in holes}
        new = {place: hole for place, hole in found.items() if place not in self._listed}
        self._listed.update(new)
        if not new or self._lines is None:
            return
        try:
            self._lines.write(
                *(json.dumps(hole._asdict() | {"step": step}) for hole in new.values())
            )
        except OSError as error:
            print(f"NOT LISTED in {self._lines.path} yet: {error}", file=sys.stderr, flush=True)


def too_many(num_bad: int, num_samples: int, limit: float, told: str) -> str:
    """Returns the message that ends a run; `told` is which samples they are, and where to look."""
    return (
        f"too many samples are bad: got {num_bad} of {num_samples}, expected at most {limit:.3%} "
        f"(data.max_bad_fraction); {told}, or raise data.max_bad_fraction"
    )


def _keys(file: Path) -> set[tuple[str, str]]:
    if not file.exists():
        return set()
    lines = read_text(file, "mend it, or move it away: a new list begins").splitlines()
    found = set()
    for line in lines:
        try:
            hole = json.loads(line)
            found.add((hole["source"], hole["key"]))
        except (ValueError, KeyError, TypeError):  # cut off by a kill, or of an older version
            continue
    return found
