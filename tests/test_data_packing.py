"""Packed rows: nothing lost, nothing cut, nothing shared; and batches from (seed, step) alone."""

import dataclasses
import gc
import itertools
import sys
from subprocess import run

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenvl_jax.config import NO_IMAGE, ConfigError, DataConfig
from qwenvl_jax.data.canvas import Canvases
from qwenvl_jax.data.example import NO_TASK, TASKS, DataError, Example
from qwenvl_jax.data.packing import LOOK_AHEAD, TASK_NUMBERS, fill, fill_rows, pack
from qwenvl_jax.data.pipeline import batches, draw, scene_rows
from qwenvl_jax.data.record import FIELDS
from qwenvl_jax.prompt.tokenizer import Tokenizer, load_tokenizer

NANO = "configs/nano/scenes.tiktoken"
SIDE = 14
TOK = Tokenizer({bytes([byte]): byte for byte in range(256)}, slots=2)
CONFIG = DataConfig(
    source="scenes",
    tasks={"caption": 1.0, "vqa": 2.0, "ref_grounding": 1.0, "text": 0.5, "chat": 1.0},
    length=131,
    max_images=3,
    image_size=56,
    rows=5,
    tokenizer=NANO,
)


def sample(number: int, num_text: int, num_images: int) -> Example:
    """Returns a sample whose tokens and pixels tell its number."""
    ids = [*TOK.image_ids() * num_images, *[number % 256] * num_text]
    images = [np.full((SIDE, SIDE, 3), number % 256, np.uint8)] * num_images
    is_target = np.arange(len(ids)) % 3 == 0
    task = ("a task of its own", *TASKS)[number % (len(TASKS) + 1)]
    return Example(np.array(ids, np.int32), is_target, tuple(images), task, f"row {number}")


sizes_strategy = st.lists(st.tuples(st.integers(1, 17), st.integers(0, 3)), max_size=40)


@settings(max_examples=60, deadline=None)
@given(sizes=sizes_strategy, num_rows=st.integers(1, 7), max_images=st.integers(0, 5))
def test_rows_keep_both_limits_and_lose_nothing(sizes, num_rows, max_images):
    samples = [sample(i, *size) for i, size in enumerate(sizes)]
    length = 23
    rows, refusals = fill_rows(iter(samples), num_rows, length, max_images)
    assert len(rows) == num_rows
    for row in rows:
        assert sum(len(example.ids) for example in row) <= length
        assert sum(len(example.images) for example in row) <= max_images
    taken = [example.key for row in rows for example in row]
    assert len(set(taken)) == len(taken)
    fits = [s.key for s in samples if len(s.ids) <= length and len(s.images) <= max_images]
    assert set(taken) <= set(fits)
    if not rows[-1]:  # rows to spare: every sample is in one
        assert set(taken) == set(fits)
        assert len(refusals) == len(samples) - len(fits)


def test_the_look_ahead_is_all_that_is_dropped():
    stream = (sample(i, 5, 1) for i in itertools.count())
    rows, _ = fill_rows(stream, num_rows=4, length=23, max_images=2)
    drawn = int(next(stream).key.split()[1])
    assert drawn - sum(map(len, rows)) <= LOOK_AHEAD


@settings(max_examples=60, deadline=None)
@given(sizes=sizes_strategy)
def test_a_batch_holds_each_sample_whole_and_apart(sizes):
    samples = [sample(i, *size) for i, size in enumerate(sizes)]
    length, max_images = 31, 4
    rows, _ = fill_rows(iter(samples), 3, length, max_images)
    batch = pack(rows, length, max_images, SIDE, TOK)
    for b, row in enumerate(rows):
        pictures = [image for example in row for image in example.images]
        for number, example in enumerate(row, 1):
            here = np.flatnonzero(batch.segment[b] == number)
            assert np.array_equal(here, np.arange(here[0], here[0] + len(example.ids)))
            assert np.array_equal(batch.tokens[b, here], example.ids)
            assert (batch.task[b, here] == TASK_NUMBERS.get(example.task, NO_TASK)).all()
            assert np.array_equal(batch.position[b, here], np.arange(len(example.ids)))
            assert np.array_equal(batch.targets[b, here[:-1]], example.ids[1:])
            assert np.array_equal(batch.loss_weight[b, here[:-1]], example.is_target[1:])
            assert batch.loss_weight[b, here[-1]] == 0  # its target would be the next sample's
        for i, image in enumerate(pictures):
            assert np.array_equal(batch.images[b, i], image)
            start = batch.image_start[b, i]
            assert batch.tokens[b, start - 1] == TOK.image_start_id
            assert (batch.tokens[b, start : start + TOK.slots] == TOK.image_pad_id).all()
            assert batch.tokens[b, start + TOK.slots] == TOK.image_end_id
        assert (batch.image_start[b, len(pictures) :] == NO_IMAGE).all()
        padding = batch.segment[b] == 0
        assert padding.sum() == length - sum(len(example.ids) for example in row)
        assert (batch.tokens[b, padding] == TOK.endoftext_id).all()
        assert not batch.loss_weight[b, padding].any()
        assert (batch.task[b, padding] == NO_TASK).all()


