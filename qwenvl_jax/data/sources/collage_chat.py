"""Dialogues about collages: questions, boxes both ways, one or the other of two, two compared.

Everything an answer says is true of the pictures. Places are live tags, as in the released chat.
"""

import random
from collections.abc import Sequence
from types import ModuleType

from qwenvl_jax.data.sources import collage_facts
from qwenvl_jax.data.sources.collage_rows import (
    WORDS,
    box_of,
    caption,
    caption_pieces,
    describable,
    phrase_and_things,
)
from qwenvl_jax.data.sources.composition import Collage, Group, Thing, can_meet
from qwenvl_jax.data.sources.cutouts import Kind
from qwenvl_jax.data.sources.nouns import Name
from qwenvl_jax.data.tasks import PICTURE, grounded_parts
from qwenvl_jax.prompt.boxes import format_box

Turn = tuple[str, str]


def located(collage: Collage, text: str, things: Sequence[Thing]) -> str:
    """Returns `<ref>text</ref>` with the boxes of the things."""
    return f"<ref>{text}</ref>" + "".join(format_box(box_of(collage, t)) for t in things)


def as_conversations(turns: Sequence[Turn], pictures: int) -> list[dict[str, str]]:
    """Returns turns in the form of a chat row, with its pictures before the first question."""
    marks = "".join(f"Picture {i + 1}: {PICTURE}\n" for i in range(pictures))
    found = []
    for i, (question, answer) in enumerate(turns):
        found.append({"from": "user", "value": question if i else marks + question})
        found.append({"from": "assistant", "value": answer})
    return found


# --- one picture --------------------------------------------------------------------------------


def dialogue(
    collage: Collage,
    language: str,
    pool: Sequence[Kind],
    rng: random.Random,
    about: Thing | None = None,
    questions: Sequence[str] = collage_facts.QUESTION_KINDS,
) -> list[Turn]:
    """Returns one to four turns about one picture; the first is about one thing where that can be.

    `questions` are the kinds that it may ask. No question comes twice.
    """
    words = WORDS[language]
    turns: dict[str, str] = {}
    for _ in range(rng.choice((1, 2, 2, 3, 4))):
        kind = rng.choice(("ask", "ask", "find", "find", "name", "describe", "boxes"))
        first = None if turns else about
        if kind == "ask":
            asked = collage_facts.ask(collage, pool, rng, first, questions)
            question, answer = words.question(asked, rng), words.answer(asked)
        else:
            question, answer = _turn(kind, collage, words, rng, first)
        turns.setdefault(question, answer)
    return list(turns.items())


def _turn(
    kind: str,
    collage: Collage,
    words: ModuleType,
    rng: random.Random,
    about: Thing | None,
) -> Turn:
    if kind == "describe":
        return rng.choice(words.DESCRIBE), caption(collage, words, rng)
    if kind == "boxes":
        grounded = "".join(grounded_parts(caption_pieces(collage, words)))
        return rng.choice(words.DESCRIBE_BOXES), grounded
    if kind == "name":
        thing = describable(collage, about, rng)
        question = rng.choice(words.NAME_BOX).format(format_box(box_of(collage, thing)))
        return question, words.counted(thing.name, 1)
    text, things = phrase_and_things(collage, words, rng, about)
    is_all = text == words.plural(things[0].name) and len(things) > 1
    request = rng.choice(words.FIND_ALL if is_all else words.FIND).format(text)
    return request, located(collage, text, things)


# --- two pictures -------------------------------------------------------------------------------


def second_groups(first: Sequence[Group], pool: Sequence[Kind], rng: random.Random) -> list[Group]:
    """Returns groups for a picture to compare: some stay, some change in number, one is new."""
    kept = [group for group in first if rng.random() < 0.6] or [rng.choice(list(first))]
    found = [
        group if rng.random() < 0.5 else Group(group.kind, rng.randint(1, 4)) for group in kept
    ]
    for _ in range(8):
        kind = rng.choice(pool)
        everything = [*first, *found]
        if all(can_meet(kind, other.kind) for other in everything) and rng.random() < 0.8:
            found.append(Group(kind, rng.choice((1, 1, 2))))
            break
    return found


