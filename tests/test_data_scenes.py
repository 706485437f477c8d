"""Drawn scenes: places tight around their ink, words true of the picture, splits apart."""

import itertools
import random
import re

import numpy as np
import pytest

from qwenvl_jax.data.sources import scene_language as language
from qwenvl_jax.data.sources.drawing import SHAPES, shape_mask
from qwenvl_jax.data.sources.scene_rows import (
    TASKS,
    cell_digits,
    dialogue,
    scene_example,
    story,
    thing_box,
)
from qwenvl_jax.data.sources.scenes import (
    COLOURS,
    HELD_OUT_PAIRS,
    HELD_OUT_WORDS,
    WORDS,
    Scene,
    Thing,
    scene,
)
from qwenvl_jax.prompt.tokenizer import Tokenizer

SIDE = 112
SPELL = Tokenizer({bytes([byte]): byte for byte in range(256)}, slots=4)


def plain_scenes(count: int, has_writing: bool):
    """Yields scenes on a background of one colour, with the mask of everything drawn."""
    for key in itertools.count():
        shown = scene(key, "train", SIDE, has_writing=has_writing)
        ground = shown.image[0, 0]
        drawn_YX = (shown.image != ground).any(axis=-1)
        if drawn_YX.mean() < 0.6 and not drawn_YX[:, 0].any() and not drawn_YX[0].any():
            count -= 1
            yield shown, drawn_YX
        if count == 0:
            return


def pixels_in(box, margin: int):
    """Returns the slices of all pixels that a box touches, and some more."""
    x1, y1, x2, y2 = box
    low_x, low_y = int(np.floor(x1)) - margin, int(np.floor(y1)) - margin
    return np.s_[
        max(0, low_y) : int(np.ceil(y2)) + margin, max(0, low_x) : int(np.ceil(x2)) + margin
    ]


def inside_quad(quad, grow: float) -> np.ndarray:
    """Returns [Y, X]: pixel centres inside a convex quad pushed outwards by some pixels."""
    y_YX, x_YX = np.mgrid[0:SIDE, 0:SIDE] + 0.5
    inside_YX = np.ones((SIDE, SIDE), bool)
    for (ax, ay), (bx, by) in itertools.pairwise([*quad, quad[0]]):
        length = np.hypot(bx - ax, by - ay)
        distance_YX = ((bx - ax) * (y_YX - ay) - (by - ay) * (x_YX - ax)) / length
        inside_YX &= distance_YX > -grow
    return inside_YX


def test_a_scene_is_a_function_of_its_key():
    one, again = scene(11, "train", SIDE), scene(11, "train", SIDE)
    assert np.array_equal(one.image, again.image)
    assert (one.things, one.writing) == (again.things, again.writing)
    assert one.image.dtype == np.uint8
    assert one.image.shape == (SIDE, SIDE, 3)
    others = [scene(12, "train", SIDE), scene(11, "heldout", SIDE)]
    assert not any(np.array_equal(one.image, other.image) for other in others)


def test_boxes_are_tight_around_what_is_drawn():
    for shown, drawn_YX in plain_scenes(60, has_writing=False):
        left_over_YX = drawn_YX.copy()
        for thing in shown.things:
            region = pixels_in(thing.box, margin=1)
            rows, columns = np.nonzero(drawn_YX[region])
            y, x = (s.start for s in region)
            ink = (columns.min() + x, rows.min() + y, columns.max() + x + 1, rows.max() + y + 1)
            assert np.allclose(thing.box, ink, atol=1.0), (shown.key, thing)
            left_over_YX[pixels_in(thing.box, margin=0)] = False
        assert not left_over_YX.any(), shown.key


def test_ink_of_writing_fills_its_quad():
    turned = 0
    for shown, drawn_YX in plain_scenes(60, has_writing=True):
        assert shown.writing is not None
        ink_YX = drawn_YX.copy()
        for thing in shown.things:
            ink_YX[pixels_in(thing.box, margin=0)] = False
        quad = shown.writing.quad
        turned += quad[0][1] != quad[1][1]
        assert not (ink_YX & ~inside_quad(quad, grow=1.0)).any(), shown.key
        assert ink_YX[inside_quad(quad, grow=0.0)].mean() > 0.25, shown.key
        # Each side of the quad touches ink: a quad shrunk by two pixels there would lose some.
        for i, (a, b) in enumerate(itertools.pairwise([*quad, quad[0]])):
            others = [*quad, quad[0]]
            inward = np.array(others[(i + 2) % 4]) - np.array(b)
            step = 2.0 * inward / np.hypot(*inward)
            strip = [a, b, tuple(b + step), tuple(a + step)]
            assert (ink_YX & inside_quad(strip, grow=0.5)).any(), (shown.key, i)
    assert turned > 5


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_fill_their_own_box(shape):
    mask, (x1, y1, x2, y2) = shape_mask(shape, 40)
    assert mask.size == (40, 40)
    coverage_YX = np.asarray(mask) / 255
    area = (x2 - x1) * (y2 - y1)
    assert 0.25 * area < coverage_YX.sum() < 1.01 * area
    assert min(x2 - x1, y2 - y1) > 0.7 * 40


