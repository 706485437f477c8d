"""Held-out drawn scenes as an examination: what is asked, and how an answer is marked.

Scenes come from the random stream that training never draws from. A fact counts as *new* where it
needs a shape in a colour, or a written word, that no training scene ever showed or named: the marks
on new facts say how far the model composes and spells, beside how well it learnt.

    papers = examination(vl.tokenizer, side=vl.config.image_size, num_scenes=200)
    answers = sit(vl, papers)
    scores = summarise(papers, answers)
"""

import random
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import numpy as np

from qwenvl_jax.data import tasks
from qwenvl_jax.data.sources import scene_language as language
from qwenvl_jax.data.sources.scene_rows import scene_of, thing_box
from qwenvl_jax.data.sources.scenes import (
    COLOURS,
    HELD_OUT_PAIRS,
    HELD_OUT_WORDS,
    SHAPES,
    Scene,
)
from qwenvl_jax.evaluation.answering import answers_to
from qwenvl_jax.evaluation.marks import HIT_IOU, Mark, Score, mean_marks, place_iou
from qwenvl_jax.evaluation.metrics import anls
from qwenvl_jax.prompt.boxes import Box, parse_boxes
from qwenvl_jax.prompt.tokenizer import Tokenizer

if TYPE_CHECKING:
    from qwenvl_jax.inference.vl import VL

Form = Literal["task", "chat"]  # the prompts of the multi-task stage, or a chat turn
Subject = Literal["caption", "question", "locate", "read"]

FORMS: tuple[Form, ...] = get_args(Form)
SUBJECTS: tuple[Subject, ...] = get_args(Subject)
MAX_NEW_TOKENS: dict[Subject, int] = {"caption": 64, "question": 24, "locate": 64, "read": 24}

# Which training task draws the subject's scenes: with writing, without, or as it falls.
_SCENE_TASK: dict[Subject, str] = {
    "caption": "caption",
    "question": "vqa",
    "locate": "ref_grounding",
    "read": "ocr_vqa",
}
_NAMED_PAIR = re.compile(rf"\b({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})\b")


class Paper(NamedTuple):
    """One thing asked about one scene, and what a right answer holds."""

    subject: Subject
    form: Form
    asked: str  # what a person would type
    tokens: list[int]  # the prompt, exactly as in training
    images_IYXC: np.ndarray  # uint8 [1, Y, X, 3]
    scene: Scene
    kind: str  # of a question: colour, count, ...; of writing: word or number
    expected: tuple[str, ...]  # texts that are right as they stand
    box: Box | None  # what is to be located, 0..999
    is_new: bool


# --- setting the papers -------------------------------------------------------------------------


def examination(
    tokenizer: Tokenizer, side: int, num_scenes: int, seed: int = 0, form: Form = "task"
) -> list[Paper]:
    """Returns one paper a scene for every subject; a pure function of its arguments."""
    first = seed * 1_000_003  # streams of different seeds do not overlap in practice
    return [
        set_paper(
            subject, form, scene_of(_SCENE_TASK[subject], first + i, "heldout", side), tokenizer
        )
        for subject in SUBJECTS
        for i in range(num_scenes)
    ]


def set_paper(subject: Subject, form: Form, scene: Scene, tokenizer: Tokenizer) -> Paper:
    """Returns the paper of a subject about a scene.

    Raises: ValueError where the scene has no writing to read, or nothing to locate.
    """
    rng = random.Random(f"exam/{scene.key}/{subject}")
    kind, box, is_new = "", None, False
    if subject == "caption":
        asked, expected = rng.choice(language.CAPTION_REQUESTS), captions(scene)
        prompt = tasks.caption("")
        is_new = any(_is_new_pair(thing.shape, thing.colour) for thing in scene.things)
    elif subject == "locate":
        if not scene.things:
            raise ValueError(f"{scene.key} holds no shape: there is nothing to locate")
        thing = rng.choice(scene.things)
        phrase = language.phrase(scene, thing, rng)
        asked, expected = rng.choice(language.LOCATE_REQUESTS).format(phrase), ()
        prompt, box = tasks.ref_grounding(phrase, []), thing_box(scene, thing)
        is_new = _is_new_pair(thing.shape, thing.colour)
    else:
        question = _question(subject, scene, rng)
        kind, asked, expected = question.kind, question.text, (question.answer,)
        write = tasks.ocr_vqa if subject == "read" else tasks.vqa
        prompt = write(question.text, "")
        is_new = _asks_for_new(question, scene)
    tokens = _prompt_ids(prompt, asked, form, tokenizer)
    return Paper(
        subject, form, asked, tokens, scene.image[None], scene, kind, expected, box, is_new
    )


