"""Objects composed on a background: where each one lies is read from its own alpha, not planned.

An object is scaled, mirrored and turned, and then laid over what is there. Its box is tight around
the pixels of it that can be seen in the end. No more than `MAX_HIDDEN` of an object is ever hidden,
objects of one name never overlap (they are counted), and what is seen is never smaller than
`MIN_SIDE` of the picture's side.

Axes: Y rows, X columns.
"""

import dataclasses
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

from qwenvl_jax.data.sources.backgrounds import background, muted
from qwenvl_jax.data.sources.cutouts import SOLID, Kind
from qwenvl_jax.data.sources.nouns import Name

Split = Literal["train", "heldout"]

MAX_HIDDEN = 0.3  # of an object's pixels
MIN_SIDE = 0.07  # of the picture's side: what is seen of an object is larger both ways
MIN_CONTRAST = 45  # mean difference of an object's pixels to those that it covers, in 0..255
_TRIES = 25  # places tried for an object; a crowded picture then goes without it
_SCALES = (0.28, 0.7)  # of a single object's longer side to the picture's; many are smaller
_SMALLEST = 0.11  # as above, of any object
_MAX_TURN = 15  # degrees
_NUM_MORE = (2, 4, 3, 2, 2, 2)  # weights of no further kind beside the first, of one, ...
MOST_KINDS = len(_NUM_MORE)


class Group(NamedTuple):
    """So many objects of one kind."""

    kind: Kind
    count: int


@dataclasses.dataclass(frozen=True)
class Thing:
    """One object in a picture; `box` is x1, y1, x2, y2 in pixels, the last two outside."""

    kind: Kind
    box: tuple[int, int, int, int]
    hidden: float  # the share of it that lies behind others

    @property
    def name(self) -> Name:
        return self.kind.name

    @property
    def centre(self) -> tuple[float, float]:
        x1, y1, x2, y2 = self.box
        return (x1 + x2) / 2, (y1 + y2) / 2

    @property
    def reach(self) -> float:
        """The side of a square as large as its box."""
        x1, y1, x2, y2 = self.box
        return ((x2 - x1) * (y2 - y1)) ** 0.5


@dataclasses.dataclass(frozen=True)
class Collage:
    """A picture and the things in it, from left to right."""

    image: Image.Image
    things: tuple[Thing, ...]

    @property
    def side(self) -> int:
        return self.image.width


class _Canvas:
    """A picture under construction that knows which object each pixel shows."""

    def __init__(self, image: Image.Image, max_hidden: float):
        self.image = image
        self.max_hidden = max_hidden
        self.owner_YX = np.zeros((image.height, image.width), np.uint8)  # 0: the background
        self.kinds: list[Kind] = []
        self.sizes: list[int] = []  # pixels of each object alone

    def place(self, kind: Kind, picture: Image.Image, rng: random.Random) -> bool:
        """Lays the object down where the rules allow it; returns whether a place was found."""
        solid_YX = np.asarray(picture.getchannel("A")) >= SOLID
        side, (height, width) = self.image.width, solid_YX.shape
        if not (MIN_SIDE * side < min(width, height) and max(width, height) < side):
            return False
        for _ in range(_TRIES):
            x, y = rng.randint(0, side - width), rng.randint(0, side - height)
            window = np.s_[y : y + height, x : x + width]
            if self._may_cover(kind, self.owner_YX[window][solid_YX]) and self._stands_out(
                picture, solid_YX, (x, y)
            ):
                self.image.paste(picture, (x, y), picture)
                self.kinds.append(kind)
                self.sizes.append(int(solid_YX.sum()))
                self.owner_YX[window][solid_YX] = len(self.kinds)
                return True
        return False

    def _may_cover(self, kind: Kind, covered: np.ndarray) -> bool:
        after = self._seen() - np.bincount(covered, minlength=len(self.kinds) + 1)
        for number, (other, size) in enumerate(zip(self.kinds, self.sizes, strict=True), 1):
            is_touched = number in covered
            if is_touched and other.name == kind.name:
                return False
            if is_touched and after[number] < (1 - self.max_hidden) * size:
                return False
        return True

    def _seen(self) -> np.ndarray:
        return np.bincount(self.owner_YX.ravel(), minlength=len(self.kinds) + 1)

    def _stands_out(
        self, picture: Image.Image, solid_YX: np.ndarray, corner: tuple[int, int]
    ) -> bool:
        x, y = corner
        below = self.image.crop((x, y, x + picture.width, y + picture.height))
        behind = np.asarray(below, np.int16)[solid_YX]
        drawn = np.asarray(picture.convert("RGB"), np.int16)[solid_YX]
        return float(np.abs(drawn - behind).mean()) >= MIN_CONTRAST

    def things(self) -> list[Thing] | None:
        """Returns the objects with their boxes, or None where too little of one can be seen."""
        found = []
        for number, (kind, size) in enumerate(zip(self.kinds, self.sizes, strict=True), 1):
            ys, xs = np.nonzero(self.owner_YX == number)
            box = (int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1)
            if min(box[2] - box[0], box[3] - box[1]) < MIN_SIDE * self.image.width:
                return None
            found.append(Thing(kind, box, 1 - len(xs) / size))
        return found


