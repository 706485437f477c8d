"""Rows made from one collage: each task's fields, in English or Chinese.

`fields` also says `language`, for questions their `kind`, and `objects`: whether the row shows an
object that training never has ("unseen" or "seen"), so that scores can be told apart.
"""

import random
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from qwenvl_jax.data.sources import collage_chinese, collage_english, collage_facts
from qwenvl_jax.data.sources.composition import Collage, Thing
from qwenvl_jax.data.sources.cutouts import Kind
from qwenvl_jax.data.tasks import Phrase
from qwenvl_jax.prompt.boxes import Box, box_from_pixels

WORDS: dict[str, ModuleType] = {"en": collage_english, "zh": collage_chinese}
# Their prompts are English (paper, Box B.1), so what follows them is too.
ENGLISH_ONLY = ("grounded_caption", "grounded_captioning")


def box_of(collage: Collage, thing: Thing) -> Box:
    """Returns a thing's box in thousandths of the picture."""
    return box_from_pixels(thing.box, collage.side, collage.side)


def boxes_of(collage: Collage, things: Sequence[Thing]) -> list[list[int]]:
    return [list(box_of(collage, thing)) for thing in things]


def caption_pieces(collage: Collage, words: ModuleType) -> list[Phrase]:
    """Returns the caption in pieces that join to it, each name with the boxes of its things.

    `a red star, two apples and a dog`; a space before a name is part of it.
    """
    found = collage_facts.groups(collage)
    pieces = []
    for i, (name, things) in enumerate(found):
        if i:
            pieces.append(Phrase(words.JOINTS[i == len(found) - 1]))
        space = words.SPACE if i else ""
        boxes = tuple(box_of(collage, thing) for thing in things)
        pieces.append(Phrase(space + words.counted(name, len(things)), boxes))
    return pieces


def caption(collage: Collage, words: ModuleType, rng: random.Random) -> str:
    """Returns a caption; half of those of two things say how they lie to each other."""
    if len(collage.things) == 2 and rng.random() < 0.5:
        one, other = collage.things
        way = collage_facts.link(one, other, collage.side)
        if way is not None and one.name != other.name:
            return words.related(one, way, other)
    return "".join(piece.text for piece in caption_pieces(collage, words))


def phrase_and_things(
    collage: Collage, words: ModuleType, rng: random.Random, about: Thing | None
) -> tuple[str, list[Thing]]:
    """Returns a phrase with what it means: one thing, or, a few times, all of a name.

    Things that no phrase can tell apart are always meant together.
    """
    thing = about or rng.choice(collage.things)
    reference = collage_facts.reference(collage, thing, rng)
    things = collage_facts.things_of(collage, thing.name)
    if reference is None or (len(things) > 1 and rng.random() < 0.3):
        return words.plural(thing.name), things
    return words.phrase(reference), [thing]


def describable(collage: Collage, about: Thing | None, rng: random.Random) -> Thing:
    """Returns a thing to be named from its box, if possible one that nothing lies before."""
    shuffled = rng.sample(collage.things, len(collage.things))
    return about or min(shuffled, key=lambda thing: thing.hidden)


def fields_of(
    task: str,
    collage: Collage,
    language: str,
    pool: Sequence[Kind],
    rng: random.Random,
    about: Thing | None = None,
    questions: Sequence[str] = collage_facts.QUESTION_KINDS,
) -> dict[str, Any]:
    """Returns the fields of a row about one collage; `about` is the thing it asks for, if any.

    `questions` are the kinds that vqa asks.

    Raises: ValueError for a task that is not made here.
    """
    words = WORDS[language]
    match task:
        case "caption":
            return {"text": caption(collage, words, rng)}
        case "vqa":
            asked = collage_facts.ask(collage, pool, rng, about, questions)
            text = words.question(asked, rng)
            return {"question": text, "answer": words.answer(asked), "kind": asked.kind}
        case "grounded_caption":
            pieces = caption_pieces(collage, words)
            return {"phrases": [[text, [list(box) for box in boxes]] for text, boxes in pieces]}
        case "ref_grounding":
            text, things = phrase_and_things(collage, words, rng, about)
            return {"phrase": text, "boxes": boxes_of(collage, things)}
        case "grounded_captioning":
            thing = describable(collage, about, rng)
            text = words.counted(thing.name, 1)
            return {"box": list(box_of(collage, thing)), "text": text}
    raise ValueError(f"unknown task of the collages: got {task!r}")