def captions(scene: Scene) -> tuple[str, ...]:
    """Returns every caption of the training language that is right for a scene."""
    found = ["".join(piece.text for piece in language.caption_pieces(scene))]
    if len(scene.things) == 2 and scene.writing is None:
        one, other = scene.things
        link = language.relation(scene, one, other)
        if link is not None:
            found.append(f"{language.describe(one)} {link} {language.describe(other)}")
    return tuple(found)


def _question(subject: Subject, scene: Scene, rng: random.Random) -> language.Question:
    if subject == "question":
        return language.question(scene, "heldout", rng)
    question = language.reading_question(scene, rng)
    if question is None:
        raise ValueError(f"{scene.key} holds no writing: there is nothing to read")
    return question


def _is_new_pair(shape: str, colour: str) -> bool:
    return (shape, colour) in HELD_OUT_PAIRS


def _asks_for_new(question: language.Question, scene: Scene) -> bool:
    if question.kind == "word":
        return question.answer in HELD_OUT_WORDS
    if question.kind == "number":  # every number was drawn in training
        return False
    pairs = {(thing.shape, thing.colour) for thing in scene.things} | named_pairs(question.text)
    return not pairs.isdisjoint(HELD_OUT_PAIRS)


def _prompt_ids(
    prompt: Sequence[tasks.Segment], asked: str, form: Form, tokenizer: Tokenizer
) -> list[int]:
    if form == "chat":
        turn = f"Picture 1: {tasks.PICTURE}\n{asked}"
        return tokenizer.chat_ids([(turn, None)], raw=True)
    return tokenizer.encode_raw(prompt[0].text)


# --- sitting it ---------------------------------------------------------------------------------


def sit(
    vl: "VL", papers: Sequence[Paper], on_progress: Callable[[int], None] = lambda done: None
) -> list[str]:
    """Returns the model's greedy answer to each paper, as text with its tags.

    Papers of one subject go through the model together; `on_progress` hears how many are done.
    """
    limits = [MAX_NEW_TOKENS[paper.subject] for paper in papers]
    return answers_to(vl, papers, limits, on_progress)


# --- marking ------------------------------------------------------------------------------------


def named_pairs(text: str) -> set[tuple[str, str]]:
    """Returns every (shape, colour) that a text names as `red circle`."""
    return {(shape, colour) for colour, shape in _NAMED_PAIR.findall(text.lower())}


def is_right(paper: Paper, answer: str) -> bool:
    """Returns whether an answer is right: its text exactly, ends trimmed, or its first box."""
    return (
        answer.strip() in paper.expected if paper.box is None else overlap(paper, answer) >= HIT_IOU
    )


def overlap(paper: Paper, answer: str) -> float:
    """Returns the IoU of the answer's first box and the thing to locate; 0 where there is none."""
    boxes = [place for place in parse_boxes(answer) if "box" in place]
    return place_iou(boxes[0], {"box": paper.box}) if boxes and paper.box is not None else 0.0


def marks(paper: Paper, answer: str) -> list[Mark]:
    """Returns what an answer earns."""
    right = float(is_right(paper, answer))
    if paper.subject == "caption":
        return [*_caption_marks(paper, answer), Mark("caption: exact", right, paper.is_new)]
    if paper.subject == "locate":
        return [
            Mark(f"locate: IoU at {HIT_IOU}", right, paper.is_new),
            Mark("locate: mean IoU", overlap(paper, answer), paper.is_new),
        ]
    if paper.subject == "question":
        return [
            Mark("question: all", right, paper.is_new),
            Mark(f"question: {paper.kind}", right, paper.is_new),
        ]
    return [
        Mark(f"read: {paper.kind} exact", right, paper.is_new),
        Mark("read: ANLS", anls(answer.strip(), list(paper.expected)), paper.is_new),
    ]


def _caption_marks(paper: Paper, answer: str) -> list[Mark]:
    said = named_pairs(answer)
    shown = {(thing.shape, thing.colour) for thing in paper.scene.things}
    found = [
        Mark("caption: objects named", float(pair in said), _is_new_pair(*pair))
        for pair in sorted(shown)
    ]
    found += [
        Mark("caption: named objects that are there", float(pair in shown), _is_new_pair(*pair))
        for pair in sorted(said)
    ]
    return found


def summarise(papers: Sequence[Paper], answers: Sequence[str]) -> list[Score]:
    """Returns one score a measure, by subject and then by name."""
    pairs = zip(papers, answers, strict=True)
    earned = (mark for paper, answer in pairs for mark in marks(paper, answer))
    return mean_marks(earned, SUBJECTS)


def facts(paper: Paper, answer: str) -> dict[str, Any]:
    """Returns an answer beside what was asked and expected, for a file."""
    return {
        "scene": paper.scene.key,
        "subject": paper.subject,
        "asked": paper.asked,
        "answer": answer,
        "expected": list(paper.expected) if paper.box is None else list(paper.box),
        "is_new": paper.is_new,
    }
