"""Marks that answers earn, and their means: what every examination has in common."""

import statistics
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
    """The mean mark of a measure: over everything, over what training had, and over the rest.

    Means are None where there is no such mark. Items of which nobody says whether training had them
    count in `value` only.
    """

    measure: str
    value: float
    count: int
    known_value: float | None
    known_count: int
    new_value: float | None
    new_count: int

    @property
    def is_told_apart(self) -> bool:
        """Whether somebody says of an item if training had it."""
        return self.known_count + self.new_count > 0


def mean_marks(marks: Iterable[Mark], subjects: Sequence[str]) -> list[Score]:
    """Returns one score a measure, in the order of the subjects and then by name."""
    by_measure: dict[str, list[Mark]] = {}
    for mark in marks:
        by_measure.setdefault(mark.measure, []).append(mark)

    def place(measure: str) -> tuple[int, str]:
        return subjects.index(measure.split(":")[0]), measure

    return [_score(measure, by_measure[measure]) for measure in sorted(by_measure, key=place)]


def _score(measure: str, group: Sequence[Mark]) -> Score:
    known = [mark.value for mark in group if mark.is_new is False]
    new = [mark.value for mark in group if mark.is_new]
    return Score(
        measure=measure,
        value=statistics.fmean(mark.value for mark in group),
        count=len(group),
        known_value=statistics.fmean(known) if known else None,
        known_count=len(known),
        new_value=statistics.fmean(new) if new else None,
        new_count=len(new),
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
