"""The public calls against the numbers of the published code, in float32 on a CPU."""

import jax
import numpy as np
import pytest
from golden_model import CASES, greedy, ids, load, model, outputs, pictures

from qwenvl_jax.config import MeshConfig
from qwenvl_jax.sharding import make_mesh

pytestmark = pytest.mark.full_compiles


def difference(ours: np.ndarray, golden: np.ndarray) -> float:
    assert ours.shape == golden.shape
    return float(np.abs(ours - golden).max())


@pytest.mark.parametrize("side", [224, 448])
def test_encode_images(side):
    ours = model().encode_images(outputs()[f"image{side}.uint8"])
    assert ours.dtype == np.float32
    assert difference(ours, outputs()[f"image{side}.embedding"]) < 1e-4


@pytest.mark.parametrize("case", CASES)
def test_logits(case):
    ours = model().logits(ids(case), pictures(case))
    assert ours.dtype == np.float32
    assert difference(ours, outputs()[f"{case}.logits"]) < 1e-3


@pytest.mark.parametrize("case", ["two_images", "text_long"])
def test_logits_of_training_mode(case):
    ours = model().logits(ids(case), pictures(case), train=True)
    assert difference(ours, outputs()[f"train.{case}.logits"]) < 1e-3


def test_training_mode_differs_beyond_the_trained_length():
    long = ids("text_long")
    assert difference(model().logits(long), model().logits(long, train=True)) > 0.1


@pytest.mark.parametrize("case", CASES)
def test_greedy(case):
    assert model().generate(ids(case), pictures(case), max_new_tokens=24) == greedy(case)


def test_a_batch_of_unequal_prompts_equals_each_alone():
    cases = CASES[1:]
    answers = model().generate_batch(
        [ids(case) for case in cases], [pictures(case) for case in cases], max_new_tokens=24
    )
    assert answers == [greedy(case) for case in cases]


def test_reference_mode_of_one_row_is_golden_too():
    for case in ("text_long", "image_long"):
        answer = model().generate(
            ids(case), pictures(case), max_new_tokens=24, long_context="reference"
        )
        assert answer == greedy(case)


def test_eight_devices_say_what_one_says():
    assert len(jax.devices()) == 8
    vl = load(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)))
    cases = ("text_short", "one_image", "two_images", "image_long")
    answers = vl.generate_batch(
        [ids(case) for case in cases], [pictures(case) for case in cases], max_new_tokens=24
    )
    assert answers == [greedy(case) for case in cases]
    assert difference(vl.logits(ids("text_long")), outputs()["text_long.logits"]) < 1e-3
