"""The adapter: any number of patches to a fixed number of picture embeddings.

Axes: I pictures  P patches  E tower width  Q queries  D decoder width  N heads  H head dimension.

One cross-attention from learned queries, no residual and no MLP. Queries and keys carry a fixed
two-dimensional sine table, values carry no position (paper 2.1; released `Resampler`). The norm and
the square matrix behind it are in the release, not in the paper's description.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from qwenvl_jax import axes
from qwenvl_jax.config import AdapterConfig, AttentionBackend
from qwenvl_jax.model.attention import AttentionMask, Projections, attention
from qwenvl_jax.model.layers import Buffer, Dense, LayerNorm, param
from qwenvl_jax.model.vit import resize_table


def sine_table(side: int, width: int) -> np.ndarray:
    """Returns float32 [side * side, width]: half the channels for x, half for y, sines first.

    >>> sine_table(2, 4)[1].round(2)  # row 0, column 1: x = 1, y = 0
    array([0.84, 0.54, 0.  , 1.  ], dtype=float32)

    Raises:
        ValueError: the width does not split into four equal parts.
    """
    if width % 4:
        raise ValueError(f"the adapter's width must be a multiple of 4: got {width}")
    rate = 10_000.0 ** -(np.arange(width // 4, dtype=np.float64) / (width // 4))
    y, x = np.meshgrid(np.arange(side), np.arange(side), indexing="ij")
    halves = []
    for place in (x, y):  # the release puts the column first
        angle = place.reshape(-1, 1) * rate
        halves += [np.sin(angle), np.cos(angle)]
    return np.concatenate(halves, axis=1).astype(np.float32)


class Adapter(nnx.Module):
    """Patch features [I, P, E] -> picture embeddings [I, Q, D]."""

    def __init__(
        self,
        config: AdapterConfig,
        vision_width: int,
        width: int,
        param_dtype: str,
        *,
        rngs: nnx.Rngs,
    ):
        Q, N = config.num_queries, config.num_heads
        norm = {"eps": config.norm_eps, "dtype": param_dtype}
        self.query = param((Q, width), (axes.QUERY, axes.EMBED), 0.02, param_dtype, rngs)
        # Loaded from a checkpoint, not recomputed: the original fine-tuning script trains it.
        self.position_embed = Buffer(
            jnp.asarray(sine_table(round(Q**0.5), width), param_dtype),
            axes=(axes.QUERY, axes.EMBED),
        )
        self.kv_proj = Dense(
            {axes.VIT_EMBED: vision_width},
            {axes.EMBED_OUT: width},
            use_bias=False,
            dtype=param_dtype,
            rngs=rngs,
        )
        self.ln_q = LayerNorm(axes.EMBED, width, **norm)
        self.ln_kv = LayerNorm(axes.EMBED, width, **norm)
        self.attn = Projections(
            (axes.EMBED, width),
            (axes.HEADS, N),
            width // N,
            qkv_bias=True,
            out_bias=True,
            out_scale=1.0,
            dtype=param_dtype,
            rngs=rngs,
        )
        # Started as the same matrix, so that a query looks first at the patches around its own place:
        # equal positions then have the largest product. Drawn apart, this has to be learned before
        # anything can be seen. Differs: the release draws both.
        self.attn.k_proj.kernel = nnx.Param(
            self.attn.q_proj.kernel[...], axes=self.attn.k_proj.kernel.axes
        )
        self.ln_post = LayerNorm(axes.EMBED, width, **norm)
        self.proj = Dense(
            {axes.EMBED: width},
            {axes.EMBED_OUT: width},
            use_bias=False,
            dtype=param_dtype,
            rngs=rngs,
        )

    def resample(self, x_IPE: Float[Array, "I P E"], *, backend: AttentionBackend) -> jax.Array:
        """Returns [I, Q, D] after the cross-attention, before the last norm and matrix."""
        value_IPD = self.ln_kv(self.kv_proj(x_IPE))
        dtype = value_IPD.dtype
        table_QD = self.position_embed[...]
        key_IPD = value_IPD + resize_table(table_QD, x_IPE.shape[1]).astype(dtype)
        query_QD = self.ln_q(self.query[...].astype(dtype)) + table_QD.astype(dtype)
        q_QNH = self.attn.q_proj(query_QD)
        q_IQNH = jnp.broadcast_to(q_QNH, (x_IPE.shape[0], *q_QNH.shape))
        k_IPNH, v_IPNH = self.attn.k_proj(key_IPD), self.attn.v_proj(value_IPD)
        return self.attn.o_proj(attention(q_IQNH, k_IPNH, v_IPNH, AttentionMask(), backend=backend))

    def __call__(
        self, x_IPE: Float[Array, "I P E"], *, backend: AttentionBackend
    ) -> Float[Array, "I Q D"]:
        return self.proj(self.ln_post(self.resample(x_IPE, backend=backend)))
