"""What is asked about a document: its lines, one line by its start or its neighbour, their number.

Nothing is asked that the picture does not settle: lines are counted only where all are labelled,
and a line is named by its text only where no other has it. Tags are live in chat and not in the
questions of vqa, so only chat asks for places.
"""

import itertools
import random
from collections.abc import Callable
from typing import Any

import numpy as np

from qwenvl_jax.data.sources.page_photo import Document, Line
from qwenvl_jax.data.sources.scene_language import BLANK
from qwenvl_jax.data.tasks import PICTURE
from qwenvl_jax.prompt.boxes import Quad, format_quad, quad_from_pixels

_AT = {
    "en": ("What does the text in {} say?", "Read the text in {}.", "What is written in {}?"),
    "zh": ("{}里写的是什么？", "请读出{}中的文字。", "{}中的文字是什么？"),
}
_ENDS = {
    "en": ("What is the first line?", "What is the last line?"),
    "zh": ("第一行写的是什么？", "最后一行写的是什么？"),
}
_STARTS = {
    "en": ("Which line begins with “{}”?", "What does the line that begins with “{}” say?"),
    "zh": ("以“{}”开头的那一行写的是什么？", "哪一行以“{}”开头？"),
}
_AFTER = {"en": "Which line comes after “{}”?", "zh": "“{}”的下一行是什么？"}
_COUNT = {"en": "How many lines of text are there?", "zh": "图中有多少行文字？"}
_FIND = {
    "en": ("Find the text “{}”.", "Where is “{}” written?"),
    "zh": ("找出文字“{}”。", "“{}”写在哪里？"),
}
_ALL = {
    "en": ("Read all the text and give the places.", "Read the page with the places of the lines."),
    "zh": ("读出所有文字，并给出位置。", "识别图中的文字和位置。"),
}

CELLS = 6  # on a side of the list of letters: one cell for each query of the small model

Asked = tuple[str, str]


def question_words() -> list[str]:
    """Returns every question of both languages, `{}` where a line or a place stands."""
    lists = [
        words
        for by_language in (_AT, _ENDS, _STARTS, _FIND, _ALL)
        for words in by_language.values()
    ]
    return [*itertools.chain.from_iterable(lists), *_AFTER.values(), *_COUNT.values()]


def quad_of(document: Document, line: Line) -> Quad:
    """Returns a line's quad in thousandths of the picture."""
    return quad_from_pixels(line.quad.tolist(), *document.image.size)


def fields_of(
    task: str, document: Document, language: str, rng: random.Random
) -> tuple[str, dict[str, Any]]:
    """Returns the task and the fields of a row; ocr where the document settles no question.

    Raises: ValueError for a task that `documents.TASKS` does not have.
    """
    if task == "chat":
        return task, {"conversations": _dialogue(document, language, rng)}
    if task in ("ocr_vqa", "vqa"):
        askers: list[Asker] = [_starts]
        if task == "vqa":
            askers += [_ends, _after, _count]
        asked = _ask(askers, document, language, rng)
        if asked is not None:
            kind = "count" if asked[0] == _COUNT[language] else "line"
            return task, {"question": asked[0], "answer": asked[1], "kind": kind}
    elif task == "letters":
        if not document.unlabelled:
            return task, _letters(document)
    elif task != "ocr":
        raise ValueError(f"unknown task of the documents: got {task!r}")
    return "ocr", {"lines": [[line.text, _points(document, line)] for line in document.lines]}


def _letters(document: Document) -> dict[str, str]:
    """Returns the first and the second character whose middle lies in each cell, row by row."""
    found: list[list[str]] = [[] for _ in range(CELLS**2)]
    for line in document.page.lines:
        middles = document.warp.to_picture(np.array(line.middles()))
        places = (middles / np.array(document.image.size) * CELLS).astype(int).clip(0, CELLS - 1)
        for char, (column, row) in zip(line.text, places.tolist(), strict=True):
            found[row * CELLS + column] += [] if char.isspace() else [char]
    firsts, seconds = zip(*((chars + [BLANK] * 2)[:2] for chars in found), strict=True)
    return {"firsts": "".join(firsts), "seconds": "".join(seconds)}


