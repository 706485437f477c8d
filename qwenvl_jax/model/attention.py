"""One attention for every part: who may look at whom, and the backends that compute it.

Axes: B rows (pictures, in the tower)  T queries  S keys  N heads  H head dimension.
All backends obey one contract, tested in `tests/test_attention.py`: causal order, segments,
padding, rows that may look at nothing (their output is zero), and gradients.
"""

from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from qwenvl_jax import axes
from qwenvl_jax.config import AttentionBackend, ConfigError, ModelConfig
from qwenvl_jax.model.layers import Dense
from qwenvl_jax.model.splash import splash_attention
from qwenvl_jax.model.xla_attention import xla_attention
from qwenvl_jax.sharding import constrain, context_platform

CHUNK = 512  # keys whose scores `xla_chunked` holds at once
STRIP = 128  # queries, at least, that leave out the same later keys
MAX_STRIPS = 4  # the work is then 5/8 of all scores; each is compiled apart
CUDNN_BYTES = 2  # widest number that cuDNN's kernel takes
CUDNN_HEAD_MULTIPLE = 8


class Backend(NamedTuple):
    """What computes the sum, and how much of it at once."""

    name: AttentionBackend
    block: int = 512  # queries and keys; `splash` only


class AttentionMask(NamedTuple):
    """Query t may look at key s when the segments agree, are not 0, and s is not later.

    A causal mask needs segments and positions, another one segments or nothing; without segments
    everyone sees everyone. Segment 0 is padding: it looks at nothing and nobody looks at it. Within
    a segment positions grow with the index, so one rule serves packed rows and cached decoding
    alike.
    """

    is_causal: bool = False
    q_segment_BT: Int[Array, "B T"] | None = None
    kv_segment_BS: Int[Array, "B S"] | None = None
    q_position_BT: Int[Array, "B T"] | None = None
    kv_position_BS: Int[Array, "B S"] | None = None

    @property
    def is_among_themselves(self) -> bool:
        """Whether queries and keys are the same tokens: order is then order of index."""
        return self.q_segment_BT is self.kv_segment_BS and self.q_position_BT is self.kv_position_BS

    def keep_BTS(self) -> jax.Array | None:
        """Returns bool [B, T, S], True where a query may look, or None when it always may."""
        self.check()
        if self.q_segment_BT is None or self.kv_segment_BS is None:
            return None
        q_segment, kv_segment = self.q_segment_BT[:, :, None], self.kv_segment_BS[:, None, :]
        keep = (q_segment == kv_segment) & (q_segment > 0)
        if self.is_causal and self.q_position_BT is not None and self.kv_position_BS is not None:
            keep &= self.kv_position_BS[:, None, :] <= self.q_position_BT[:, :, None]
        return keep

    def check(self) -> None:
        """Raises ValueError where a causal mask lacks segments or positions."""
        if not self.is_causal:
            return
        if self.q_segment_BT is None or self.kv_segment_BS is None:
            raise ValueError("a causal mask needs segments and positions: got no segments")
        if self.q_position_BT is None or self.kv_position_BS is None:
            raise ValueError("a causal mask needs segments and positions: got no positions")


def attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BSNH: Float[Array, "B S N H"],
    v_BSNH: Float[Array, "B S N H"],
    mask: AttentionMask,
    *,
    backend: AttentionBackend | Backend,
) -> Float[Array, "B T N H"]:
    """Returns softmax(q k / sqrt(H)) v in the dtype of `q`; scores and softmax are float32.

    "auto" is `splash` on TPUs and `xla_chunked` elsewhere. `splash` leaves queries against a cache
    to plain XLA, in chunks of keys: the kernel knows order by index only.

    Raises:
        ValueError: the mask lacks what its rule needs, or the backend cannot compute this here.
    """
    backend = backend if isinstance(backend, Backend) else Backend(backend)
    name = chosen(backend.name)
    if name == "splash" and mask.is_among_themselves:
        mask.check()
        return splash_attention(
            q_BTNH,
            k_BSNH,
            v_BSNH,
            mask.q_segment_BT,
            mask.kv_segment_BS,
            is_causal=mask.is_causal,
            block=backend.block,
        )
    if name == "cudnn":
        return _cudnn(q_BTNH, k_BSNH, v_BSNH, mask)
    # The scores of one query are few.
    chunk = k_BSNH.shape[1] if name == "xla" or q_BTNH.shape[1] == 1 else CHUNK
    keep_BTS = mask.keep_BTS()
    if mask.is_causal and keep_BTS is not None and mask.is_among_themselves:
        return _in_strips(q_BTNH, k_BSNH, v_BSNH, keep_BTS, chunk)
    return xla_attention(q_BTNH, k_BSNH, v_BSNH, keep_BTS, chunk)


