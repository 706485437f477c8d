"""Prints the table of the paper's runs on TPU pods, as markdown: each compiled, no TPU needed.

    pip install '.[tpu]'
    python benchmarks/plan_pods.py              # all rows: minutes each, 4 GB of memory
    python benchmarks/plan_pods.py stage2       # rows whose name holds a word

One process a row, so that each row's host memory is its own. Finished rows are kept in
~/.cache/qwenvl_jax/plans: a second call goes on where the first one stopped.
"""

import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BIG = ["--mesh.data=-1", "--mesh.fsdp=128", "--mesh.tensor=1"]
# 128 chips of 4 x 4 x 8: four copies, so that fsdp takes whole dimensions of the torus. Over all
# three of them no exchange crosses beside compute.
CUBE = ["--mesh.data=-1", "--mesh.fsdp=32", "--mesh.tensor=1"]
DOTS = ["--model.remat=dots"]
# Half a row a chip: there is room for whole weights, and little to compute beside gathering twice.
KEPT = ["--model.remat=weights"]

# (config, pod, slices, options): the recipe of the config, cut to the memory of the chip.
ROWS: list[tuple[str, str, int, list[str]]] = [
    ("stage1_pretrain", "v5e-256", 1, []),
    ("stage1_pretrain", "v5e-256", 2, ["--micro-batches=10"]),
    ("stage1_pretrain", "v6e-256", 1, ["--micro-batches=10"]),
    ("stage1_pretrain", "v5p-256", 1, [*CUBE, "--micro-batches=6"]),
    ("stage1_pretrain", "v4-512", 1, ["--micro-batches=10"]),
    ("stage1_pretrain", "v4-256", 1, CUBE),
    ("stage2_multitask", "v5e-256", 1, []),
    ("stage2_multitask", "v6e-256", 1, ["--micro-batches=8"]),
    ("stage2_multitask", "v5p-256", 1, [*CUBE, "--micro-batches=8"]),
    ("stage2_multitask", "v4-512", 1, ["--micro-batches=8"]),
    ("stage2_multitask", "v4-256", 1, [*CUBE, "--micro-batches=16"]),
    ("stage3_chat", "v5e-256", 1, [*BIG[:2], "--mesh.tensor=2", *DOTS, "--micro-batches=1"]),
    ("stage3_chat", "v6e-256", 1, [*BIG[:2], "--mesh.tensor=2", *KEPT, "--micro-batches=1"]),
    ("stage3_chat", "v5p-256", 1, [*CUBE, *DOTS, "--micro-batches=1"]),
    ("stage3_chat", "v4-512", 1, [*BIG[:2], "--mesh.tensor=2", *DOTS, "--micro-batches=1"]),
    ("stage3_chat", "v4-256", 1, [*CUBE, *DOTS, "--micro-batches=1"]),
    ("stage3_chat", "v5e-16", 1, []),
    ("stage3_chat", "v6e-8", 1, [*DOTS, "--micro-batches=32"]),
    ("stage3_chat", "v5e-8", 1, ["--model.remat=full", "--micro-batches=32"]),
    ("finetune", "v5e-16", 1, ["--mesh.tensor=2", *DOTS]),
    ("finetune", "v6e-8", 1, ["--mesh.tensor=2", *DOTS, "--micro-batches=32"]),
    ("finetune_lora", "v5e-8", 1, ["--mesh.tensor=2", *DOTS, "--micro-batches=32"]),
    ("finetune_lora", "v6e-8", 1, DOTS),
    ("finetune_adapter", "v5e-8", 1, ["--mesh.tensor=2", *DOTS, "--micro-batches=32"]),
    ("finetune_adapter", "v6e-8", 1, DOTS),
]


def row(stage: str, pod: str, slices: int, options: list[str]) -> str:
    """Returns one row of the table, compiled or from the disk."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    from qwenvl_jax.cli.config_file import read_config
    from qwenvl_jax.cli.host_memory import give_freed_memory_back
    from qwenvl_jax.planning.cache import ProgramCache
    from qwenvl_jax.planning.plan import make_plan
    from qwenvl_jax.planning.pods import find_pod
    from qwenvl_jax.planning.report import table_row

    give_freed_memory_back()
    config = read_config(str(ROOT / "configs" / f"{stage}.py"), options)
    programs = ProgramCache(Path("~/.cache/qwenvl_jax/plans").expanduser())
    return table_row(stage, make_plan(config, find_pod(pod, slices), programs))


def main() -> None:
    from qwenvl_jax.planning.report import TABLE_HEAD

    words = sys.argv[1:]
    chosen = [x for x in ROWS if all(word in f"{x[0]} {x[1]} x{x[2]}" for word in words)]
    print(TABLE_HEAD, flush=True)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool:
        for arguments in chosen:
            print(pool.submit(row, *arguments).result(), flush=True)


if __name__ == "__main__":
    main()
