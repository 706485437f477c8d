"""Held-out rows of any source as an examination: by task and language, new objects apart.

A row is asked as training shows it, up to what the model has to say; of a dialogue that is the
first answer. What the row says there decides how an answer is marked:

    says                        marks
    text                        exact; where lines are read, ANLS
    one place                   IoU of the first box at 0.5
    several places              F1 of boxes at IoU 0.5
    phrases with places         F1 of phrases whose box is right: the same words and IoU 0.5
    lines with their quads      ANLS of the lines' text

Rows that say `objects: unseen` show what no training row showed or named, and count apart. Where no
row has `objects`, as in a file of your own, there is one score and no such columns.

    papers = row_papers(open_source("runs/nano/rows/heldout/food"), 500, vl.tokenizer, 112)
    papers, too_long = split_by_length(papers, vl.tokenizer, vl.config.decoder.max_positions)
    scores = summarise_rows(papers, sit_rows(vl, papers))
"""

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from qwenvl_jax.data.clean import language_of
from qwenvl_jax.data.example import DataError
from qwenvl_jax.data.packing import pixels
from qwenvl_jax.data.record import Record, Source
from qwenvl_jax.data.tasks import example_of
from qwenvl_jax.evaluation.answering import answers_to
from qwenvl_jax.evaluation.marks import HIT_IOU, Mark, Score, mean_marks, place_iou
from qwenvl_jax.evaluation.metrics import anls
from qwenvl_jax.evaluation.questions import as_question
from qwenvl_jax.prompt.boxes import parse_boxes, scan, strip_boxes
from qwenvl_jax.prompt.tokenizer import Tokenizer

if TYPE_CHECKING:
    from qwenvl_jax.inference.vl import VL

Form = Literal["text", "lines", "place", "places", "phrases", "quads"]

_NAMES = {
    "vqa": "question",
    "ocr_vqa": "reading",
    "ocr": "all lines",
    "letters": "letters of all cells",
    "caption": "caption",
    "ref_grounding": "phrase located",
    "grounded_caption": "caption with boxes",
    "grounded_captioning": "thing in a box named",
    "chat": "chat",
    "compare": "two pictures in chat",
}
_FORMAT = re.compile(  # what is the same in all languages
    r"<\|im_start\|>(?:system.*?<\|im_end\|>|\w+)|Picture \d+:|Answer:|<[^<>]*>", re.DOTALL
)
_MARGIN = 16  # tokens that an answer may have more than the right one, and more up to the next 32


class RowPaper(NamedTuple):
    """What one row asks, and what it says itself."""

    key: str
    subject: str  # a task's name for people, and "two pictures in chat"
    language: str
    asked: str  # the prompt as text
    tokens: list[int]  # the prompt, exactly as in training
    images_IYXC: np.ndarray  # uint8 [I, Y, X, 3]
    expected: str  # with its tags
    form: Form
    is_new: bool | None  # None where the row does not say


# --- setting the papers -------------------------------------------------------------------------


def row_papers(
    source: Source,
    num_rows: int,
    tokenizer: Tokenizer,
    side: int,
    seed: int = 0,
    on_unusable: Callable[[DataError], None] | None = None,
) -> list[RowPaper]:
    """Returns papers of so many different rows, drawn by `seed`; all rows where there are fewer.

    Raises: DataError for a row that cannot be used, unless `on_unusable` takes it.
    """
    order = np.random.default_rng(seed).permutation(len(source))[:num_rows]
    papers = []
    for index in order:
        try:
            papers.append(row_paper(source[int(index)], tokenizer, side))
        except DataError as error:
            if on_unusable is None:
                raise
            on_unusable(error)
    return [paper for paper in papers if paper is not None]


def row_paper(record: Record, tokenizer: Tokenizer, side: int) -> RowPaper | None:
    """Returns what a row asks; None for plain text, which asks nothing.

    Raises: DataError where the row does not fit its task.
    """
    if record.task == "text":
        return None
    example = example_of(record, tokenizer)
    question = as_question(example, tokenizer)
    if question is None:
        raise DataError(f"row {record.key} has no answer: got nothing that a model would say")
    prompt = question.prompt.tolist()
    num_images = prompt.count(tokenizer.image_start_id)
    shown = [pixels(example, image, side) for image in example.images[:num_images]]
    asked, expected = tokenizer.decode(prompt), tokenizer.decode(question.answer)
    subject = "compare" if record.task == "chat" and num_images > 1 else record.task
    return RowPaper(
        key=record.key,
        subject=_NAMES[subject],
        language=str(record.fields.get("language") or _language(asked + expected)),
        asked=asked,
        tokens=prompt,
        images_IYXC=np.stack(shown) if shown else np.zeros((0, side, side, 3), np.uint8),
        expected=expected,
        form=_form(expected, record),
        is_new=_is_new(record),
    )


def _language(text: str) -> str:
    """Returns the language of a dialogue, without what its format says in Latin letters."""
    return language_of(_FORMAT.sub(" ", text))