def test_things_do_not_touch_and_stay_inside():
    for key in range(200):
        shown = scene(key, "heldout", SIDE)
        assert len(shown.things) + (shown.writing is not None) >= 1
        for thing in shown.things:
            assert min(thing.box) >= 0
            assert max(thing.box) <= SIDE
        for one, other in itertools.combinations(shown.things, 2):
            apart_x = max(one.box[0], other.box[0]) - min(one.box[2], other.box[2])
            apart_y = max(one.box[1], other.box[1]) - min(one.box[3], other.box[3])
            assert max(apart_x, apart_y) >= 2, shown.key
        assert [thing.centre for thing in shown.things] == sorted(t.centre for t in shown.things)


def test_a_map_says_what_lies_in_each_cell():
    for shown, drawn_YX in plain_scenes(40, has_writing=False):
        words = language.cell_words(shown)
        assert len(words) == language.CELLS**2
        named = {pair for pair in words if pair != (language.NOTHING, language.NOTHING)}
        assert named == {(thing.shape, thing.colour) for thing in shown.things}
        side = SIDE // language.CELLS
        for i, pair in enumerate(words):
            y, x = (side * part for part in divmod(i, language.CELLS))
            ink = drawn_YX[y : y + side, x : x + side].mean()
            if pair == (language.NOTHING, language.NOTHING):
                assert ink <= language.COVERED  # ink lies inside the box
            elif pair[0] in ("square", "circle"):  # others leave corners of their box empty
                assert ink > 0


def test_letters_lie_where_their_cell_is():
    for key in range(60):
        shown = scene(key, "train", SIDE, has_writing=True)
        firsts, seconds = language.cell_letters(shown.writing, SIDE)
        assert len(firsts) == len(seconds) == language.CELLS**2
        told = sorted(letter for letter in firsts + seconds if letter != language.BLANK)
        dropped = len(shown.writing.text) - len(told)
        assert 0 <= dropped <= 1, shown.key  # a third letter in one cell has no place
        assert not set(told) - set(shown.writing.text)
        left, right = (sorted(x for x, _ in shown.writing.quad)[i] for i in (0, -1))
        columns = [i % language.CELLS for i, letter in enumerate(firsts) if letter != "."]
        width = SIDE / language.CELLS
        assert left < (min(columns) + 1) * width
        assert max(columns) * width < right


def test_edges_are_the_digits_of_the_box_of_the_thing_in_each_cell():
    for key in range(40):
        shown = scene(key, "train", SIDE, has_writing=False)
        pairs = language.cell_words(shown)
        by_pair = {(thing.shape, thing.colour): thing_box(shown, thing) for thing in shown.things}
        for edge in range(4):
            firsts, seconds = cell_digits(shown, edge)
            assert len(firsts) == len(seconds) == language.CELLS**2
            for pair, first, second in zip(pairs, firsts, seconds, strict=True):
                number = str(by_pair[pair][edge]) if pair in by_pair else ""
                assert first + second == (number + "..")[:2], (shown.key, edge)


def everything_said(split: str, keys: range):
    """Yields the words of every task's samples, one lower-case string each."""
    for key in keys:
        for task in TASKS:
            sample = scene_example(task, key, split, SIDE, SPELL)
            yield SPELL.decode(sample.ids.tolist(), skip_special=True)


def test_training_neither_shows_nor_names_what_is_held_out():
    for key in range(800):
        shown = scene(key, "train", SIDE)
        assert not {(t.shape, t.colour) for t in shown.things} & HELD_OUT_PAIRS
        assert shown.writing is None or shown.writing.text not in HELD_OUT_WORDS
    names = re.compile(
        "|".join([f"{colour} {shape}\\b" for shape, colour in HELD_OUT_PAIRS])
        + "|"
        + "|".join(rf"\b{word}\b" for word in HELD_OUT_WORDS)
    )
    assert not any(names.search(text) for text in everything_said("train", range(80)))
    assert any(names.search(text) for text in everything_said("heldout", range(40)))


def test_held_out_lists_leave_every_shape_and_colour_in_training():
    assert set(WORDS) > HELD_OUT_WORDS
    assert len(set(WORDS)) == len(WORDS)
    for i, names in enumerate((SHAPES, tuple(COLOURS))):
        held = [pair[i] for pair in HELD_OUT_PAIRS]
        assert all(held.count(name) <= 1 for name in names)
        assert set(held) <= set(names)


# --- an independent reading of what is said ------------------------------------------------------


def resolve(shown: Scene, phrase: str) -> list[Thing]:
    """Returns the things that a phrase fits, read word by word."""
    words = phrase.removeprefix("the ").split()
    left = list(shown.things)
    for word in words:
        if word in COLOURS:
            left = [t for t in left if t.colour == word]
        elif word in SHAPES:
            left = [t for t in left if t.shape == word]
        elif word in ("small", "large"):
            left = [t for t in left if t.size == word]
    for word, axis, pick in (
        ("left", 0, min),
        ("right", 0, max),
        ("top", 1, min),
        ("bottom", 1, max),
    ):
        if word in words:
            left = [pick(left, key=lambda t, axis=axis: t.centre[axis])]
    return left


