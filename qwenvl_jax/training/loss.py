"""The next-token loss, without ever holding the logits of all tokens.

Axes: B batch rows, L text length, D text width, V vocabulary rows.
"""

import jax
import jax.numpy as jnp

from qwenvl_jax import axes
from qwenvl_jax.sharding import constrain


def next_token_loss(
    hidden_BLD: jax.Array,
    lm_head_DV: jax.Array,
    targets_BL: jax.Array,
    weight_BL: jax.Array,
    chunk: int,
) -> tuple[jax.Array, jax.Array]:
    """Returns (weighted sum of cross-entropies, sum of weights), two float32 scalars.

    The caller divides, because micro-batches are joined by their sums, not by their means.
    `chunk` is the number of tokens whose logits exist at once. The cut runs along L, so that rows
    split over devices stay where they are; one position of every row is the least there can be.
    The backward pass computes each chunk's logits again. Logits and logsumexp are float32 whatever
    the dtype of `hidden_BLD`. Targets with weight 0 are not looked at but must be valid ids.
    """
    num_rows, length, _ = hidden_BLD.shape
    step = min(length, max(1, chunk // num_rows))
    # Whole on every device before the loop, in the compute dtype: inside, it would be gathered, and
    # its gradient summed over devices, once a chunk.
    lm_head_DV = constrain(lm_head_DV.astype(hidden_BLD.dtype), None, axes.VOCAB)
    num_chunks = -(-length // step)
    if num_chunks == 1:
        return _chunk_loss(hidden_BLD, lm_head_DV, targets_BL, weight_BL), _total(weight_BL)

    def cut(x: jax.Array) -> jax.Array:
        padding = [(0, 0)] * x.ndim
        padding[1] = (0, num_chunks * step - length)  # weight 0, so padding scores nothing
        x = jnp.pad(x, padding).reshape(num_rows, num_chunks, step, *x.shape[2:])
        return jnp.moveaxis(x, 1, 0)

    # prevent_cse guards against the compiler merging the recomputation away, which it cannot do
    # inside a scan.
    chunk_loss = jax.checkpoint(_chunk_loss, prevent_cse=False)

    def body(total, part):
        hidden, targets, weight = part
        return total + chunk_loss(hidden, lm_head_DV, targets, weight), None

    parts = (cut(hidden_BLD), cut(targets_BL), cut(weight_BL))
    total, _ = jax.lax.scan(body, jnp.zeros((), jnp.float32), parts)
    return total, _total(weight_BL)


def _total(weight: jax.Array) -> jax.Array:
    return weight.astype(jnp.float32).sum()


def _chunk_loss(
    hidden_BLD: jax.Array, lm_head_DV: jax.Array, targets_BL: jax.Array, weight_BL: jax.Array
) -> jax.Array:
    """Returns the weighted sum of cross-entropies of one chunk of positions."""
    logits_BLV = jnp.einsum(
        "BLD,DV->BLV", hidden_BLD, lm_head_DV, preferred_element_type=jnp.float32
    )
    logits_BLV = constrain(logits_BLV, axes.BATCH, None, axes.VOCAB)
    # A comparison instead of a gather: its backward pass is no scatter, and it stays local when
    # the vocabulary is split over devices.
    is_target = targets_BL[..., None] == jnp.arange(logits_BLV.shape[-1])
    target_logit_BL = jnp.where(is_target, logits_BLV, 0.0).sum(axis=-1)
    loss_BL = jax.nn.logsumexp(logits_BLV, axis=-1) - target_logit_BL
    return (loss_BL * weight_BL).sum()
