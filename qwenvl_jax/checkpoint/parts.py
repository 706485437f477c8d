"""Reading many arrays through Orbax a part at a time: while it reads, it holds two copies."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp

Item = dict[str, Any]  # dotted name -> array, or ShapeDtypeStruct with a sharding

_READ_BYTES = 1 << 30


def restore_in_parts(restore: Callable[[ocp.args.PyTreeRestore], Item], wanted: Item) -> Item:
    """Returns the arrays of `wanted`, read by one call of `restore` for some of them at a time.

    The largest come first, when most of the memory is free. What is read may hold others beside
    them.
    """
    arrays: Item = {}
    for some in _in_parts(wanted):
        target = {name: placed(x) for name, x in some.items()}
        # Without these Orbax takes the dtypes and the shardings of the save.
        each = ocp.checkpoint_utils.construct_restore_args(target)
        args = ocp.args.PyTreeRestore(target, restore_args=each, partial_restore=True)
        arrays |= restore(args)
    return {name: arrays[name] for name in wanted}


def placed(array: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """Returns the same with a sharding: the first device's where none is asked for."""
    sharding = array.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)


def _in_parts(wanted: Item) -> Iterator[Item]:
    """Yields the items in dicts that take a process about `_READ_BYTES`, or hold one array.

    All processes get the same ones, as they read together.
    """
    part, filled = {}, 0
    for name, x in sorted(wanted.items(), key=lambda pair: (-pair[1].size, pair[0])):
        here = placed(x).sharding
        share = math.prod(here.shard_shape(x.shape)) * x.dtype.itemsize
        share = share * len(here.device_set) // jax.process_count()
        if part and filled + share > _READ_BYTES:
            yield part
            part, filled = {}, 0
        part[name], filled = x, filled + share
    if part:
        yield part
