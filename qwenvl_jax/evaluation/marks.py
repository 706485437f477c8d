"""Marks that answers earn, and their means: what every examination has in common."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from qwenvl_jax.evaluation.metrics import box_iou

HIT_IOU = 0.5


class Mark(NamedTuple):
    """What one answer earns; `measure` reads `subject: what is measured`."""

    measure: str
    value: float  # 0..1
    is_new: bool | None  # never in training; None where nobody says


class Score(NamedTuple):
    """The mean mark of a measure, over everything and over what was never in training."""

    measure: str
    value: float
    count: int
    new_value: float | None
    new_count: int
    is_told_apart: bool = True  # False: nobody says of any item whether training had it

    @property
    def known_value(self) -> float | None:
        """The mean over what training had; None where there is no such mark."""
        known = self.count - self.new_count
        rest = self.value * self.count - (self.new_value or 0.0) * self.new_count
        # Marks lie in 0..1; the difference of two sums can lie a rounding beside it.
        return min(max(rest / known, 0.0), 1.0) if known else None


def mean_marks(marks: Iterable[Mark], subjects: Sequence[str]) -> list[Score]:
    """Returns one score a measure, in the order of the subjects and then by name."""
    by_measure: dict[str, list[Mark]] = {}
    for mark in marks:
        by_measure.setdefault(mark.measure, []).append(mark)

    def place(measure: str) -> tuple[int, str]:
        return subjects.index(measure.split(":")[0]), measure

    return [_score(measure, by_measure[measure]) for measure in sorted(by_measure, key=place)]


def _score(measure: str, group: Sequence[Mark]) -> Score:
    new = [mark.value for mark in group if mark.is_new]
    return Score(
        measure=measure,
        value=sum(mark.value for mark in group) / len(group),
        count=len(group),
        new_value=sum(new) / len(new) if new else None,
        new_count=len(new),
        is_told_apart=any(mark.is_new is not None for mark in group),
    )


def place_iou(one: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    """Returns the IoU of two places of `parse_boxes`, corners in any order.

    Two quads count as their upright boxes; a box and a quad overlap with nothing.
    """
    kind = "box" if "box" in one else "quad"
    return box_iou(_upright(one[kind]), _upright(other[kind])) if kind in other else 0.0


def _upright(points: Any) -> np.ndarray:
    corners = np.array(points).reshape(-1, 2)
    return np.concatenate([corners.min(0), corners.max(0)])
