"""The model's parts against the published numbers, and what the published code does not have."""

import dataclasses
import json

import golden_model
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_training_golden as golden_run
import tiny
from flax import nnx

from qwenvl_jax import presets
from qwenvl_jax.config import NO_IMAGE, ConfigError, VisionConfig
from qwenvl_jax.model.attention import AttentionMask
from qwenvl_jax.model.decoder import ntk_alpha, rotary_angles
from qwenvl_jax.model.products import logits, matmul
from qwenvl_jax.model.qwenvl import (
    QwenVL,
    abstract_state,
    draw_state,
    merge_images,
)
from qwenvl_jax.model.vit import (
    ViT,
    from_windows,
    patch_waves,
    resize_table,
    sine_table,
    to_windows,
)
from qwenvl_jax.sharding import make_mesh, named_variables
from qwenvl_jax.training.state import merge_model


@pytest.fixture(scope="module")
def golden() -> QwenVL:
    config = golden_run.golden_config()
    graphdef, _ = abstract_state(config)
    weights = {name: jnp.asarray(x) for name, x in golden_run.our_weights(config).items()}
    return merge_model(graphdef, weights)


def pixels(number: int, side: int, seed: int = 0) -> jax.Array:
    random = np.random.default_rng(seed)
    return jnp.asarray(random.integers(0, 256, (number, side, side, 3), np.uint8))


def close(ours: jax.Array, name: str, tolerance: float) -> None:
    np.testing.assert_allclose(ours, golden_model.outputs()[name], atol=tolerance, rtol=0)


def test_every_vision_stage_is_golden(golden):
    image = jnp.asarray(golden_model.outputs()["image224.uint8"])
    close(golden.vit.embed(image[:1], "float32"), "image224.ln_pre", 1e-4)
    patches = golden.vit(image, dtype="float32", backend="xla", remat="none")
    close(patches, "image224.blocks", 1e-4)
    close(golden.adapter.resample(patches, backend="xla"), "image224.adapter", 1e-4)
    close(golden.encode_images(image), "image224.embedding", 1e-4)


def test_patch_waves_are_apart_and_the_longest_come_first():
    waves = patch_waves(6, 108)
    assert waves.shape == (108, 108)
    length = np.linalg.norm(waves, axis=0)
    np.testing.assert_allclose(waves.T @ waves, np.diag(length**2), atol=1e-4)
    # The first is the mean brightness, and the mean of any other over the patch is zero.
    means = waves.reshape(36, 3, 108).mean(0)
    np.testing.assert_allclose(means[:, 0], means[0, 0], rtol=1e-5)
    assert (np.abs(means).max(0) > 1e-6).sum() == 3  # brightness and two colour contrasts
    np.testing.assert_array_equal(patch_waves(6, 11), waves[:, :11])


@pytest.mark.parametrize("width", [24, 128])  # fewer and more than a patch has pixels
def test_a_new_tower_sees_edges_as_clearly_as_the_mean(width):
    config = VisionConfig(
        width=width, num_layers=1, num_heads=4, mlp_dim=8, patch_size=6, table_side=4
    )
    kernel = np.asarray(ViT(config, "float32", rngs=nnx.Rngs(0)).patch_embed.kernel[...])
    assert kernel.shape == (108, width)
    plain = np.ones((6, 6, 3))
    edge = np.where(np.arange(6) < 3, 1.0, -1.0)[None, :, None] * plain
    of_plain, of_edge = (np.linalg.norm(x.ravel() @ kernel) for x in (plain, edge))
    assert of_edge > 2 * of_plain


def test_448_pixels_resize_both_tables(golden):
    image = jnp.asarray(golden_model.outputs()["image448.uint8"])
    patches = golden.vit(image, dtype="float32", backend="xla", remat="none")
    close(golden.adapter.resample(patches, backend="xla_chunked"), "image448.adapter", 1e-4)
    close(golden.encode_images(image), "image448.embedding", 1e-4)


