"""Parts of bfloat16 arrays, read and written on CPUs without widening the whole.

XLA's CPU compiler has no slices of bfloat16: it widens the whole operand to float32, slices that,
and moves the conversion out of the loop. A model of bfloat16 weights then takes three times its
size, and every step widens all of it before the first layer. Slices of integers it has.
"""

import jax
import jax.numpy as jnp

from qwenvl_jax.sharding import context_platform

_BITS = jnp.dtype(jnp.uint16)


def is_widened(table: jax.Array) -> bool:
    """Returns whether a slice of such an array would be made of a copy in float32."""
    return held_dtype(table.dtype) != table.dtype


def held_dtype(dtype: jax.typing.DTypeLike) -> jnp.dtype:
    """Returns the dtype for an array that is written slice by slice: that of its bits, or its own.

    What is written goes through `to_held`, what was read through `from_held`.
    """
    is_narrow = jnp.dtype(dtype) == jnp.bfloat16 and context_platform() == "cpu"
    return _BITS if is_narrow else jnp.dtype(dtype)


def to_held(x: jax.Array, held: jnp.dtype) -> jax.Array:
    """Returns what to write into an array of this dtype."""
    if held == _BITS:
        return jax.lax.bitcast_convert_type(x.astype(jnp.bfloat16), _BITS)
    return x.astype(held)


def from_held(x: jax.Array) -> jax.Array:
    """Returns what was read from such an array."""
    return jax.lax.bitcast_convert_type(x, jnp.bfloat16) if x.dtype == _BITS else x


def take(table: jax.Array, index: jax.Array) -> jax.Array:
    """Returns table[index]: `index` [...] counts rows of `table` [N, ...], all of them there."""
    return _take_bits(table, index) if is_widened(table) else table[index]


@jax.custom_vjp
def _take_bits(table: jax.Array, index: jax.Array) -> jax.Array:
    # Behind the barrier the view stays beside the slice, and is part of its loop. Moved out of the
    # layers' loop it would be a copy of the table.
    table, index = jax.lax.optimization_barrier((table, index))
    bits = jax.lax.bitcast_convert_type(table, _BITS)
    return jax.lax.bitcast_convert_type(bits[index], table.dtype)


def _take_forward(table, index):
    return _take_bits(table, index), (table, index)


def _take_backward(residuals, grad):
    table, index = residuals
    return jnp.zeros_like(table).at[index].add(grad), None


_take_bits.defvjp(_take_forward, _take_backward)
