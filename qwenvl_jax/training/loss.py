"""The next-token loss, without ever holding the logits of all tokens.

Axes: B batch rows, L text length, D text width, V vocabulary rows.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qwenvl_jax import axes
from qwenvl_jax.data.example import NO_TASK, TASKS, Batch
from qwenvl_jax.model.products import logits
from qwenvl_jax.sharding import constrain, context_platform


def next_token_loss(
    hidden_BLD: jax.Array,
    lm_head_DV: jax.Array,
    targets_BL: jax.Array,
    weight_BL: jax.Array,
    chunk: int,
) -> jax.Array:
    """Returns float32 [B, L]: the cross-entropy of each target times its weight.

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
        return _chunk_loss(hidden_BLD, lm_head_DV, targets_BL, weight_BL)

    def cut(x: jax.Array) -> jax.Array:
        padding = [(0, 0)] * x.ndim
        padding[1] = (0, num_chunks * step - length)  # weight 0, so padding scores nothing
        x = jnp.pad(x, padding).reshape(num_rows, num_chunks, step, *x.shape[2:])
        return jnp.moveaxis(x, 1, 0)

    # prevent_cse guards against the compiler merging the recomputation away, which it cannot do
    # inside a scan.
    chunk_loss = jax.checkpoint(_chunk_loss, prevent_cse=False)

    def body(carry, part):
        hidden, targets, weight = part
        return carry, chunk_loss(hidden, lm_head_DV, targets, weight)

    parts = (cut(hidden_BLD), cut(targets_BL), cut(weight_BL))
    _, losses = jax.lax.scan(body, None, parts)
    return jnp.moveaxis(losses, 0, 1).reshape(num_rows, -1)[:, :length]


def _chunk_loss(
    hidden_BLD: jax.Array, lm_head_DV: jax.Array, targets_BL: jax.Array, weight_BL: jax.Array
) -> jax.Array:
    """Returns the weighted cross-entropies of one chunk of positions."""
    logits_BLV = constrain(logits(hidden_BLD, lm_head_DV), axes.BATCH, None, axes.VOCAB)
    loss_BL = jax.nn.logsumexp(logits_BLV, axis=-1) - _logit_of(logits_BLV, targets_BL)
    return loss_BL * weight_BL


@jax.custom_vjp
def _logit_of(logits_BLV: jax.Array, targets_BL: jax.Array) -> jax.Array:
    """Returns each target's logit [B, L]."""
    if context_platform() == "cpu":
        return jnp.take_along_axis(logits_BLV, targets_BL[..., None], axis=-1)[..., 0]
    # A comparison stays local when the vocabulary is split over devices.
    return jnp.where(_is_target(logits_BLV, targets_BL), logits_BLV, 0.0).sum(axis=-1)


def _logit_of_forward(logits_BLV, targets_BL):
    return _logit_of(logits_BLV, targets_BL), (logits_BLV, targets_BL)


def _logit_of_backward(residuals, grad_BL):
    # A comparison on every platform: that of a gather would be a scatter.
    return jnp.where(_is_target(*residuals), grad_BL[..., None], 0.0), None


_logit_of.defvjp(_logit_of_forward, _logit_of_backward)


def _is_target(logits_BLV: jax.Array, targets_BL: jax.Array) -> jax.Array:
    return targets_BL[..., None] == jnp.arange(logits_BLV.shape[-1])


class Sums(NamedTuple):
    """Sums over the scored tokens of some rows, float32; micro-batches are joined by adding them.

    Not means: micro-batches with few scored tokens then count for as much as they hold.
    """

    loss: jax.Array  # []
    weight: jax.Array  # []
    task_loss: jax.Array  # [tasks], in the order of `TASKS`
    task_weight: jax.Array  # [tasks]


def sum_up(loss_BL: jax.Array, batch: Batch) -> Sums:
    """Returns the sums of weighted losses, in all and by task; without tasks the latter are 0."""
    task_BL = jnp.full(loss_BL.shape, NO_TASK) if batch.task is None else batch.task
    # A comparison with every task instead of a scatter: few tasks, and it joins the sum above.
    is_task = task_BL == jnp.arange(len(TASKS))[:, None, None]

    def by_task(x_BL: jax.Array) -> jax.Array:
        return jnp.where(is_task, x_BL, 0.0).sum((1, 2))

    weight_BL = jnp.asarray(batch.loss_weight, jnp.float32)
    return Sums(loss_BL.sum(), weight_BL.sum(), by_task(loss_BL), by_task(weight_BL))


def no_sums() -> Sums:
    """Returns the sums over no rows."""
    zero, zeros = jnp.zeros((), jnp.float32), jnp.zeros(len(TASKS), jnp.float32)
    return Sums(zero, zero, zeros, zeros)


def by_task(task_loss: np.ndarray, task_weight: np.ndarray) -> dict[str, float]:
    """Returns the columns of the tasks that were scored: `loss/vqa`, `scored_tokens/vqa`, ..."""
    scored = [(name, i) for i, name in enumerate(TASKS) if task_weight[i] > 0]
    losses = {f"loss/{name}": float(task_loss[i] / task_weight[i]) for name, i in scored}
    return losses | {f"scored_tokens/{name}": float(task_weight[i]) for name, i in scored}
