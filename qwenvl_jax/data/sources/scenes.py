"""Drawn scenes: one to three shapes on a background, and sometimes a written word or number.

`scene(key, split, side)` is a pure function. The two splits draw from disjoint random streams, and
training never draws a shape in a colour of `HELD_OUT_PAIRS` nor a word of `HELD_OUT_WORDS`, so the
evaluation can say how far the model composes and spells, and not only how well it remembers.
What is said about a scene lives in `scene_language.py`.
"""

import dataclasses
import math
import random
from typing import Literal

import numpy as np
from PIL import Image

from qwenvl_jax.data.sources.drawing import SHAPES, Point, shape_mask, writing_mask

Split = Literal["train", "heldout"]

COLOURS = {
    "red": (215, 35, 40),
    "orange": (250, 140, 20),
    "yellow": (250, 220, 40),
    "green": (35, 150, 60),
    "blue": (35, 80, 215),
    "purple": (135, 45, 165),
    "black": (15, 15, 18),
    "white": (248, 248, 248),
}
HELD_OUT_PAIRS = frozenset(
    {("star", "purple"), ("circle", "green"), ("heart", "blue"), ("square", "orange")}
)
# fmt: off
WORDS = (
    "ANT", "APPLE", "ARM", "BAG", "BALL", "BAT", "BEAR", "BED", "BEE", "BELL", "BIKE", "BIRD",
    "BLUE", "BOAT", "BOOK", "BOX", "BOY", "BUS", "CAKE", "CAR", "CAT", "COAT", "COW", "CUP",
    "DAY", "DESK", "DOG", "DOLL", "DOOR", "DUCK", "EAR", "EGG", "EYE", "FAN", "FARM", "FISH",
    "FLAG", "FOOT", "FOX", "FROG", "GIRL", "GOAT", "GOLD", "HAND", "HAT", "HEN", "HILL", "HOME",
    "HORSE", "HOUSE", "ICE", "INK", "IRON", "JAM", "JAR", "JET", "JUMP", "KEY", "KING", "KITE",
    "LAKE", "LAMP", "LEAF", "LION", "LIP", "MAP", "MILK", "MOON", "MOUSE", "NEST", "NET", "NOSE",
    "NUT", "OIL", "OPEN", "OWL", "PAN", "PARK", "PEN", "PIG", "QUEEN", "QUIZ", "RAIN", "RAT",
    "RING", "ROAD", "ROPE", "ROSE", "SALT", "SEA", "SHIP", "SHOE", "SKY", "SNOW", "SOAP", "SOCK",
    "SONG", "STAR", "SUN", "TABLE", "TAXI", "TENT", "TIGER", "TOY", "TRAIN", "TREE", "VAN",
    "VASE", "WALL", "WATER", "WAVE", "WEB", "WIND", "WOLF", "YARD", "YES", "ZEBRA", "ZOO",
)
# fmt: on
HELD_OUT_WORDS = frozenset(
    ["BEAR", "CUP", "FLAG", "HILL", "KITE", "MILK", "NUT", "ROPE", "SNOW", "TAXI", "VAN", "WOLF"]
)

# Things come in two sizes and stand on a grid, so coordinates are few: with free ones the last
# digits of every box are noise, and a small model spends its short training on them.
GRID = 16  # steps across the picture
SIZES = {"small": 4, "large": 7}  # in steps
GAP = 2  # pixels at least between any two drawn things


@dataclasses.dataclass(frozen=True)
class Thing:
    """One drawn shape; `box` is x1, y1, x2, y2 in pixels, tight around its ink."""

    shape: str
    colour: str
    size: Literal["small", "large"]
    box: tuple[float, float, float, float]

    @property
    def centre(self) -> Point:
        x1, y1, x2, y2 = self.box
        return (x1 + x2) / 2, (y1 + y2) / 2


@dataclasses.dataclass(frozen=True)
class Writing:
    """One drawn word or number; `quad` runs clockwise in pixels from its own top left corner."""

    text: str
    quad: tuple[Point, Point, Point, Point]

    @property
    def kind(self) -> Literal["word", "number"]:
        return "number" if self.text.isdigit() else "word"


@dataclasses.dataclass(frozen=True)
class Scene:
    """A picture and everything that is true of it; `things` run from left to right."""

    key: str
    image: np.ndarray  # uint8 [Y, X, 3]
    things: tuple[Thing, ...]
    writing: Writing | None

    @property
    def side(self) -> int:
        return self.image.shape[0]


# --- composition --------------------------------------------------------------------------------


def _place(
    rng: random.Random, width: int, height: int, side: int, taken: list[tuple[int, int, int, int]]
) -> tuple[int, int] | None:
    """Returns a free top left corner, or None when a few tries find none."""
    step = side / GRID
    columns, rows = int((side - width) / step), int((side - height) / step)
    for _ in range(12 if min(columns, rows) >= 0 else 0):
        x, y = round(rng.randint(0, columns) * step), round(rng.randint(0, rows) * step)
        right, bottom = x + width + GAP, y + height + GAP
        if all(right <= a or c + GAP <= x or bottom <= b or d + GAP <= y for a, b, c, d in taken):
            taken.append((x, y, x + width, y + height))
            return x, y
    return None


