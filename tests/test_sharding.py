"""The mesh and the placement of every parameter."""

import dataclasses
import math
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qwenvl_jax import presets
from qwenvl_jax.config import ConfigError, MeshConfig, RematPolicy
from qwenvl_jax.model.layers import Dense, scan_layers, stack_layers
from qwenvl_jax.model.qwenvl import QwenVL, abstract_state, draw_state
from qwenvl_jax.sharding import (
    batch_sharding,
    constrain,
    describe,
    make_mesh,
    mesh_sizes,
    named_variables,
    partition_spec,
    placements,
    with_shardings,
)

P = PartitionSpec
# What the table says for one parameter of each kind, written out by hand.
EXPECTED = {
    "vit.patch_embed.kernel": P(None, "fsdp"),
    "vit.position_embed": P(None, "fsdp"),
    "vit.blocks.attn.q_proj.kernel": P(None, "fsdp", "tensor", None),
    "vit.blocks.attn.o_proj.kernel": P(None, "tensor", None, "fsdp"),
    "vit.blocks.mlp.up_proj.kernel": P(None, "fsdp", "tensor"),
    "vit.blocks.mlp.down_proj.kernel": P(None, "tensor", "fsdp"),
    "adapter.query": P(None, "fsdp"),
    "adapter.kv_proj.kernel": P("fsdp", "tensor"),
    "adapter.proj.kernel": P("fsdp", "tensor"),
    "decoder.embed.embedding": P("tensor", "fsdp"),
    "decoder.blocks.attn.k_proj.bias": P(None, "tensor", None),
    "decoder.blocks.mlp.gate_proj.kernel": P(None, "fsdp", "tensor"),
    "decoder.lm_head.kernel": P("fsdp", "tensor"),
    "decoder.ln_f.scale": P("fsdp"),
}


@pytest.mark.parametrize(
    "sizes", [(1, 8, 1), (8, 1, 1), (1, 1, 8), (2, 2, 2), (1, -1, 2), (-1, 1, 4)]
)
def test_mesh_uses_every_device(sizes):
    data, fsdp, tensor = sizes
    mesh = make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor))
    assert mesh.size == 8
    assert mesh.axis_names == ("data", "fsdp", "tensor")
    assert all(kind == jax.sharding.AxisType.Auto for kind in mesh.axis_types)


def test_default_mesh_is_one_device():
    assert dict(make_mesh().shape) == {"data": 1, "fsdp": 1, "tensor": 1}


@pytest.mark.parametrize("sizes", [(3, 1, 1), (1, 4, 1), (0, 8, 1), (0, -1, 1), (-1, -1, 1)])
def test_mesh_that_does_not_fit_names_the_numbers(sizes):
    data, fsdp, tensor = sizes
    with pytest.raises(ConfigError, match=r"got .* for 8 devices; set exactly one of them to -1"):
        make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor))


@pytest.mark.parametrize(
    ("sizes", "devices", "told"),
    [
        (
            (-1, 128, 1),
            1,
            "got -1 x 128 x 1 for 1 device; 128 does not divide 1, try .*fsdp=-1 --mesh.tensor=1",
        ),
        (
            (-1, 3, 4),
            8,
            "got -1 x 3 x 4 for 8 devices; 12 does not divide 8, try .*fsdp=-1 --mesh.tensor=4",
        ),
    ],
)
def test_advice_that_was_followed_is_not_given_again(sizes, devices, told):
    data, fsdp, tensor = sizes
    with pytest.raises(ConfigError, match=told) as caught:
        mesh_sizes(MeshConfig(data=data, fsdp=fsdp, tensor=tensor), devices)
    assert "exactly one" not in str(caught.value)
    followed = MeshConfig(data=1, fsdp=-1, tensor=int(str(caught.value)[-1]))
    assert math.prod(mesh_sizes(followed, devices)) == devices


def test_every_parameter_is_where_the_table_says():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    # The axis of 2 divides every dimension here, so no parameter may be replicated by refusal.
    decoder = dataclasses.replace(tiny.model_config().decoder, vocab_size=58)
    config = tiny.model_config(decoder=decoder)
    state = draw_state(config, jax.random.key(0), abstract_state(config, mesh)[1])
    placed = named_variables(state)
    for path, spec in EXPECTED.items():
        want = NamedSharding(mesh, spec)
        value = placed[path].get_value()
        assert value.sharding.is_equivalent_to(want, value.ndim), (path, value.sharding)
    for path, variable in placed.items():
        value = variable.get_value()
        spec = partition_spec(variable.axes, value.shape, mesh)
        assert value.sharding.is_equivalent_to(NamedSharding(mesh, spec), value.ndim), path


def test_stacked_layers_are_never_split_but_carry_their_axis():
    _, state = abstract_state(presets.qwen_vl())
    for path, variable in named_variables(state).items():
        assert len(variable.axes) == len(variable.get_value().shape), path
        assert (variable.axes[0] == "layers") == (".blocks." in path), path


