"""The one contract that every attention backend obeys, against a sum written out in float64."""

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from qwenvl_jax import from_pretrained
from qwenvl_jax.config import ConfigError, MeshConfig, to_dict
from qwenvl_jax.model import attention as room
from qwenvl_jax.model.attention import AttentionMask, attention
from qwenvl_jax.sharding import make_mesh
from qwenvl_jax.training.loop import train

BACKENDS = ("xla", "xla_chunked", "splash", "cudnn")
B, T, N, H = 2, 11, 3, 5


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(room, "CHUNK", 4)  # 11 keys: three chunks, the last one padded
    monkeypatch.setattr(room, "STRIP", 3)  # 11 queries: strips of 3, 4 and 4


@pytest.fixture(autouse=True)
def cudnn_on_a_cpu(monkeypatch, request):
    """Has jax compute without a GPU what our call asks of cuDNN."""
    if "backend" not in request.fixturenames or request.getfixturevalue("backend") != "cudnn":
        return
    call = jax.nn.dot_product_attention

    def without_a_gpu(*args, implementation, **options):
        assert implementation == "cudnn"
        return call(*args, implementation="xla", **options)

    monkeypatch.setattr(room, "CUDNN_HEAD_MULTIPLE", 1)
    monkeypatch.setattr(room, "CUDNN_BYTES", 4)
    monkeypatch.setattr(room, "context_platform", lambda: "gpu")
    monkeypatch.setattr(jax.nn, "dot_product_attention", without_a_gpu)


def arrays(seed: int, keys: int = T):
    random = np.random.default_rng(seed)

    def draw(length: int) -> jax.Array:
        return jnp.asarray(random.standard_normal((B, length, N, H)), jnp.float32)

    return draw(T), draw(keys), draw(keys)


