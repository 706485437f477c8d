"""The kinds of problems that a row can have, and one of them as it is found."""

from typing import NamedTuple

# What each kind means, and how to mend it; in the order of a report.
KINDS = {
    "file": "the file as a whole; rows before the place are checked",
    "form": 'a row is not {"id": ..., "conversations": [{"from": ..., "value": ...}, ...]}',
    "foreign_format": "written for another model; docs/data.md has a few lines that convert it",
    "role": 'a turn is from somebody else than "user" and "assistant"',
    "order": "turns do not go user, assistant, user, assistant",
    "empty": "a question, an answer or a phrase without words",
    "tag": "a tag is not closed, not opened, or stands inside another",
    "box_malformed": "a place is not written as (x1,y1),(x2,y2), a quad with four points",
    "box_outside": "a coordinate is not in 0..999, thousandths of the picture's width or height",
    "box_reversed": "a box's second corner is left of or above its first",
    "box_empty": "a place has no area",
    "box_without_picture": "a place is given where no picture has been shown",
    "special_token": "control tokens of the model stand in the text",
    "picture_number": "pictures are not marked 'Picture 1: ', 'Picture 2: ', ... through the row",
    "picture_count": "the text speaks of a picture that the row does not have",
    "picture_address": "a picture is not a file; download it, nothing is fetched in training",
    "picture_missing": "a picture's file is not there",
    "picture_unreadable": "a picture's file cannot be decoded",
    "too_long": "a row has more tokens than fit, so its last turns would go",
    "cut_picture": "a row has more tokens than fit, and a plain cut would go through a picture",
    "duplicate_id": "rows have the same id",
}


class Fault(NamedTuple):
    """What is wrong with a text, not yet where."""

    kind: str
    detail: str


class Problem(NamedTuple):
    """One thing that is wrong with one row. `turn` counts from 0, as `row` does."""

    kind: str
    row: int | None
    line: int | None
    id: str | None
    turn: int | None
    detail: str