def _is_new(record: Record) -> bool | None:
    objects = record.fields.get("objects")
    return None if objects is None else objects == "unseen"


def split_by_length(
    papers: Sequence[RowPaper], tokenizer: Tokenizer, max_positions: int
) -> tuple[list[RowPaper], list[RowPaper]]:
    """Returns the papers that a model of so many positions can sit, and those that are too long."""
    lengths = [len(paper.tokens) + _answer_room(paper, tokenizer) for paper in papers]
    pairs = [*zip(papers, lengths, strict=True)]
    return (
        [paper for paper, length in pairs if length <= max_positions],
        [paper for paper, length in pairs if length > max_positions],
    )


def _answer_room(paper: RowPaper, tokenizer: Tokenizer) -> int:
    """Returns how many tokens an answer may have."""
    return -(-(len(tokenizer.encode_raw(paper.expected)) + _MARGIN) // 32) * 32


def _form(expected: str, record: Record) -> Form:
    places = parse_boxes(expected, inherit_ref=True)
    if any("quad" in place for place in places):
        return "quads"
    if not places:
        is_reading = record.task == "ocr_vqa" or record.fields.get("kind") == "line"
        return "lines" if is_reading else "text"
    is_one_phrase = strip_boxes(expected) == (places[0]["ref"] or "")
    if record.task == "grounded_caption" or not is_one_phrase:
        return "phrases"
    return "place" if len(places) == 1 else "places"


# --- sitting it ---------------------------------------------------------------------------------


def sit_rows(
    vl: "VL", papers: Sequence[RowPaper], on_progress: Callable[[int], None] = lambda done: None
) -> list[str]:
    """Returns the model's greedy answer to each paper, as text with its tags.

    Raises: InputError for a paper that is too long; `split_by_length` finds those before.
    """
    limits = [_answer_room(paper, vl.tokenizer) for paper in papers]
    return answers_to(vl, papers, limits, on_progress)


# --- marking ------------------------------------------------------------------------------------


def row_marks(paper: RowPaper, answer: str) -> list[Mark]:
    """Returns what an answer earns; each measure's name says task, measure and language."""

    def mark(measure: str, value: float) -> Mark:
        return Mark(f"{paper.subject}: {measure}, {paper.language}", value, paper.is_new)

    if paper.form == "text":
        return [mark("exact", float(answer.strip() == paper.expected.strip()))]
    if paper.form in ("lines", "quads"):
        said, right = (_words(text) for text in (answer, paper.expected))
        return [mark("ANLS", anls(said, [right])), mark("lines exact", float(said == right))]
    found, wanted = (parse_boxes(text, inherit_ref=True) for text in (answer, paper.expected))
    if paper.form == "place":
        hit = bool(found) and place_iou(found[0], wanted[0]) >= HIT_IOU
        return [mark(f"IoU at {HIT_IOU}", float(hit))]
    if paper.form == "places":
        return [mark(f"box F1 at {HIT_IOU}", f1(found, wanted, has_phrases=False))]
    return [mark(f"phrase-box F1 at {HIT_IOU}", f1(found, wanted, has_phrases=True))]


def f1(
    found: Sequence[dict[str, Any]], wanted: Sequence[dict[str, Any]], *, has_phrases: bool
) -> float:
    """Returns 2 TP / (found + wanted); a place is right where it meets one that no other has met.

    The best overlaps are paired first. With phrases only places of equal words can meet.
    """
    pairs = sorted(
        (
            (place_iou(one, other), i, j)
            for i, one in enumerate(found)
            for j, other in enumerate(wanted)
            if not has_phrases or one["ref"] == other["ref"]
        ),
        reverse=True,
    )
    used: set[tuple[str, int]] = set()
    right = 0
    for iou, i, j in pairs:
        if iou >= HIT_IOU and not used & {("found", i), ("wanted", j)}:
            used |= {("found", i), ("wanted", j)}
            right += 1
    return 2 * right / (len(found) + len(wanted)) if found or wanted else 1.0


def _words(text: str) -> str:
    """Returns what an answer reads: its lines with one space between them, without places."""
    lines = [span.body.strip() for span in scan(text) if span.kind == "ref"]
    return " ".join(lines) if lines else strip_boxes(text)


def summarise_rows(papers: Sequence[RowPaper], answers: Sequence[str]) -> list[Score]:
    """Returns one score a measure, task by task."""
    pairs = zip(papers, answers, strict=True)
    earned = (mark for paper, answer in pairs for mark in row_marks(paper, answer))
    return mean_marks(earned, [*_NAMES.values()])


def facts(paper: RowPaper, answer: str) -> dict[str, Any]:
    """Returns an answer beside what was asked and expected, for a file."""
    names = ("key", "subject", "language", "asked", "expected", "is_new")
    return {name: getattr(paper, name) for name in names} | {"answer": answer}
