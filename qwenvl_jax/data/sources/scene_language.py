"""What is said about a drawn scene: captions, phrases for one thing, questions with their answers.

Everything said is true of the scene, phrases fit exactly one thing, and yes/no questions are right
half of the time. Sentences are short and regular: the shipped model learns them in an hour. In the
train split no sentence pairs a shape with a colour of `HELD_OUT_PAIRS`, not even to deny it.
"""

import itertools
import random
from collections.abc import Sequence
from typing import NamedTuple, Protocol, TypeVar, runtime_checkable

from qwenvl_jax.data.sources.drawing import SHAPES, letter_places
from qwenvl_jax.data.sources.scenes import (
    COLOURS,
    Scene,
    Split,
    Thing,
    Writing,
    is_allowed,
)

CELLS = 4  # on a side of the map of a scene: one cell for each query of the small model's adapter
COVERED = 0.2  # of a cell: less is not called a thing in it
NOTHING = "no"
BLANK = "."  # of a list of single characters
CLEAR = 0.14  # of the side: two positions that differ by less are not called left, right, ...

CAPTION_REQUESTS = (
    "Describe the picture.",
    "What is in the picture?",
    "Describe the image.",
    "What do you see?",
)
LOCATE_REQUESTS = ("Find {}.", "Where is {}? Draw a box.", "Locate {}.", "Draw a box around {}.")
READ_REQUESTS = ("Read the text.", "Find the text.")


@runtime_checkable
class Boxed(Protocol):
    """What lies in a picture: `box` is x1, y1, x2, y2 in pixels."""

    @property
    def box(self) -> tuple[float, float, float, float]: ...


BoxedThing = TypeVar("BoxedThing", bound=Boxed)


class Question(NamedTuple):
    kind: str
    text: str
    answer: str


# --- naming things ------------------------------------------------------------------------------


def _a(noun_phrase: str) -> str:
    return f"an {noun_phrase}" if noun_phrase[0] in "aeiou" else f"a {noun_phrase}"


def describe(thing: Thing) -> str:
    """Returns `a red circle` or `a small red circle`."""
    name = f"{thing.colour} {thing.shape}"
    return _a(f"small {name}" if thing.size == "small" else name)


def _ends(scene: Scene, group: list[Thing]) -> list[tuple[str, Thing]]:
    """Returns `("left", thing)` and so on for a group of two that lies clearly apart."""
    if len(group) != 2:
        return []
    found = []
    for axis, low, high in ((0, "left", "right"), (1, "top", "bottom")):
        first, second = sorted(group, key=lambda thing: thing.centre[axis])
        if second.centre[axis] - first.centre[axis] >= CLEAR * scene.side:
            found += [(low, first), (high, second)]
    return found


def phrases(scene: Scene, thing: Thing) -> list[str]:
    """Returns every phrase of this language that fits `thing` and nothing else in the scene."""
    same_shape = [other for other in scene.things if other.shape == thing.shape]
    same_colour = [other for other in scene.things if other.colour == thing.colour]
    found = [f"the {thing.colour} {thing.shape}"]  # a scene never repeats this pair
    if len(same_shape) == 1:
        found.append(f"the {thing.shape}")
    elif sum(other.size == thing.size for other in same_shape) == 1:
        found.append(f"the {thing.size} {thing.shape}")
    found += [
        f"the {end} {thing.shape}" for end, other in _ends(scene, same_shape) if other is thing
    ]
    if len(same_colour) == 1:
        found.append(f"the {thing.colour} thing")
    return found


def phrase(scene: Scene, thing: Thing, rng: random.Random) -> str:
    """Returns one phrase that fits `thing` only; half of the time its colour and shape."""
    found = phrases(scene, thing)
    return found[0] if rng.random() < 0.5 else rng.choice(found)


# --- captions -----------------------------------------------------------------------------------


class Piece(NamedTuple):
    """A run of a caption; `thing` is what it names, if anything."""

    text: str
    thing: Thing | None


def caption_pieces(scene: Scene) -> list[Piece]:
    """Returns the caption in pieces whose texts join to it; things run from left to right.

    `a red circle, a small blue star and an orange ring with the word TREE`
    """
    pieces: list[Piece] = []
    last = len(scene.things) - 1
    for i, thing in enumerate(scene.things):
        if i:
            pieces.append(Piece(" and" if i == last else ",", None))
        pieces.append(Piece(f" {describe(thing)}", thing))
    if scene.writing is not None:
        start = " with the" if pieces else " the"
        pieces.append(Piece(f"{start} {scene.writing.kind} {scene.writing.text}", None))
    first = pieces[0]
    pieces[0] = first._replace(text=first.text.removeprefix(" "))
    return pieces


