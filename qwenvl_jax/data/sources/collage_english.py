"""Collages in English words. `collage_chinese` has the same functions."""

import random

from qwenvl_jax.data.sources.collage_facts import Asked, Link, Reference
from qwenvl_jax.data.sources.composition import Thing
from qwenvl_jax.data.sources.nouns import Name

NUMBERS = "no one two three four five six seven eight nine ten eleven twelve".split()
YES, NO = "yes", "no"
NOTHING, SAME, WHICH = "nothing", "the same number", "Picture {}"
JOINTS, SPACE = (
    (",", " and"),
    " ",
)  # of a list: before each but the last, before the last; before a word

_LINKS: dict[Link, str] = {
    "left": "to the left of",
    "right": "to the right of",
    "above": "above",
    "below": "below",
}
_HOW = {
    "bigger": "the bigger {}",
    "smaller": "the smaller {}",
    "left": "the {} on the left",
    "right": "the {} on the right",
    "above": "the upper {}",
    "below": "the lower {}",
    "most left": "the leftmost {}",
    "most right": "the rightmost {}",
    "most above": "the topmost {}",
    "most below": "the bottommost {}",
}
_COLUMNS, _ROWS = {-1: "left", 0: "", 1: "right"}, {-1: "top", 0: "", 1: "bottom"}

DESCRIBE = ("Describe the picture.", "What is in the picture?", "What do you see?")
DESCRIBE_BOXES = (
    "Describe the picture and give the boxes.",
    "What is in the picture? Draw boxes.",
)
FIND = ("Find {}.", "Where is {}? Draw a box.", "Locate {}.", "Draw a box around {}.")
FIND_ALL = ("Find all the {}.", "Draw boxes around all the {}.")
NAME_BOX = ("What is in {}?", "What does {} show?")
FIND_IN = "Find {} in Picture {}."
WHICH_MORE = ("Which picture has more {}?", "In which picture are there more {}?")
ONLY_IN = (
    "What is in Picture {} but not in Picture {}?",
    "What does Picture {} show that Picture {} does not?",
)
COMMON = ("What is in both pictures?", "What do the two pictures have in common?")
IN_BOTH = "Is there {} in both pictures?"
COUNT_IN = "How many {} are in Picture {}?"
COUNT_EACH, EACH = "How many {} are in each picture?", "{} and {}"
EXISTS_IN = "Is there {} in Picture {}?"
DESCRIBE_ONE = "What is in Picture {}?"


def singular(name: Name) -> str:
    """Returns `red apple`."""
    return name.english


def plural(name: Name) -> str:
    """Returns `red apples`."""
    return f"{name.colour} {name.noun.plural}" if name.colour else name.noun.plural


def counted(name: Name, count: int) -> str:
    """Returns `a red apple`, `an apple` or `two red apples`."""
    if count != 1:
        return f"{NUMBERS[count] if count < len(NUMBERS) else count} {plural(name)}"
    article = name.noun.article
    if name.colour:
        article = "an" if name.colour[0] in "aeiou" else "a"
    return f"{article} {name.english}"


def the(name: Name, count: int) -> str:
    """Returns `the red apple` of one, `the red apples` of more."""
    return f"the {name.english if count == 1 else plural(name)}"


def all_of(name: Name, count: int) -> str:
    """Returns `the red apple` of one, `all the red apples` of more."""
    return the(name, count) if count == 1 else f"all {the(name, count)}"


def phrase(reference: Reference) -> str:
    """Returns `the red apple`, `the bigger apple`, `the apple above the dog`."""
    if reference.how == "name":
        return f"the {reference.name.english}"
    if reference.link is not None and reference.anchor is not None:
        anchor = reference.anchor.english
        return f"the {reference.name.english} {_LINKS[reference.link]} the {anchor}"
    return _HOW[reference.how].format(reference.name.english)


def related(one: Thing, way: Link, other: Thing) -> str:
    """Returns `an apple to the left of a dog`."""
    return f"{counted(one.name, 1)} {_LINKS[way]} {counted(other.name, 1)}"


def question(asked: Asked, rng: random.Random) -> str:
    """Returns the question in words."""
    name = asked.name
    named = [phrase(reference) for reference in asked.references]
    way = _LINKS[asked.link] if asked.link else ""
    match asked.kind:
        case "count" if name:
            end = rng.choice(("are there", "are in the picture"))
            return f"How many {plural(name)} {end}?"
        case "total":
            return rng.choice(
                ("How many things are there?", "How many objects are in the picture?")
            )
        case "colour":
            return f"What {rng.choice(('colour', 'color'))} is {named[0]}?"
        case "exists" if name:
            end = rng.choice(("", " in the picture"))
            return f"Is there {counted(name, 1)}{end}?"
        case "relation":
            return f"Is {named[0]} {way} {named[1]}?"
        case "neighbour":
            return f"What is {way} {named[0]}?"
        case "where":
            return rng.choice(("Where is {}?", "Where in the picture is {}?")).format(named[0])
        case "more" if name and asked.other:
            return f"Are there more {plural(name)} than {plural(asked.other)}?"
    raise ValueError(f"unknown kind of question: got {asked.kind!r}")


def answer(asked: Asked) -> str:
    """Returns the answer: a number, yes or no, a colour, a place, or a thing with its article."""
    value = asked.answer
    if isinstance(value, bool):
        return YES if value else NO
    if isinstance(value, int):
        return str(value)
    if isinstance(value, Name):
        return str(value.colour) if asked.kind == "colour" else counted(value, 1)
    column, row = value
    return f"{_ROWS[row]} {_COLUMNS[column]}".strip() or "center"
