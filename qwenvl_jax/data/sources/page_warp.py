"""How a flat page lies in a picture: bent like paper, and seen in perspective.

One function maps the picture's points to the page's, and everything follows it: pixels through a
mesh of small cells, a line's outline through its inverse. So a quad lies where the ink does.

Axes: M points, D the two coordinates x and y.
"""

import functools
import random
from collections.abc import Sequence

import numpy as np
from PIL import Image

Size = tuple[int, int]
Point = tuple[float, float]
Box = tuple[float, float, float, float] | tuple[int, int, int, int]  # x1, y1, x2, y2

# How long the top, right, bottom and left edge are, of their full length, and how often.
# Source: the eight patterns of SynthDoG's `perspective`.
_SHRUNK, _WHOLE = (0.75, 1.0), (1.0, 1.0)
_PATTERNS = (
    (750, (_SHRUNK, _SHRUNK, _SHRUNK, _SHRUNK)),
    (50, (_SHRUNK, _WHOLE, _SHRUNK, _WHOLE)),
    (50, (_WHOLE, _SHRUNK, _WHOLE, _SHRUNK)),
    (25, (_SHRUNK, _WHOLE, _WHOLE, _WHOLE)),
    (25, (_WHOLE, _SHRUNK, _WHOLE, _WHOLE)),
    (25, (_WHOLE, _WHOLE, _SHRUNK, _WHOLE)),
    (25, (_WHOLE, _WHOLE, _WHOLE, _SHRUNK)),
    (50, (_WHOLE, _WHOLE, _WHOLE, _WHOLE)),
)
BEND = 0.006  # of the page's shorter side: how far paper bends away from flat, at most (ours)
_WAVES = (0.3, 0.9)  # of them fit into the page
_CELL = 32  # pixels, of the mesh: inside a cell the map is taken as bilinear
_OUTLINE = 12  # points of a line's outline, along each long side