def comparison(
    one: Collage, two: Collage, language: str, rng: random.Random, about: Name | None = None
) -> list[Turn]:
    """Returns one to three turns that need both pictures; `about` a name, where one is given."""
    words = WORDS[language]
    names = list(
        dict.fromkeys(name for shown in (one, two) for name, _ in collage_facts.groups(shown))
    )
    turns: dict[str, str] = {}
    for _ in range(rng.choice((1, 2, 2, 3))):
        name = about if about and about in names and not turns else rng.choice(names)
        kind = rng.choice(("only", "only", "more", "more", "common", "both", "find"))
        question, answer = _compared(kind, (one, two), words, name, rng)
        turns.setdefault(question, answer)
    return list(turns.items())


def either(one: Collage, two: Collage, language: str, rng: random.Random) -> list[Turn]:
    """Returns two to four turns about one or the other picture, which no comparison goes without.

    What is asked for is in one of them at least.
    """
    words = WORDS[language]
    names = [name for shown in (one, two) for name, _ in collage_facts.groups(shown)]
    turns: dict[str, str] = {}
    for _ in range(rng.choice((2, 3, 3, 4))):
        name, at = rng.choice(names), rng.randrange(2)
        shown = (one, two)[at]
        counts = [len(collage_facts.things_of(picture, name)) for picture in (one, two)]
        match rng.choice(("count", "counts", "counts", "exists", "describe")):
            case "count":
                question = words.COUNT_IN.format(words.plural(name), at + 1)
                answer = str(counts[at])
            case "counts":
                question = words.COUNT_EACH.format(words.plural(name))
                answer = words.EACH.format(*counts)
            case "exists":
                question = words.EXISTS_IN.format(words.counted(name, 1), at + 1)
                answer = words.YES if counts[at] else words.NO
            case _:
                question = words.DESCRIBE_ONE.format(at + 1)
                answer = "".join(piece.text for piece in caption_pieces(shown, words))
        turns.setdefault(question, answer)
    return list(turns.items())


def _compared(
    kind: str, pictures: tuple[Collage, Collage], words: ModuleType, name: Name, rng: random.Random
) -> Turn:
    counts = [len(collage_facts.things_of(shown, name)) for shown in pictures]
    there = 0 if rng.random() < 0.5 else 1
    if kind == "only":
        question = rng.choice(words.ONLY_IN)
        numbers = (there + 1, 2 - there)
        asked = question.format(*numbers, *numbers)
        return asked, _set(pictures[there], pictures[1 - there], words, is_common=False)
    if kind == "common":
        return rng.choice(words.COMMON), _set(*pictures, words, is_common=True)
    if kind == "both":
        is_both = min(counts) > 0
        return words.IN_BOTH.format(words.counted(name, 1)), words.YES if is_both else words.NO
    if kind == "more":
        question = rng.choice(words.WHICH_MORE).format(words.plural(name))
        more = words.WHICH.format(1 if counts[0] > counts[1] else 2)
        return question, words.SAME if counts[0] == counts[1] else more
    shown = pictures[there] if counts[there] else pictures[1 - there]
    things = collage_facts.things_of(shown, name)
    request = words.FIND_IN.format(words.all_of(name, len(things)), pictures.index(shown) + 1)
    return request, located(shown, words.the(name, len(things)), things)


def _set(one: Collage, two: Collage, words: ModuleType, is_common: bool) -> str:
    """Returns what one picture shows and the other does not, or what both show, as a list."""
    parts = [
        words.plural(name) if is_common else words.counted(name, len(things))
        for name, things in collage_facts.groups(one)
        if bool(collage_facts.things_of(two, name)) == is_common
    ]
    if not parts:
        return words.NOTHING
    text = parts[0]
    for i, part in enumerate(parts[1:], 2):
        text += words.JOINTS[i == len(parts)] + words.SPACE + part
    return text
