"""What is checked and laid out on the host before anything compiles."""

import dataclasses
import inspect

import numpy as np
import pytest
from golden_model import GOLDEN

from qwenvl_jax.config import NO_IMAGE
from qwenvl_jax.conversion.config import model_config_from_released
from qwenvl_jax.conversion.reader import read_json
from qwenvl_jax.inference import prompts
from qwenvl_jax.inference.cache import bucket, prompt_bucket, row_bucket
from qwenvl_jax.inference.errors import InputError
from qwenvl_jax.inference.pictures import MAX_AT_ONCE, PictureFeatures

IMG, END, PAD = 420, 421, 422
SPAN = [IMG, *[PAD] * 16, END]


def config():
    return model_config_from_released(read_json(GOLDEN / "tiny.config.json"))


def find(ids, num_images):
    return prompts.find_pictures(np.array(ids), num_images, config(), "row 3").tolist()


def test_buckets_hold_what_they_are_asked_for():
    for smallest in (1, 8, 64):
        sizes = [bucket(count, smallest) for count in range(1, 700)]
        assert all(size >= count for count, size in enumerate(sizes, start=1))
        assert all(size <= max(smallest, 2 * count) for count, size in enumerate(sizes, start=1))
        assert sizes == sorted(sizes)
    assert sorted({bucket(count, 64) for count in range(1, 500)}) == [
        64,
        96,
        128,
        192,
        256,
        384,
        512,
    ]
    assert [bucket(count, 1) for count in range(1, 8)] == [1, 2, 3, 4, 6, 6, 8]
    assert [row_bucket(rows) for rows in (1, 2, 3, 5, 8)] == [1, 2, 4, 8, 8]


def test_a_prompt_bucket_stays_inside_the_context():
    short = dataclasses.replace(
        config(), decoder=dataclasses.replace(config().decoder, max_positions=150)
    )
    assert prompt_bucket(97, short) == 128
    assert prompt_bucket(140, short) == 150
    assert (
        prompt_bucket(
            20,
            dataclasses.replace(
                short, decoder=dataclasses.replace(short.decoder, max_positions=50)
            ),
        )
        == 50
    )


def test_pictures_are_found_in_reading_order():
    assert find([5, *SPAN, 6, *SPAN], 2) == [2, 21]
    assert find([5, 6], 0) == []


def test_a_lone_image_tag_is_ordinary_text():
    assert find([5, IMG, 6, END, *SPAN, IMG], 1) == [5]


@pytest.mark.parametrize(
    ("ids", "num_images", "message"),
    [
        ([*SPAN], 0, "1 picture span in .* positions .0., and 0 pictures given"),
        ([5, 6], 1, "0 picture spans .* and 1 picture given"),
        ([5, IMG, *[PAD] * 15, END], 1, "position 1 must be .* 16 <imgpad>.* got 15 <imgpad>"),
        ([IMG, *[PAD] * 16], 1, "position 0 .* then the end"),
        ([IMG, *[PAD] * 16, 9], 1, "position 0 .* then id 9"),
        ([5, *[PAD] * 16, END], 1, "position 1 does not follow <img>"),
        ([IMG, *b"a.png", *[PAD] * 11, END], 1, "position 0 must hold .* got id 97; paths inside"),
        ([IMG, *[104] * 16, END], 1, "position 0 must hold <imgpad>.* got id 104; paths inside"),
    ],
)
def test_misaligned_pictures_are_named(ids, num_images, message):
    with pytest.raises(InputError, match=f"^row 3: .*{message}"):
        find(ids, num_images)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([], "non-empty list of ids"),
        ([[1, 2]], "got shape .1, 2."),
        ([[1, 2], [3]], "must be one list of ids: got lists of several lengths"),
        ([1.5], "float64"),
        ([4, 448], "got 448 at position 1"),
        ([-1], "got -1 at position 0"),
    ],
)
def test_wrong_ids_are_named(tokens, message):
    with pytest.raises(InputError, match=f"^row 3: .*{message}"):
        prompts.check_ids(tokens, config(), "row 3")


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((1, 28, 28, 3), np.float32), "must be uint8: got float32"),
        (np.zeros((28, 28, 3), np.uint8), r"wrong shape: got \(28, 28, 3\)"),
        (np.zeros((1, 3, 28, 28), np.uint8), "wrong shape"),
        (np.zeros((1, 28, 42, 3), np.uint8), "wrong size: got 28 x 42"),
        (np.zeros((1, 30, 30, 3), np.uint8), "got 30 x 30; .* multiple of 14"),
        ([np.zeros((s, s, 3), np.uint8) for s in (28, 42)], "must have the same size: got .*42"),
    ],
    ids=str,
)
def test_wrong_pictures_are_named(images, message):
    with pytest.raises(InputError, match=f"^row 3: .*{message}"):
        prompts.check_images(images, config(), "row 3")