def check_backend(config: ModelConfig, platform: str) -> None:
    """Raises ConfigError where a model's backend cannot compute on "cpu", "gpu" or "tpu"."""
    name = config.attention_backend
    if name == "splash" and platform != "tpu":
        raise ConfigError(
            f"attention_backend 'splash' needs a TPU: got {platform}, where jax can only interpret "
            "its kernel, if at all, many times slower than any other; use 'auto'"
        )
    if name == "cudnn":
        vision, decoder = config.vision, config.decoder
        heads = vision.width // vision.num_heads, decoder.width // config.adapter.num_heads
        for head_dim in (*heads, decoder.head_dim):
            _check_cudnn(platform, jnp.dtype(config.dtype), head_dim)


def _check_cudnn(platform: str, dtype: Any, head_dim: int) -> None:
    """Raises ConfigError for no GPU, a dtype of more than 16 bits, or an odd head dimension."""
    if platform != "gpu":
        raise ConfigError(
            f"attention_backend 'cudnn' needs an NVIDIA GPU: got {platform}; use 'auto'"
        )
    if dtype.itemsize > CUDNN_BYTES or head_dim % CUDNN_HEAD_MULTIPLE:
        raise ConfigError(
            "attention_backend 'cudnn' needs 16-bit numbers and heads of a multiple of "
            f"{CUDNN_HEAD_MULTIPLE}: got {dtype} and {head_dim}; use 'xla_chunked', or dtype "
            "bfloat16"
        )


def _in_strips(
    q_BTNH: jax.Array, k_BSNH: jax.Array, v_BSNH: jax.Array, keep_BTT: jax.Array, chunk: int
) -> jax.Array:
    """Attention that is causal by index: each strip of queries sees no key after its own."""
    T = q_BTNH.shape[1]
    count = max(1, min(MAX_STRIPS, T // STRIP))
    ends = [T * (i + 1) // count for i in range(count)]

    def strip(start: int, end: int) -> Any:
        q, k, v = q_BTNH[:, start:end], k_BSNH[:, :end], v_BSNH[:, :end]
        return xla_attention(q, k, v, keep_BTT[:, start:end, :end], chunk)

    return jnp.concatenate([strip(*edges) for edges in pairwise([0, *ends])], axis=1)


def chosen(name: AttentionBackend) -> AttentionBackend:
    """Returns the backend that "auto" stands for where this will run; any other as it is."""
    if name != "auto":
        return name
    return "splash" if context_platform() == "tpu" else "xla_chunked"


def _cudnn(q_BTNH: jax.Array, k_BSNH: jax.Array, v_BSNH: jax.Array, mask: AttentionMask):
    """The kernel of NVIDIA's cuDNN. The mask goes in whole, as bool [B, 1, T, S].

    cuDNN's own causal flag and lengths know nothing of packed samples, and would let them see each
    other.

    Raises: ConfigError for what cuDNN refuses.
    """
    _check_cudnn(context_platform(), q_BTNH.dtype, q_BTNH.shape[-1])
    keep_BTS = mask.keep_BTS()
    keep_B1TS = None if keep_BTS is None else keep_BTS[:, None]
    out_BTNH = jax.nn.dot_product_attention(
        q_BTNH, k_BSNH, v_BSNH, mask=keep_B1TS, implementation="cudnn"
    )
    if keep_BTS is not None:
        out_BTNH = jnp.where(keep_BTS.any(axis=-1)[:, :, None, None], out_BTNH, 0)
    return out_BTNH


class Projections(nnx.Module):
    """The four matrices of one multi-head attention; the parts wire them up themselves."""

    def __init__(
        self,
        width: tuple[str, int],
        num_heads: tuple[str, int],
        head_dim: int,
        *,
        out_bias: bool,
        out_scale: float,
        dtype: str,
        rngs: nnx.Rngs,
    ):
        """`width` and `num_heads` are (logical axis, size)."""
        self.heads = num_heads[0]
        inputs = dict([width])
        heads = dict([num_heads, (axes.HEAD_DIM, head_dim)])
        self.q_proj = Dense(inputs, heads, use_bias=True, dtype=dtype, rngs=rngs)
        self.k_proj = Dense(inputs, heads, use_bias=True, dtype=dtype, rngs=rngs)
        self.v_proj = Dense(inputs, heads, use_bias=True, dtype=dtype, rngs=rngs)
        self.o_proj = Dense(
            heads, inputs, use_bias=out_bias, dtype=dtype, rngs=rngs, scale=out_scale
        )

    def qkv(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns queries, keys and values of the same tokens, rows and heads split as tabled."""
        q, k, v = (
            constrain(proj(x), axes.BATCH, None, self.heads, None)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        return q, k, v
