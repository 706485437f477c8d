"""All problems of one row of a fine-tuning file, and of a run of rows."""

import functools
import unicodedata
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from qwenvl_jax.data.example import DataError
from qwenvl_jax.data.lint.problems import Fault, Problem
from qwenvl_jax.data.lint.text import picture_faults, spans_of, text_faults
from qwenvl_jax.data.record import Record
from qwenvl_jax.data.sources.conversations import Conversations, is_address
from qwenvl_jax.data.turns import fit_turns
from qwenvl_jax.image.decode import ImageError, format_of
from qwenvl_jax.image.load import load_image
from qwenvl_jax.prompt.chat import DEFAULT_SYSTEM, messages_from_conversations, render_example
from qwenvl_jax.prompt.tokenizer import Tokenizer
from qwenvl_jax.words import counted

_ROLES = ("user", "assistant")
_ROLE_HINTS = {"human": "user", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant"}
_CACHED_PICTURES = 1 << 16  # many rows ask about one picture
_TURN_BYTES = 24  # more than the tokens that ChatML puts around a turn


class Checks(NamedTuple):
    """What is looked at besides the text. No tokenizer: lengths are not."""

    tokenizer: Tokenizer | None = None
    length: int = 2048
    decode: bool = True  # whole pictures; else only whether a file is there and starts like one


class Checked(NamedTuple):
    """What a run of rows showed: N rows."""

    problems: list[Problem]
    id_hashes: np.ndarray  # uint64 [N]; 0 for a row without an id


def check_rows(source: Conversations, checks: Checks, rows: range) -> Checked:
    """Returns the problems of some rows, in order, and their ids' hashes for `duplicate_ids`."""
    problems: list[Problem] = []
    hashes = np.zeros(len(rows), np.uint64)
    for place, index in enumerate(rows):
        name = None
        try:
            row = source.row(index)
        except DataError as error:
            faults = [(None, Fault("form", _without_key(error)))]
        else:
            if "id" in row:
                name = str(row["id"])
                hashes[place] = id_hash(name)
            faults = list(row_faults(source, row, checks))
        line = int(source.rows.lines[index])
        problems += [
            Problem(fault.kind, index, line, name, turn, fault.detail) for turn, fault in faults
        ]
    return Checked(problems, hashes)


def id_hash(name: str) -> int:
    """Returns 64 bits of an id, never 0."""
    data = name.encode("utf-8", "surrogatepass")
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "little") or 1


def duplicate_ids(source: Conversations, id_hashes_N: np.ndarray) -> Iterator[Problem]:
    """Yields a problem for each row whose id an earlier row has."""
    order = np.argsort(id_hashes_N, kind="stable")
    ordered = id_hashes_N[order]
    is_again = np.zeros(len(order), bool)
    is_again[1:] = (ordered[1:] == ordered[:-1]) & (ordered[1:] != 0)
    first = np.maximum.accumulate(np.where(is_again, 0, np.arange(len(order))))
    firsts = dict(zip(order[is_again].tolist(), order[first[is_again]].tolist(), strict=True))
    for row in sorted(firsts):
        name = str(source.row(row)["id"])
        line = int(source.rows.lines[row])
        detail = f"{name[:80]!r} is also the id of row {firsts[row]}"
        yield Problem("duplicate_id", row, line, name, None, detail)


def row_faults(
    source: Conversations, row: dict[str, Any], checks: Checks
) -> Iterator[tuple[int | None, Fault]]:
    """Yields what is wrong with a row, each fault with its turn where it has one."""
    turns = row.get("conversations")
    if not isinstance(turns, list) or not turns or not all(map(_is_turn, turns)):
        yield None, Fault("form", _wrong_form(row, turns))
        return
    if "system" in row and not isinstance(row["system"], str):
        yield None, Fault("form", f"system is {row['system']!r}, expected text")
        return
    roles, values = [turn["from"] for turn in turns], [turn["value"] for turn in turns]
    yield from _role_faults(roles)
    for turn, value in enumerate(values):
        yield from ((turn, fault) for fault in text_faults(value))
    yield from picture_faults(values)
    paths = [
        (turn, span.body)
        for turn, value in enumerate(values)
        for span in spans_of(value)
        if span.kind == "image"
    ]
    if "image" in row and not paths:
        detail = f"the key 'image' is not read: got {str(row['image'])[:80]!r}"
        yield None, Fault("foreign_format", detail)
    for turn, path in paths:
        yield from ((turn, fault) for fault in _file_faults(source, path, checks.decode))
    # Where no sample can be made of a row, that is told above, and it has no length.
    is_open = any(value.rfind("<img>") > value.rfind("</img>") for value in values)
    is_swapped = roles[0] == "assistant" and "<img>" in values[0]
    has_sample = set(roles) <= set(_ROLES) and "user" in roles and not is_open and not is_swapped
    if checks.tokenizer is not None and has_sample:
        system = row.get("system", DEFAULT_SYSTEM)
        images = tuple(Path(path) for _, path in paths)
        record = Record("", "chat", {"conversations": turns, "system": system}, images)
        yield from ((None, fault) for fault in _length_faults(record, checks.tokenizer, checks))


