"""A fingerprint of every array that does not depend on how the array is split over devices."""

from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

_SEEDS = (0x243F6A88, 0x85A308D3)
# Larger arrays are looked at in parts of so many elements. On CPUs XLA writes down what it is to
# add up, four bytes an element and seed: four times a model of bfloat16.
_PART = 1 << 20


class _Walk(NamedTuple):
    """How an array is looked at: `size` indices of an axis at a time."""

    axis: int
    size: int


def digests(arrays: Mapping[str, jax.Array]) -> dict[str, str]:
    """Returns name -> 16 hex digits, computed where the arrays live.

    Every element's bits are mixed with its position by a bijection of 32-bit integers and the
    results are added modulo 2**32. Integer sums do not depend on their order, so one device and a
    pod give the same digits; a change of any one element always changes them. Two seeds give
    64 bits. This guards against damage, not against an adversary.
    """
    found = {}
    for name, array in arrays.items():
        found[name] = _digest(array, _walk(array))
        if len(array.sharding.device_set) > 1:
            # One program at a time: of many that sum over devices, XLA on a CPU starts more than it
            # has threads for, and each waits for others that cannot begin.
            found[name].block_until_ready()
    sums = jax.device_get(found)
    return {name: "".join(f"{int(part):08x}" for part in pair) for name, pair in sums.items()}


def _walk(array: jax.Array) -> _Walk:
    """Returns the walk along the first axis that is on no two devices in parts; else one step."""
    parts = array.sharding.shard_shape(array.shape)
    whole = (axis for axis, part in enumerate(parts) if part == array.shape[axis] > 1)
    axis = next(whole, 0)
    length = array.shape[axis] if array.ndim else 1
    if array.size <= _PART or parts[axis] != length:
        return _Walk(axis, length)
    return _Walk(axis, max(1, _PART * length // array.size))


# A program for each kind of array, not one for all: a model's weights and moments are of few kinds.
@partial(jax.jit, static_argnums=1)
def _digest(array: jax.Array, walk: _Walk) -> jax.Array:
    width = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[np.dtype(array.dtype).itemsize]
    length = array.shape[walk.axis] if array.ndim else 1
    if length == walk.size:
        return _sum(jax.lax.bitcast_convert_type(array, width), array.shape, walk.axis, 0)

    def part(start: jax.Array, size: int) -> jax.Array:
        # Behind the barrier the view stays in the loop; before it, it would be a copy.
        held, start = jax.lax.optimization_barrier((array, start))
        bits = jax.lax.bitcast_convert_type(held, width)
        bits = jax.lax.dynamic_slice_in_dim(bits, start, size, walk.axis)
        return _sum(bits, array.shape, walk.axis, start)

    steps, rest = divmod(length, walk.size)
    add = lambda k, total: total + part(k * walk.size, walk.size)  # noqa: E731
    total = jax.lax.fori_loop(0, steps, add, jnp.zeros(len(_SEEDS), jnp.uint32))
    return total + part(jnp.int32(length - rest), rest) if rest else total


def _sum(bits: jax.Array, shape: tuple[int, ...], axis: int, start: jax.Array | int) -> jax.Array:
    """Returns the two sums of a part that begins at index `start` of an axis of an array."""
    # The position in row-major order, from one iota a dimension: a flat iota would have to be
    # resharded to meet the array.
    position = jnp.zeros(bits.shape, jnp.uint32)
    for dimension, size in enumerate(shape):
        step = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, dimension)
        if dimension == axis:
            step += jnp.asarray(start, jnp.uint32)
        position = position * jnp.uint32(size % 2**32) + step
    bits = bits.astype(jnp.uint32)
    return jnp.stack([_mix(bits ^ _mix(position + jnp.uint32(s))).sum() for s in _SEEDS])


def _mix(x: jax.Array) -> jax.Array:
    """Returns the finalizer of murmur3: every input bit moves every output bit, one to one."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