def _pair(rng: random.Random, split: Split, used: list[tuple[str, str]]) -> tuple[str, str]:
    """Returns a shape and a colour new to the scene; a third of the time one of them repeats."""
    while True:
        shape, colour = rng.choice(SHAPES), rng.choice(tuple(COLOURS))
        if used and rng.random() < 0.33:
            if rng.random() < 0.6:
                shape = used[-1][0]
            else:
                colour = used[-1][1]
        if (shape, colour) not in used and is_allowed(shape, colour, split):
            return shape, colour


def is_allowed(shape: str, colour: str, split: Split) -> bool:
    """Returns whether a split may show, or name, this shape in this colour."""
    return split != "train" or (shape, colour) not in HELD_OUT_PAIRS


def _text(rng: random.Random, split: Split) -> str:
    if rng.random() < 0.35:
        return str(rng.randint(0, 99))
    while True:
        word = rng.choice(WORDS)
        if split != "train" or word not in HELD_OUT_WORDS:
            return word


def _background(rng: random.Random, colours: list[str], side: int) -> tuple[Image.Image, float]:
    """Returns a plain, graded or noisy picture far from the given colours, and its brightness."""
    base = (128, 128, 128)
    for _ in range(40):
        low, high = rng.choice(((200, 240), (200, 240), (110, 140)))
        tint = tuple(rng.randint(low, high) for _ in range(3))
        if all(math.dist(tint, COLOURS[colour]) > 120 for colour in colours):
            base = tint
            break
    kind = rng.random()
    if kind < 0.6:
        return Image.new("RGB", (side, side), base), sum(base) / 3
    pixels_YXC = np.empty((side, side, 3), np.float32)
    pixels_YXC[:] = base
    if kind < 0.85:
        ramp = np.linspace(-1.0, 1.0, side, dtype=np.float32)[:, None]
        slope = np.array([rng.uniform(-22, 22) for _ in range(3)], np.float32)
        ramp_AC = ramp * slope
        pixels_YXC += ramp_AC[:, None] if rng.random() < 0.5 else ramp_AC[None]
    else:
        noise = np.random.default_rng(rng.getrandbits(63))
        pixels_YXC += noise.integers(-14, 15, (side, side, 1), np.int8)
    return Image.fromarray(np.clip(pixels_YXC, 0, 255).astype(np.uint8)), sum(base) / 3


def _draw_writing(
    rng: random.Random, text: str, canvas: Image.Image, brightness: float, taken: list
) -> Writing | None:
    side = canvas.width
    for scale in (1.0, 0.7):
        pixels = round(side * scale / 4)
        degrees = rng.uniform(-12, 12) if rng.random() < 0.2 else 0.0
        mask, corners = writing_mask(text, pixels, degrees)
        corner = _place(rng, mask.width, mask.height, side, taken)
        if corner is None:
            continue
        shade = rng.randint(0, 30) if brightness > 110 else rng.randint(225, 255)
        canvas.paste((shade, shade, shade), corner, mask)
        a, b, c, d = ((x + corner[0], y + corner[1]) for x, y in corners)
        return Writing(text=text, quad=(a, b, c, d))
    return None


def scene(key: int, split: Split, side: int, has_writing: bool | None = None) -> Scene:
    """Returns the scene of a key; `has_writing` None leaves it to the key (a third have some).

    Pure in all arguments. A scene asked to have writing has it; one asked for none has one to three
    shapes; with writing there are none to two.
    """
    rng = random.Random(f"scene/{split}/{key}")
    wants_writing = rng.random() < 0.33 if has_writing is None else has_writing
    counts = (0, 0, 1, 1, 1, 1, 1, 2) if wants_writing else (1, 1, 1, 1, 2, 2, 2, 2, 3, 3)
    pairs: list[tuple[str, str]] = []
    for _ in range(rng.choice(counts)):
        pairs.append(_pair(rng, split, pairs))
    canvas, brightness = _background(rng, [colour for _, colour in pairs], side)
    taken: list[tuple[int, int, int, int]] = []
    writing = None
    if wants_writing:  # first, so that there is always room for it
        writing = _draw_writing(rng, _text(rng, split), canvas, brightness, taken)
    things = []
    for shape, colour in pairs:
        sizes = ("large", "small") if rng.random() < 0.5 else ("small",)
        for size in sizes:
            pixels = round(side * SIZES[size] / GRID)
            corner = _place(rng, pixels, pixels, side, taken)
            if corner is None:
                continue
            mask, (x1, y1, x2, y2) = shape_mask(shape, pixels)
            shade = tuple(min(255, max(0, value + rng.randint(-7, 7))) for value in COLOURS[colour])
            canvas.paste(shade, corner, mask)
            x, y = corner
            things.append(Thing(shape, colour, size, (x + x1, y + y1, x + x2, y + y2)))
            break
    things.sort(key=lambda thing: thing.centre)
    return Scene(f"scenes/{split}/{key}", np.asarray(canvas), tuple(things), writing)