class Warp:
    """The way from a page of some size into a picture of another."""

    def __init__(self, page: Size, picture: Size, corners: Sequence[Point], bends: np.ndarray):
        """`corners` are where the page's corners lie in the picture, clockwise from the top left.

        `bends` float [2, 4]: of x and of y the amplitude in pixels, waves along x and y, phase.
        """
        self.page, self.picture = page, picture
        self._to_picture = _homography(page, corners)
        self._to_flat = np.linalg.inv(self._to_picture)
        self._bends = bends

    def to_page(self, points_MD: np.ndarray) -> np.ndarray:
        """Returns where in the page the picture's points come from; exact, not by the mesh."""
        flat_MD = _apply(self._to_flat, points_MD)
        return flat_MD + self._bend(flat_MD)

    def to_picture(self, points_MD: np.ndarray) -> np.ndarray:
        """Returns where in the picture points of the page lie: the inverse of `to_page`."""
        points_MD = np.asarray(points_MD, float)
        flat_MD = points_MD
        for _ in range(20):  # a bend is a small fraction of its wave: each round gains a digit
            flat_MD = points_MD - self._bend(flat_MD)
        return _apply(self._to_picture, flat_MD)

    def _bend(self, flat_MD: np.ndarray) -> np.ndarray:
        along_MD = flat_MD / np.array(self.page)
        waves = along_MD @ self._bends[:, 1:3].T + self._bends[:, 3]
        return self._bends[:, 0] * np.sin(2 * np.pi * waves)

    def apply(self, layer: Image.Image) -> Image.Image:
        """Returns a layer of the page ("L") as the picture shows it; 0 outside of the page."""
        return layer.transform(
            self.picture, Image.Transform.MESH, self._mesh, Image.Resampling.BILINEAR
        )

    @functools.cached_property
    def _mesh(self) -> list[tuple[tuple[int, ...], tuple[float, ...]]]:
        """Returns cells of the picture, each with the page's places of its four corners."""
        xs, ys = (
            np.linspace(0, side, max(2, side // _CELL) + 1).round().astype(int)
            for side in self.picture
        )
        grid_MD = np.stack(np.meshgrid(xs, ys), -1).reshape(-1, 2)
        source = self.to_page(grid_MD).reshape(len(ys), len(xs), 2)
        boxes = np.stack(
            np.broadcast_arrays(xs[:-1], ys[:-1, None], xs[1:], ys[1:, None]), -1
        ).reshape(-1, 4)
        corners = (source[:-1, :-1], source[1:, :-1], source[1:, 1:], source[:-1, 1:])
        quads = np.concatenate(corners, -1).reshape(-1, 8)
        return [
            (tuple(box), tuple(quad))
            for box, quad in zip(boxes.tolist(), quads.tolist(), strict=True)
        ]

    def quad(self, box: Box) -> np.ndarray:
        """Returns the quad [4, 2] in the picture around a box of the page, from its own top left.

        Where the page bends, each edge is moved out until the box's whole outline is inside.
        """
        x1, y1, x2, y2 = box
        along = np.linspace(0, 1, _OUTLINE + 1)
        xs, ys = x1 + along * (x2 - x1), y1 + along * (y2 - y1)
        sides = (
            np.stack([xs, np.full_like(xs, y1)], 1),
            np.stack([np.full_like(ys, x2), ys], 1),
            np.stack([xs[::-1], np.full_like(xs, y2)], 1),
            np.stack([np.full_like(ys, x1), ys[::-1]], 1),
        )
        seen = [self.to_picture(side) for side in sides]
        return _around([side[0] for side in seen], np.concatenate(seen))


def _around(corners: Sequence[np.ndarray], outline_MD: np.ndarray) -> np.ndarray:
    """Returns the quad whose edges are parallel to those of the corners and hold all points."""
    lines = []
    for start, end in zip(corners, [*corners[1:], corners[0]], strict=True):
        normal = np.array([end[1] - start[1], start[0] - end[0]])  # outwards, y down, clockwise
        normal = normal / max(float(np.hypot(*normal)), 1e-9)
        lines.append((normal, float((outline_MD @ normal).max())))
    found = []
    for (before, reach), (normal, far) in zip([lines[-1], *lines[:-1]], lines, strict=True):
        found.append(np.linalg.solve(np.stack([before, normal]), [reach, far]))
    return np.array(found)


def random_warp(page: Size, picture: Size, box: Box, rng: random.Random) -> Warp:
    """Returns a bent page that fills the given box of the picture, less what perspective takes."""
    pattern = rng.choices(_PATTERNS, weights=[weight for weight, _ in _PATTERNS])[0][1]
    top, right, bottom, left = (rng.uniform(*share) for share in pattern)
    x1, y1, x2, y2 = box
    width, height = x2 - x1, y2 - y1
    corners = [
        (x1 + (1 - top) / 2 * width, y1 + (1 - left) / 2 * height),
        (x2 - (1 - top) / 2 * width, y1 + (1 - right) / 2 * height),
        (x2 - (1 - bottom) / 2 * width, y2 - (1 - right) / 2 * height),
        (x1 + (1 - bottom) / 2 * width, y2 - (1 - left) / 2 * height),
    ]
    bends = np.array(
        [
            [
                rng.uniform(0, BEND) * min(page),
                rng.uniform(*_WAVES),
                rng.uniform(*_WAVES),
                rng.random(),
            ]
            for _ in "xy"
        ]
    )
    return Warp(page, picture, corners, bends)


def _homography(page: Size, corners: Sequence[Point]) -> np.ndarray:
    """Returns the 3 x 3 matrix that takes the page's corners to those of the picture."""
    width, height = page
    rows, values = [], []
    for (x, y), (u, v) in zip(
        ((0, 0), (width, 0), (width, height), (0, height)), corners, strict=True
    ):
        rows.append([x, y, 1, 0, 0, 0, -u * x, -u * y])
        rows.append([0, 0, 0, x, y, 1, -v * x, -v * y])
        values += [u, v]
    return np.append(np.linalg.solve(np.array(rows), np.array(values)), 1.0).reshape(3, 3)


def _apply(matrix: np.ndarray, points_MD: np.ndarray) -> np.ndarray:
    seen = np.asarray(points_MD, float) @ matrix[:, :2].T + matrix[:, 2]
    return seen[:, :2] / seen[:, 2:]