def compose(
    groups: Sequence[Group], side: int, rng: random.Random, photos: tuple[Path, ...] = ()
) -> Collage:
    """Returns a square picture of the groups; a crowded one may show fewer of them, never none.

    Raises: DataError for a file that cannot be read.
    """
    while True:
        image = background(rng, (side, side), muted(rng), photos)
        canvas = _Canvas(image, MAX_HIDDEN if rng.random() < 0.4 else 0.0)
        for group in groups:
            scale = rng.uniform(*_SCALES) / sum(group.count for group in groups) ** 0.5
            for _ in range(group.count):
                pixels = round(side * max(scale * rng.uniform(0.75, 1.3), _SMALLEST))
                canvas.place(group.kind, _posed(group.kind, pixels, rng), rng)
        things = canvas.things()
        if things:
            return Collage(canvas.image, tuple(sorted(things, key=lambda thing: thing.centre)))


def _posed(kind: Kind, pixels: int, rng: random.Random) -> Image.Image:
    """Returns the object mirrored half of the time and a little turned, cut to its alpha."""
    picture = kind.picture(rng, pixels)
    if rng.random() < 0.5:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if rng.random() < 0.5:
        angle = rng.uniform(-_MAX_TURN, _MAX_TURN)
        picture = picture.rotate(angle, Image.Resampling.BICUBIC, expand=True)
    box = picture.getchannel("A").getbbox()
    return picture if box is None else picture.crop(box)


# --- which objects meet -------------------------------------------------------------------------


def choose_groups(
    pool: Sequence[Kind], rng: random.Random, first: Kind | None = None, most: int = 4
) -> list[Group]:
    """Returns one to `most` groups whose names cannot be confused; `first` is among them.

    `most` is `MOST_KINDS` at most.
    """
    chosen = [first or rng.choice(pool)]
    for _ in range(rng.choices(range(most), weights=_NUM_MORE[:most])[0]):
        same = [kind for kind in pool if kind.noun == chosen[0].noun and kind.name.colour]
        kind = rng.choice(same if same and rng.random() < 0.3 else pool)
        if all(can_meet(kind, other) for other in chosen):
            chosen.append(kind)
    counts = [rng.choice((1, 1, 1, 1, 2, 2, 3, 4)) for _ in chosen]
    return [Group(kind, count) for kind, count in zip(chosen, counts, strict=True)]


def can_meet(one: Kind, other: Kind) -> bool:
    """Whether two kinds may be in one picture: neither may pass for the other in either language.

    One noun in two colours is told apart by the colour. Two nouns must not share their last word
    (`bear`, `teddy bear`), and neither Chinese name may hold the other.
    """
    if one.noun.en.lower() == other.noun.en.lower():
        return None not in (one.name.colour, other.name.colour) and one.name != other.name
    if one.noun.en.split()[-1].lower() == other.noun.en.split()[-1].lower():
        return False
    first, second = one.noun.zh, other.noun.zh
    return not (first and second and (first in second or second in first))
