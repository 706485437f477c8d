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
from qwenvl_jax.model.attention import AttentionMask, Backend, Projections, attention
from qwenvl_jax.model.layers import Buffer, Dense, LayerNorm, param
from qwenvl_jax.model.vit import resize_table, sine_table, wave_rates
from qwenvl_jax.sharding import constrain

SHORT_WAVE = 0.2  # radians from one query to the next: neighbours differ by more than a little
NEAR_GAIN = 5.0  # makes the next query's place about exp(-2) as likely as one's own


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
            out_bias=True,
            out_scale=1.0,
            dtype=param_dtype,
            rngs=rngs,
        )
        self._look_near_first(width)
        self.ln_post = LayerNorm(axes.EMBED, width, **norm)
        self.proj = Dense(
            {axes.EMBED: width},
            {axes.EMBED_OUT: width},
            use_bias=False,
            dtype=param_dtype,
            rngs=rngs,
        )

    def _look_near_first(self, width: int) -> None:
        """Sets the initial weights so that a query looks at the patches around its own place.

        Queries and keys start with the same matrix, and with little besides their positions, of
        which the waves short enough to tell neighbours apart count most. Drawn at random, as in the
        release, all queries see the same average of the picture and places must first be found:
        with a few thousand steps to spend, that is most of them. The norm behind the attention
        takes the small scale of the values out again.
        """
        is_short = np.tile(wave_rates(width) > SHORT_WAVE, 4)
        kernel_DNH = self.attn.q_proj.kernel[...]
        gain_D11 = np.where(is_short, NEAR_GAIN, 1.0)[:, None, None]
        kernel_DNH = (kernel_DNH * gain_D11).astype(kernel_DNH.dtype)  # NumPy's is float64
        for norm in (self.ln_q, self.ln_kv):
            norm.scale = nnx.Param(0.1 * norm.scale[...], axes=norm.scale.axes)
        for proj in (self.attn.q_proj, self.attn.k_proj):
            proj.kernel = nnx.Param(kernel_DNH, axes=proj.kernel.axes)

    def resample(
        self, x_IPE: Float[Array, "I P E"], *, backend: AttentionBackend | Backend
    ) -> jax.Array:
        """Returns [I, Q, D] after the cross-attention, before the last norm and matrix."""
        value_IPD = self.ln_kv(constrain(self.kv_proj(x_IPE), axes.BATCH, None, None))
        dtype = value_IPD.dtype
        table_QD = self.position_embed[...]
        key_IPD = value_IPD + resize_table(table_QD, x_IPE.shape[1]).astype(dtype)
        query_QD = self.ln_q(self.query[...].astype(dtype)) + table_QD.astype(dtype)
        q_QNH = self.attn.q_proj(query_QD)
        q_IQNH = jnp.broadcast_to(q_QNH, (x_IPE.shape[0], *q_QNH.shape))
        heads = (axes.BATCH, None, axes.HEADS, None)
        q_IQNH, k_IPNH, v_IPNH = (
            constrain(x, *heads)
            for x in (q_IQNH, self.attn.k_proj(key_IPD), self.attn.v_proj(value_IPD))
        )
        return self.attn.o_proj(attention(q_IQNH, k_IPNH, v_IPNH, AttentionMask(), backend=backend))

    def __call__(
        self, x_IPE: Float[Array, "I P E"], *, backend: AttentionBackend | Backend
    ) -> Float[Array, "I Q D"]:
        x_IQD = constrain(self.resample(x_IPE, backend=backend), axes.BATCH, None, None)
        return constrain(self.proj(self.ln_post(x_IQD)), axes.BATCH, None, None)
