"""Times causal attention in plain XLA: in strips that leave later keys out, and all keys for all.

    python benchmarks/attention.py              about a minute on two idle cores
    python benchmarks/attention.py --rounds 3

Shapes are the decoders' of the race's model, of 2,048 tokens, and of the package's small model.
Both ways take turns; printed are medians of the forward pass, and of both passes, and their ratios.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from unittest import mock

import jax
import jax.numpy as jnp

from qwenvl_jax.cli.host_memory import computes_on_cpu, keep_freed_memory
from qwenvl_jax.model import attention as room

SHAPES = ((2, 512, 8, 64), (1, 2048, 8, 64), (8, 256, 8, 32))  # rows, tokens, heads, head dimension
DTYPES = ("float32", "bfloat16")


def passes(shape: tuple[int, int, int, int], dtype: str, strips: int) -> dict[str, Callable]:
    """Returns the forward pass, and both passes, compiled with at most so many strips."""
    B, T, _, _ = shape
    ones, order = jnp.ones((B, T), jnp.int32), jnp.tile(jnp.arange(T), (B, 1))
    q, k, v, grad = jax.random.normal(jax.random.key(0), (4, *shape), dtype)

    def attended(q, k, v, segment, position):
        mask = room.AttentionMask(True, segment, segment, position, position)
        return room.attention(q, k, v, mask, backend="xla_chunked")

    def both(q, k, v, segment, position):
        _, pull = jax.vjp(lambda q, k, v: attended(q, k, v, segment, position), q, k, v)
        return pull(grad)

    arrays = (q, k, v, ones, order)
    with mock.patch.object(room, "MAX_STRIPS", strips):
        compiled = {
            "forward": jax.jit(attended).lower(*arrays).compile(),
            "both passes": jax.jit(both).lower(*arrays).compile(),
        }
    return {
        name: lambda run=run: jax.block_until_ready(run(*arrays)) for name, run in compiled.items()
    }


def seconds(call: Callable) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    if computes_on_cpu():
        keep_freed_memory()  # as train.py does
    for dtype in DTYPES:
        for shape in SHAPES:
            ways = [passes(shape, dtype, strips) for strips in (room.MAX_STRIPS, 1)]
            told = []
            for name in ways[0]:
                calls = [way[name] for way in ways]
                times = [[seconds(call) for call in calls] for _ in range(rounds + 1)][1:]
                strips, whole = (statistics.median(column) for column in zip(*times, strict=True))
                told.append(f"{name} {strips * 1e3:.1f} ms ({whole / strips:.2f} x as fast)")
            print(f"{dtype} {shape}: in strips, {', '.join(told)}", flush=True)


if __name__ == "__main__":
    main()
