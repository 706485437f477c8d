"""Drawn scenes as rows: the same samples, prepared like any other source."""

import numpy as np
import pytest

from qwenvl_jax.data.example import DataError
from qwenvl_jax.data.sources.generated import GeneratedOptions, open_generated
from qwenvl_jax.data.sources.scene_records import TASKS, Scenes, scene_record
from qwenvl_jax.data.sources.scene_rows import scene_example
from qwenvl_jax.data.tasks import example_of
from qwenvl_jax.image.load import load_image
from qwenvl_jax.prompt.tokenizer import Tokenizer

SPELL = Tokenizer({bytes([byte]): byte for byte in range(256)}, slots=4)


@pytest.mark.parametrize("task", TASKS)
def test_a_row_says_what_the_sample_of_its_key_says(task):
    for key in range(12):
        row = example_of(scene_record(task, key, "heldout", 112), SPELL)
        sample = scene_example(task, key, "heldout", 112, SPELL)
        np.testing.assert_array_equal(row.ids, sample.ids)
        np.testing.assert_array_equal(row.is_target, sample.is_target)
        np.testing.assert_array_equal(load_image(row.images[0]), sample.images[0])


def test_rows_follow_from_their_index_and_settings():
    rows = Scenes(40, "train", side=64, tasks=("vqa", "vqa", "ocr"))
    assert rows[7] == Scenes(99, "train", side=64, tasks=("vqa", "vqa", "ocr"))[7]
    assert rows[7] != Scenes(40, "heldout", side=64, tasks=("vqa", "vqa", "ocr"))[7]
    tasks = [rows[i].task for i in range(40)]
    assert 20 < tasks.count("vqa") < 35
    assert len({row.fingerprint for row in (rows, Scenes(40, "train"), Scenes(41, "train"))}) == 3
    with pytest.raises(IndexError):
        rows[40]


def test_settings_that_cannot_be_are_refused():
    with pytest.raises(DataError, match="tasks of scenes must be of caption"):
        Scenes(1, "train", tasks=("map",))
    with pytest.raises(DataError, match="side of at least 56 pixels: got num 1, side 40"):
        Scenes(1, "train", side=40)
    assert open_generated("scenes", 3, GeneratedOptions(side=64)) == Scenes(3, "train", side=64)
    with pytest.raises(DataError, match="languages has no effect on scenes"):
        open_generated("scenes", 1, GeneratedOptions(languages=("zh",)))
