"""Samples made from drawn scenes: every task, with the picture or with words in its place.

`scene_example(task, key, ...)` is pure in its arguments. Without pictures (`has_picture=False`) the
same samples read a written list of what the scene holds where the picture would stand, so a decoder
can learn the language, the formats and looking things up before it ever sees.
"""

import random
from collections.abc import Sequence

from qwenvl_jax.data import tasks
from qwenvl_jax.data.example import TASKS, Example
from qwenvl_jax.data.sources import scene_language as language
from qwenvl_jax.data.sources.scenes import Scene, Split, Thing, Writing, scene
from qwenvl_jax.prompt.boxes import (
    Box,
    Quad,
    box_from_pixels,
    format_box,
    format_quad,
    quad_from_pixels,
)
from qwenvl_jax.prompt.tokenizer import Tokenizer

LISTS = ("map", "letters", "edges")  # one word or character for each cell of the picture
EDGES = ("Left", "Top", "Right", "Bottom")  # in the order of a box's coordinates
_HAS_WRITING = {
    "ocr_vqa": True,
    "ocr": True,
    "ref_grounding": False,
    "grounded_captioning": False,
    "map": False,
    "letters": True,
    "edges": False,
}


def scene_of(task: str, key: int, split: Split, side: int) -> Scene:
    """Returns the scene that a task asks about: with writing, without, or as the key falls."""
    return scene(key, split, side, has_writing=_HAS_WRITING.get(task))


def scene_example(
    task: str,
    key: int,
    split: Split,
    side: int,
    tokenizer: Tokenizer,
    has_picture: bool = True,
) -> Example:
    """Returns one sample of a task about the scene of a key.

    Raises: ValueError for a task that is not in `TASKS`.
    """
    shown = scene_of(task, key, split, side)
    rng = random.Random(f"words/{split}/{key}/{task}")
    name = f"{shown.key}/{task}"
    if task == "text":
        return tasks.to_example(
            tasks.plain_text(story(shown, split, rng)), (), tokenizer, task, name
        )
    images = (shown.image,) if has_picture else ()
    picture = tasks.PICTURE if has_picture else inventory(shown, rng)
    if task == "chat":
        turns = dialogue(shown, split, rng)
        first, answer = turns[0]
        turns[0] = (f"Picture 1: {picture}\n{first}", answer)
        return tasks.chat_example(turns, images, tokenizer, name)
    segments = _segments(task, shown, split, rng, picture)
    return tasks.to_example(segments, images, tokenizer, task, name)


def _segments(
    task: str, shown: Scene, split: Split, rng: random.Random, picture: str
) -> list[tasks.Segment]:
    if task == "caption":
        return tasks.caption(language.caption(shown, rng), picture)
    if task == "vqa":
        asked = language.question(shown, split, rng)
        return tasks.vqa(asked.text, asked.answer, picture)
    if task == "map":
        return tasks.cell_map(language.cell_words(shown), picture)
    if task == "edges":
        edge = rng.randrange(4)
        return tasks.cell_characters(EDGES[edge], *cell_digits(shown, edge), picture)
    if task == "grounded_caption":
        return tasks.grounded_caption(grounded_phrases(shown), picture)
    if task == "ref_grounding":
        thing = rng.choice(shown.things)
        phrase = language.phrase(shown, thing, rng)
        return tasks.ref_grounding(phrase, [thing_box(shown, thing)], picture)
    if task == "grounded_captioning":
        thing = rng.choice(shown.things)
        return tasks.grounded_captioning(thing_box(shown, thing), language.describe(thing), picture)
    if task not in ("ocr_vqa", "ocr", "letters"):
        raise ValueError(f"unknown task of the scenes: got {task!r}, expected one of {TASKS}")
    writing = shown.writing
    asked = language.reading_question(shown, rng)
    assert writing is not None  # `scene_of` asked for writing
    assert asked is not None
    if task == "letters":
        letters = language.cell_letters(writing, shown.side)
        return tasks.cell_characters("Letters", *letters, picture)
    if task == "ocr_vqa":
        return tasks.ocr_vqa(asked.text, asked.answer, picture)
    return tasks.ocr([(writing.text, writing_quad(shown, writing))], picture)


