"""Bfloat16 weights on a CPU take their own size, and give what slices of them give."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from qwenvl_jax.config import MeshConfig
from qwenvl_jax.model import narrow
from qwenvl_jax.model.layers import Dense, scan_layers, stack_layers
from qwenvl_jax.model.narrow import take
from qwenvl_jax.model.qwenvl import QwenVL
from qwenvl_jax.sharding import make_mesh

DEPTH, WIDTH = 12, 256

pytestmark = pytest.mark.full_compiles


def table(dtype=jnp.bfloat16) -> jax.Array:
    return jax.random.normal(jax.random.key(0), (11, 3, 5)).astype(dtype)


@pytest.mark.parametrize("index", [4, [[0, 10, 3], [3, 3, 7]]])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.float16])
def test_rows_are_those_of_the_table(index, dtype):
    index = jnp.asarray(index)
    found = jax.jit(take)(table(dtype), index)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, table(dtype)[index])


@pytest.mark.parametrize("index", [4, [[0, 10, 3], [3, 3, 7]]])
def test_gradient_is_added_up_in_the_rows(index):
    index = jnp.asarray(index)
    weight = jax.random.normal(jax.random.key(1), (*index.shape, 3, 5)).astype(jnp.bfloat16)

    def total(read):
        return lambda table: (read(table) * weight).sum()

    ours = jax.grad(total(lambda table: take(table, index)))(table())
    plain = jax.grad(total(lambda table: table[index]))(table())
    np.testing.assert_array_equal(ours, plain)


def stacked(dtype: str) -> nnx.Module:
    def make(rngs):
        sides = {"vit_embed": WIDTH}, {"vit_mlp": WIDTH}
        return Dense(*sides, use_bias=False, dtype=dtype, rngs=rngs)

    return stack_layers(make, DEPTH, nnx.Rngs(0))


def through(remat: str):
    graphdef = nnx.graphdef(stacked("bfloat16"))

    def passes(state, x):
        layers = nnx.merge(graphdef, state)
        return scan_layers(layers, lambda layer, x: jax.nn.silu(layer(x)), x, remat=remat)

    return passes


def inputs():
    return jax.random.normal(jax.random.key(2), (4, WIDTH)).astype(jnp.bfloat16)


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_layers_of_narrow_weights_do_not_take_more_than_they_are(remat):
    """Widened they would take twice their size once more, as they did."""
    state = nnx.state(stacked("bfloat16"))
    size = sum(x.nbytes for x in jax.tree.leaves(state))
    assert size == 2 * DEPTH * WIDTH**2

    def step(x, state):
        return jax.grad(lambda x: through(remat)(state, x).astype(jnp.float32).sum())(x)

    memory = jax.jit(step).lower(inputs(), state).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 1.2 * size


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_layers_give_the_same_either_way(remat, monkeypatch):
    state = nnx.state(stacked("bfloat16"))

    def value(state, x):
        return through(remat)(state, x).astype(jnp.float32).sum()

    both = jax.jit(jax.value_and_grad(value, (0, 1)))
    ours = jax.device_get(both(state, inputs()))
    monkeypatch.setattr(narrow, "is_widened", lambda table: False)
    monkeypatch.setattr("qwenvl_jax.model.layers.is_widened", lambda table: False)
    jax.clear_caches()
    jax.tree.map(np.testing.assert_array_equal, ours, jax.device_get(both(state, inputs())))


@pytest.mark.parametrize("shape", [(1, 8, 1), (2, 2, 2)])
def test_narrow_layers_on_a_mesh(shape):
    data, fsdp, tensor = shape
    mesh = make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor))
    state, x = nnx.state(stacked("bfloat16")), inputs()
    alone = jax.jit(through("full"))(state, x)
    split = jax.sharding.NamedSharding(mesh, jax.P(None, "fsdp", "tensor"))
    with jax.set_mesh(mesh):
        spread = jax.device_put(state, split)
        found = jax.jit(through("full"))(spread, x)
    np.testing.assert_allclose(found.astype("f4"), alone.astype("f4"), rtol=0.05, atol=0.02)


def test_a_whole_model_of_narrow_weights_is_not_widened():
    config = tiny.model_config(param_dtype="bfloat16", dtype="bfloat16")
    graphdef, state = nnx.split(QwenVL(config, rngs=nnx.Rngs(0)))
    tokens = jnp.ones((1, 4), jnp.int32)

    def answer(state):
        hidden, _ = nnx.merge(graphdef, state)(tokens)
        return hidden

    text = jax.jit(answer).lower(state).compile().as_text()
    stacks = {x.shape for x in jax.tree.leaves(state.decoder.blocks) if x.ndim > 2}
    assert stacks
    for shape in stacks:
        assert f"f32[{','.join(map(str, shape))}]" not in text
