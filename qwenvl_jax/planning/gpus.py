"""GPU machines: their memory, and what a run would fill of it by the estimate from shapes.

XLA compiles for a GPU only where there is one, so nothing is compiled here.
"""

import dataclasses
import re
from typing import Any

from qwenvl_jax.config import ConfigError, TrainConfig
from qwenvl_jax.planning.estimate import estimate_memory
from qwenvl_jax.planning.pods import GB, GiB
from qwenvl_jax.planning.useful import useful_flops
from qwenvl_jax.training.flops import PEAKS

_RESERVE = 0.90  # jax takes three quarters unless told otherwise; the driver needs the rest of this


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gpus:
    """Equal GPUs. Source: the vendor's data sheets, dense bf16."""

    name: str
    count: int
    memory_bytes: int
    peak_flops: float


_KINDS = {
    "l4": (24 * GiB, PEAKS["NVIDIA L4"]),
    "a100-40": (40 * GiB, PEAKS["NVIDIA A100"]),
    "a100-80": (80 * GiB, PEAKS["NVIDIA A100"]),
    "h100": (80 * GiB, PEAKS["NVIDIA H100"]),
    "h200": (141 * GB, PEAKS["NVIDIA H200"]),
}


def find_gpus(name: str) -> Gpus | None:
    """Returns the GPUs of a name such as "h100-8", or None when it names something else.

    >>> find_gpus("a100-80-8").count
    8

    Raises:
        ConfigError: the name of a GPU without how many.
    """
    found = re.fullmatch(rf"({'|'.join(_KINDS)})-(\d+)", name)
    if found is None or int(found[2]) < 1:
        near = [kind for kind in _KINDS if kind.split("-")[0] == name.split("-")[0]]
        if near:
            examples = " or ".join(f"{kind}-8" for kind in near)
            raise ConfigError(
                f"a topology is a kind and a number: got {name!r}, expected {examples}"
            )
        return None
    memory, peak = _KINDS[found[1]]
    return Gpus(name=name, count=int(found[2]), memory_bytes=memory, peak_flops=peak)


def gpu_text(config: TrainConfig, gpus: Gpus) -> tuple[str, dict[str, Any], bool]:
    """Returns the estimate as text, as plain values, and whether it fits.

    Raises:
        ConfigError: mesh or rows do not go with the number of GPUs.
    """
    by_class = estimate_memory(config, gpus.count)
    total, room = sum(by_class.values()), int(gpus.memory_bytes * _RESERVE)
    compute = useful_flops(config) / gpus.count / gpus.peak_flops
    lines = [f"{gpus.name}: memory of a GPU, estimated from shapes, nothing compiled"]
    lines += [f"  {kind:<12}{size / GB:>8.2f} GB" for kind, size in by_class.items() if size]
    lines += [
        f"  {'total':<12}{total / GB:>8.2f} GB of {room / GB:.1f} that jax can be given "
        f"(XLA_PYTHON_CLIENT_MEM_FRACTION={_RESERVE:.2f})",
        "fits" if total <= room else "DOES NOT FIT: more remat, more micro-batches, or more GPUs",
        f"a step takes at least {compute:.2f} s, "
        f"its useful work at {gpus.peak_flops / 1e12:.0f} TFLOP/s",
    ]
    row = {"gpus": dataclasses.asdict(gpus), "memory": by_class, "compute_seconds": compute}
    return "\n".join(lines), row, total <= room
