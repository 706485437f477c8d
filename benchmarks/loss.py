"""Times the loss behind the decoder, both passes, by the share of tokens that is scored.

    python benchmarks/loss.py              about a minute on two idle cores
    python benchmarks/loss.py --rounds 3

Shapes are those of the package's small model and of the race's. The scored tokens stand anywhere;
shares take turns. Printed are medians, and their ratios to a head for every token.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from qwenvl_jax.cli.host_memory import computes_on_cpu, keep_freed_memory
from qwenvl_jax.training.loss import next_token_loss

SHAPES = ((8, 256, 256, 1980), (2, 512, 512, 16_384))  # rows, tokens, width, vocabulary
DTYPES = ("float32", "bfloat16")
SHARES = (1.0, 0.33, 0.1)
CHUNK = 128


def both_passes(shape: tuple[int, int, int, int], dtype: str) -> Callable[[float], float]:
    """Returns a function from the share of scored tokens to the seconds of both passes."""
    rows, length, width, vocabulary = shape
    keys = jax.random.split(jax.random.key(0), 4)
    hidden = jax.random.normal(keys[0], (rows, length, width), dtype)
    head = jax.random.normal(keys[1], (width, vocabulary))
    targets = jax.random.randint(keys[2], (rows, length), 0, vocabulary)
    place = jax.random.uniform(keys[3], (rows, length))

    @jax.jit
    def gradients(hidden, head, weight):
        loss = lambda hidden, head: next_token_loss(hidden, head, targets, weight, CHUNK)  # noqa: E731
        return jax.value_and_grad(loss, (0, 1), has_aux=True)(hidden, head)

    def seconds(share: float) -> float:
        weight = jax.block_until_ready(jnp.where(place < share, 1.0, 0.0))
        begin = time.perf_counter()
        jax.block_until_ready(gradients(hidden, head, weight))
        return time.perf_counter() - begin

    return seconds


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
            seconds = both_passes(shape, dtype)
            seconds(1.0)  # compiles
            taken = [[seconds(share) for share in SHARES] for _ in range(rounds)]
            medians = [statistics.median(times) for times in zip(*taken, strict=True)]
            told = [
                f"{share:.0%} scored {1e3 * median:.1f} ms ({medians[0] / median:.2f} x)"
                for share, median in zip(SHARES, medians, strict=True)
            ]
            print(f"{dtype} {'x'.join(map(str, shape))}: " + ", ".join(told), flush=True)


if __name__ == "__main__":
    main()