def test_gradients_are_golden():
    """The norm of every tensor's gradient, and some gradients whole."""
    config = golden_run.golden_config()
    graphdef, _ = abstract_state(config)
    weights = {name: jnp.asarray(x) for name, x in golden_run.our_weights(config).items()}
    outputs = golden_model.outputs()
    ids, labels = outputs["two_images.ids"], outputs["train.two_images.labels"]
    start = np.flatnonzero(ids == config.image_start_id) + 1

    def loss(weights):
        model = merge_model(graphdef, weights)
        visual = model.encode_images(jnp.asarray(golden_model.pictures("two_images")))
        hidden, _ = model(
            jnp.asarray(ids)[None],
            visual_BIQD=visual[None],
            image_start_BI=jnp.asarray(start)[None],
        )
        log_chance = jax.nn.log_softmax(model.logits(hidden)[0, :-1])
        target = labels[1:]
        picked = jnp.take_along_axis(log_chance, np.maximum(target, 0)[:, None], axis=1)[:, 0]
        return -(picked * (target >= 0)).sum() / (target >= 0).sum()

    value, gradient = jax.value_and_grad(loss)(weights)
    assert float(value) == pytest.approx(float(outputs["train.two_images.loss"][0]), rel=1e-5)
    gradient = {name: np.asarray(x) for name, x in gradient.items()}
    norms = golden_run.released_norms(config, gradient)
    expected = json.loads((golden_model.GOLDEN / "tiny.grad_norms.json").read_text())
    for name, norm in expected.items():
        assert norms[name] == pytest.approx(norm, rel=1e-3, abs=1e-7), name
    D, E = config.decoder.width, config.vision.width
    prefix = "train.grad.transformer."
    whole = {
        "ln_f.weight": gradient["decoder.ln_f.scale"],
        "visual.proj": gradient["adapter.proj.kernel"],
        "visual.attn_pool.query": gradient["adapter.query"],
        "visual.attn_pool.kv_proj.weight": gradient["adapter.kv_proj.kernel"].T,
        "visual.positional_embedding": gradient["vit.position_embed"],
        "visual.conv1.weight": gradient["vit.patch_embed.kernel"]
        .reshape(14, 14, 3, E)
        .transpose(3, 2, 0, 1),
        "h.0.mlp.w2.weight": gradient["decoder.blocks.mlp.gate_proj.kernel"][0].T,
        "h.0.attn.c_attn.bias": np.concatenate(
            [gradient[f"decoder.blocks.attn.{x}_proj.bias"][0].reshape(D) for x in "qkv"]
        ),
    }
    for name, ours in whole.items():
        close(ours, prefix + name, 1e-4)


def test_the_released_size_is_exact():
    _, state = abstract_state(presets.qwen_vl())
    sizes = {
        name: sum(x.size for x in jax.tree.leaves(state[name]))
        for name in ("vit", "adapter", "decoder")
    }
    assert sizes == {"vit": 1_842_770_688, "adapter": 92_839_936, "decoder": 7_721_324_544}
    assert sum(x.size for x in jax.tree.leaves(state)) == 9_656_935_168


def test_every_parameter_has_the_dtype_that_was_asked_for():
    _, state = abstract_state(tiny.model_config(param_dtype="bfloat16"))
    assert {str(x.dtype) for x in named_variables(state).values()} == {"bfloat16"}


def test_pictures_without_places_are_refused():
    model = QwenVL(tiny.model_config(), rngs=nnx.Rngs(0))
    tokens, visual = jnp.arange(11)[None], model.encode_images(pixels(1, 28))[None]
    with pytest.raises(ValueError, match="go together: got no image_start_BI"):
        model(tokens, visual_BIQD=visual)
    with pytest.raises(ValueError, match="go together: got no visual_BIQD"):
        model(tokens, image_start_BI=jnp.array([[2]]))


