"""Rows of any source: their bytes, and the samples that tasks make of them."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import qwenvl_jax
from qwenvl_jax.data import tasks
from qwenvl_jax.data.example import DataError
from qwenvl_jax.data.packing import pixels
from qwenvl_jax.data.record import FIELDS, Record, decode_record, encode_record
from qwenvl_jax.prompt.tokenizer import Tokenizer, load_tokenizer

NANO = Path(qwenvl_jax.__file__).parent / "assets" / "nano"

BOX = [1, 20, 300, 999]
QUAD = [[1, 2], [30, 4], [30, 50], [1, 50]]
ROWS = {
    "caption": {"text": "a red star", "language": "en"},
    "vqa": {"question": "What?", "answer": "red"},
    "ocr_vqa": {"question": "What?", "answer": "red"},
    "grounded_caption": {"phrases": [["a ", []], ["star", [BOX]]]},
    "ref_grounding": {"phrase": "star", "boxes": [BOX]},
    "grounded_captioning": {"box": BOX, "text": "a star"},
    "ocr": {"lines": [["CAT", QUAD]]},
    "text": {"text": "a red star"},
    "chat": {"conversations": [{"from": "user", "value": "Picture 1: <img>a</img>\nWhat?"}]},
    "letters": {"firsts": "C.A.", "seconds": "...T"},
}


@pytest.fixture(scope="module")
def tok() -> Tokenizer:
    return load_tokenizer(NANO, slots=4)


def png(side: int = 9) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (side, side), (200, 30, 40)).save(data, "PNG")
    return data.getvalue()


@pytest.mark.parametrize("task", FIELDS)
def test_every_task_goes_through_bytes_to_a_sample(task, tok):
    row = Record(f"rows/{task}", task, ROWS[task], () if task == "text" else (png(),))
    read = decode_record(encode_record(row), "here")
    assert read == row
    example = tasks.example_of(read, tok)
    assert example.is_target.any()
    assert len(example.images) == len(row.images)
    assert (example.ids == tok.image_start_id).sum() == len(row.images)


def test_picture_is_decoded_after_packing(tok):
    example = tasks.example_of(Record("r", "caption", ROWS["caption"], (png(9),)), tok)
    square = pixels(example, example.images[0], 14)
    assert square.shape == (14, 14, 3)
    assert square.dtype == np.uint8
    assert np.unique(square.reshape(-1, 3), axis=0).tolist() == [[200, 30, 40]]


def test_picture_that_cannot_be_read_is_told_with_its_row(tok):
    row = Record("shard-3/17", "caption", ROWS["caption"], (b"<html>",))
    example = tasks.example_of(row, tok)
    with pytest.raises(DataError, match=r"shard-3/17 has a picture that cannot be read"):
        pixels(example, example.images[0], 14)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (Record("k", "captoin", {}), "unknown task: got 'captoin'"),
        (Record("k", "vqa", {"question": "?"}), "lacks answer"),
        (Record("k", "grounded_caption", {"phrases": ["a"]}), "another form"),
        (Record("k", "caption", {"text": "a", "language": "fr"}), "language"),
        (Record("k", "chat", {"conversations": [{"from": "gpt"}]}), "row k: conversation turn 0"),
        (Record("k", "chat", ROWS["chat"]), "marks 1 picture in"),
    ],
)
def test_wrong_rows_are_named(row, message, tok):
    with pytest.raises(DataError, match=message):
        tasks.example_of(row, tok)


def test_damaged_bytes_are_told():
    data = encode_record(Record("k", "text", {"text": "hello"}))
    with pytest.raises(DataError, match="row shard/3 is damaged"):
        decode_record(data[:-2], "shard/3")
