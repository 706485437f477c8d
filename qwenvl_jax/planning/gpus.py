"""GPU machines: their memory, and what a run would fill of it by the estimate from shapes.

XLA compiles for a GPU only where there is one, so nothing is compiled here.
"""

import dataclasses
import re
from typing import Any

from jax.sharding import AbstractMesh

from qwenvl_jax.config import ConfigError, TrainConfig
from qwenvl_jax.model.qwenvl import abstract_state
from qwenvl_jax.planning.estimate import estimate_memory, state_memory
from qwenvl_jax.planning.pods import GB, GPU_KINDS
from qwenvl_jax.planning.report import short
from qwenvl_jax.planning.useful import useful_flops
from qwenvl_jax.sharding import MESH_AXES, mesh_sizes, replicated, replicated_lines
from qwenvl_jax.training.optimizer import plan_parameters, trained_parts
from qwenvl_jax.training.state import check_frozen_dtype, make_layout

_RESERVE = 0.90  # jax takes three quarters unless told otherwise; the driver needs the rest of this


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gpus:
    """Equal GPUs of one machine."""

    name: str
    count: int
    memory_bytes: int
    peak_flops: float


def find_gpus(name: str) -> Gpus | None:
    """Returns the GPUs of a name such as "h100-8" or "H100-8", or None if it names something else.

    >>> find_gpus("a100-80-8").count
    8

    Raises:
        ConfigError: the name of a GPU without how many.
    """
    small = name.lower()
    found = re.fullmatch(rf"({'|'.join(GPU_KINDS)})-(\d{{1,6}})", small)
    if found is None or int(found[2]) < 1:
        near = [kind for kind in GPU_KINDS if kind.split("-")[0] == small.split("-")[0]]
        if near:
            examples = " or ".join(f"{kind}-8" for kind in near)
            raise ConfigError(
                f"a topology is a kind and a number: got {name!r}, expected {examples}"
            )
        return None
    memory, peak = GPU_KINDS[found[1]]
    return Gpus(name=small, count=int(found[2]), memory_bytes=memory, peak_flops=peak)


def gpu_text(config: TrainConfig, gpus: Gpus) -> tuple[str, dict[str, Any], bool]:
    """Returns the estimate as text, as plain values, and whether it fits.

    Raises:
        ConfigError: mesh or rows do not go with the number of GPUs.
    """
    sizes = mesh_sizes(config.mesh, gpus.count)
    state = state_memory(config, gpus.count)
    by_class = estimate_memory(config, gpus.count, state)
    total, room = sum(by_class.values()), _room(gpus)
    data, fsdp, tensor = sizes
    compute = useful_flops(config, tensor) / (data * fsdp) / gpus.peak_flops
    layout = make_layout(config, AbstractMesh(sizes, MESH_AXES))
    check_frozen_dtype(config, layout)
    copied = replicated(layout.model_state, layout.mesh)
    lines = [f"{gpus.name}: memory of a GPU, estimated from shapes, nothing compiled"]
    way_out = "" if total <= room else _way_out(config, gpus, sizes, state)
    lines += [f"  {kind:<12}{size / GB:>8.2f} GB" for kind, size in by_class.items() if size]
    lines += [
        f"  {'total':<12}{total / GB:>8.2f} GB of {room / GB:.1f} that jax can be given "
        f"(XLA_PYTHON_CLIENT_MEM_FRACTION={_RESERVE:.2f})",
        f"DOES NOT FIT: {way_out}" if way_out else "fits",
        f"a step takes at least {short(compute)} s, "
        f"its useful work at {gpus.peak_flops / 1e12:.0f} TFLOP/s",
        *replicated_lines(copied),
    ]
    row = {
        "gpus": dataclasses.asdict(gpus),
        "memory": by_class,
        "compute_seconds": compute,
        "replicated": copied,
    }
    return "\n".join(lines), row, total <= room


def _way_out(
    config: TrainConfig, gpus: Gpus, sizes: tuple[int, int, int], state: dict[str, int]
) -> str:
    """Returns what can still be changed to make a run fit."""
    model, (data, fsdp, _) = config.model, sizes
    trained = trained_parts(plan_parameters(abstract_state(model)[1], config.parameters))
    ways = ["parameters split over more of these (mesh.data=1, mesh.fsdp=-1)"] * (data > 1)
    ways += ["more GPUs"]
    ways += ["LoRA (configs/finetune_lora.py)"] * ("decoder" in trained and not model.lora.rank)
    ways += ["fewer trained parts"] * (len(trained) > 1)
    enough, some = _narrow_frozen(config, gpus, state)
    if sum(state.values()) > _room(gpus):
        # Nothing that a step keeps is among them.
        ways = [*enough, *ways, *some]
        return f"weights, moments and gradients alone do not: {_either(ways)} can help"
    is_full = {model.remat, model.vit_remat or model.remat} == {"full"}
    more = ["more remat"] * (not is_full)
    most = dataclasses.replace(config, micro_batches=max(1, config.data.rows // (data * fsdp)))
    least, now = (sum(estimate_memory(c, gpus.count, state).values()) for c in (most, config))
    more += ["more micro-batches"] * (least < 0.99 * now)
    return _either([*enough, *more, *ways, *some])


def _narrow_frozen(
    config: TrainConfig, gpus: Gpus, state: dict[str, int]
) -> tuple[list[str], list[str]]:
    """Returns the option that halves frozen weights: first if it is enough, second if it is not."""
    if config.model.dtype != "bfloat16":
        return [], []  # products in float32 would lose digits of the weights
    narrow = dataclasses.replace(config, frozen_dtype="bfloat16")
    smaller = state_memory(narrow, gpus.count)
    if sum(smaller.values()) == sum(state.values()):
        return [], []  # nothing is frozen, or it is narrow already
    total = sum(estimate_memory(narrow, gpus.count, smaller).values())
    if total <= _room(gpus):
        return ["--frozen-dtype=bfloat16 (then it fits)"], []
    return [], [f"--frozen-dtype=bfloat16 (not enough alone: {total / GB:.2f} GB)"]


def _room(gpus: Gpus) -> int:
    return int(gpus.memory_bytes * _RESERVE)


def _either(ways: list[str]) -> str:
    return " or ".join(filter(None, [", ".join(ways[:-1]), ways[-1]]))