@pytest.mark.parametrize(
    ("dtype", "policies"),
    [("float32", ("weights", "full")), ("bfloat16", ("dots",))],  # on CPUs the latter unrolls
)
def test_remat_changes_no_gradient(dtype, policies):
    config = tiny.model_config(dtype=dtype)
    graphdef, abstract = abstract_state(config, make_mesh())
    state = draw_state(config, jax.random.key(0), abstract)
    image = pixels(1, 28)

    def loss(state, config):
        model = nnx.merge(graphdef, state)
        model.config = config
        visual = model.encode_images(image)
        tokens = jnp.arange(11)[None]
        hidden, _ = model(tokens, visual_BIQD=visual[None], image_start_BI=jnp.array([[2]]))
        return jnp.square(model.logits(hidden)).mean()

    hurry = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    gradient = jax.jit(jax.grad(loss), static_argnums=1, compiler_options=hurry)
    plain = gradient(state, config)
    largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(plain))
    assert largest > 1e-3
    near = {"float32": 1e-6, "bfloat16": 0.02 * largest}[dtype]
    for remat in policies:
        again = gradient(state, dataclasses.replace(config, remat=remat))
        for want, got in zip(jax.tree.leaves(plain), jax.tree.leaves(again), strict=True):
            np.testing.assert_allclose(got, want, atol=near, err_msg=remat)


# --- merge --------------------------------------------------------------------------------------


def test_merge_puts_each_picture_in_its_slots_and_nothing_else():
    B, L, D, Q = 2, 13, 3, 4
    x = jnp.zeros((B, L, D))
    visual = jnp.arange(1, 1 + B * 2 * Q * D, dtype=jnp.float32).reshape(B, 2, Q, D)
    start = jnp.array([[0, 7], [NO_IMAGE, 5]])  # a picture at the very start; an unused slot first
    merged = np.asarray(merge_images(x, visual, start))
    expected = np.zeros((B, L, D))
    expected[0, 0:4], expected[0, 7:11] = visual[0]
    expected[1, 5:9] = visual[1, 1]
    np.testing.assert_array_equal(merged, expected)
    used = jax.grad(lambda v: merge_images(x, v, start).sum())(visual)
    np.testing.assert_array_equal(used[1, 0], 0)  # the unused picture gets no gradient
    np.testing.assert_array_equal(used[0], 1)


# --- vision -------------------------------------------------------------------------------------


def small_tower(**changes) -> tuple[VisionConfig, ViT]:
    sizes = {"width": 12, "num_layers": 4, "num_heads": 3, "mlp_dim": 20}
    sizes |= {"patch_size": 2, "table_side": 3}
    config = VisionConfig(**{**sizes, **changes})
    return config, ViT(config, "float32", rngs=nnx.Rngs(0))


def run_tower(tower: ViT, side: int) -> np.ndarray:
    return np.asarray(tower(pixels(2, side), dtype="float32", backend="xla", remat="none"))


def test_windows_are_cut_and_joined_again():
    x = jnp.arange(2 * 25 * 1, dtype=jnp.float32).reshape(2, 25, 1)
    windows, segment = to_windows(x, 2)  # a grid of 5 in windows of 2: padded to 6
    assert windows.shape == (18, 4, 1)
    assert int(segment.sum()) == 50
    np.testing.assert_array_equal(windows[0, :, 0], [0, 1, 5, 6])
    np.testing.assert_array_equal(windows[2, :, 0], [4, 0, 9, 0])
    np.testing.assert_array_equal(segment[2], [1, 0, 1, 0])
    np.testing.assert_array_equal(from_windows(windows, 25, 2), x)


def test_window_attention_confines_all_blocks_but_every_fourth():
    _, tower = small_tower(attention="window", window_side=2, global_every=5)  # none is global
    image = pixels(1, 10)
    other = image.at[0, 8:, 8:].set(255 - image[0, 8:, 8:])  # the last patch of a 5 x 5 grid

    def differs(tower: ViT) -> np.ndarray:
        run = lambda x: np.asarray(tower(x, dtype="float32", backend="xla", remat="none"))  # noqa: E731
        return (np.abs(run(image) - run(other)) > 1e-7).any(axis=-1).reshape(5, 5)

    confined = np.zeros((5, 5), bool)
    confined[4, 4] = True  # alone in its window, because 5 is no multiple of 2
    np.testing.assert_array_equal(differs(tower), confined)
    _, tower = small_tower(attention="window", window_side=2, global_every=4)  # the last is global
    assert differs(tower).all()


