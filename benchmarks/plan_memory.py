"""Compares the memory that a plan predicts with what a train step really takes, on this CPU.

    python benchmarks/plan_memory.py            # six settings, about ten seconds each

The step is that of the race (benchmarks/train_race/mid_size.py), under each remat policy and in two
dtypes. Predicted are XLA's own analysis of the compiled step, which `qwenvl plan` prints for TPUs,
and the estimate from shapes, which it prints for GPUs. Measured is by how much the memory of a
fresh process rises at most while it makes its first step; state and batch lie there before.
Prints markdown. Linux only: it reads /proc.
"""

import dataclasses
import gc
import multiprocessing
import os
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

MB = 1e6
SETTINGS = [
    (dtype, remat) for dtype in ("float32", "bfloat16") for remat in ("none", "dots", "full")
]


def resident(field: str) -> int:
    """Returns VmRSS (now) or VmHWM (at most, since the last `reset`) of this process in bytes."""
    status = Path("/proc/self/status").read_text()
    found = re.search(rf"{field}:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) * 1024


def reset() -> None:
    """Makes VmHWM start again from what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def row(dtype: str, remat: str) -> str:
    """Returns one row of the table."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    import jax
    from train_race import mid_size

    from qwenvl_jax.planning.estimate import estimate_memory
    from qwenvl_jax.sharding import make_mesh
    from qwenvl_jax.training.state import make_layout, random_weights, start_state
    from qwenvl_jax.training.step import make_train_step

    config = mid_size.train_config(dtype)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, remat=remat))
    layout = make_layout(config, make_mesh())
    with jax.set_mesh(layout.mesh):
        state = start_state(config, layout, random_weights(config, layout))
        batch = jax.device_put(mid_size.batch())
        compiled = make_train_step(config, layout).lower(state, batch).compile()  # type: ignore[attr-defined]
        jax.block_until_ready((state, batch))
        gc.collect()
        before = resident("VmRSS")
        reset()
        jax.block_until_ready(compiled(state, batch))
        measured = resident("VmHWM") - before
    sizes = compiled.memory_analysis()
    new = sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    predicted = sizes.temp_size_in_bytes + new
    by_class = estimate_memory(config, 1)
    held = sum(by_class[kind] for kind in ("weights", "optimizer", "batch"))
    estimated = sum(by_class.values()) - held
    cells = (dtype, remat, held, predicted, estimated, measured)
    shares = f"{predicted / measured:.2f} | {estimated / measured:.2f}"
    text = " | ".join(x if isinstance(x, str) else f"{x / MB:,.0f}" for x in cells)
    return f"| {text} | {shares} |"


def main() -> None:
    # Freed memory goes back at once, so that what is resident is what is in use.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = os.environ["MALLOC_TRIM_THRESHOLD_"] = "65536"
    print(
        "| dtype | remat | state and batch, MB | compiled: more in a step | estimated | measured | "
        "compiled / measured | estimated / measured |\n"
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        flush=True,
    )
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool:
        for setting in SETTINGS:
            print(pool.submit(row, *setting).result(), flush=True)


if __name__ == "__main__":
    main()