def test_every_task_of_a_source_has_a_number():
    assert set(FIELDS) < set(TASKS)
    assert len(TASK_NUMBERS) == len(TASKS)


def test_shapes_and_types_are_static():
    full = pack([[sample(1, 5, 2)], []], 29, 3, SIDE, TOK)
    empty = pack([[], []], 29, 3, SIDE, TOK)
    assert [(a.shape, a.dtype) for a in full] == [(a.shape, a.dtype) for a in empty]
    assert full.images.shape == (2, 3, SIDE, SIDE, 3)
    assert full.images.dtype == np.uint8
    assert pack([[sample(1, 5, 0)]], 29, 0, SIDE, TOK).images.shape == (1, 0, SIDE, SIDE, 3)


def test_fill_reports_shares():
    batch = pack([[sample(1, 5, 1), sample(2, 3, 0)], [sample(3, 1, 2)]], 18, 2, SIDE, TOK)
    assert fill(batch) == pytest.approx((21 / 36, 3 / 4))


def broken(**changes) -> Example:
    return sample(9, 4, 2)._replace(**changes)


@pytest.mark.parametrize(
    "example",
    [
        broken(images=sample(9, 4, 1).images),
        broken(ids=sample(9, 4, 2).ids[:6]),  # cut inside the second picture
        broken(ids=sample(9, 4, 2).ids[1:]),
        broken(ids=np.delete(sample(9, 4, 2).ids, 2)),  # one slot lost
        broken(ids=np.insert(sample(9, 4, 2).ids, 9, TOK.image_pad_id)),  # a slot outside
        broken(ids=np.insert(sample(9, 4, 2).ids, 9, TOK.image_end_id)),
        sample(9, 0, 1)._replace(ids=np.array(TOK.image_ids()[:-1], np.int32)),
    ],
)
def test_pictures_and_slots_that_do_not_match_name_the_row(example):
    size = len(example.ids)
    example = example._replace(is_target=np.zeros(size, bool))
    with pytest.raises(DataError, match="row 9 has pictures and slots that do not match"):
        pack([[example]], 31, 3, SIDE, TOK)


def test_a_picture_of_another_form_names_the_row():
    small = (np.zeros((SIDE - 1, SIDE, 3), np.uint8),)
    with pytest.raises(DataError, match=r"row 3 .*uint8 \(13, 14, 3\), expected .*\(14, 14, 3\)"):
        pack([[sample(3, 4, 1)._replace(images=small)]], 31, 3, SIDE, TOK)
    float_image = (np.zeros((SIDE, SIDE, 3), np.float32),)
    with pytest.raises(DataError, match=r"row 3 .*float32"):
        pack([[sample(3, 4, 1)._replace(images=float_image)]], 31, 3, SIDE, TOK)


def test_a_row_that_overflows_is_an_error():
    with pytest.raises(DataError, match="row 2 does not fit"):
        pack([[sample(1, 9, 0), sample(2, 9, 0)]], 17, 3, SIDE, TOK)
    with pytest.raises(DataError, match="row 2 does not fit"):
        pack([[sample(1, 1, 1), sample(2, 1, 1)]], 17, 1, SIDE, TOK)


# --- batches --------------------------------------------------------------------------------------


def same(one, other) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


def test_memory_of_a_canvas_is_used_again_only_when_no_view_is_left():
    canvases = Canvases((2, 3, 4, 4, 3))
    first = canvases.take()
    view = first[1, 2:].reshape(-1)[::2]
    place = address(first)
    first[...] = 7
    del first
    gc.collect()
    second = canvases.take()
    second[...] = 8
    assert address(second) != place
    np.testing.assert_array_equal(view, 7)
    del view
    gc.collect()
    assert address(canvases.take()) == place
    assert second.shape == (2, 3, 4, 4, 3)
    assert second.dtype == np.uint8
    assert second.flags.c_contiguous