def test_the_context_limit_names_all_numbers():
    prompts.check_length(8000, 192, config(), "row 3")
    with pytest.raises(InputError, match=r"8,192 .* got 8,000 prompt .* 193 new .* 8,193"):
        prompts.check_length(8000, 193, config(), "row 3")


def test_a_batch_is_right_padded_with_unused_pictures_marked():
    feature = np.random.default_rng(0).normal(size=(2, 16, 256)).astype(np.float32)
    none = feature[:0]
    batch = prompts.lay_out(
        [np.array([5, 6, 7], np.int32), np.array([8], np.int32)],
        [np.array([1, 2], np.int32), np.array([], np.int32)],
        [feature, none],
        config(),
        rows=4,
    )
    assert batch.tokens_BL.shape == (4, 64)
    assert batch.tokens_BL[:2, :4].tolist() == [[5, 6, 7, 0], [8, 0, 0, 0]]
    assert batch.length_B.tolist() == batch.ntk_length_B.tolist() == [3, 1, 0, 0]
    assert batch.image_start_BI.tolist() == [[1, 2], *[[NO_IMAGE] * 2] * 3]
    np.testing.assert_array_equal(batch.visual_BIQD[0], feature)


def test_reference_layout_counts_from_the_left_padding():
    none = np.zeros((0, 16, 256), np.float32)
    ids = [np.zeros(length, np.int32) for length in (70, 9)]
    starts = [np.array([], np.int32)] * 2
    batch = prompts.lay_out(ids, starts, [none] * 2, config(), rows=2, long_context="reference")
    assert batch.ntk_length_B.tolist() == [70, 70]
    assert batch.position_start_B.tolist() == [0, 61]


def test_an_unknown_long_context_is_named():
    none = np.zeros((0, 16, 256), np.float32)
    unchecked = inspect.unwrap(prompts.lay_out)  # outside the tests no annotation is checked
    with pytest.raises(InputError, match=r"one of \('row', 'reference'\): got 'left'"):
        unchecked(
            [np.array([5], np.int32)],
            [np.array([], np.int32)],
            [none],
            config(),
            rows=1,
            long_context="left",
        )


def test_stop_tokens_are_ids_of_the_model():
    assert prompts.check_stop_tokens([0, 447], config()) == (0, 447)
    for wrong in (-1, 448, 2**31):
        with pytest.raises(InputError, match=rf"stop_tokens must lie in 0 \.\. 447: got {wrong}"):
            prompts.check_stop_tokens([3, wrong], config())


def test_each_different_picture_is_encoded_once():
    calls = []

    def encode(image_IYXC):
        calls.append(len(image_IYXC))
        return image_IYXC.reshape(len(image_IYXC), -1)[:, :6].reshape(-1, 2, 3).astype(np.float32)

    features = PictureFeatures(encode, (2, 3), max_kept=3)
    a, b, c, d = np.random.default_rng(1).integers(0, 256, (4, 14, 14, 3), np.uint8)
    out = features(np.stack([a, b, a]))
    assert calls == [2]
    np.testing.assert_array_equal(out, encode(np.stack([a, b, a])))
    calls.clear()
    features(np.stack([b, c]))
    assert calls == [1]
    features(np.stack([d]))  # four pictures: a, the longest unused, goes
    features(np.stack([b, c, d]))
    assert calls == [1, 1]
    features(np.stack([a]))
    assert calls == [1, 1, 1]


def test_many_pictures_go_through_the_tower_in_parts():
    sizes = []

    def encode(image_IYXC):
        sizes.append(len(image_IYXC))
        return image_IYXC[:, :1, :2, 0].astype(np.float32).reshape(-1, 1, 2)

    many = np.arange(MAX_AT_ONCE + 5, dtype=np.uint8)[:, None, None, None] * np.ones(
        (1, 14, 14, 3), np.uint8
    )
    features = PictureFeatures(encode, (1, 2))
    out = features(many)
    assert all(kept.base is None for kept in features._kept.values())  # no view keeps its batch
    assert sizes == [MAX_AT_ONCE, 6]  # five, padded to their bucket
    assert out[:, 0, 0].tolist() == list(range(MAX_AT_ONCE + 5))
