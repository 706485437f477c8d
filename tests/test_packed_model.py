"""Samples packed into a row are for the model what each is alone: no attention, no loss across."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from qwenvl_jax.data.example import Batch, Example
from qwenvl_jax.data.packing import pack
from qwenvl_jax.model.qwenvl import abstract_state
from qwenvl_jax.prompt.tokenizer import Tokenizer
from qwenvl_jax.sharding import named_variables
from qwenvl_jax.training.state import merge_model

SIDE, LENGTH = 28, 53
TOK = Tokenizer({bytes([byte]): byte for byte in range(256)}, slots=4)
SIZES = [(7, 1), (9, 2), (5, 0)]  # text tokens, pictures: 13 + 21 + 5 of a row's places


@pytest.fixture(scope="module")
def logits():
    """Returns a function from a batch to float32 [B, L, V], as the train step computes them."""
    config = tiny.model_config()
    decoder = dataclasses.replace(config.decoder, vocab_size=TOK.vocab_size, max_positions=LENGTH)
    config = dataclasses.replace(config, decoder=decoder, image_start_id=TOK.image_start_id)
    graphdef, abstract = abstract_state(config)
    random = np.random.default_rng(0)
    # Large enough that attention is far from flat: leaks would hide below the tolerance.
    weights = {
        path: jnp.asarray(random.normal(0.5 * ("norm" in path), 0.3, variable.get_value().shape))
        for path, variable in named_variables(abstract).items()
    }
    model = merge_model(graphdef, {name: x.astype("float32") for name, x in weights.items()})

    @jax.jit
    def compute(batch: Batch) -> jax.Array:
        visual_IQD = model.encode_images(batch.images.reshape(-1, *batch.images.shape[2:]))
        hidden_BLD, _ = model(
            batch.tokens,
            visual_BIQD=visual_IQD.reshape(*batch.images.shape[:2], *visual_IQD.shape[1:]),
            image_start_BI=batch.image_start,
            position_BL=batch.position,
            segment_BL=batch.segment,
        )
        return model.logits(hidden_BLD)

    return lambda batch: np.asarray(compute(Batch(*map(jnp.asarray, batch))))


def samples(seed: int = 0) -> list[Example]:
    random = np.random.default_rng(seed)
    made = []
    for number, (num_text, num_images) in enumerate(SIZES):
        pictures = TOK.image_ids() * num_images
        ids = np.array([*pictures, *random.integers(0, 256, num_text)], np.int32)
        images = random.integers(0, 256, (num_images, SIDE, SIDE, 3), np.uint8)
        is_target = ids < 256
        made.append(Example(ids, is_target, tuple(images), "test", str(number)))
    return made


def packed(rows: list[list[Example]], **options) -> Batch:
    rows = rows + [[]] * (len(SIZES) - len(rows))  # one shape is compiled
    return pack(rows, LENGTH, 4, SIDE, TOK, **options)


def test_logits_of_a_packed_row_are_those_of_each_sample_alone(logits):
    row = samples()
    together = logits(packed([row]))[0]
    alone = logits(packed([[sample] for sample in row]))
    start = 0
    for number, sample in enumerate(row):
        size = len(sample.ids)
        ours, theirs = together[start : start + size], alone[number, :size]
        assert np.ptp(theirs) > 1  # or the tolerance would say nothing
        np.testing.assert_allclose(ours, theirs, atol=2e-5, rtol=0)
        start += size


def test_a_sample_does_not_feel_its_neighbours_unless_asked(logits):
    row, other = samples(), samples(seed=1)
    end = len(row[0].ids) + len(row[1].ids)
    for across in (False, True):
        one = logits(packed([row], attend_across=across))[0]
        changed = logits(packed([[other[0], other[1], row[2]]], attend_across=across))[0]
        apart = np.abs(one[end : end + 5] - changed[end : end + 5]).max()
        assert (apart > 1e-2) if across else (apart == 0)
        later = logits(packed([[row[0], row[1], other[2]]], attend_across=across))[0]
        np.testing.assert_array_equal(one[:end], later[:end])  # never what comes after


def test_no_loss_crosses_from_one_sample_into_the_next():
    row = samples()
    ends = np.cumsum([len(sample.ids) for sample in row]) - 1
    for across in (False, True):
        batch = packed([row], attend_across=across)
        scored = np.flatnonzero(batch.loss_weight[0])
        assert not set(scored) & set(ends)
        assert np.array_equal(batch.targets[0, scored], batch.tokens[0, scored + 1])
        assert len(scored) == sum(int(sample.is_target[1:].sum()) for sample in row)
