"""The train step that `train.py` runs, compiled for a pod that is not there."""

import dataclasses
import pickle
import re
import resource
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from qwenvl_jax.config import TrainConfig
from qwenvl_jax.data.example import Batch
from qwenvl_jax.planning.cache import (
    CompiledProgram,
    ProgramCache,
    Sizes,
    TooLarge,
    program_digest,
)
from qwenvl_jax.planning.pods import Pod, quiet
from qwenvl_jax.sharding import batch_sharding, make_mesh
from qwenvl_jax.training.compiler import compiler_options
from qwenvl_jax.training.state import Layout, check_frozen_dtype, make_layout
from qwenvl_jax.training.step import make_train_step


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompiledStep:
    """One train step, compiled; `executable` is None where it did not fit or was found on disk."""

    config: TrainConfig
    layout: Layout
    batch: Batch
    program: CompiledProgram
    executable: Any


def abstract_batch(config: TrainConfig, mesh: Mesh | AbstractMesh) -> Batch:
    """Returns the shapes of a step's global batch, with their shardings."""
    data = config.data
    sharding = batch_sharding(mesh)

    def array(dtype: type, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((data.rows, *shape), dtype, sharding=sharding)

    fields: dict[str, Any] = {
        "tokens": array(np.int32, data.length),
        "targets": array(np.int32, data.length),
        "loss_weight": array(np.float32, data.length),
        "segment": array(np.int32, data.length),
        "position": array(np.int32, data.length),
        "images": array(np.uint8, data.max_images, data.image_size, data.image_size, 3),
        "image_start": array(np.int32, data.max_images),
        "task": array(np.int32, data.length),
    }
    return Batch(**fields)


def compile_step(
    config: TrainConfig, pod: Pod, cache: ProgramCache | None = None, *, anew: bool = False
) -> CompiledStep:
    """Returns the compiled step: same code, shardings and donation as in a run.

    `cache`: where the same program may be found, and is kept. `anew`: compile it even where it is
    found, for the executable, which is not kept.

    Raises:
        ConfigError: the mesh or the rows do not fit the number of chips.
        PlanError: no TPU compiler.
    """
    mesh = make_mesh(config.mesh, pod.devices())
    layout = make_layout(config, mesh)
    check_frozen_dtype(config, layout)
    batch = abstract_batch(config, mesh)
    begin = time.perf_counter(), time.process_time()
    with jax.set_mesh(mesh), quiet():
        step: Any = make_train_step(config, layout)
        lowered = step.lower(layout.abstract, batch)
        places = str([(device.id, device.coords) for device in mesh.devices.flat])
        options = str(sorted(compiler_options(mesh).items()))
        digest = program_digest(lowered.as_text(), pod.title, places, options)
        known = cache.read(digest) if cache and not anew else None
        if known is not None:
            return CompiledStep(
                config=config, layout=layout, batch=batch, program=known, executable=None
            )
        program, executable = _compile(lowered, begin)
    if cache:
        cache.write(digest, program)
    return CompiledStep(
        config=config, layout=layout, batch=batch, program=program, executable=executable
    )


def _compile(lowered: Any, begin: tuple[float, float]) -> tuple[CompiledProgram, Any]:
    text = sizes = too_large = executable = None
    try:
        executable = lowered.compile()
        text = executable.as_text()
        stats = executable.memory_analysis()
        sizes = Sizes(
            arguments=stats.argument_size_in_bytes,
            results=stats.output_size_in_bytes,
            shared=stats.alias_size_in_bytes,
            temporaries=stats.temp_size_in_bytes,
            code=stats.generated_code_size_in_bytes,
            peak=stats.peak_memory_in_bytes or None,
        )
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        too_large = read_refusal(str(error))
    program = CompiledProgram(
        text=text,
        sizes=sizes,
        too_large=too_large,
        seconds=time.perf_counter() - begin[0],
        cpu_seconds=time.process_time() - begin[1],
        host_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )
    return program, executable


def save_executable(compiled: CompiledStep, path: str | Path) -> None:
    """Writes the executable with the trees of its arguments and results, as one pickle.

    `jax.experimental.serialize_executable.deserialize_and_load(*pickle.load(file))` reads it, on
    the same kind of pod and with the same versions.
    """
    from jax.experimental import serialize_executable

    Path(path).write_bytes(pickle.dumps(serialize_executable.serialize(compiled.executable)))


def read_refusal(message: str) -> TooLarge:
    """Returns what the compiler's out-of-memory message says."""
    used = re.search(r"Used ([\d.]+)([KMGT]) of ([\d.]+)([KMGT])", message)
    # Where it is sure before all is placed, it gives two totals and no list.
    used = used or re.search(r"\(([\d.]+)([KMGT])\) exceeds .*?\(([\d.]+)([KMGT])\)", message)
    space = re.search(r"in memory\s+space (\w+)", message)
    sizes = re.findall(r"Size: ([\d.]+[KMGT])", message)
    shapes = re.findall(r"Shape: (\w+\[[\d,]*\])", message)
    names = re.findall(r'op_name="([^"]*)"', message)
    largest = [f"{size} {shape}" for size, shape in zip(sizes, shapes, strict=False)]
    if len(names) == len(largest):
        largest = [f"{x} ({name.split('/')[-1]})" for x, name in zip(largest, names, strict=True)]
    return TooLarge(
        needed=_bytes(used[1], used[2]) if used else None,
        capacity=_bytes(used[3], used[4]) if used else None,
        largest=tuple(largest),
        space=space[1] if space else "hbm",
    )


def _bytes(number: str, unit: str) -> int:
    return int(float(number) * 2 ** (10 * (1 + "KMGT".index(unit))))