def test_patches_of_a_window_see_each_other_and_no_padding():
    _, tower = small_tower(num_layers=1, attention="window", window_side=2, global_every=2)
    graphdef, stacked = nnx.split(tower.blocks)
    layer = nnx.merge(graphdef, jax.tree.map(lambda x: x[0], stacked))
    image = pixels(1, 10)
    x_PE = tower.embed(image, "float32")[0]
    expected = np.zeros(x_PE.shape)
    for top in (0, 2, 4):
        for left in (0, 2, 4):  # 5 is no multiple of 2: those at the edge are smaller
            rows, columns = np.mgrid[top : min(top + 2, 5), left : min(left + 2, 5)]
            place = (5 * rows + columns).reshape(-1)
            y_IPE = x_PE[None, place]
            y_IPE += layer.attend(layer.ln_1(y_IPE), AttentionMask(), "xla")
            expected[place] = (y_IPE + layer.feed_forward(layer.ln_2(y_IPE)))[0]
    found = tower(image, dtype="float32", backend="xla", remat="none")[0]
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_picture_of_one_window_needs_no_windows():
    _, whole = small_tower()
    _, windowed = small_tower(attention="window", window_side=5, global_every=4)
    np.testing.assert_array_equal(run_tower(whole, 10), run_tower(windowed, 10))
    assert not np.allclose(run_tower(whole, 14), run_tower(windowed, 14))


@pytest.mark.parametrize("side", [14, 28, 42, 70])
def test_any_multiple_of_the_patch_size(side):
    model = QwenVL(tiny.model_config(), rngs=nnx.Rngs(0))
    visual = np.asarray(model.encode_images(pixels(2, side)))
    assert visual.shape == (2, 4, 32)
    assert np.isfinite(visual).all()
    assert not np.allclose(visual[0], visual[1])


@pytest.mark.parametrize("shape", [(28, 42), (29, 29), (13, 13)])
def test_other_shapes_say_what_is_expected(shape):
    model = QwenVL(tiny.model_config(), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=rf"multiple of 14: got {shape[0]}x{shape[1]}"):
        model.encode_images(jnp.zeros((1, *shape, 3), jnp.uint8))


def test_tables():
    table = sine_table(3, 8)
    np.testing.assert_allclose(table[5, :4], [np.sin(2), np.sin(0.02), np.cos(2), np.cos(0.02)])
    np.testing.assert_allclose(table[5, 4], np.sin(1))  # patch 5 of a 3 x 3 grid: x 2, y 1
    np.testing.assert_array_equal(resize_table(jnp.asarray(table), 9), table)
    with pytest.raises(ValueError, match="multiple of 4: got 6"):
        sine_table(2, 6)


# --- long sequences -----------------------------------------------------------------------------


def test_ntk_alpha_steps_where_the_release_steps():
    lengths = jnp.array([1, 2047, 2048, 2049, 4096, 4097, 8192, 8193])
    np.testing.assert_array_equal(ntk_alpha(lengths, 2048), [1, 1, 1, 3, 3, 7, 7, 15])


@pytest.mark.parametrize("head_dim", [6, 8])
def test_rotary_base_is_scaled_per_row(head_dim):
    position = jnp.array([[0, 5], [0, 5]])
    cos, sin = rotary_angles(position, head_dim, 100.0, jnp.array([1.0, 3.0]))
    exponent = np.arange(0, head_dim, 2) / head_dim
    scaled_base = 100.0 * 3.0 ** (head_dim / (head_dim - 2))
    np.testing.assert_allclose(cos[0, 1, 0], np.cos(5 * 100.0**-exponent), atol=1e-6)
    np.testing.assert_allclose(sin[1, 1, 0], np.sin(5 * scaled_base**-exponent), atol=1e-6)


def test_unrolled_layers_take_their_rotary_angles_from_one_table():
    config = tiny.model_config(dtype="bfloat16", remat="dots")
    graphdef, state = abstract_state(config)
    hidden = jax.jit(lambda state, tokens: nnx.merge(graphdef, state)(tokens)[0].sum())
    tokens = jax.ShapeDtypeStruct((1, 11), jnp.int32)
    compiled = jax.jit(jax.grad(hidden)).lower(state, tokens).compile().as_text()
    assert "while" in compiled  # of the table: layers and keys have none
    assert compiled.count(" sine(") == compiled.count(" cosine(") == 1


