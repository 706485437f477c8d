"""The language model: Qwen-7B, with a cache for decoding.

Axes: B rows  L new tokens  S cached slots  K layers  D width  N heads  H head dimension
F MLP width  V vocabulary.

Everything that depends on the caller's situation is an argument: positions, segments, the rotary
scale of each row, the cache. The module holds weights only.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from qwenvl_jax import axes
from qwenvl_jax.config import AttentionBackend, DecoderConfig, RematPolicy
from qwenvl_jax.model.attention import AttentionMask, Backend, Projections, attention
from qwenvl_jax.model.layers import Dense, RMSNorm, param, scan_layers, stack_layers
from qwenvl_jax.model.narrow import from_held, take, to_held
from qwenvl_jax.sharding import constrain, context_platform


class KVCache(NamedTuple):
    """Keys and values of what was read so far, for all layers.

    All rows write the same slots, so one slice update serves the batch. A row that is shorter than
    its neighbours has padding in between: segment 0 hides it, and `position` keeps the row's own
    count.
    """

    k_KBSNH: Array  # of `narrow.held_dtype`
    v_KBSNH: Array
    segment_BS: Int[Array, "B S"]  # 0: nothing there yet, or padding
    position_BS: Int[Array, "B S"]
    length: Int[Array, ""]  # the next free slot


def ntk_alpha(length_B: Float[Array, "B"] | Int[Array, "B"], seq_length: int) -> jax.Array:
    """Returns how much each row's rotary base grows, by the row's own length: float32 [B].

    1 up to the trained length, then 3 up to twice, 7 up to four times that length.
    Source: `modeling_qwen.py`, dynamic NTK. Differs: there, the padded length of the whole batch.
    """
    # Exact powers of two must not be pushed over the edge by a rounded logarithm.
    ratio_B = length_B / seq_length
    doublings_B = jnp.ceil(jnp.log2(ratio_B) - 1e-6)
    return jnp.maximum(2.0 ** (doublings_B + 1) - 1, 1.0).astype(jnp.float32)


def rotary_angles(
    position_BL: jax.Array, head_dim: int, base: float, ntk_alpha_B: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Returns float32 cosines and sines [B, L, 1, H / 2] of every position."""
    exponent = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    base_B = jnp.full((1,), base, jnp.float32)
    if ntk_alpha_B is not None:
        base_B = base * ntk_alpha_B ** (head_dim / (head_dim - 2))
    rate_BH = base_B[:, None] ** -exponent

    def turn(rate_BH: jax.Array) -> tuple[jax.Array, jax.Array]:
        angle_BLH = position_BL[..., None].astype(jnp.float32) * rate_BH[:, None, :]
        return jnp.cos(angle_BLH)[:, :, None], jnp.sin(angle_BLH)[:, :, None]

    num_rates, length = rate_BH.shape[-1], position_BL.shape[1]
    if context_platform() != "cpu" or length == 1 or num_rates % 2:
        return turn(rate_BH)
    # In unrolled layers XLA on a CPU would compute them again in every layer, for every head and in
    # both directions: it takes them into what they multiply, barrier or not, but no loop's result.
    halves = jax.lax.map(turn, jnp.stack(jnp.split(rate_BH, 2, axis=-1)))
    cos, sin = (jnp.concatenate([*half], axis=-1) for half in halves)
    return cos, sin


