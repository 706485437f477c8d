"""Where the time of a run goes: steps, and everything that is not steps."""

import contextlib
import time
from collections.abc import Iterator
from typing import Literal

Section = Literal["start", "restore", "compile", "data", "save", "compare", "replay", "evaluate"]


class Goodput:
    """Adds up the wall clock by section; what is in none of them is steps."""

    def __init__(self):
        self._start = time.perf_counter()
        self._spent: dict[str, float] = {}

    @contextlib.contextmanager
    def spend(self, section: Section) -> Iterator[None]:
        """Counts the time inside; sections are not nested."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._spent[section] = self._spent.get(section, 0.0) + time.perf_counter() - start

    def started(self) -> None:
        """Counts what has passed so far, and is in no section yet, as `start`."""
        self._spent["start"] = self.split()["productive"]

    def split(self) -> dict[str, float]:
        """Returns seconds by section; `productive` is the time in steps, `total` is all."""
        total = time.perf_counter() - self._start
        productive = total - sum(self._spent.values())
        return {"total": total, "productive": productive} | self._spent

    def summary(self) -> str:
        """Returns one line: the whole time, and the share of each section."""
        split = self.split()
        total = split.pop("total")
        shares = "  ".join(f"{name} {seconds / total:.1%}" for name, seconds in split.items())
        return f"{total:,.1f} s: {shares}"
