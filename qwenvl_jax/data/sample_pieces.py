"""A sample's ids as pieces that a person can read: text, special tokens, whole pictures."""

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

from qwenvl_jax.data.example import Example
from qwenvl_jax.prompt.boxes import parse_boxes
from qwenvl_jax.prompt.tokenizer import Tokenizer

Kind = Literal["text", "special", "picture"]


class Piece(NamedTuple):
    """Tokens that are read together: mostly one, several where a character's bytes are split."""

    kind: Kind
    text: str  # of a picture: empty
    ids: tuple[int, ...]
    is_target: bool


def pieces_of(example: Example, tokenizer: Tokenizer) -> Iterator[Piece]:
    """Yields the pieces of a sample in order; their ids join to the sample's.

    A picture is `<img>`, its slots and `</img>` as one piece.
    """
    names = {token: name for name, token in tokenizer.special_ids.items()}
    stream = tokenizer.stream()
    held: list[int] = []  # ids of bytes that are not a whole character yet
    is_held_target = False
    ids, targets = example.ids.tolist(), example.is_target.tolist()
    i = 0
    while i < len(ids):
        token = ids[i]
        if token not in names:
            held.append(token)
            is_held_target = is_held_target or targets[i]
            text = stream.push(token)
            if text or not _continues(ids, i, names):
                yield Piece(
                    "text",
                    text + (stream.finish() if not text else ""),
                    tuple(held),
                    is_held_target,
                )
                held, is_held_target = [], False
            i += 1
            continue
        end = _picture_end(ids, i, tokenizer)
        kind: Kind = "picture" if end > i + 1 else "special"
        name = "" if kind == "picture" else names[token]
        yield Piece(kind, name, tuple(ids[i:end]), any(targets[i:end]))
        i = end


def _continues(ids: list[int], i: int, names: dict[int, str]) -> bool:
    return i + 1 < len(ids) and ids[i + 1] not in names


def _picture_end(ids: list[int], start: int, tokenizer: Tokenizer) -> int:
    """Returns one past the picture that starts there; one past the token where none does."""
    end = start + tokenizer.slots + 2
    is_picture = ids[start : start + 2] == [tokenizer.image_start_id, tokenizer.image_pad_id]
    is_whole = end <= len(ids) and ids[end - 1] == tokenizer.image_end_id
    return end if is_picture and is_whole else start + 1


def places_by_picture(pieces: list[Piece], num_pictures: int) -> list[list[dict[str, Any]]]:
    """Returns the boxes and quads to draw on each picture, as `parse_boxes` gives them.

    A place belongs to the last picture before it; those before any picture are left out, and so are
    all where there is no picture.
    """
    texts = [""] * (num_pictures + 1)
    number = 0
    for piece in pieces:
        if piece.kind == "picture":
            number = min(number + 1, num_pictures)
        else:
            texts[number] += piece.text
    return [parse_boxes(text, inherit_ref=True) for text in texts[1:]]
