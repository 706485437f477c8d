"""What is true of a collage, in no language: phrases that fit one thing, questions and answers.

A phrase or a question is made only where nobody could take it otherwise: "the left cat" needs two
cats clearly apart, "the cat to the left of the dog" that no other cat is. The modules
`collage_english` and `collage_chinese` put it into words.
"""

import itertools
import random
from collections.abc import Sequence
from typing import Literal, NamedTuple

from qwenvl_jax.data.sources.composition import Collage, Group, Thing
from qwenvl_jax.data.sources.cutouts import Kind
from qwenvl_jax.data.sources.nouns import Name

CLEAR = 0.12  # of the side: positions that differ by less are not called left, above, ...
CLEARLY_BIGGER = 1.4  # times as long and as wide

Link = Literal["left", "right", "above", "below"]
_OPPOSITE: dict[Link, Link] = {"left": "right", "right": "left", "above": "below", "below": "above"}
_AXES: tuple[tuple[int, Link, Link], ...] = ((0, "left", "right"), (1, "above", "below"))


QUESTION_KINDS = (
    "count",
    "exists",
    "exists",  # twice as likely
    "colour",
    "relation",
    "neighbour",
    "where",
    "more",
    "total",
)


class Reference(NamedTuple):
    """A phrase for one thing: its name and, where that is not enough, what sets it apart.

    `how` is "name", "bigger", "smaller", "left" ... "below" (the one of two that lies there),
    "most left" ... "most below" (of more than two), or "beside": it lies `link` of `anchor`.
    """

    thing: Thing
    name: Name
    how: str
    link: Link | None = None
    anchor: Name | None = None


class Asked(NamedTuple):
    """A question and its answer; which fields matter hangs on `kind`.

    kind        asks                                      answer
    count       how many `name` there are                 int
    total       how many things there are                 int
    colour      the colour of the thing of `references`   its Name
    exists      whether there is a `name`                 bool
    relation    whether the first lies `link` the second  bool
    neighbour   what lies `link` the reference            Name
    where       where in the picture it lies              (column, row), each -1, 0 or 1
    more        whether there are more `name` than `other`  bool
    """

    kind: str
    answer: int | bool | Name | tuple[int, int]
    references: tuple[Reference, ...] = ()
    name: Name | None = None
    other: Name | None = None
    link: Link | None = None


# --- names and groups ---------------------------------------------------------------------------


def fits(thing: Thing, name: Name) -> bool:
    """Whether a name fits a thing; one without a colour fits every colour."""
    is_noun = thing.name.noun.en == name.noun.en
    return is_noun and name.colour in (None, thing.name.colour)


def things_of(collage: Collage, name: Name) -> list[Thing]:
    return [thing for thing in collage.things if fits(thing, name)]


def groups(collage: Collage) -> list[tuple[Name, list[Thing]]]:
    """Returns the things by full name, in the order of each name's leftmost one."""
    found: dict[Name, list[Thing]] = {}
    for thing in collage.things:
        found.setdefault(thing.name, []).append(thing)
    return list(found.items())


def shown(collage: Collage) -> list[Group]:
    """Returns what the picture really shows, as groups."""
    kinds = {thing.name: thing.kind for thing in collage.things}
    return [Group(kinds[name], len(things)) for name, things in groups(collage)]


# --- places -------------------------------------------------------------------------------------


def link(one: Thing, other: Thing, side: int) -> Link | None:
    """Returns how one lies to the other, where one direction is clear; or None."""
    dx, dy = (a - b for a, b in zip(one.centre, other.centre, strict=True))
    if abs(dx) >= CLEAR * side and abs(dx) > 1.4 * abs(dy):
        return "left" if dx < 0 else "right"
    if abs(dy) >= CLEAR * side and abs(dy) > 1.4 * abs(dx):
        return "above" if dy < 0 else "below"
    return None


