"""The vision tower: pictures to patch features.

Axes: I pictures  Y X C pixels  P patches  R pixels of a patch  E width  M MLP width  N heads
H head dimension  G patches on a side of the picture.

An OpenCLIP ViT without class token and without a final norm: the last block's output goes to the
adapter (paper 2.1; released `visual.py`). Attention is over the whole picture, or, in most blocks,
over windows (the ablation in paper E.3).
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, UInt8

from qwenvl_jax import axes
from qwenvl_jax.config import AttentionBackend, RematPolicy, VisionConfig
from qwenvl_jax.model.attention import AttentionMask, Backend, Projections, attention
from qwenvl_jax.model.layers import Dense, LayerNorm, scan_layers, stack_layers
from qwenvl_jax.sharding import constrain

# Mean and deviation of RGB that CLIP was trained with.
PIXEL_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
PIXEL_STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)

# Reciprocals of what a wave of normalised pixels has on average in a patch: fitted to drawn scenes.
MEAN_GAIN = 0.06  # of the patch's mean
WAVE_GAIN, WAVE_SLOPE = 0.22, 1.8  # of a wave with one half period a patch; and its growth
WAVE_LIMIT = 6.0  # below this is noise


def normalize_pixels(image_IYXC: jax.Array, dtype: str) -> jax.Array:
    """Returns uint8 pixels as CLIP saw them: zero mean, unit deviation, float."""
    # In float32 up to the end: bf16 holds 8 bits, and the pixels use all of theirs.
    unit = image_IYXC.astype(jnp.float32) / 255.0
    return ((unit - PIXEL_MEAN) / PIXEL_STD).astype(dtype)


def to_patches(image_IYXC: jax.Array, patch_size: int) -> jax.Array:
    """Returns [I, P, R]: patches row by row, each as (y, x, channel) pixels.

    Raises:
        ValueError: the picture is not square, or its side is no multiple of the patch size.
    """
    I, Y, X, C = image_IYXC.shape
    if Y != X or Y % patch_size:
        raise ValueError(
            f"pictures must be square with a side that is a multiple of {patch_size}: got {Y}x{X}; "
            "resize them first (qwenvl_jax.image.to_square)"
        )
    G = Y // patch_size
    grid = image_IYXC.reshape(I, G, patch_size, G, patch_size, C).swapaxes(2, 3)
    return grid.reshape(I, G * G, patch_size * patch_size * C)


def patch_waves(patch_size: int, num_waves: int) -> np.ndarray:
    """Returns float32 [R, W]: the longest waves that fit a patch, weighed to come out alike.

    Cosines along rows times cosines along columns, of brightness and of two colour contrasts. In
    pictures short waves are weak: each is divided by what it has on average there, as whitening
    does, so that edges and corners count beside the mean colour.
    """
    place = (np.arange(patch_size) + 0.5) * np.pi / patch_size
    cosine = np.cos(np.arange(patch_size)[:, None] * place)  # [wave, place]
    cosine /= np.linalg.norm(cosine, axis=1, keepdims=True)
    contrast = np.array([[1, 1, 1], [1, -1, 0], [1, 1, -2]], np.float64)
    contrast /= np.linalg.norm(contrast, axis=1, keepdims=True)
    along = np.arange(patch_size)
    rate = np.hypot(along[:, None], along)[..., None] + np.zeros(3)
    # Colour contrasts are worth less than brightness of the same wave length.
    order = np.argsort((rate + 2.0 * (np.arange(3) > 0)).ravel(), kind="stable")[:num_waves]
    waves = np.einsum("uy,vx,wc->yxcuvw", cosine, cosine, contrast)
    weight = np.minimum(WAVE_GAIN * rate**WAVE_SLOPE, WAVE_LIMIT)
    weight[0, 0] = MEAN_GAIN
    weighed = (waves * weight).reshape(patch_size**2 * 3, -1)
    return weighed[:, order].astype(np.float32)


def wave_rates(width: int) -> np.ndarray:
    """Returns float64 [width / 4]: radians from one place to the next, of each wave of an axis."""
    return 10_000.0 ** -(np.arange(width // 4, dtype=np.float64) / (width // 4))


def sine_table(side: int, width: int) -> np.ndarray:
    """Returns float32 [side * side, width]: half the channels for x, half for y, sines first.

    >>> sine_table(2, 4)[1].round(2)  # row 0, column 1: x = 1, y = 0
    array([0.84, 0.54, 0.  , 1.  ], dtype=float32)

    Raises:
        ValueError: the width does not split into four equal parts.
    """
    if width % 4:
        raise ValueError(f"the width of a sine table must be a multiple of 4: got {width}")
    rate = wave_rates(width)
    y, x = np.meshgrid(np.arange(side), np.arange(side), indexing="ij")
    halves = []
    for place in (x, y):  # the release puts the column first
        angle = place.reshape(-1, 1) * rate
        halves += [np.sin(angle), np.cos(angle)]
    return np.concatenate(halves, axis=1).astype(np.float32)


def resize_table(table_PE: jax.Array, num_patches: int) -> jax.Array:
    """Returns a square position table resized to another square grid, in float32.

    As PyTorch's bicubic does it with align_corners=False and no antialias, which is what the
    weights were trained with, at 448 pixels and beyond.
    """
    old, new = round(table_PE.shape[0] ** 0.5), round(num_patches**0.5)
    table = table_PE.astype(jnp.float32)
    if old == new:
        return table
    square = table.reshape(old, old, -1)
    square = jax.image.resize(
        square, (new, new, square.shape[-1]), jax.image.ResizeMethod.CUBIC_PYTORCH, antialias=False
    )
    return square.reshape(new * new, -1)


class Block(nnx.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: VisionConfig, dtype: str, rngs: nnx.Rngs):
        E, M, N = config.width, config.mlp_dim, config.num_heads
        out_scale = (2 * config.num_layers) ** -0.5  # keeps the residual sum at unit scale
        self.ln_1 = LayerNorm(axes.VIT_EMBED, E, eps=config.norm_eps, dtype=dtype)
        self.attn = Projections(
            (axes.VIT_EMBED, E),
            (axes.VIT_HEADS, N),
            E // N,
            out_bias=True,
            out_scale=out_scale,
            dtype=dtype,
            rngs=rngs,
        )
        self.ln_2 = LayerNorm(axes.VIT_EMBED, E, eps=config.norm_eps, dtype=dtype)
        width, hidden = {axes.VIT_EMBED: E}, {axes.VIT_MLP: M}
        self.mlp = nnx.Dict(
            up_proj=Dense(width, hidden, use_bias=True, dtype=dtype, rngs=rngs),
            down_proj=Dense(hidden, width, use_bias=True, dtype=dtype, rngs=rngs, scale=out_scale),
        )

    def attend(self, x_IPE: jax.Array, mask: AttentionMask, backend: AttentionBackend | Backend):
        out_IPNH = attention(*self.attn.qkv(x_IPE), mask, backend=backend)
        return self.attn.o_proj(out_IPNH)

    def feed_forward(self, x_IPE: jax.Array) -> jax.Array:
        hidden_IPM = constrain(self.mlp.up_proj(x_IPE), axes.BATCH, None, axes.VIT_MLP)
        return self.mlp.down_proj(jax.nn.gelu(hidden_IPM, approximate=False))


def to_windows(x_IPE: jax.Array, side: int) -> tuple[jax.Array, jax.Array]:
    """Returns windows [I * windows, side * side, E] and their segments: 1 a patch, 0 padding."""
    I, P, E = x_IPE.shape
    G = round(P**0.5)
    num = -(-G // side)
    pad = num * side - G

    def split(grid_IGGE):
        padded = jnp.pad(grid_IGGE, ((0, 0), (0, pad), (0, pad), (0, 0)))
        windows = padded.reshape(-1, num, side, num, side, padded.shape[-1]).swapaxes(2, 3)
        return windows.reshape(-1, side * side, padded.shape[-1])

    segment = split(jnp.ones((1, G, G, 1), jnp.int32))[..., 0]
    return split(x_IPE.reshape(I, G, G, E)), jnp.tile(segment, (I, 1))


def from_windows(x: jax.Array, num_patches: int, side: int) -> jax.Array:
    """Returns [I, P, E] again, the padding dropped: the inverse of `to_windows`."""
    G = round(num_patches**0.5)
    num = -(-G // side)
    grid = x.reshape(-1, num, num, side, side, x.shape[-1]).swapaxes(2, 3)
    grid = grid.reshape(-1, num * side, num * side, x.shape[-1])[:, :G, :G]
    return grid.reshape(-1, num_patches, x.shape[-1])


class ViT(nnx.Module):
    """uint8 pictures [I, Y, X, C] -> patch features [I, P, E]."""

    def __init__(self, config: VisionConfig, param_dtype: str, *, rngs: nnx.Rngs):
        E, R = config.width, config.patch_size**2 * 3
        self.config = config
        self.patch_embed = Dense(
            {axes.PATCH: R}, {axes.VIT_EMBED: E}, use_bias=False, dtype=param_dtype, rngs=rngs
        )
        # Trained from here on. Drawn at random, a patch is little more than its mean colour, and
        # what tells shapes apart stays hidden under it.
        waves_RW = jnp.asarray(patch_waves(config.patch_size, min(R, E)))
        mix_WE = jax.random.orthogonal(rngs.params(), waves_RW.shape[1], m=E)
        self.patch_embed.kernel = nnx.Param(
            (waves_RW @ mix_WE).astype(param_dtype), axes=self.patch_embed.kernel.axes
        )
        # Trained from here on. Started as waves, places are told apart and ordered from the first
        # step, at every picture size; twice as strong, they are not drowned by the pixels.
        self.position_embed = nnx.Param(
            jnp.asarray(2 * sine_table(config.table_side, E), param_dtype),
            axes=(axes.VIT_POSITION, axes.VIT_EMBED),
        )
        self.ln_pre = LayerNorm(axes.VIT_EMBED, E, eps=config.norm_eps, dtype=param_dtype)
        self.blocks = stack_layers(
            lambda rngs: Block(config, param_dtype, rngs), config.num_layers, rngs
        )

    def embed(self, image_IYXC: UInt8[Array, "I Y X C"], dtype: str) -> jax.Array:
        """Returns what enters the first block [I, P, E]: patches, positions, first norm."""
        patch_IPR = to_patches(normalize_pixels(image_IYXC, dtype), self.config.patch_size)
        x_IPE = self.patch_embed(patch_IPR)
        table_PE = resize_table(self.position_embed[...], x_IPE.shape[1])
        x_IPE = constrain(x_IPE + table_PE.astype(x_IPE.dtype), axes.BATCH, None, None)
        return self.ln_pre(x_IPE)

    def __call__(
        self,
        image_IYXC: UInt8[Array, "I Y X C"],
        *,
        dtype: str,
        backend: AttentionBackend | Backend,
        remat: RematPolicy,
    ) -> Float[Array, "I P E"]:
        x_IPE = self.embed(image_IYXC, dtype)
        P, side = x_IPE.shape[1], self.config.window_side
        has_windows = self.config.attention == "window" and P > side * side

        def everywhere(layer: Block, x_IPE):
            return layer.attend(x_IPE, AttentionMask(), backend)

        def in_windows(layer: Block, x_IPE):
            windows, segment = to_windows(x_IPE, side)
            mask = AttentionMask(q_segment_BT=segment, kv_segment_BS=segment)
            return from_windows(layer.attend(windows, mask, backend), P, side)

        def step(layer: Block, x_IPE, is_global):
            y_IPE = layer.ln_1(x_IPE)
            if has_windows:
                # One branch runs; both are compiled once for all blocks.
                x_IPE += jax.lax.cond(
                    is_global,
                    lambda y: everywhere(layer, y),
                    lambda y: in_windows(layer, y),
                    y_IPE,
                )
            else:
                x_IPE += everywhere(layer, y_IPE)
            x_IPE += layer.feed_forward(layer.ln_2(x_IPE))
            return constrain(x_IPE, axes.BATCH, None, None)

        K, every = self.config.num_layers, self.config.global_every
        is_global_K = jnp.arange(K) % every == every - 1
        return scan_layers(self.blocks, step, x_IPE, remat=remat, per_layer=(is_global_K,))