def by_hand(q, k, v, keep_BTS):
    """Returns the sum over allowed keys, one query at a time."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros(q.shape)
    for b, t, n in itertools.product(range(B), range(q.shape[1]), range(N)):
        seen = np.flatnonzero(keep_BTS[b, t])
        if len(seen):
            score = k[b, seen, n] @ q[b, t, n] / np.sqrt(H)
            weight = np.exp(score - score.max())
            out[b, t, n] = (weight / weight.sum()) @ v[b, seen, n]
    return out


def packed() -> tuple[AttentionMask, np.ndarray]:
    """Returns a causal mask of packed rows with padding, and the same rule spelled out."""
    segment = np.array([[1, 1, 1, 2, 2, 2, 2, 3, 0, 0, 0], [0, 0, 1, 1, 1, 1, 1, 1, 1, 2, 2]])
    position = np.array([[0, 1, 2, 0, 1, 2, 3, 0, 0, 1, 2], [0, 1, 0, 1, 2, 3, 4, 5, 6, 0, 1]])
    keep = np.zeros((B, T, T), bool)
    for b, t, s in itertools.product(range(B), range(T), range(T)):
        keep[b, t, s] = segment[b, t] == segment[b, s] != 0 and s <= t
    segment_BT, position_BT = jnp.array(segment), jnp.array(position)
    return AttentionMask(True, segment_BT, segment_BT, position_BT, position_BT), keep


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_a_mask_everyone_sees_everyone(backend):
    q, k, v = arrays(0, keys=9)
    out = attention(q, k, v, AttentionMask(), backend=backend)
    np.testing.assert_allclose(out, by_hand(q, k, v, np.ones((B, T, 9), bool)), atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_causal_segments_and_padding(backend):
    mask, keep = packed()
    q, k, v = arrays(1)
    out = attention(q, k, v, mask, backend=backend)
    np.testing.assert_allclose(out, by_hand(q, k, v, keep), atol=1e-6)
    assert np.all(np.asarray(out)[0, 8:] == 0), "padding queries must give exact zeros"


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_leaks_between_segments(backend):
    mask, _ = packed()
    q, k, v = arrays(2)
    before = np.asarray(attention(q, k, v, mask, backend=backend))
    k, v = k.at[0, 3:7].set(1e4), v.at[0, 3:7].set(-1e4)  # segment 2 of row 0
    after = np.asarray(attention(q, k, v, mask, backend=backend))
    np.testing.assert_array_equal(before[0, :3], after[0, :3])
    np.testing.assert_array_equal(before[0, 7:], after[0, 7:])
    np.testing.assert_array_equal(before[1], after[1])
    assert not np.allclose(before[0, 3:7], after[0, 3:7])


@pytest.mark.parametrize("backend", BACKENDS)
def test_queries_at_the_end_of_a_cache(backend):
    """One new token a row: rows of unequal length, with a hole of padding between old and new."""
    q, k, v = arrays(3, keys=8)
    kv_segment = jnp.array([[1, 1, 1, 0, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0, 0, 0]])
    kv_position = jnp.array([[0, 1, 2, 3, 3, 0, 0, 0], [0, 1, 2, 3, 4, 0, 0, 0]])
    mask = AttentionMask(
        True, jnp.ones((B, 1), int), kv_segment, jnp.array([[3], [4]]), kv_position
    )
    out = attention(q[:, :1], k, v, mask, backend=backend)
    expected = by_hand(q[:, :1], k, v, np.asarray(kv_segment, bool)[:, None])
    np.testing.assert_allclose(out, expected, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients(backend):
    mask, keep = packed()
    q, k, v = arrays(4)
    weight = jnp.asarray(np.random.default_rng(5).standard_normal(q.shape), jnp.float32)

    def simple(q, k, v):
        score = jnp.einsum("BTNH,BSNH->BNTS", q, k) / np.sqrt(H)
        top = jnp.exp(score) * keep[:, None]
        total = top.sum(-1, keepdims=True)
        share = top / jnp.where(total > 0, total, 1.0)
        return (jnp.einsum("BNTS,BSNH->BTNH", share, v) * weight).sum()

    def ours(q, k, v):
        return (attention(q, k, v, mask, backend=backend) * weight).sum()

    expected = jax.grad(simple, (0, 1, 2))(q, k, v)
    for got, want in zip(jax.grad(ours, (0, 1, 2))(q, k, v), expected, strict=True):
        assert np.isfinite(np.asarray(got)).all()
        np.testing.assert_allclose(got, want, atol=2e-6)


def test_later_keys_cost_nothing(monkeypatch):
    """What causal order hides from a whole strip of queries is left out, forwards and backwards."""
    monkeypatch.setattr(room, "STRIP", 64)
    length = 256
    ones, order = jnp.ones((1, length), int), jnp.arange(length)[None]
    x = jnp.ones((1, length, 2, 64))

    def flops(is_causal: bool) -> float:
        mask = AttentionMask(is_causal, ones, ones, order, order)

        def total(q, k, v):
            return attention(q, k, v, mask, backend="xla").sum()

        compiled = jax.jit(jax.grad(total, (0, 1, 2))).lower(x, x, x).compile()
        costs = compiled.cost_analysis()
        assert costs is not None
        return costs["flops"]

    assert flops(is_causal=True) < 0.7 * flops(is_causal=False)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_stays_bfloat16_and_close(backend):
    mask, keep = packed()
    q, k, v = arrays(6)
    out = attention(*(x.astype(jnp.bfloat16) for x in (q, k, v)), mask, backend=backend)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(out, np.float32), by_hand(q, k, v, keep), atol=3e-2)


def test_a_causal_mask_without_positions_is_refused():
    q, k, v = arrays(7)
    with pytest.raises(ValueError, match=r"causal mask needs .* got no segments"):
        attention(q, k, v, AttentionMask(True), backend="xla")
    ones = jnp.ones((B, T), int)
    with pytest.raises(ValueError, match=r"causal mask needs .* got no positions"):
        attention(q, k, v, AttentionMask(True, ones, ones), backend="xla")


def test_cudnn_is_refused_where_it_cannot_run(monkeypatch):
    q, k, v = arrays(8)
    with pytest.raises(ValueError, match=r"needs an NVIDIA GPU: got cpu"):
        attention(q, k, v, AttentionMask(), backend="cudnn")
    monkeypatch.setattr(room, "context_platform", lambda: "gpu")
    with pytest.raises(ValueError, match=r"16-bit numbers .* got float32 and 5"):
        attention(q, k, v, AttentionMask(), backend="cudnn")


def test_a_backend_that_cannot_compute_here_is_refused_before_anything_is_loaded(tmp_path):
    wide = tiny.model_config(dtype="bfloat16")
    room.check_backend(wide, "cpu")
    for name, platform, told in (
        ("splash", "cpu", "'splash' needs a TPU: got cpu, where jax can only interpret"),
        ("splash", "gpu", "'splash' needs a TPU: got gpu"),
        ("cudnn", "cpu", "needs an NVIDIA GPU: got cpu; use 'auto'"),
    ):
        config = dataclasses.replace(wide, attention_backend=name)
        with pytest.raises(ConfigError, match=told):
            room.check_backend(config, platform)
        if platform == "gpu":
            continue
        with pytest.raises(ConfigError, match=told):
            train(tiny.train_config(tmp_path / "run", model=config), devices=jax.devices()[:1])
        assert not (tmp_path / "run").exists()
        folder = tmp_path / name
        (folder / "checkpoints").mkdir(parents=True)  # a run, whose weights nobody reaches
        (folder / "config.json").write_text(json.dumps({"model": to_dict(config)}))
        with pytest.raises(ConfigError, match=f"{name}/config.json: .*{told}"):
            from_pretrained(folder)
    config = dataclasses.replace(wide, attention_backend="cudnn")
    room.check_backend(config, "gpu")
    with pytest.raises(ConfigError, match=r"16-bit numbers .* got float32 and 8"):
        room.check_backend(dataclasses.replace(config, dtype="float32"), "gpu")
    odd = dataclasses.replace(config.vision, width=12)
    with pytest.raises(ConfigError, match="heads of a multiple of 8: got bfloat16 and 6"):
        room.check_backend(dataclasses.replace(config, vision=odd), "gpu")
    room.check_backend(dataclasses.replace(wide, attention_backend="splash"), "tpu")


def test_auto_is_splash_on_a_tpu_only(monkeypatch):
    assert room.chosen("auto") == "xla_chunked"
    monkeypatch.setattr(room, "context_platform", lambda: "tpu")
    assert room.chosen("auto") == "splash"
    assert room.chosen("xla") == "xla"


def test_splash_on_a_mesh_gives_the_numbers_of_one_device():
    """Rows and heads over devices, two blocks, and the tower's 104 wide heads."""
    random = np.random.default_rng(10)
    q, k, v = (jnp.asarray(random.standard_normal((4, 130, 2, 104)), jnp.float32) for _ in "qkv")
    segment = jnp.asarray(np.sort(random.integers(0, 4, (4, 130)), axis=1))
    position = jnp.broadcast_to(jnp.arange(130), (4, 130))
    mask = AttentionMask(True, segment, segment, position, position)
    expected = attention(q, k, v, mask, backend="xla")
    with jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))):
        run = jax.jit(
            lambda q, k, v: attention(q, k, v, mask, backend=room.Backend("splash", block=128))
        )
        text = run.lower(q, k, v).as_text()
        got = run(q, k, v)
    assert "manual_computation" in text, "every device works on its own rows and heads"
    np.testing.assert_allclose(got, expected, atol=2e-6)