def relation(scene: Scene, one: Thing, other: Thing) -> str | None:
    """Returns `left of`, `right of`, `above` or `below`: how one lies to the other, if clear."""
    dx, dy = (a - b for a, b in zip(one.centre, other.centre, strict=True))
    clear = CLEAR * scene.side
    if abs(dx) >= clear and abs(dx) > 1.3 * abs(dy):
        return "left of" if dx < 0 else "right of"
    if abs(dy) >= clear and abs(dy) > 1.3 * abs(dx):
        return "above" if dy < 0 else "below"
    return None


def caption(scene: Scene, rng: random.Random) -> str:
    """Returns a caption; a quarter of those with two things say how they lie to each other."""
    if len(scene.things) == 2 and scene.writing is None and rng.random() < 0.25:
        one, other = scene.things
        link = relation(scene, one, other)
        if link is not None:
            return f"{describe(one)} {link} {describe(other)}"
    return "".join(piece.text for piece in caption_pieces(scene))


def cell_things(scene: Scene) -> list[Thing | None]:
    """Returns the thing that lies in each cell of the picture, row by row."""
    return in_cells(scene.things, scene.side, COVERED)


def in_cells(things: Sequence[BoxedThing], side: int, least: float) -> list[BoxedThing | None]:
    """Returns the thing of each cell of a picture of `side` pixels, row by row.

    A cell belongs to the thing whose box covers most of it, and to none where none covers `least`.
    """

    def covered(thing: BoxedThing, column: int, row: int) -> float:
        x1, y1, x2, y2 = (edge / (side / CELLS) for edge in thing.box)
        width = min(x2, column + 1.0) - max(x1, column)
        height = min(y2, row + 1.0) - max(y1, row)
        return max(0.0, width) * max(0.0, height)

    found: list[BoxedThing | None] = []
    for cell in range(CELLS**2):
        row, column = divmod(cell, CELLS)
        parts = [(covered(thing, column, row), thing) for thing in things]
        share, thing = max(parts, key=lambda part: part[0], default=(0.0, None))
        found.append(thing if share >= least else None)
    return found


def cell_words(scene: Scene) -> list[tuple[str, str]]:
    """Returns the shape and the colour that lie in each cell, row by row, or twice `NOTHING`."""
    things = cell_things(scene)
    return [
        (NOTHING, NOTHING) if thing is None else (thing.shape, thing.colour) for thing in things
    ]


def cell_letters(writing: Writing, side: int) -> tuple[str, str]:
    """Returns the first and the second letter whose middle lies in each cell, row by row.

    Two strings with one character a cell, `BLANK` where there is none.
    """
    (ax, ay), (bx, by), (cx, cy), (dx, dy) = writing.quad
    found: list[list[str]] = [[] for _ in range(CELLS**2)]
    for letter, along in zip(writing.text, letter_places(writing.text), strict=True):
        x = (1 - along) * (ax + dx) / 2 + along * (bx + cx) / 2
        y = (1 - along) * (ay + dy) / 2 + along * (by + cy) / 2
        found[int(y * CELLS / side) * CELLS + int(x * CELLS / side)].append(letter)
    lists = ((letters + [BLANK] * 2)[:2] for letters in found)
    firsts, seconds = zip(*lists, strict=True)
    return "".join(firsts), "".join(seconds)


# --- questions ----------------------------------------------------------------------------------


def _word_for_colour(rng: random.Random) -> str:
    return rng.choice(("colour", "color"))


def _colour(scene: Scene, split: Split, rng: random.Random) -> Question | None:
    thing = rng.choice(scene.things)
    named = [text for text in phrases(scene, thing) if thing.colour not in text.split()]
    if not named:
        return None
    text = f"What {_word_for_colour(rng)} is {rng.choice(named)}?"
    return Question("colour", text, thing.colour)


def _shape(scene: Scene, split: Split, rng: random.Random) -> Question | None:
    thing = rng.choice(scene.things)
    if sum(other.colour == thing.colour for other in scene.things) != 1:
        return None
    return Question("shape", f"What shape is the {thing.colour} thing?", thing.shape)