def test_a_canvas_without_pictures_is_empty():
    assert Canvases((2, 0, 4, 4, 3)).take().shape == (2, 0, 4, 4, 3)


def test_a_batch_is_a_function_of_seed_and_step():
    stream = list(itertools.islice(batches(CONFIG, seed=3, slots=16), 4))
    resumed = list(itertools.islice(batches(CONFIG, seed=3, first_step=2, slots=16), 2))
    assert same(stream[2], resumed[0])
    assert same(stream[3], resumed[1])
    far = next(batches(CONFIG, seed=3, first_step=1_000_000, slots=16))
    others = [stream[1], far, next(batches(CONFIG, seed=4, slots=16))]
    others.append(next(batches(CONFIG, seed=3, slots=16, split="heldout")))
    assert not any(same(stream[0], other) for other in others)


def test_processes_make_the_same_batches():
    # In a process of its own: grain's workers start from a fresh interpreter.
    script = f"""
import dataclasses, hashlib, itertools, sys
from qwenvl_jax.config import DataConfig
from qwenvl_jax.data.pipeline import batches
if __name__ == "__main__":
    config = {CONFIG!r}
    for workers in (0, 2):
        made = batches(dataclasses.replace(config, num_workers=workers), 5, 1, slots=16)
        digest = hashlib.sha256()
        for batch in itertools.islice(made, 3):
            for array in batch:
                digest.update(array.tobytes())
        print(workers, digest.hexdigest())
    sys.stdout.flush()
"""
    ended = run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True
    )
    (none, one), (two, other) = (line.split() for line in ended.stdout.splitlines())
    assert (none, two) == ("0", "2")
    assert one == other


def test_the_mixture_follows_the_weights():
    tok = load_tokenizer(NANO, 16)
    drawn = [draw(CONFIG, tok, 0, "train", 0, n).task for n in range(800)]
    total = sum(CONFIG.tasks.values())
    for task, weight in CONFIG.tasks.items():
        assert drawn.count(task) / 800 == pytest.approx(weight / total, abs=0.06)


def test_text_source_has_no_pictures():
    config = dataclasses.replace(
        CONFIG, source="text", tasks=dict.fromkeys(TASKS, 1.0), length=257, max_images=0
    )
    batch = next(batches(config, 0, slots=16))
    assert batch.images.size == 0
    assert fill(batch).tokens > 0.8
    assert not np.isin(batch.tokens, load_tokenizer(NANO).image_ids()).any()
    assert batch.loss_weight.sum() > 100


def test_rows_of_the_multitask_mixture_are_mostly_full():
    tasks = {task: 1.0 for task in TASKS if task != "chat"}
    config = dataclasses.replace(CONFIG, tasks=tasks, length=128, rows=16)
    shares = [fill(batch) for batch in itertools.islice(batches(config, 0, slots=16), 3)]
    assert np.mean([share.tokens for share in shares]) > 0.9


def test_samples_longer_than_a_row_are_skipped_with_their_key_until_too_many(caplog):
    tok = load_tokenizer(NANO, 16)
    config = dataclasses.replace(CONFIG, tasks={"caption": 40.0, "chat": 1.0}, length=64, rows=32)
    with caplog.at_level("WARNING"):
        for step in range(4):
            assert len(scene_rows(config, tok, 0, "train", step)) == 32
    assert any("/chat does not fit into a row" in record.message for record in caplog.records)
    with pytest.raises(DataError, match=r"step 0 refused \d+ samples.*scenes/train/\d+/chat"):
        scene_rows(dataclasses.replace(config, tasks={"chat": 1.0}), tok, 0, "train", 0)
    with pytest.raises(DataError, match="step 0 refused 1,000 samples for 0 that it took"):
        scene_rows(dataclasses.replace(config, length=20), tok, 0, "train", 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": "scene"}, r"data\.source is unknown: got 'scene'"),
        ({"tasks": {"captoin": 1.0}}, "did you mean 'caption'"),
        ({"max_images": 0}, "room for a picture"),
        ({"length": 17}, "room for a picture"),
    ],
)
def test_settings_that_cannot_be_served(changes, message):
    with pytest.raises(ConfigError, match=message):
        batches(dataclasses.replace(CONFIG, **changes), 0, slots=16)


def test_importing_the_room_starts_no_jax():
    rooms = "qwenvl_jax.data.pipeline, qwenvl_jax.data.vocabulary"
    script = f"import {rooms}, sys; assert 'jax' not in sys.modules"
    run([sys.executable, "-c", script], check=True, timeout=60)