def _points(document: Document, line: Line) -> list[list[int]]:
    return [list(point) for point in quad_of(document, line)]


Asker = Callable[[Document, str, random.Random], Asked | None]


def _ask(
    askers: list[Asker], document: Document, language: str, rng: random.Random
) -> Asked | None:
    for asker in rng.sample(askers, len(askers)):
        asked = asker(document, language, rng)
        if asked is not None:
            return asked
    return None


def _at(document: Document, language: str, rng: random.Random) -> Asked:
    line = rng.choice(document.lines)
    place = format_quad(quad_of(document, line))
    return rng.choice(_AT[language]).format(place), line.text


def _starts(document: Document, language: str, rng: random.Random) -> Asked | None:
    """Asks for a line by its first word, or its first two signs, which stand nowhere else."""
    whole = "\n".join(line.text for line in document.lines)
    found = []
    for line in document.lines:
        start = line.text[:2] if language == "zh" else line.text.split()[0]
        if whole.count(start) == 1 and len(start) > 1 and start != line.text:
            found.append((start, line))
    if document.unlabelled or not found:
        return None
    start, line = rng.choice(found)
    return rng.choice(_STARTS[language]).format(start), line.text


def _ends(document: Document, language: str, rng: random.Random) -> Asked | None:
    if document.unlabelled or len({line.column for line in document.lines}) > 1:
        return None
    is_last = rng.random() < 0.5
    return _ENDS[language][is_last], document.lines[-is_last].text


def _after(document: Document, language: str, rng: random.Random) -> Asked | None:
    if document.unlabelled:
        return None
    lines = document.lines
    pairs = [
        (line, after)
        for line, after in itertools.pairwise(lines)
        if line.column == after.column and _is_unique(document, line)
    ]
    if not pairs:
        return None
    line, after = rng.choice(pairs)
    return _AFTER[language].format(line.text), after.text


def _count(document: Document, language: str, rng: random.Random) -> Asked | None:
    if document.unlabelled or len({line.column for line in document.lines}) > 1:
        return None
    return _COUNT[language], str(len(document.lines))


def _find(document: Document, language: str, rng: random.Random) -> Asked | None:
    found = [line for line in document.lines if _is_unique(document, line)]
    if not found:
        return None
    line = rng.choice(found)
    return rng.choice(_FIND[language]).format(line.text), _read(document, line)


def _all(document: Document, language: str, rng: random.Random) -> Asked:
    read = "".join(_read(document, line) for line in document.lines)
    return rng.choice(_ALL[language]), read


def _read(document: Document, line: Line) -> str:
    return f"<ref>{line.text}</ref>{format_quad(quad_of(document, line))}"


def _is_unique(document: Document, line: Line) -> bool:
    """Whether no other line holds the same text."""
    return sum(line.text in other.text for other in document.lines) == 1


def _dialogue(document: Document, language: str, rng: random.Random) -> list[dict[str, str]]:
    """Returns one to three turns, no question twice."""
    turns: dict[str, str] = {}
    kinds: list[Asker] = [_at, _find, _find, _ends, _after, _count, _starts]
    for _ in range(rng.choice((1, 2, 3))):
        asked = rng.choice(kinds)(document, language, rng)
        question, answer = asked or _at(document, language, rng)
        turns.setdefault(question, answer)
    if len(document.lines) <= 6 and rng.random() < 0.3:
        turns = dict([_all(document, language, rng)])
    found = []
    for i, (question, answer) in enumerate(turns.items()):
        start = "" if i else f"Picture 1: {PICTURE}\n"
        found.append({"from": "user", "value": start + question})
        found.append({"from": "assistant", "value": answer})
    return found
