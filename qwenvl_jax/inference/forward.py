"""Forward passes without a cache: pictures to features, prompts to the scores of every position.

Axes: B rows  L prompt length, padded  I pictures  Y X C picture rows, columns, channels
      Q adapter queries  D text width  V vocabulary rows.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from qwenvl_jax.config import ModelConfig
from qwenvl_jax.inference.generate import place, rotary_alpha
from qwenvl_jax.inference.prompts import Prompts

LOGITS_AT_ONCE = 256  # positions whose scores exist on the device at once


class Forward:
    """Compiled forward passes for one model on one mesh."""

    def __init__(self, config: ModelConfig, graphdef: nnx.GraphDef, state: nnx.State, mesh: Mesh):
        self._state, self._mesh = state, mesh
        self._encode = jax.jit(partial(_encode, graphdef))
        self._hidden = jax.jit(partial(_hidden, graphdef, config), static_argnames="is_training")
        self._scores = jax.jit(partial(_scores, graphdef), static_argnames="size")

    def encode(self, image_IYXC: np.ndarray) -> np.ndarray:
        """Returns the adapter's output [I, Q, D] in the compute dtype."""
        with jax.set_mesh(self._mesh):  # for kernels and constraints that name mesh axes only
            return np.asarray(self._encode(self._state, place(image_IYXC, self._mesh)))

    def logits(self, prompts: Prompts, *, is_training: bool) -> np.ndarray:
        """Returns float32 [length, V] of the first row, made piece by piece."""
        length = int(prompts.length_B[0])
        placed = place(prompts, self._mesh)
        with jax.set_mesh(self._mesh):
            hidden_BLD = self._hidden(self._state, placed, is_training=is_training)
        padded = hidden_BLD.shape[1]
        size = min(LOGITS_AT_ONCE, padded)
        pieces = []
        for first in range(0, length, size):
            begin = min(first, padded - size)  # the last piece overlaps: pieces have one size
            piece_LV = np.asarray(self._scores(self._state, hidden_BLD, np.int32(begin), size=size))
            pieces.append(piece_LV[first - begin : length - begin])
        return np.concatenate(pieces)


def _encode(graphdef: nnx.GraphDef, state: nnx.State, image_IYXC: jax.Array) -> jax.Array:
    return nnx.merge(graphdef, state).encode_images(image_IYXC)


def _hidden(
    graphdef: nnx.GraphDef,
    config: ModelConfig,
    state: nnx.State,
    prompts: Prompts,
    *,
    is_training: bool,
) -> jax.Array:
    """Returns hidden states after the last norm [B, L, D]."""
    is_real_BL = jnp.arange(prompts.tokens_BL.shape[1]) < prompts.length_B[:, None]
    hidden_BLD, _ = nnx.merge(graphdef, state)(
        prompts.tokens_BL,
        visual_BIQD=prompts.visual_BIQD,
        image_start_BI=prompts.image_start_BI,
        segment_BL=is_real_BL.astype(jnp.int32),
        ntk_alpha_B=None if is_training else rotary_alpha(prompts, config),
    )
    return hidden_BLD


def _scores(
    graphdef: nnx.GraphDef, state: nnx.State, hidden_BLD: jax.Array, begin: jax.Array, *, size: int
) -> jax.Array:
    """Returns the first row's logits [size, V] from position `begin`."""
    piece_BLD = jax.lax.dynamic_slice_in_dim(hidden_BLD, begin, size, axis=1)
    return nnx.merge(graphdef, state).logits(piece_BLD)[0]