def test_full_model_on_a_pod_replicates_nothing_large():
    """The 9.66 B model over fsdp=8: only norms and biases and small tables may stay whole."""
    mesh = make_mesh(MeshConfig(fsdp=8))
    _, state = abstract_state(presets.qwen_vl())
    rows = placements(state, mesh)
    assert sum(np.prod(row.shape) for row in rows) == 9_656_935_168
    whole = [row for row in rows if "fsdp" not in row.spec]
    assert sum(row.bytes_per_device for row in whole) < 20e6, [row.path for row in whole]
    total = sum(row.bytes_per_device for row in rows)
    assert total == pytest.approx(9_656_935_168 * 4 / 8, rel=0.002)


def test_a_dimension_that_does_not_divide_is_replicated_and_said():
    mesh = make_mesh(MeshConfig(tensor=8, fsdp=1))
    assert partition_spec(("vocab", "embed"), (739, 256), mesh) == P(None, "fsdp")
    text = describe(abstract_state(presets.nano(num_ranks=522, num_queries=16))[1], mesh)
    assert "decoder.lm_head.kernel" in text
    assert "vocab=739 over tensor" in text
    assert "total" in text.splitlines()[-1]


def test_one_mesh_axis_twice_is_an_error():
    with pytest.raises(ConfigError, match="one mesh axis twice"):
        partition_spec(("embed", "embed"), (8, 8), make_mesh())
    with pytest.raises(ConfigError, match="no row in AXIS_TABLE"):
        partition_spec(("embd",), (8,), make_mesh())


def places(state: nnx.State, mesh: Mesh) -> nnx.State:
    return jax.tree.map(lambda x: x.sharding, with_shardings(state, mesh))


@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 2, 2)])
def test_eight_devices_give_the_numbers_of_one(sizes):
    config = tiny.model_config()
    graphdef, abstract = abstract_state(config, make_mesh())
    state = draw_state(config, jax.random.key(1), abstract)
    batch = tiny.batch(tiny.train_config(), 0)

    @jax.jit
    def logits(state, batch):
        model: QwenVL = nnx.merge(graphdef, state)
        B, I = batch.images.shape[:2]
        visual = model.encode_images(batch.images.reshape(B * I, *batch.images.shape[2:]))
        hidden, _ = model(
            batch.tokens,
            visual_BIQD=visual.reshape(B, I, *visual.shape[1:]),
            image_start_BI=batch.image_start,
            position_BL=batch.position,
            segment_BL=batch.segment,
        )
        return model.logits(hidden)

    alone = logits(state, batch)
    data, fsdp, tensor = sizes
    mesh = make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor))
    spread = jax.device_put(state, places(state, mesh))
    together = logits(spread, jax.device_put(batch, batch_sharding(mesh)))
    np.testing.assert_allclose(together, alone, atol=2e-5)


def layers_state_and_rows() -> tuple[nnx.GraphDef, nnx.State, jax.Array]:
    def make(rngs: nnx.Rngs) -> Dense:
        outputs = {"heads": 2, "head_dim": 8}
        return Dense({"embed": 16}, outputs, use_bias=False, dtype="float32", rngs=rngs)

    graphdef, state = nnx.split(stack_layers(make, 3, nnx.Rngs(0)))
    return graphdef, state, jax.random.normal(jax.random.key(1), (8, 5, 16))


def gradient_of_layers(graphdef: nnx.GraphDef, remat: RematPolicy) -> Callable:
    def step(layer: Dense, x: jax.Array) -> jax.Array:
        return constrain(jnp.sin(x + layer(x).reshape(x.shape)), "batch", None, None)

    def loss(state: nnx.State, x: jax.Array) -> jax.Array:
        return scan_layers(nnx.merge(graphdef, state), step, x, remat=remat).sum()

    return jax.grad(loss)


@pytest.mark.parametrize(
    ("remat", "sizes"),
    [("none", (2, 2, 2)), ("dots", (1, 8, 1)), ("weights", (2, 2, 2)), ("weights", (8, 1, 1))],
)
def test_a_gradient_is_summed_where_its_weight_lies(remat, sizes):
    graphdef, state, x = layers_state_and_rows()
    alone = gradient_of_layers(graphdef, "none")(state, x)
    data, fsdp, tensor = sizes
    mesh = make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor))
    placed = places(state, mesh), batch_sharding(mesh)
    with jax.set_mesh(mesh):
        gradient = gradient_of_layers(graphdef, remat)
        step = jax.jit(gradient, in_shardings=placed, out_shardings=placed[0]).lower(state, x)
        program = step.compile()
        together = program(*jax.device_put((state, x), placed))
    assert ("reduce-scatter" in program.as_text()) == (fsdp > 1)
    for one, many in zip(jax.tree.leaves(alone), jax.tree.leaves(together), strict=True):
        np.testing.assert_allclose(many, one, atol=1e-5)


def test_weights_that_are_kept_are_gathered_once():
    graphdef, state, x = layers_state_and_rows()
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    placed = places(state, mesh), batch_sharding(mesh)

    def gathers(remat: RematPolicy) -> int:
        with jax.set_mesh(mesh):
            gradient = gradient_of_layers(graphdef, remat)
            step = jax.jit(gradient, in_shardings=placed, out_shardings=placed[0]).lower(state, x)
            return len(re.findall(r" all-gather(?:-start)?\(", step.compile().as_text()))

    assert gathers("weights") < gathers("full")
