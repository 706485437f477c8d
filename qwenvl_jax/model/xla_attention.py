"""Attention in plain XLA, walked in chunks of keys so that not all scores exist at once.

Axes: B rows  T queries  S keys  N heads  H head dimension.

The backward pass is written out: it needs the output and one number a query (the logarithm of the
sum of its exponentials), computes each chunk's scores once again, and multiplies in the compute
dtype. Derived, it would do the forward pass over, and multiply in float32.
Source: Rabe and Staats, arXiv 2112.05682; Dao et al., arXiv 2205.14135, algorithm 4.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

KEPT = "attention"  # name of what the backward pass needs, for what remat keeps
MASKED = -1e30  # finite: minus infinity would make NaN of a row that may look at nothing


class _Part(NamedTuple):
    k_BSNH: jax.Array
    v_BSNH: jax.Array
    keep_BTS: jax.Array | None


class _Seen(NamedTuple):
    """A softmax under way. Where a query has seen nothing, `top` is MASKED and the rest is void."""

    top_BNT: jax.Array  # the largest score
    total_BNT: jax.Array  # of exponentials of what scores are below it
    out_BTNH: jax.Array  # values times these exponentials


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def xla_attention(
    q_BTNH: jax.Array,
    k_BSNH: jax.Array,
    v_BSNH: jax.Array,
    keep_BTS: jax.Array | None,
    chunk: int,
) -> jax.Array:
    """Returns [B, T, N, H] in the dtype of `q`; without `keep_BTS` everyone sees everyone.

    `chunk` is the number of keys whose scores exist at once. Scores, softmax and sums are float32.
    A query that may look at nothing gets zeros.
    """
    return _forward(q_BTNH, k_BSNH, v_BSNH, keep_BTS, chunk)[0]


def _forward(q_BTNH, k_BSNH, v_BSNH, keep_BTS, chunk):
    B, T, N, H = q_BTNH.shape

    def look(part: _Part) -> tuple[_Seen, None]:
        score_BNTS = _scores(q_BTNH, part)
        top_BNT = score_BNTS.max(axis=-1)
        weight_BNTS = jnp.exp(score_BNTS - top_BNT[..., None])
        out_BTNH = _product("BNTS,BSNH->BTNH", weight_BNTS, part.v_BSNH)
        return _Seen(top_BNT, weight_BNTS.sum(axis=-1), out_BTNH), None

    nothing = _Seen(
        jnp.full((B, N, T), MASKED, jnp.float32),
        jnp.zeros((B, N, T), jnp.float32),
        jnp.zeros((B, T, N, H), jnp.float32),
    )
    whole = _Part(k_BSNH, v_BSNH, keep_BTS)
    (top_BNT, total_BNT, out_BTNH), _ = _walk(look, _join, nothing, whole, chunk)
    # A query that may look at nothing gets a sum so large that its weights are 0, in both passes.
    total_BNT = jnp.where(top_BNT > MASKED, total_BNT, jnp.inf)
    out_BTNH = (out_BTNH / _beside_heads(total_BNT)).astype(q_BTNH.dtype)
    log_BNT = top_BNT + jnp.log(total_BNT)
    out_BTNH, log_BNT = checkpoint_name(out_BTNH, KEPT), checkpoint_name(log_BNT, KEPT)
    return out_BTNH, (q_BTNH, k_BSNH, v_BSNH, keep_BTS, out_BTNH, log_BNT)


def _backward(chunk, residuals, grad_BTNH):
    q_BTNH, k_BSNH, v_BSNH, keep_BTS, out_BTNH, log_BNT = residuals
    wide = grad_BTNH.astype(jnp.float32) * out_BTNH.astype(jnp.float32)
    mean_BNT1 = jnp.swapaxes(wide.sum(axis=-1), 1, 2)[..., None]  # of the weights' gradients

    def look(part: _Part) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        weight_BNTS = jnp.exp(_scores(q_BTNH, part) - log_BNT[..., None])
        grad_v_BSNH = _product("BNTS,BTNH->BSNH", weight_BNTS, grad_BTNH)
        grad_weight_BNTS = _product("BTNH,BSNH->BNTS", grad_BTNH, part.v_BSNH)
        grad_score_BNTS = weight_BNTS * (grad_weight_BNTS - mean_BNT1) * q_BTNH.shape[-1] ** -0.5
        grad_k_BSNH = _product("BNTS,BTNH->BSNH", grad_score_BNTS, q_BTNH)
        grad_q_BTNH = _product("BNTS,BSNH->BTNH", grad_score_BNTS, part.k_BSNH)
        return grad_q_BTNH, (grad_k_BSNH.astype(k_BSNH.dtype), grad_v_BSNH.astype(v_BSNH.dtype))

    nothing = jnp.zeros(q_BTNH.shape, jnp.float32)
    whole = _Part(k_BSNH, v_BSNH, keep_BTS)
    grad_q, (grad_k, grad_v) = _walk(look, jnp.add, nothing, whole, chunk)
    return grad_q.astype(q_BTNH.dtype), grad_k, grad_v, None


xla_attention.defvjp(_forward, _backward)


def _join(a: _Seen, b: _Seen) -> _Seen:
    """Returns what both together have seen."""
    top_BNT = jnp.maximum(a.top_BNT, b.top_BNT)
    of_a, of_b = jnp.exp(a.top_BNT - top_BNT), jnp.exp(b.top_BNT - top_BNT)
    total_BNT = a.total_BNT * of_a + b.total_BNT * of_b
    out_BTNH = a.out_BTNH * _beside_heads(of_a) + b.out_BTNH * _beside_heads(of_b)
    return _Seen(top_BNT, total_BNT, out_BTNH)


def _scores(q_BTNH: jax.Array, part: _Part) -> jax.Array:
    score_BNTS = _product("BTNH,BSNH->BNTS", q_BTNH, part.k_BSNH) * q_BTNH.shape[-1] ** -0.5
    if part.keep_BTS is None:
        return score_BNTS
    return jnp.where(part.keep_BTS[:, None], score_BNTS, MASKED)


def _product(axes: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """Returns the float32 product of both in the narrower dtype of the two."""
    narrow = min(a.dtype, b.dtype, key=lambda dtype: dtype.itemsize)
    a, b = a.astype(narrow), b.astype(narrow)
    product = partial(jnp.einsum, preferred_element_type=jnp.float32)
    inputs, (rows, tokens, heads, width) = axes.split("->")
    if narrow != jnp.float32 or heads != "N":
        return product(axes, a, b)
    # A product leaves heads beside rows. Asked for them elsewhere, einsum turns the sides round and
    # leaves tokens last, and on a CPU whatever reads the result does so at a stride.
    return jnp.swapaxes(product(f"{inputs}->{rows}{heads}{tokens}{width}", a, b), 1, 2)


def _beside_heads(x_BNT: jax.Array) -> jax.Array:
    return jnp.swapaxes(x_BNT, 1, 2)[..., None]


def _walk(look: Callable, join: Callable, nothing: Any, whole: _Part, chunk: int) -> tuple:
    """Returns what `look` finds at all keys: the first joined, the second [B, S, ..] in order."""
    B, S = whole.k_BSNH.shape[:2]
    if S <= chunk:
        return look(whole)
    padding = -S % chunk  # may not be looked at
    keep_BTS = whole.keep_BTS
    if keep_BTS is None and padding:
        keep_BTS = jnp.ones((B, 1, S), bool)

    def split(x: jax.Array, axis: int) -> jax.Array:  # [.., S, ..] -> [chunks, .., chunk, ..]
        widths = [(0, padding if i == axis else 0) for i in range(x.ndim)]
        shape = (*x.shape[:axis], -1, chunk, *x.shape[axis + 1 :])
        return jnp.moveaxis(jnp.pad(x, widths).reshape(shape), axis, 0)

    def restore(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x, 0, 1).reshape(B, -1, *x.shape[3:])[:, :S]

    keep = None if keep_BTS is None else split(keep_BTS, 2)
    parts = _Part(split(whole.k_BSNH, 1), split(whole.v_BSNH, 1), keep)

    def step(before: Any, part: _Part) -> tuple:
        found, result = look(part)
        return join(before, found), result

    joined, results = jax.lax.scan(step, nothing, parts)
    return joined, jax.tree.map(restore, results)
