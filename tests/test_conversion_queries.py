"""Weights with another number of queries: the grid is resized, everything else stays."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from released_files import golden_tensors, write_folder

from qwenvl_jax.checkpoint.weights import (
    load_weights_folder,
    open_weights,
    read_weights_config,
)
from qwenvl_jax.cli.convert import main
from qwenvl_jax.conversion.queries import TABLES, change_queries
from qwenvl_jax.conversion.run import import_released
from qwenvl_jax.model.qwenvl import abstract_state
from qwenvl_jax.sharding import make_mesh


def read(folder, name):
    leaf = open_weights(folder)[name]
    return leaf.read((slice(None),) * len(leaf.shape))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The golden checkpoint as a folder of ours, sixteen queries."""
    top = tmp_path_factory.mktemp("queries")
    import_released(write_folder(top / "released", golden_tensors()), top / "weights")
    return top


def test_tables_are_resized_and_nothing_else(folder, capsys):
    assert main(["queries", str(folder / "weights"), "1", str(folder / "one")]) == 0
    assert "1 queries, ready" in capsys.readouterr().out
    assert read_weights_config(folder / "one").adapter.num_queries == 1
    before, after = open_weights(folder / "weights"), open_weights(folder / "one")
    assert before.keys() == after.keys()
    # PyTorch's cubic (a = -0.75) halfway between two of four places.
    halfway = np.array([-3, 19, 19, -3]) / 32
    for name in before:
        old, new = read(folder / "weights", name), read(folder / "one", name)
        if name in TABLES:
            square = old.reshape(4, 4, -1).astype(np.float64)
            middle = np.einsum("y,x,yxd->d", halfway, halfway, square)
            assert new.dtype == old.dtype
            np.testing.assert_allclose(new[0].astype(np.float64), middle, rtol=8e-3, atol=1e-3)
        else:
            assert old.tobytes() == new.tobytes(), name


def test_the_same_number_changes_nothing(folder):
    change_queries(folder / "weights", folder / "same", 16)
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
    config = change_queries(folder / "weights", folder / "many", 64)
    mesh = make_mesh()
    graph, abstract = abstract_state(config, mesh)
    model = nnx.merge(graph, load_weights_folder(folder / "many", abstract))
    patches = np.random.default_rng(0).normal(size=(1, 4, config.vision.width))
    seen = model.adapter(jnp.asarray(patches, jnp.float32), backend="xla")
    assert seen.shape == (1, 64, config.decoder.width)
    assert np.ptp(np.asarray(seen), axis=1).min() > 0  # each place sees something else
