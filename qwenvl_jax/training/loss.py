"""The next-token loss: logits of scored tokens only, and never of all of them at once.

Axes: B batch rows, L text length, G devices that rows are split over, T tokens of one device, N the
same with padding, S tokens of a chunk, D text width, V vocabulary rows.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qwenvl_jax import axes
from qwenvl_jax.data.example import NO_TASK, TASKS, Batch
from qwenvl_jax.model.products import logits
from qwenvl_jax.sharding import constrain, context_platform, num_parts


def next_token_loss(
    hidden_BLD: jax.Array,
    lm_head_DV: jax.Array,
    targets_BL: jax.Array,
    weight_BL: jax.Array,
    chunk: int,
) -> tuple[jax.Array, jax.Array]:
    """Returns float32 (the sum of the losses, [], and the losses, [B, L], which have no gradient).

    A loss is the cross-entropy of a target times its weight. Those with a weight come first, and
    `chunk` is the number of tokens of a device whose logits exist at once: the loop ends with the
    last scored token of any device, so that pictures, prompts and padding cost no product with the
    head. What is differentiated makes its gradient in the same loop, from the same logits.
    Logits and logsumexp are float32 whatever the dtype of `hidden_BLD`. Targets with weight 0 are
    not looked at but must be valid ids.
    """
    num_rows, length, _ = hidden_BLD.shape
    # Whole on every device before the loop, in the compute dtype: inside, it would be gathered, and
    # its gradient summed over devices, once a chunk.
    lm_head_DV = constrain(lm_head_DV.astype(hidden_BLD.dtype), None, axes.VOCAB)
    groups = math.gcd(num_rows, num_parts(axes.BATCH, jax.sharding.get_abstract_mesh()))
    num_tokens = num_rows // groups * length
    chunk = min(chunk, num_tokens)

    def of_device(x: jax.Array) -> jax.Array:  # no token changes its device
        x = x.reshape(groups, num_tokens, *x.shape[2:])
        return constrain(x, axes.BATCH, *[None] * (x.ndim - 1))

    weight_GT = of_device(weight_BL)
    order_GT = jnp.argsort(weight_GT == 0, axis=1, stable=True)

    def ordered(x_GT: jax.Array) -> jax.Array:
        x_GT = jnp.take_along_axis(x_GT, order_GT, axis=1)
        return jnp.pad(x_GT, ((0, 0), (0, -num_tokens % chunk)))  # weight 0: it scores nothing

    tokens = _Ordered(
        source_GN=ordered(jnp.broadcast_to(jnp.arange(num_tokens), order_GT.shape)),
        place_GT=jnp.argsort(order_GT, axis=1),
        targets_GN=ordered(of_device(targets_BL)),
        weight_GN=ordered(weight_GT),
        num_chunks=-(-jnp.count_nonzero(weight_GT, axis=1).max() // chunk),
    )
    found: Any = _losses(of_device(hidden_BLD), lm_head_DV, tokens, chunk)
    total, losses_GT = found
    return total, losses_GT.reshape(num_rows, length)


class _Ordered(NamedTuple):
    """The tokens of each device, those with a weight first, up to whole chunks."""

    source_GN: jax.Array  # where each stood
    place_GT: jax.Array  # where each went
    targets_GN: jax.Array
    weight_GN: jax.Array
    num_chunks: jax.Array  # [], until no device has a scored token left


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _losses(
    hidden_GTD: jax.Array, lm_head_DV: jax.Array, tokens: _Ordered, chunk: int
) -> tuple[jax.Array, jax.Array]:
    """Returns (the sum of the losses, [], and the losses, [G, T])."""
    losses_GN, _ = _over_chunks(hidden_GTD, lm_head_DV, tokens, chunk, None)
    return losses_GN.sum(), _pick(losses_GN, tokens.place_GT)


def _losses_forward(hidden_GTD, lm_head_DV, tokens, chunk):
    # What a backward pass needs is made here: it would have to compute the logits again.
    zeros_GND = jnp.zeros((*tokens.source_GN.shape, hidden_GTD.shape[-1]), hidden_GTD.dtype)
    start = (zeros_GND, jnp.zeros_like(lm_head_DV))
    losses_GN, gradients = _over_chunks(hidden_GTD, lm_head_DV, tokens, chunk, start)
    of_hidden_GND, of_head_DV = gradients
    losses = losses_GN.sum(), _pick(losses_GN, tokens.place_GT)
    return losses, (_pick(of_hidden_GND, tokens.place_GT), of_head_DV)


def _losses_backward(chunk, gradients, of_results):
    of_sum, _ = of_results
    of_hidden_GTD, of_head_DV = (of_sum.astype(x.dtype) * x for x in gradients)
    return of_hidden_GTD, of_head_DV, None


_losses.defvjp(_losses_forward, _losses_backward)


def _over_chunks(
    hidden_GTD: jax.Array,
    lm_head_DV: jax.Array,
    tokens: _Ordered,
    chunk: int,
    gradients: tuple[jax.Array, jax.Array] | None,
) -> tuple[jax.Array, Any]:
    """Returns (losses [G, N], and gradients of their sum added to those given, if they are).

    Gradients are those of the hidden states [G, N, D], and of the head [D, V].
    """
    most = tokens.source_GN.shape[1] // chunk

    def goes_on(state):
        # The constant changes nothing; a plan, which knows no batch, reckons with it.
        return (state[0] < tokens.num_chunks) & (state[0] < most)

    def add_chunk(state):
        index, losses_GN, gradients = state
        cut = partial(jax.lax.dynamic_slice_in_dim, start_index=index * chunk, slice_size=chunk)
        source, targets, weight = (
            cut(x, axis=1) for x in (tokens.source_GN, tokens.targets_GN, tokens.weight_GN)
        )
        put = partial(jax.lax.dynamic_update_slice_in_dim, start_index=index * chunk, axis=1)
        loss = partial(_chunk_loss, targets_BL=targets, weight_BL=weight)
        hidden_GSD = _pick(hidden_GTD, source)
        if gradients is None:
            return index + 1, put(losses_GN, loss(hidden_GSD, lm_head_DV)), None
        losses_GS, pull = jax.vjp(loss, hidden_GSD, lm_head_DV)
        of_hidden, of_head = pull(jnp.ones_like(losses_GS))
        gradients = put(gradients[0], of_hidden), gradients[1] + of_head
        return index + 1, put(losses_GN, losses_GS), gradients

    start = (jnp.zeros((), jnp.int32), jnp.zeros(tokens.weight_GN.shape), gradients)
    return jax.lax.while_loop(goes_on, add_chunk, start)[1:]


def _pick(x: jax.Array, index_GS: jax.Array) -> jax.Array:
    """Returns the tokens of x [G, T, ...] at these places of their device."""
    index = index_GS.reshape(*index_GS.shape, *[1] * (x.ndim - 2))
    return jnp.take_along_axis(x, index, axis=1, mode="clip")


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

    def of_each(x_BL: jax.Array) -> jax.Array:
        return jnp.where(is_task, x_BL, 0.0).sum((1, 2))

    weight_BL = jnp.asarray(batch.loss_weight, jnp.float32)
    return Sums(loss_BL.sum(), weight_BL.sum(), of_each(loss_BL), of_each(weight_BL))


def no_sums() -> Sums:
    """Returns the sums over no rows."""
    zero, zeros = jnp.zeros((), jnp.float32), jnp.zeros(len(TASKS), jnp.float32)
    return Sums(zero, zero, zeros, zeros)


def by_task(task_loss: np.ndarray, task_weight: np.ndarray) -> dict[str, float]:
    """Returns the columns of the tasks that were scored: `loss/vqa`, `scored_tokens/vqa`, ..."""
    scored = [(name, i) for i, name in enumerate(TASKS) if task_weight[i] > 0]
    losses = {f"loss/{name}": float(task_loss[i] / task_weight[i]) for name, i in scored}
    return losses | {f"scored_tokens/{name}": float(task_weight[i]) for name, i in scored}
