"""Races the train step against PyTorch on a CPU: same shapes, same batch, float32 and bf16.

    python benchmarks/train_step.py                 about 15 minutes on 2 idle cores
    python benchmarks/train_step.py --rounds 3

Every contestant is a process of its own that is stopped until its turn, so they take turns round by
round and whatever else the machine does hits all of them. Printed are medians and ratios. The
forward pass is the loss without gradients; the step holds gradients, clipping and AdamW with f32
weights. In float32 a third line has the matrix products of a step alone, as the library of each
side does them: what is left of a ratio then is ours.
PyTorch takes part twice, as it is and with torch.compile (where there is a C++ compiler).
Needs PyTorch: pip install 'qwenvl-jax[bench]'.
"""

import argparse
import dataclasses
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

from train_race.products import jax_products, num_operations, torch_products

from qwenvl_jax.cli.host_memory import keep_freed_memory

DTYPES = ("float32", "bfloat16")
KINDS = ("jax", "torch", "compiled")


def jax_contestant(dtype: str) -> tuple[Callable[[], float], Callable[[], float], int]:
    """Returns (forward, step, number of parameters); each call runs one and returns the loss."""
    import jax
    from train_race import mid_size

    from qwenvl_jax.sharding import make_mesh
    from qwenvl_jax.training.state import make_layout, random_weights, start_state
    from qwenvl_jax.training.step import batch_loss, make_train_step

    config = mid_size.train_config(dtype)
    layout = make_layout(config, make_mesh())
    state = start_state(config, layout, random_weights(config, layout))
    batch = jax.device_put(mid_size.batch())
    step = make_train_step(config, layout)

    # What a backward pass would need is not kept where there is none, as when a model answers.
    model = dataclasses.replace(config.model, remat="none")
    forward_layout = make_layout(dataclasses.replace(config, model=model), make_mesh())

    @jax.jit
    def loss(weights, batch):
        total, _ = batch_loss(forward_layout.graphdef, weights, batch, config.loss_chunk)
        return total / batch.loss_weight.sum()

    def forward() -> float:
        return float(loss(state.trainable | state.frozen, batch))

    def train() -> float:
        nonlocal state
        state, metrics = step(state, batch)
        return float(jax.block_until_ready((state, metrics))[1]["loss"])

    sizes = [x.size for x in state.trainable.values()]
    return forward, train, sum(sizes)


def torch_contestant(
    dtype: str, is_compiled: bool
) -> tuple[Callable[[], float], Callable[[], float], int]:
    import torch
    from train_race import mid_size
    from train_race.torch_model import TorchQwenVL, tensors

    torch.manual_seed(0)
    model = TorchQwenVL(mid_size.model_config("float32"))
    batch = tensors(mid_size.batch())
    run = torch.compile(model) if is_compiled else model
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-5, betas=(0.9, 0.98), eps=1e-6, fused=True)

    def loss() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            return run(*batch)

    def forward() -> float:
        with torch.no_grad():
            return float(loss())

    def train() -> float:
        optimizer.zero_grad(set_to_none=True)
        value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        optimizer.step()
        return float(value.detach())

    return forward, train, sum(p.numel() for p in model.parameters())


def contestant(kind: str, dtype: str) -> None:
    """Runs what each line on the standard input names, `forward` or `step`; prints seconds."""
    keep_freed_memory()
    if kind == "jax":
        forward, train, count = jax_contestant(dtype)
    else:
        forward, train, count = torch_contestant(dtype, kind == "compiled")
    print(count, flush=True)
    calls = {"forward": forward, "step": train}
    if dtype == "float32":
        calls["products"] = jax_products() if kind == "jax" else torch_products()
    for line in sys.stdin:
        start = time.perf_counter()
        calls[line.strip()]()
        print(time.perf_counter() - start, flush=True)


class Contestant:
    """A process that is asked for one timing at a time, and stopped in between.

    Threads that wait for work spin for a while, on the cores of whoever has the next turn.
    """

    def __init__(self, kind: str, dtype: str):
        command = [sys.executable, __file__, "--contestant", kind, dtype]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.num_parameters = int(self._answer())
        self._signal(signal.SIGSTOP)

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("a contestant has ended early: its message is above")
        return line

    def _signal(self, number: int) -> None:
        os.killpg(self._process.pid, number)  # with the processes that compile for it

    def seconds(self, what: str) -> float:
        assert self._process.stdin is not None
        self._signal(signal.SIGCONT)
        print(what, file=self._process.stdin, flush=True)
        seconds = float(self._answer())
        self._signal(signal.SIGSTOP)
        return seconds

    def close(self) -> None:
        self._signal(signal.SIGKILL)
        self._process.wait()


def race(dtype: str, kinds: list[str], rounds: int) -> None:
    """Prints one table: seconds of each contestant, and how many of ours each takes."""
    field = {kind: Contestant(kind, dtype) for kind in kinds}
    counts = {kind: f"{runner.num_parameters / 1e6:.2f} M" for kind, runner in field.items()}
    print(f"{dtype}, parameters {counts}", flush=True)
    try:
        for what in ("forward", "step", "products") if dtype == "float32" else ("forward", "step"):
            for runner in field.values():  # compiles
                runner.seconds(what)
            times = {kind: [] for kind in kinds}
            for _ in range(rounds):
                for kind, runner in field.items():
                    times[kind].append(runner.seconds(what))
            median = {kind: statistics.median(values) for kind, values in times.items()}
            told = ", ".join(
                f"{kind} {seconds:.2f} s ({seconds / median['jax']:.2f} x ours)"
                for kind, seconds in median.items()
            )
            print(f"  {what:<8} {told}", flush=True)
            if what == "products":
                rates = {k: f"{num_operations() / s / 1e9:.0f}" for k, s in median.items()}
                print(f"           billion operations a second: {rates}", flush=True)
    finally:
        for runner in field.values():
            runner.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtypes", nargs="+", default=DTYPES, choices=DTYPES)
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
    parser.add_argument("--contestant", nargs=2)
    options = parser.parse_args()
    if options.contestant:
        contestant(*options.contestant)
        return
    kinds = [kind for kind in options.kinds if kind != "compiled" or shutil.which("g++")]
    for dtype in options.dtypes:
        race(dtype, ["jax", *(kind for kind in kinds if kind != "jax")], options.rounds)


if __name__ == "__main__":
    main()
