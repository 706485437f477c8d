"""The sample formats: the seven of the multi-task stage and plain text as segments, and chat.

A segment is a run of text that wholly carries loss or wholly does not. Segments are tokenised one
by one, so the border of the loss falls between two tokens whatever the vocabulary. Text here is
trusted: tags and special tokens in it are live. `picture` is what stands for the picture.

Source: paper Box B.1; for chat the released `finetune.py`. Where print leaves spaces open
they follow the released model's own output: a target starts with a space, and nothing follows a
prompt's colon.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from qwenvl_jax.data.example import DataError, Example, Picture
from qwenvl_jax.data.record import Record, check_record
from qwenvl_jax.prompt.boxes import format_box, format_quad
from qwenvl_jax.prompt.chat import (
    DEFAULT_SYSTEM,
    ChatError,
    LossMask,
    Message,
    messages_from_conversations,
    render_example,
)
from qwenvl_jax.prompt.tokenizer import RELEASED_CHAT_TAGS, Tokenizer

EOS = "<|endoftext|>"
PICTURE = "<img></img>"  # the tokenizer writes the slots; what stands inside does not matter

_LANGUAGES = {"en": "English", "zh": "Chinese"}

Box = Sequence[int]
Quad = Sequence[Sequence[int]]


class Segment(NamedTuple):
    text: str
    is_target: bool


class Phrase(NamedTuple):
    """A run of a grounded caption with the boxes of what it names; no boxes: plain words."""

    text: str
    boxes: tuple[Box, ...] = ()


def caption(text: str, picture: str = PICTURE, language: str = "en") -> list[Segment]:
    """Raises: DataError for a language other than "en" and "zh"."""
    if language not in _LANGUAGES:
        raise DataError(f"a caption's language must be one of {[*_LANGUAGES]}: got {language!r}")
    return [
        Segment(f"{picture}Generate the caption in {_LANGUAGES[language]}:", False),
        Segment(f" {text}{EOS}", True),
    ]


def vqa(question: str, answer: str, picture: str = PICTURE) -> list[Segment]:
    return [
        Segment(f"{picture} {question} Answer:", False),
        Segment(f" {answer}{EOS}", True),
    ]


def ocr_vqa(question: str, answer: str, picture: str = PICTURE) -> list[Segment]:
    """As `vqa`, but the end carries no loss: so the paper prints it, perhaps by a slip."""
    return [
        Segment(f"{picture} {question} Answer:", False),
        Segment(f" {answer}", True),
        Segment(EOS, False),
    ]


def grounded_caption(phrases: Sequence[Phrase], picture: str = PICTURE) -> list[Segment]:
    """Returns a caption whose named things are followed by their boxes.

    The texts of `phrases` join to the caption; a phrase's leading space goes inside its `<ref>`.
    """
    return [
        Segment(f"{picture}Generate the caption in English with grounding:", False),
        Segment(grounded_text(phrases, start=" ") + EOS, True),
    ]


def ref_grounding(phrase: str, boxes: Sequence[Box], picture: str = PICTURE) -> list[Segment]:
    return [
        Segment(f"{picture}<ref>{phrase}</ref>", False),
        Segment("".join(map(format_box, boxes)) + EOS, True),
    ]


def grounded_captioning(box: Box, text: str, picture: str = PICTURE) -> list[Segment]:
    return [
        Segment(f"{picture}<ref>This</ref>{format_box(box)} is", False),
        Segment(f" {text}{EOS}", True),
    ]


def ocr(lines: Sequence[tuple[str, Quad]], picture: str = PICTURE) -> list[Segment]:
    read = "".join(f"<ref>{text}</ref>{format_quad(quad)}" for text, quad in lines)
    return [
        Segment(f"{picture}OCR with grounding:", False),
        Segment(f" {read}{EOS}", True),
    ]


def cell_map(words: Sequence[tuple[str, str]], picture: str = PICTURE) -> list[Segment]:
    """Returns the shapes of all cells of a picture, then their colours (ours, not the paper's).

    Where each word is one token, the slot that answers a cell lies equally far before each word of
    a list: the shortest way there is from a loss to the tower.
    """
    shapes, colours = (" ".join(column) for column in zip(*words, strict=True))
    return [
        Segment(f"{picture}Shapes:", False),
        Segment(f" {shapes}", True),
        Segment(" Colours:", False),
        Segment(f" {colours}{EOS}", True),
    ]


def cell_characters(title: str, firsts: str, seconds: str, picture: str = PICTURE) -> list[Segment]:
    """Returns the first and then the second character in all cells, as `cell_map` (ours).

    The title says of what: `Letters`, or `Left` for the left edge's coordinate.
    """
    return [
        Segment(f"{picture}{title}:", False),
        Segment(firsts, True),
        Segment(" Next:", False),
        Segment(f"{seconds}{EOS}", True),
    ]


def plain_text(text: str) -> list[Segment]:
    return [Segment(f"{text}{EOS}", True)]


def grounded_text(phrases: Sequence[Phrase], start: str = "") -> str:
    """Returns the phrases joined, each that has boxes between `<ref>` tags and followed by them."""
    parts = []
    for phrase in phrases:
        text, start = start + phrase.text, ""
        boxes = "".join(map(format_box, phrase.boxes))
        parts.append(f"<ref>{text}</ref>{boxes}" if phrase.boxes else text)
    return "".join(parts)


def example_of(record: Record, tokenizer: Tokenizer, mask: LossMask = "released") -> Example:
    """Returns the tokenised sample of a row; its pictures stay as they are, not yet decoded.

    `mask` is that of chat rows.

    Raises: DataError where the row does not fit its task.
    """
    check_record(record)
    if record.task == "chat":
        system = record.fields.get("system", DEFAULT_SYSTEM)
        try:
            messages = messages_from_conversations(record.fields["conversations"], system)
            rendered = render_example(tokenizer, messages, mask)
        except ChatError as error:
            raise DataError(f"row {record.key}: {error}") from error
        ids, is_target = rendered.ids, rendered.is_target
        return _example(ids, is_target, record.images, tokenizer, "chat", record.key)
    picture = PICTURE if record.images else ""
    segments = _segments(record, picture)
    return to_example(segments, record.images, tokenizer, record.task, record.key)


def _segments(record: Record, picture: str) -> list[Segment]:
    fields = record.fields
    try:
        match record.task:
            case "caption":
                return caption(fields["text"], picture, fields["language"])
            case "vqa":
                return vqa(fields["question"], fields["answer"], picture)
            case "ocr_vqa":
                return ocr_vqa(fields["question"], fields["answer"], picture)
            case "grounded_caption":
                phrases = [Phrase(text, tuple(boxes)) for text, boxes in fields["phrases"]]
                return grounded_caption(phrases, picture)
            case "ref_grounding":
                return ref_grounding(fields["phrase"], fields["boxes"], picture)
            case "grounded_captioning":
                return grounded_captioning(fields["box"], fields["text"], picture)
            case "ocr":
                return ocr([(text, quad) for text, quad in fields["lines"]], picture)
            case _:
                return plain_text(fields["text"])
    except (TypeError, ValueError) as error:
        raise DataError(
            f"row {record.key} of task {record.task} has a field of another form: {error}; "
            "data/record.py lists the forms"
        ) from error


def to_example(
    segments: Sequence[Segment],
    images: Sequence[Picture],
    tokenizer: Tokenizer,
    task: str,
    key: str,
) -> Example:
    """Returns the tokenised sample.

    Raises: DataError where the text does not mark as many pictures as there are.
    """
    ids: list[int] = []
    is_target: list[bool] = []
    for segment in segments:
        piece = tokenizer.encode_raw(segment.text)
        ids += piece
        is_target += [segment.is_target] * len(piece)
    return _example(ids, is_target, images, tokenizer, task, key)


def chat_example(
    turns: Sequence[tuple[str, str]],
    images: Sequence[Picture],
    tokenizer: Tokenizer,
    key: str,
) -> Example:
    """Returns a dialogue in ChatML with the released mask, under the default system message.

    Questions mark their pictures as `Picture 1: <img></img>` and a line break.

    Raises: as `to_example`.
    """
    messages = [Message("system", DEFAULT_SYSTEM)]
    for question, answer in turns:
        messages.append(Message("user", question, RELEASED_CHAT_TAGS))
        messages.append(Message("assistant", answer, RELEASED_CHAT_TAGS))
    rendered = render_example(tokenizer, messages)
    return _example(rendered.ids, rendered.is_target, images, tokenizer, "chat", key)


def _example(
    ids: list[int],
    is_target: list[bool],
    images: Sequence[Picture],
    tokenizer: Tokenizer,
    task: str,
    key: str,
) -> Example:
    marked = ids.count(tokenizer.image_start_id)
    if marked != len(images):
        raise DataError(
            f"sample {key} marks {marked} pictures in its text: got {len(images)} pictures; "
            "give one <img></img> for each, in reading order"
        )
    return Example(
        ids=np.array(ids, np.int32),
        is_target=np.array(is_target, bool),
        images=tuple(images),
        task=task,
        key=key,
    )