def may_lie(one: Thing, other: Thing, way: Link) -> bool:
    """Whether somebody could say that one lies that way of the other."""
    axis = 0 if way in ("left", "right") else 1
    ahead = one.centre[axis] - other.centre[axis]
    return ahead < 0 if way in ("left", "above") else ahead > 0


def cell(thing: Thing, side: int) -> tuple[int, int] | None:
    """Returns which of nine parts of the picture a thing lies in, or None near their borders."""
    found = []
    for place in thing.centre:
        along = place / side
        if min(abs(along - 1 / 3), abs(along - 2 / 3)) < 0.06:
            return None
        found.append(-1 if along < 1 / 3 else 1 if along > 2 / 3 else 0)
    return found[0], found[1]


# --- phrases ------------------------------------------------------------------------------------


def references(collage: Collage, thing: Thing) -> list[Reference]:
    """Returns every phrase for this thing that fits no other; there may be none."""
    found = []
    for name in dict.fromkeys((Name(thing.name.noun), thing.name)):
        same = things_of(collage, name)
        if len(same) == 1:
            found.append(Reference(thing, name, "name"))
            continue
        found += [Reference(thing, name, how) for how in _extremes(collage, thing, same)]
        found += _beside(collage, thing, name, same)
    return found


def _extremes(collage: Collage, thing: Thing, same: list[Thing]) -> list[str]:
    most = "" if len(same) == 2 else "most "
    found = []
    for axis, low, high in _AXES:
        ordered = sorted(same, key=lambda other: other.centre[axis])
        places = [other.centre[axis] for other in ordered]
        if thing is ordered[0] and places[1] - places[0] >= CLEAR * collage.side:
            found.append(most + low)
        if thing is ordered[-1] and places[-1] - places[-2] >= CLEAR * collage.side:
            found.append(most + high)
    if len(same) == 2 and not any(other.hidden for other in same):
        other = same[0] if same[1] is thing else same[1]
        if thing.reach >= CLEARLY_BIGGER * other.reach:
            found.append("bigger")
        if other.reach >= CLEARLY_BIGGER * thing.reach:
            found.append("smaller")
    return found


def _beside(collage: Collage, thing: Thing, name: Name, same: list[Thing]) -> list[Reference]:
    found = []
    for anchor in collage.things:
        way = link(thing, anchor, collage.side)
        if way is None or fits(anchor, name) or len(things_of(collage, anchor.name)) > 1:
            continue
        if not any(may_lie(other, anchor, way) for other in same if other is not thing):
            found.append(Reference(thing, name, "beside", way, anchor.name))
    return found


def reference(collage: Collage, thing: Thing, rng: random.Random) -> Reference | None:
    """Returns one phrase that fits only this thing, the ways to say it being equally likely."""
    found = references(collage, thing)
    return rng.choice(found) if found else None


# --- questions ----------------------------------------------------------------------------------


def ask(
    collage: Collage,
    pool: Sequence[Kind],
    rng: random.Random,
    about: Thing | None = None,
    kinds: Sequence[str] = QUESTION_KINDS,
) -> Asked:
    """Returns a question that the picture answers; `about` one thing where that can be.

    Its kind is one of `kinds`, or any where the picture allows none of them.
    """
    thing = about or rng.choice(collage.things)
    order = list(kinds)
    rng.shuffle(order)
    for kind in itertools.chain(order, QUESTION_KINDS):
        asked = _ASKERS[kind](collage, thing, pool, rng)
        if asked is not None:
            return asked
    raise AssertionError("every thing can be counted")


def _count(
    collage: Collage, thing: Thing, pool: Sequence[Kind], rng: random.Random
) -> Asked | None:
    name = rng.choice((thing.name, Name(thing.name.noun)))
    return Asked("count", len(things_of(collage, name)), name=name)


def _total(
    collage: Collage, thing: Thing, pool: Sequence[Kind], rng: random.Random
) -> Asked | None:
    return Asked("total", len(collage.things))


