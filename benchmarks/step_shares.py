r"""What a step spends outside of matrix products, and a run outside of its steps: ratios.

    python benchmarks/step_shares.py            about four minutes on two cores
    python benchmarks/step_shares.py --steps 20 --rounds 1
    python benchmarks/step_shares.py --config benchmarks/train_race/mid_size.py --steps 16 \
      --parts products saves

Measured with the package's small model on its own generated data, or with another config:

- the share of a step that is no matrix product, from XLA's trace of a few steps. The times of all
  operations are added up over threads; fusions with a product inside count as products;
- how long the loop waits for batches: the run's `data_wait` column, first steps left out;
- what a save costs where there is one every 100 steps: how long the loop stands still for it, and
  by how much the steps are slower that run while it is written, against 100 steps of usual length.
  Beside it stands how long the system takes to accept as many bytes in one file, idle otherwise.
"""

import argparse
import dataclasses
import json
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path

import jax

from qwenvl_jax.checkpoint.store import CheckpointStore
from qwenvl_jax.cli.config_file import read_config
from qwenvl_jax.cli.host_memory import computes_on_cpu, keep_freed_memory
from qwenvl_jax.config import TrainConfig
from qwenvl_jax.data.pipeline import batches
from qwenvl_jax.planning.hlo import Program
from qwenvl_jax.sharding import batch_sharding, make_mesh
from qwenvl_jax.training.loop import train
from qwenvl_jax.training.state import make_layout, random_weights, start_state, to_items
from qwenvl_jax.training.step import make_train_step

CONFIG = "configs/nano/stage2.py"
PARTS = ("products", "saves", "data")
EVERY = 100  # steps between saves that the cost is told for
WARM = 5  # steps before anything is measured
TRACED = 3  # steps
_CONTAINERS = ("while", "call", "conditional")  # their time is that of what they run


class Stepper:
    """The train step of a config, on one batch, as often as is asked for."""

    def __init__(self, config: TrainConfig):
        layout = make_layout(config, make_mesh())
        self.state = start_state(config, layout, random_weights(config, layout))
        made = batches(config.data, config.seed, slots=config.model.adapter.num_queries)
        self._batch = jax.device_put(next(made), batch_sharding(layout.mesh))
        step = make_train_step(config, layout)
        self.compiled = step.lower(layout.abstract, self._batch).compile()
        self.run(WARM)

    def run(self, count: int) -> float:
        """Returns the seconds of so many steps."""
        begin = time.perf_counter()
        for _ in range(count):
            self.state, _ = self.compiled(self.state, self._batch)
        jax.block_until_ready(self.state)
        return time.perf_counter() - begin


def operation_seconds(stepper: Stepper) -> Counter[str]:
    """Returns operation -> traced seconds of a few steps."""
    spent: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            stepper.run(TRACED)
        (file,) = Path(folder).rglob("*.xplane.pb")
        for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
            for line in plane.lines:
                for event in line.events:
                    name = dict(event.stats).get("hlo_op")
                    if name is not None:
                        spent[str(name)] += event.duration_ns / 1e9
    return spent


def products_of(program: Program) -> tuple[set[str], set[str]]:
    """Returns the operations that hold a matrix product, and those that only run others."""
    products, containers = set(), set()
    for computation in program.computations.values():
        for name, instruction in computation.items():
            inside = list(program.inside(instruction))
            is_library = any("gemm" in x.rest or "cudnn" in x.rest for x in inside)
            if is_library or any(x.opcode in ("dot", "convolution") for x in inside):
                products.add(name)
            if instruction.opcode in _CONTAINERS:
                containers.add(name)
    return products, containers


def tell_operations(stepper: Stepper) -> None:
    """Prints the share of a step that is no matrix product, and its largest parts."""
    spent = operation_seconds(stepper)
    products, containers = products_of(Program(stepper.compiled.as_text()))
    spent = Counter({name: s for name, s in spent.items() if name not in containers})
    total = spent.total()
    others = Counter({name: s for name, s in spent.items() if name not in products})
    largest = ", ".join(f"{name} {s / total:.1%}" for name, s in others.most_common(4))
    print(f"no matrix product: {others.total() / total:.1%} of a step ({largest})", flush=True)


def tell_data_wait(config: TrainConfig, steps: int) -> None:
    """Prints the share of a run's time that its loop waits for batches."""
    with tempfile.TemporaryDirectory() as folder:
        run = dataclasses.replace(config, run_dir=folder, init=None, steps=steps, log_every=steps)
        train(run)
        lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines][WARM:]
    waited = sum(record["data_wait"] for record in records)
    whole = len(records) * records[-1]["seconds_per_step"]
    print(f"waiting for data: {waited / whole:.2%} of {len(records)} steps", flush=True)


def tell_saves(stepper: Stepper, steps: int, rounds: int) -> None:
    """Prints what a save costs, as shares of the time of so many steps as lie between two.

    The first one of a process is told apart: it compiles the digests.
    """
    still, slower, usual, plain = [], [], [], []
    num_bytes = sum(x.nbytes for item in to_items(stepper.state).values() for x in item.values())
    with tempfile.TemporaryDirectory() as folder:
        store = CheckpointStore(folder, keep=1)
        for number in range(rounds + 1):
            without = stepper.run(steps)
            begin = time.perf_counter()
            store.save(number + 1, to_items(stepper.state))
            stood = time.perf_counter() - begin
            beside = stepper.run(steps)
            store.wait()
            plain.append(plain_write(Path(folder) / "plain", num_bytes))
            still.append(stood)
            slower.append(beside - without)
            usual.append(without / steps)
        store.close()
    between = EVERY * statistics.median(usual)
    first, *still = still
    _, *slower = slower
    costs = [a + b for a, b in zip(still, slower, strict=True)]
    print(
        f"a save every {EVERY} steps: {statistics.median(costs) / between:.2%} of them, medians of "
        f"{rounds}: {statistics.median(still) / between:.2%} standing still, "
        f"{statistics.median(slower) / between:+.2%} slower steps beside it (a step takes "
        f"{between / EVERY:.3f} s; once a run {first:.1f} s, as the first compiles the digests); "
        f"a plain write of the same {num_bytes / 1e6:.0f} MB: "
        f"{statistics.median(plain) / between:.2%}",
        flush=True,
    )


def plain_write(file: Path, num_bytes: int) -> float:
    """Returns the seconds that a write of so many bytes takes, the file new and then removed."""
    block = bytes(1 << 20)
    begin = time.perf_counter()
    with file.open("wb", buffering=0) as out:
        for start in range(0, num_bytes, len(block)):
            out.write(block[: num_bytes - start])
    seconds = time.perf_counter() - begin
    file.unlink()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default=CONFIG)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    options = parser.parse_args()
    if computes_on_cpu():
        keep_freed_memory()  # as train.py does
    config = read_config(options.config)
    stepper = Stepper(config)
    if "products" in options.parts:
        tell_operations(stepper)
    if "saves" in options.parts:
        tell_saves(stepper, options.steps // 2, options.rounds)
    if "data" in options.parts:
        warm_up = dataclasses.replace(config.optimizer, warmup_steps=1)
        tell_data_wait(dataclasses.replace(config, optimizer=warm_up), options.steps + WARM)


if __name__ == "__main__":
    main()
