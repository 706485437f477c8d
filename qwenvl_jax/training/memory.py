"""What the step takes on a device, and what to say when it does not fit."""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import jax

from qwenvl_jax.training.state import Layout

_NUM_LISTED = 3  # of the largest arrays


class OutOfMemory(RuntimeError):
    """The device cannot hold the step."""


def bytes_per_device(tree: Any) -> int:
    """Returns how much of an abstract tree, whose leaves carry shardings, one device holds."""
    leaves = jax.tree.leaves(tree)
    sizes = [math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves]
    return sum(sizes)


def describe_memory(compiled: jax.stages.Compiled) -> str:
    """Returns a line: what the compiled step takes of each device, and what the device has."""
    memory = compiled.memory_analysis()
    if memory is None:
        return "compiled step: this backend does not say how much memory it takes"
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    has = f" of {limit / 1e9:.2f}" if limit else ""
    state, work = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    return (
        f"compiled step, GB a device: {(state + work) / 1e9:.3f}{has} "
        f"(state and batch {state / 1e9:.3f}, temporaries {work / 1e9:.3f})"
    )


@contextlib.contextmanager
def explained(layout: Layout) -> Iterator[None]:
    """Turns the compiler's or the device's lack of memory into an error that says what to do."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise OutOfMemory(out_of_memory(layout, str(error))) from error


def out_of_memory(layout: Layout, reason: str) -> str:
    """Returns the message: what filled the device, the largest arrays, what can be done."""
    parts = {
        "trained": layout.abstract.trainable,
        "frozen": layout.abstract.frozen,
        "optimizer": layout.abstract.optimizer,
    }
    sizes = ", ".join(f"{name} {bytes_per_device(p) / 1e9:.2f} GB" for name, p in parts.items())
    arrays = layout.abstract.trainable | layout.abstract.frozen
    held = {path: bytes_per_device(array) for path, array in arrays.items()}
    largest = sorted(held, key=held.__getitem__, reverse=True)[:_NUM_LISTED]
    listed = ", ".join(f"{path} {held[path] / 1e9:.2f} GB" for path in largest)
    return (
        f"out of memory on the device ({' '.join(reason.split())[:160]}); a device holds {sizes}; "
        f"its largest parameters are {listed}; raise micro_batches or mesh.fsdp, set "
        "model.remat=full, lower loss_chunk or data.rows; checkpoints on disk are whole"
    )