def answer(shown: Scene, text: str) -> str:
    """Returns the answer to a question, worked out from the scene alone."""

    def one(phrase: str) -> Thing:
        (thing,) = resolve(shown, phrase)
        return thing

    if match := re.fullmatch(r"What colou?r is (the .*)\?", text):
        return one(match[1]).colour
    if match := re.fullmatch(r"What shape is (the .*)\?", text):
        return one(match[1]).shape
    if re.fullmatch(r"How many shapes are .*\?", text):
        return str(len(shown.things))
    if match := re.fullmatch(r"Is there an? (.*)\?", text):
        return "yes" if resolve(shown, match[1]) else "no"
    if match := re.fullmatch(r"Is (the .*) (left of|right of|above|below) (the .*)\?", text):
        (ax, ay), (bx, by) = one(match[1]).centre, one(match[3]).centre
        holds = {"left of": ax < bx, "right of": ax > bx, "above": ay < by, "below": ay > by}
        return "yes" if holds[match[2]] else "no"
    if match := re.fullmatch(r"Where is (the .*) from (the .*)\?", text):
        (ax, ay), (bx, by) = one(match[1]).centre, one(match[2]).centre
        if abs(ax - bx) > abs(ay - by):
            return "left of it" if ax < bx else "right of it"
        return "above it" if ay < by else "below it"
    if match := re.fullmatch(r"Where is (the .*)\?", text):
        x, y = one(match[1]).centre
        return f"{'top' if y < SIDE / 2 else 'bottom'} {'left' if x < SIDE / 2 else 'right'}"
    if match := re.fullmatch(r"Is (the .*) small or large\?", text):
        _, y1, _, y2 = one(match[1]).box
        return "small" if y2 - y1 < 0.29 * SIDE else "large"
    assert re.fullmatch(r"What (word|number) is written\?|What is the (word|number)\?", text), text
    assert shown.writing is not None
    assert (shown.writing.kind in text) == ("word" in text or "number" in text)
    return shown.writing.text


def test_every_answer_is_what_the_scene_says():
    kinds: dict[str, list[str]] = {}
    for key in range(1500):
        shown = scene(key, "heldout", SIDE)
        kinds_asked = ("link",) if key % 10 == 0 else language.ASKED_KINDS
        asked = language.question(shown, "heldout", random.Random(key), kinds_asked)
        assert answer(shown, asked.text) == asked.answer, (shown.key, asked)
        kinds.setdefault(asked.kind, []).append(asked.answer)
    assert set(kinds) == {*language.CHOICES, "word", "number"}
    for kind in ("exists", "relation"):
        assert 0.4 < kinds[kind].count("yes") / len(kinds[kind]) < 0.6


def test_every_phrase_fits_one_thing():
    seen = set()
    for key in range(800):
        shown = scene(key, "heldout", SIDE)
        for thing in shown.things:
            for phrase in language.phrases(shown, thing):
                assert resolve(shown, phrase) == [thing], (shown.key, phrase)
                seen.update(phrase.split())
    assert {"left", "right", "top", "bottom", "small", "large", "thing", "circle"} <= seen


def test_captions_name_all_things_and_the_writing():
    for key in range(300):
        shown = scene(key, "heldout", SIDE)
        text = language.caption(shown, random.Random(key))
        for thing in shown.things:
            assert f"{thing.colour} {thing.shape}" in text
            assert language.describe(thing) in text
        assert text.count(" small ") == sum(thing.size == "small" for thing in shown.things)
        if shown.writing is not None:
            assert text.endswith(f"the {shown.writing.kind} {shown.writing.text}")
        assert len(text.split()) <= 17
        assert story(shown, "heldout", random.Random(key)).startswith(
            "".join(piece.text for piece in language.caption_pieces(shown))
        )


def test_captions_say_relations_that_hold():
    found = 0
    for key in range(400):
        shown = scene(key, "train", SIDE, has_writing=False)
        text = language.caption(shown, random.Random(key))
        match = re.fullmatch(r"an? (.*) (left of|right of|above|below) an? (.*)", text)
        if match:
            found += 1
            question = f"Is the {match[1]} {match[2]} the {match[3]}?"
            assert answer(shown, question) == "yes"
    assert found > 20


def test_dialogues_answer_their_requests():
    for key in range(300):
        shown = scene(key, "heldout", SIDE)
        for request, reply in dialogue(shown, "heldout", random.Random(key)):
            assert request[-1] in ".?"
            if request in language.CAPTION_REQUESTS:
                assert all(t.shape in reply for t in shown.things)
            elif "<box>" not in request and "<" not in reply:
                assert answer(shown, request) == reply
            elif "<ref>the " in reply:
                phrase = reply.removeprefix("<ref>").split("</ref>")[0]
                assert phrase in request
                (thing,) = resolve(shown, phrase)
                corners = [int(n) for n in re.findall(r"\d+", reply)]
                assert np.allclose(corners, np.array(thing.box) / SIDE * 999, atol=1.0)
