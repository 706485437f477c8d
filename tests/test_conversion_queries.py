"""Weights with another number of queries: the grid is resized, everything else stays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from qwenvl_jax.checkpoint.weights import (
    load_weights_folder,
    open_weights,
    read_weights_config,
    save_weights,
)
from qwenvl_jax.cli.convert import main
from qwenvl_jax.conversion.queries import TABLES, change_queries
from qwenvl_jax.model.qwenvl import abstract_state, init_state
from qwenvl_jax.sharding import make_mesh


def read(folder, name):
    leaf = open_weights(folder)[name]
    return leaf.read((slice(None),) * len(leaf.shape))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    top = tmp_path_factory.mktemp("queries")
    config = tiny.model_config()
    _, state = init_state(config, jax.random.key(3), make_mesh())
    save_weights(top / "weights", config, state)
    return top


def test_tables_are_resized_and_nothing_else(folder, capsys):
    assert main(["queries", str(folder / "weights"), "9", str(folder / "nine")]) == 0
    assert "9 queries, ready" in capsys.readouterr().out
    assert read_weights_config(folder / "nine").adapter.num_queries == 9
    before, after = open_weights(folder / "weights"), open_weights(folder / "nine")
    assert before.keys() == after.keys()
    for name in before:
        old, new = read(folder / "weights", name), read(folder / "nine", name)
        if name in TABLES:
            assert new.shape == (9, old.shape[1])
            square = old.reshape(2, 2, -1)
            # Halfway between the four old ones lies their mean, whatever the cubic.
            np.testing.assert_allclose(new[4], square.mean((0, 1)), atol=1e-6)
        else:
            assert old.tobytes() == new.tobytes(), name


def test_the_same_number_changes_nothing(folder):
    change_queries(folder / "weights", folder / "same", 4)
    for name in TABLES:
        assert read(folder / "same", name).tobytes() == read(folder / "weights", name).tobytes()


def test_what_cannot_be_done_is_said(folder, tmp_path, capsys):
    weights = str(folder / "weights")
    for words, told in (
        (["queries", weights, "10", str(tmp_path / "out")], "square number"),
        (["queries", weights, "0", str(tmp_path / "out")], "num_queries"),
        (
            ["queries", str(tmp_path / "none"), "9", str(tmp_path / "out")],
            "no weights folder of ours",
        ),
        (["queries", weights, "9", weights], "is there already"),
    ):
        assert main(words) == 2
        assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_picture_has_as_many_embeddings(folder):
    config = change_queries(folder / "weights", folder / "sixteen", 16)
    mesh = make_mesh()
    graph, abstract = abstract_state(config, mesh)
    model = nnx.merge(graph, load_weights_folder(folder / "sixteen", abstract))
    patches = np.random.default_rng(0).normal(size=(1, 4, config.vision.width))
    seen = model.adapter(jnp.asarray(patches, jnp.float32), backend="xla")
    assert seen.shape == (1, 16, config.decoder.width)
    assert np.ptp(np.asarray(seen), axis=1).min() > 0  # each place sees something else