def rotate(x_BLNH: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Returns `x` turned by its position, first half of the head against second half."""
    # float32: a bf16 angle is wrong by whole turns at long positions.
    first, second = jnp.split(x_BLNH.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_BLNH.dtype)


def log_n(position_BL: jax.Array, seq_length: int) -> jax.Array:
    """Returns what multiplies each query: log(position + 1) in base seq_length, at least 1."""
    return jnp.maximum(jnp.log(position_BL + 1.0) / jnp.log(float(seq_length)), 1.0)


class Block(nnx.Module):
    """Pre-norm block: attention with biases on q, k, v only, and a SwiGLU MLP without biases."""

    def __init__(self, config: DecoderConfig, dtype: str, rngs: nnx.Rngs):
        D, F = config.width, config.mlp_dim
        out_scale = (2 * config.num_layers) ** -0.5
        self.ln_1 = RMSNorm(axes.EMBED, D, eps=config.norm_eps, dtype=dtype)
        self.attn = Projections(
            (axes.EMBED, D),
            (axes.HEADS, config.num_heads),
            config.head_dim,
            out_bias=False,
            out_scale=out_scale,
            dtype=dtype,
            rngs=rngs,
        )
        self.ln_2 = RMSNorm(axes.EMBED, D, eps=config.norm_eps, dtype=dtype)
        width, hidden = {axes.EMBED: D}, {axes.MLP: F}
        self.mlp = nnx.Dict(
            gate_proj=Dense(width, hidden, use_bias=False, dtype=dtype, rngs=rngs),
            up_proj=Dense(width, hidden, use_bias=False, dtype=dtype, rngs=rngs),
            down_proj=Dense(hidden, width, use_bias=False, dtype=dtype, rngs=rngs, scale=out_scale),
        )

    def finish(self, x_BLD: jax.Array, out_BLNH: jax.Array) -> jax.Array:
        """Returns the block's output, given what its attention found."""
        x_BLD += self.attn.o_proj(out_BLNH)
        x_BLD += self.feed_forward(self.ln_2(x_BLD))
        return constrain(x_BLD, axes.BATCH, None, None)

    def feed_forward(self, x_BLD: jax.Array) -> jax.Array:
        gate_BLF, up_BLF = self.mlp.gate_proj(x_BLD), self.mlp.up_proj(x_BLD)
        hidden_BLF = constrain(jax.nn.silu(gate_BLF) * up_BLF, axes.BATCH, None, axes.MLP)
        return self.mlp.down_proj(hidden_BLF)


class Decoder(nnx.Module):
    """Embeddings [B, L, D] -> hidden states [B, L, D]; embedding table and head belong to it."""

    def __init__(self, config: DecoderConfig, param_dtype: str, *, rngs: nnx.Rngs):
        D, V = config.width, config.vocab_size
        self.config = config
        self.embed = nnx.Dict(
            embedding=param((V, D), (axes.VOCAB, axes.EMBED), D**-0.5, param_dtype, rngs)
        )
        self.blocks = stack_layers(
            lambda rngs: Block(config, param_dtype, rngs), config.num_layers, rngs
        )
        self.ln_f = RMSNorm(axes.EMBED, D, eps=config.norm_eps, dtype=param_dtype)
        self.lm_head = Dense(
            {axes.EMBED: D}, {axes.VOCAB: V}, use_bias=False, dtype=param_dtype, rngs=rngs
        )

    def embed_tokens(self, tokens_BL: Int[Array, "B L"], dtype: str) -> jax.Array:
        # First as the table lies, then with its rows: the gradient goes the same way back, and is
        # added up where the table lies. Else XLA gathers a float32 table for it on every device.
        x_BLD = take(self.embed.embedding[...], tokens_BL).astype(dtype)
        x_BLD = constrain(x_BLD, axes.COPIES, None, axes.EMBED)
        return constrain(x_BLD, axes.BATCH, None, None)

    def __call__(
        self,
        x_BLD: Float[Array, "B L D"],
        position_BL: Int[Array, "B L"],
        segment_BL: Int[Array, "B L"],
        *,
        ntk_alpha_B: Float[Array, "B"] | None,
        cache: KVCache | None,
        backend: AttentionBackend | Backend,
        remat: RematPolicy,
    ) -> tuple[Float[Array, "B L D"], KVCache | None]:
        """Returns hidden states after the last norm, and the cache with the new tokens in it."""
        config = self.config
        cos, sin = rotary_angles(position_BL, config.head_dim, config.rope_base, ntk_alpha_B)
        logn_BL11 = None
        if ntk_alpha_B is not None and config.use_logn:
            logn_BL11 = log_n(position_BL, config.seq_length)[..., None, None]

        def project(layer: Block, x_BLD):
            y_BLD = layer.ln_1(x_BLD)
            q, k, v = layer.attn.qkv(y_BLD)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
            return q if logn_BL11 is None else q * logn_BL11.astype(q.dtype), k, v

        if cache is not None:
            x_BLD, cache = self._with_cache(x_BLD, position_BL, segment_BL, cache, project, backend)
            return self.ln_f(x_BLD), cache

        mask = AttentionMask(True, segment_BL, segment_BL, position_BL, position_BL)

        def step(layer: Block, x_BLD):
            return layer.finish(x_BLD, attention(*project(layer, x_BLD), mask, backend=backend))

        return self.ln_f(scan_layers(self.blocks, step, x_BLD, remat=remat)), None

    def _with_cache(
        self,
        x_BLD: jax.Array,
        position_BL: jax.Array,
        segment_BL: jax.Array,
        cache: KVCache,
        project: Callable,
        backend: AttentionBackend | Backend,
    ) -> tuple[jax.Array, KVCache]:
        """Returns what left the last block, and the cache with the new tokens written into it."""
        start = cache.length
        segment_BS = jax.lax.dynamic_update_slice(cache.segment_BS, segment_BL, (0, start))
        position_BS = jax.lax.dynamic_update_slice(cache.position_BS, position_BL, (0, start))
        mask = AttentionMask(True, segment_BL, segment_BS, position_BL, position_BS)

        def step(layer: Block, carry, layer_index):
            # The whole cache is carried, not sliced in and stacked out: the update stays in place.
            x_BLD, k_KBSNH, v_KBSNH = carry
            q, k, v = project(layer, x_BLD)
            where = (layer_index, 0, start, 0, 0)
            k, v = to_held(k[None], k_KBSNH.dtype), to_held(v[None], v_KBSNH.dtype)
            k_KBSNH = jax.lax.dynamic_update_slice(k_KBSNH, k, where)
            v_KBSNH = jax.lax.dynamic_update_slice(v_KBSNH, v, where)
            k, v = from_held(k_KBSNH[layer_index]), from_held(v_KBSNH[layer_index])
            out = attention(q, k, v, mask, backend=backend)
            return layer.finish(x_BLD, out), k_KBSNH, v_KBSNH

        x_BLD, k_KBSNH, v_KBSNH = scan_layers(
            self.blocks,
            step,
            (x_BLD, cache.k_KBSNH, cache.v_KBSNH),
            remat="none",
            per_layer=(jnp.arange(self.config.num_layers),),
        )
        length = start + x_BLD.shape[1]
        return x_BLD, KVCache(k_KBSNH, v_KBSNH, segment_BS, position_BS, length)