def _count(scene: Scene, split: Split, rng: random.Random) -> Question | None:
    text = rng.choice(("How many shapes are there?", "How many shapes are in the picture?"))
    return Question("count", text, str(len(scene.things)))


def _exists(scene: Scene, split: Split, rng: random.Random) -> Question | None:
    thing = rng.choice(scene.things)
    present = {(other.shape, other.colour) for other in scene.things}
    shape, colour = thing.shape, thing.colour
    is_there = rng.random() < 0.5
    while not is_there and ((shape, colour) in present or not is_allowed(shape, colour, split)):
        shape, colour = rng.choice(SHAPES), rng.choice(tuple(COLOURS))
        keep = rng.random()  # a denied thing mostly shares something with a real one
        if keep < 0.4:
            shape = thing.shape
        elif keep < 0.8:
            colour = thing.colour
    article = _a(f"{colour} {shape}")
    return Question("exists", f"Is there {article}?", "yes" if is_there else "no")


def _related(scene: Scene, rng: random.Random) -> tuple[Thing, str, Thing] | None:
    """Returns two things, and between them how the first lies to the second, if that is clear."""
    if len(scene.things) < 2:
        return None
    one, other = rng.sample(scene.things, 2)
    link = relation(scene, one, other)
    return None if link is None else (one, link, other)


def _relation(scene: Scene, split: Split, rng: random.Random) -> Question | None:
    related = _related(scene, rng)
    if related is None:
        return None
    one, link, other = related
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    is_true = rng.random() < 0.5
    asked = link if is_true else opposite[link]
    text = f"Is {phrase(scene, one, rng)} {asked} {phrase(scene, other, rng)}?"
    return Question("relation", text, "yes" if is_true else "no")


def _link(scene: Scene, split: Split, rng: random.Random) -> Question | None:
    related = _related(scene, rng)
    if related is None:
        return None
    one, link, other = related
    text = f"Where is {phrase(scene, one, rng)} from {phrase(scene, other, rng)}?"
    return Question("link", text, f"{link} it")


def _where(scene: Scene, split: Split, rng: random.Random) -> Question | None:
    thing = rng.choice(scene.things)
    x, y = (value / scene.side - 0.5 for value in thing.centre)
    if min(abs(x), abs(y)) < CLEAR / 2:
        return None
    corner = f"{'top' if y < 0 else 'bottom'} {'left' if x < 0 else 'right'}"
    return Question("where", f"Where is {phrase(scene, thing, rng)}?", corner)


def _size(scene: Scene, split: Split, rng: random.Random) -> Question | None:
    thing = rng.choice(scene.things)
    named = [text for text in phrases(scene, thing) if thing.size not in text.split()]
    return Question("size", f"Is {rng.choice(named)} small or large?", thing.size)


def reading_question(scene: Scene, rng: random.Random) -> Question | None:
    """Returns a question whose answer is the written word or number, if there is one."""
    if scene.writing is None:
        return None
    kind = scene.writing.kind
    text = rng.choice((f"What {kind} is written?", f"What is the {kind}?"))
    return Question(kind, text, scene.writing.text)


_ASKERS = {
    "colour": _colour,
    "shape": _shape,
    "count": _count,
    "exists": _exists,
    "relation": _relation,
    "link": _link,
    "where": _where,
    "size": _size,
}
# Where nobody chose: those named twice are asked twice as often. `link` is for teaching.
ASKED_KINDS = ("colour", "colour", "shape", "shape", "count", "exists", "exists", "relation")
ASKED_KINDS += ("relation", "where", "size")
CHOICES = tuple(_ASKERS)


def question(
    scene: Scene, split: Split, rng: random.Random, kinds: Sequence[str] = ASKED_KINDS
) -> Question:
    """Returns one question that the scene answers without doubt.

    Its kind is one of `kinds`, or any where the scene allows none of them.
    """
    if scene.writing is not None and (not scene.things or rng.random() < 0.4):
        asked = reading_question(scene, rng)
        assert asked is not None
        return asked
    order = list(kinds)
    rng.shuffle(order)
    for kind in itertools.chain(order, ASKED_KINDS):
        asked = _ASKERS[kind](scene, split, rng)
        if asked is not None:
            return asked
    raise AssertionError("a scene with a thing can always be asked about its size")