def _is_turn(turn: object) -> bool:
    texts = (turn.get("from"), turn.get("value")) if isinstance(turn, dict) else (None,)
    return all(isinstance(text, str) for text in texts)


def _wrong_form(row: dict[str, Any], turns: object) -> str:
    if "conversations" not in row:
        return f"no 'conversations': got keys {', '.join(map(repr, row)) or 'none'}"
    if not isinstance(turns, list) or not turns:
        return f"'conversations' is {str(turns)[:60]!r}, expected a list of turns"
    wrong = next(i for i, turn in enumerate(turns) if not _is_turn(turn))
    return f"turn {wrong} is {str(turns[wrong])[:80]!r}, expected from and value as texts"


def _role_faults(roles: list[str]) -> Iterator[tuple[int | None, Fault]]:
    for turn, role in enumerate(roles):
        if role not in _ROLES:
            hint = _ROLE_HINTS.get(role.lower())
            expected = f"expected {hint!r}" if hint else 'expected "user" or "assistant"'
            yield turn, Fault("role", f"from {role[:40]!r}, {expected}")
    known = [_ROLE_HINTS.get(role.lower(), role) for role in roles]
    if known[0] == "assistant":
        yield 0, Fault("order", "starts with an answer, which training drops")
    for turn in range(1, len(known)):
        if known[turn] == known[turn - 1] and known[turn] in _ROLES:
            yield turn, Fault("order", f"a second turn of the {known[turn]} in a row")
    if known[-1] == "user":
        yield len(known) - 1, Fault("order", "ends with a question that has no answer")


def _file_faults(source: Conversations, path: str, decode: bool) -> Iterable[Fault]:
    if is_address(path):
        return [Fault("picture_address", path[:80])]
    try:
        place = source.picture(path, "")
    except DataError:
        return [Fault("empty", f"no path between <img> and </img>: got {path[:80]!r}")]
    kind, detail = _picture_fault(place, decode)
    return [Fault(kind, detail)] if kind else []


@functools.lru_cache(_CACHED_PICTURES)
def _picture_fault(path: Path, decode: bool) -> tuple[str, str]:
    """Returns the kind and the detail of what is wrong with a picture's file; empty for nothing."""
    try:
        if not path.is_file():
            return "picture_missing", f"{path}{', which is a folder' if path.is_dir() else ''}"
        if decode:
            load_image(path)
        else:
            with path.open("rb") as file:
                head = file.read(16)
            if format_of(head) is None:
                return "picture_unreadable", f"{path} does not start like a picture"
    except ImageError as error:
        return "picture_unreadable", str(error)
    except OSError as error:
        return "picture_unreadable", f"{path}: {error.strerror}"
    return "", ""


def _length_faults(record: Record, tokenizer: Tokenizer, checks: Checks) -> Iterator[Fault]:
    """Yields one fault where a row has more ids than fit."""
    turns = record.fields["conversations"]
    values = [turn["value"] for turn in turns]
    # Each token is at least one byte of the text once it is normalised, so most rows need no count.
    if all(unicodedata.is_normalized("NFC", value) for value in values):
        texts = [*values, record.fields["system"]]
        most = sum(len(text.encode("utf-8", "replace")) + _TURN_BYTES for text in texts)
        if most + (tokenizer.slots + 2) * len(record.images) <= checks.length:
            return
    messages = messages_from_conversations(turns, record.fields["system"])
    ids = render_example(tokenizer, messages).ids
    if len(ids) <= checks.length:
        return
    try:
        kept = len(fit_turns(record, tokenizer, checks.length).fields["conversations"])
        outcome = f"{kept} of {counted(len(turns), 'turn')} fit whole"
    except DataError:
        outcome = "not even the first question and answer fit"
    detail = f"{len(ids)} tokens, and {checks.length} fit: {outcome}"
    cut = ids[checks.length]
    is_in_picture = cut in (tokenizer.image_pad_id, tokenizer.image_end_id)
    yield Fault("cut_picture" if is_in_picture else "too_long", detail)


def _without_key(error: DataError) -> str:
    """Returns an error of a row without the row's name, which is told apart."""
    return str(error).partition(") ")[2] or str(error)