# --- places, in thousandths of the picture -------------------------------------------------------


def thing_box(shown: Scene, thing: Thing) -> Box:
    return box_from_pixels(thing.box, shown.side, shown.side)


def writing_quad(shown: Scene, writing: Writing) -> Quad:
    return quad_from_pixels(writing.quad, shown.side, shown.side)


def grounded_phrases(shown: Scene) -> list[tasks.Phrase]:
    """Returns the caption with the box of each thing; a leading space goes inside its phrase."""
    return [
        tasks.Phrase(text, () if thing is None else (thing_box(shown, thing),))
        for text, thing in language.caption_pieces(shown)
    ]


def cell_digits(shown: Scene, edge: int) -> tuple[str, str]:
    """Returns the first and the second digit of a coordinate of the thing in each cell.

    Two strings with one character a cell, `BLANK` where there is none. The digits are those that a
    box writes, so that a slot whose cell can be listed holds what a box needs to say.
    """
    numbers = [
        "" if thing is None else str(thing_box(shown, thing)[edge])
        for thing in language.cell_things(shown)
    ]
    firsts, seconds = zip(*(number.ljust(2, language.BLANK)[:2] for number in numbers), strict=True)
    return "".join(firsts), "".join(seconds)


def _read(shown: Scene, writing: Writing) -> str:
    return f"<ref>{writing.text}</ref>{format_quad(writing_quad(shown, writing))}"


def _located(shown: Scene, thing: Thing, phrase: str) -> str:
    return f"<ref>{phrase}</ref>{format_box(thing_box(shown, thing))}"


# --- words about the whole scene -----------------------------------------------------------------


def inventory(shown: Scene, rng: random.Random) -> tasks.Tag:
    """Returns everything in the scene with its place, in a random order, as tagged text."""
    parts = [_located(shown, thing, language.describe(thing)) for thing in shown.things]
    if shown.writing is not None:
        parts.append(_read(shown, shown.writing))
    rng.shuffle(parts)
    return tasks.Tag("".join(parts))


def story(shown: Scene, split: Split, rng: random.Random) -> str:
    """Returns a caption, half of the time with a question that it answers."""
    caption = "".join(piece.text for piece in language.caption_pieces(shown))
    if rng.random() < 0.5:
        return caption
    asked = language.question(shown, split, rng)
    if asked.kind in ("relation", "where"):  # the caption does not tell
        return caption
    return f"{caption}. {asked.text} {asked.answer}"


def dialogue(
    shown: Scene,
    split: Split,
    rng: random.Random,
    questions: Sequence[str] = language.ASKED_KINDS,
) -> list[tuple[str, str]]:
    """Returns one to three turns about a scene: questions, a caption, things found and read.

    `questions` are the kinds that it may ask.
    """
    kinds = rng.sample(("ask", "ask", "ask", "describe"), rng.choice((1, 2, 2, 3)))
    if rng.random() < 0.5:  # one place, at most one other turn with it: places are long
        places = ["find", "find", "name"] if shown.things else []
        if shown.writing is not None:
            places += ["read", "read"]
        kinds = [*kinds[:1], rng.choice(places)] if rng.random() < 0.5 else [rng.choice(places)]
        rng.shuffle(kinds)
    return [_turn(kind, shown, split, rng, questions) for kind in kinds]


def _turn(
    kind: str, shown: Scene, split: Split, rng: random.Random, questions: Sequence[str]
) -> tuple[str, str]:
    if kind == "describe":
        return rng.choice(language.CAPTION_REQUESTS), language.caption(shown, rng)
    if kind == "ask":
        asked = language.question(shown, split, rng, questions)
        return asked.text, asked.answer
    if kind == "read":
        assert shown.writing is not None
        return rng.choice(language.READ_REQUESTS), _read(shown, shown.writing)
    thing = rng.choice(shown.things)
    if kind == "name":
        box = format_box(thing_box(shown, thing))
        return f"What is in {box}?", language.describe(thing)
    phrase = language.phrase(shown, thing, rng)
    request = rng.choice(language.LOCATE_REQUESTS).format(phrase)
    return request, _located(shown, thing, phrase)