def test_config_errors_name_field_and_numbers():
    with pytest.raises(ConfigError, match=r"num_queries must be a square.*got 15, nearest 16"):
        tiny.model_config(adapter=dataclasses.replace(tiny.model_config().adapter, num_queries=15))
    with pytest.raises(ConfigError, match=r"image_size must be a multiple.*got image_size=30"):
        tiny.model_config(image_size=30)
    with pytest.raises(ConfigError, match=r"width must be a multiple of num_heads.*width=12"):
        small_tower(num_heads=5)


@pytest.mark.parametrize("num_inputs", [1, 2])
def test_a_bf16_product_and_its_gradients_are_summed_in_float32(num_inputs):
    inputs, outputs = (24, 4)[-num_inputs:], (3, 8)
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], (2, 300, *inputs), jnp.bfloat16)
    kernel = jax.random.normal(keys[1], (*inputs, *outputs), jnp.bfloat16)
    bias = jax.random.normal(keys[3], outputs, jnp.bfloat16)
    toward = jax.random.normal(keys[2], (2, 300, *outputs), jnp.bfloat16)

    def wide(x, kernel, bias):
        return jnp.tensordot(x, kernel, axes=num_inputs) + bias

    names = ("embed", "mlp", "heads")[-kernel.ndim :]
    product = jax.jit(lambda x, kernel, bias: matmul(x, kernel, bias, num_inputs, names))
    out, back = jax.vjp(product, x, kernel, bias)
    *f32, wide_toward = (a.astype(jnp.float32) for a in (x, kernel, bias, toward))
    expected, expected_back = jax.vjp(wide, *f32)
    for got, want in zip(
        (out, *back(toward)), (expected, *expected_back(wide_toward)), strict=True
    ):
        assert got.dtype == jnp.bfloat16
        # One rounding of the result; a sum of bf16 numbers kept in bf16 would be far off.
        np.testing.assert_allclose(got.astype(jnp.float32), want, rtol=2**-8, atol=1e-2)


@pytest.mark.parametrize(
    ("inputs", "outputs"), [((96,), (8,)), ((8,), (96,)), ((4, 24), (8,)), ((8,), (3, 4, 8))]
)
def test_the_wide_side_of_a_product_is_never_transposed_for_its_gradient(inputs, outputs):
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (2, 300, *inputs))
    kernel = jax.random.normal(keys[1], (*inputs, *outputs))
    toward = jax.random.normal(keys[2], (2, 300, *outputs))
    names = (*"abcd",)[: kernel.ndim]

    @jax.jit
    def gradient(x, kernel, toward):
        return jax.vjp(lambda w: matmul(x * x, w, None, len(inputs), names), kernel)[1](toward)[0]

    expected = jnp.tensordot(x * x, toward, axes=((0, 1), (0, 1)))
    np.testing.assert_allclose(gradient(x, kernel, toward), expected, rtol=1e-4, atol=1e-4)
    compiled = gradient.lower(x, kernel, toward).compile().as_text()
    assert "f32[96,600]{1,0}" not in compiled
    assert "f32[600,96]{0,1}" not in compiled


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_logits_are_float32_and_their_gradients_those_that_follow(dtype):
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (2, 30, 24), dtype)
    head = jax.random.normal(keys[1], (24, 50), dtype)
    toward = jax.random.normal(keys[2], (2, 30, 50))

    out, back = jax.vjp(jax.jit(logits), hidden, head)
    expected, expected_back = jax.vjp(
        lambda x, w: x @ w, *(a.astype("float32") for a in (hidden, head))
    )
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
    for got, want in zip(back(toward), expected_back(toward), strict=True):
        assert got.dtype == dtype
        rounding = (
            {"rtol": 2**-7, "atol": 0.1} if dtype == jnp.bfloat16 else {"rtol": 1e-5, "atol": 1e-4}
        )
        np.testing.assert_allclose(got.astype("float32"), want, **rounding)