def _exists(
    collage: Collage, thing: Thing, pool: Sequence[Kind], rng: random.Random
) -> Asked | None:
    if rng.random() < 0.5:
        return Asked("exists", True, name=rng.choice((thing.name, Name(thing.name.noun))))
    absent = absent_name(collage, pool, rng)
    return None if absent is None else Asked("exists", False, name=absent)


def absent_name(collage: Collage, pool: Sequence[Kind], rng: random.Random) -> Name | None:
    """Returns the name of something that is clearly not there, or None where a few tries fail.

    A bear is not denied where a polar bear is shown; half of the names share a noun with a thing
    that is there, and differ in colour, where there are such.
    """
    nouns = {thing.name.noun.en for thing in collage.things if thing.name.colour}
    near = [kind for kind in pool if kind.noun.en in nouns and kind.name.colour]
    for _ in range(8):
        name = rng.choice(near if near and rng.random() < 0.5 else pool).name
        present = [thing.name for thing in collage.things]
        is_apart = all(_apart(name, other) for other in present)
        if is_apart:
            return name
    return None


def _apart(name: Name, other: Name) -> bool:
    if name.noun.en == other.noun.en:
        return None not in (name.colour, other.colour) and name.colour != other.colour
    words, others = name.noun.en.split(), other.noun.en.split()
    zh, other_zh = name.noun.zh or name.noun.en, other.noun.zh or other.noun.en
    return words[-1] != others[-1] and zh not in other_zh and other_zh not in zh


def _colour(
    collage: Collage, thing: Thing, pool: Sequence[Kind], rng: random.Random
) -> Asked | None:
    named = [found for found in references(collage, thing) if found.name.colour is None]
    if thing.name.colour is None or not named:
        return None
    return Asked("colour", thing.name, (rng.choice(named),))


def _relation(
    collage: Collage, thing: Thing, pool: Sequence[Kind], rng: random.Random
) -> Asked | None:
    others = [other for other in collage.things if other.name != thing.name]
    other = rng.choice(others) if others else None
    if other is None:
        return None
    way = link(thing, other, collage.side)
    first, second = reference(collage, thing, rng), reference(collage, other, rng)
    if way is None or first is None or second is None or "beside" in (first.how, second.how):
        return None
    is_true = rng.random() < 0.5
    asked = way if is_true else _OPPOSITE[way]
    return Asked("relation", is_true, (first, second), link=asked)


def _neighbour(
    collage: Collage, thing: Thing, pool: Sequence[Kind], rng: random.Random
) -> Asked | None:
    """Asks what lies left of something, where only this thing could be meant."""
    for other in rng.sample(collage.things, len(collage.things)):
        way = link(thing, other, collage.side)
        named = [found for found in references(collage, other) if found.how == "name"]
        meant = [t for t in collage.things if t is not other and way and may_lie(t, other, way)]
        if way is not None and named and meant == [thing]:
            return Asked("neighbour", thing.name, (rng.choice(named),), link=way)
    return None


def _where(
    collage: Collage, thing: Thing, pool: Sequence[Kind], rng: random.Random
) -> Asked | None:
    named = [
        found for found in references(collage, thing) if found.how in ("name", "bigger", "smaller")
    ]
    place = cell(thing, collage.side)
    if place is None or not named:
        return None
    return Asked("where", place, (rng.choice(named),))


def _more(collage: Collage, thing: Thing, pool: Sequence[Kind], rng: random.Random) -> Asked | None:
    others = [name for name, _ in groups(collage) if name != thing.name]
    if not others:
        return None
    one, other = thing.name, rng.choice(others)
    if rng.random() < 0.5:
        one, other = other, one
    counts = [len(things_of(collage, name)) for name in (one, other)]
    return None if counts[0] == counts[1] else Asked("more", counts[0] > counts[1], (), one, other)


_ASKERS = {
    "count": _count,
    "exists": _exists,
    "colour": _colour,
    "relation": _relation,
    "neighbour": _neighbour,
    "where": _where,
    "more": _more,
    "total": _total,
}
