"""Faults on request, `--simulate-fault NAME@STEP`: what a run does about them can be tried.

Those in the numbers are part of the compiled step, so a second try of the same step meets them
again, as it would meet bad data; without the option the step holds nothing of them. The others
strike on the host, once.
"""

import errno
import os
import random
import re
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from qwenvl_jax.config import ConfigError
from qwenvl_jax.data.example import Batch, DataError

IN_STEP = {
    "nan-loss": "the loss is NaN, on every try",
    "nan-gradient": "one gradient is NaN, on every try",
    "spike": "loss and gradients are ten times too large, on every try",
}
ON_HOST = {
    "hardware": "the numbers are NaN on the first try only, as of a chip that slipped",
    "kill": "the process is killed with SIGKILL after the step was sent",
    "sigterm": "the process gets SIGTERM after the step was sent",
    "disk-full": "the first save from this step on meets a full disk",
    "flip-bit": "one bit of the newest checkpoint's largest file flips, then SIGKILL",
    "data-error": "the data end in an error",
    "data-hang": "the data do not come any more",
    "replica": "one element of one copy of a replicated parameter changes",
    "out-of-memory": "the device has no memory left",
}
Fault = tuple[str, int]


def parse_faults(texts: Sequence[str]) -> tuple[Fault, ...]:
    """Returns (name, step) of each `NAME@STEP`. Raises: ConfigError for anything else."""
    found = []
    for text in texts:
        match = re.fullmatch(r"([a-z-]+)@(\d+)", text)
        if match is None or match[1] not in IN_STEP | ON_HOST or int(match[2]) < 1:
            raise ConfigError(
                f"simulate_fault is not NAME@STEP: got {text!r}, expected a step from 1 on and one "
                f"of {', '.join(IN_STEP | ON_HOST)}"
            )
        found.append((match[1], int(match[2])))
    return tuple(found)


def disturb(
    gradients: dict[str, jax.Array],
    loss_sum: jax.Array,
    step: jax.Array,
    faults: Sequence[Fault],
) -> tuple[dict[str, jax.Array], jax.Array]:
    """Returns gradients and loss of the 1-based `step` with the faults that belong to it."""
    for name, at in faults:
        is_now = step == at
        if name == "nan-loss":
            loss_sum = jnp.where(is_now, jnp.nan, loss_sum)
        elif name == "nan-gradient":
            first = min(gradients)
            gradients = gradients | {first: jnp.where(is_now, jnp.nan, gradients[first])}
        elif name == "spike":
            scale = jnp.where(is_now, 10.0, 1.0)
            loss_sum = loss_sum * scale
            gradients = {path: g * scale.astype(g.dtype) for path, g in gradients.items()}
    return gradients, loss_sum


class HostFaults:
    """The faults that strike outside the compiled step, each of them once."""

    def __init__(self, texts: Sequence[str] = ()):
        self._waiting = sorted(fault for fault in parse_faults(texts) if fault[0] in ON_HOST)

    def strikes(self, name: str, step: int) -> bool:
        """Returns whether `name` is due at this step; True once for each time it is asked for."""
        due = next(
            (fault for fault in self._waiting if fault[0] == name and fault[1] <= step), None
        )
        if due is not None:
            self._waiting.remove(due)
        return due is not None

    def before_step(self, step: int, batch: Batch) -> Batch:
        """Returns what the step gets to see."""
        if self.strikes("data-error", step):
            raise DataError(f"simulated: the data of step {step} cannot be read")
        if self.strikes("out-of-memory", step):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: simulated: out of memory")
        if self.strikes("hardware", step):
            return batch._replace(loss_weight=batch.loss_weight * np.float32("nan"))
        return batch

    def after_step(self, step: int) -> None:
        if self.strikes("sigterm", step):
            os.kill(os.getpid(), signal.SIGTERM)
        if self.strikes("kill", step):
            os.kill(os.getpid(), signal.SIGKILL)

    def before_save(self, step: int) -> None:
        if self.strikes("disk-full", step):
            raise OSError(errno.ENOSPC, "simulated: No space left on device")

    def hang_data(self, step: int) -> None:
        if self.strikes("data-hang", step):
            time.sleep(3600)

    def damage(self, step: int, checkpoints: Path) -> None:
        """Flips a bit of the newest checkpoint and ends the process, at its step."""
        if not self.strikes("flip-bit", step):
            return
        newest = max(
            (p for p in checkpoints.iterdir() if p.name.isdigit()), key=lambda p: int(p.name)
        )
        flip_bit(max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size))
        os.kill(os.getpid(), signal.SIGKILL)


def flip_bit(path: Path, seed: int = 0) -> None:
    """Changes one bit of a file, in place."""
    with path.open("r+b") as file:
        place = random.Random(seed).randrange(path.stat().st_size)
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1]))


def change_one_copy(array: jax.Array) -> jax.Array:
    """Returns a replicated array of which one copy, this process's last one, differs."""
    copies = [np.array(shard.data) for shard in array.addressable_shards]
    copies[-1].flat[0] += 1
    placed = [
        jax.device_put(copy, shard.device)
        for copy, shard in zip(copies, array.addressable_shards, strict=True)
    ]
    return jax.make_array_from_single_device_arrays(array.shape, array.sharding, placed)
