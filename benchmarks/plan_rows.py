"""How long planning takes for many samples, with its memory, and how full the rows are.

    python benchmarks/plan_rows.py --samples 10000000

Sizes have the shape of the paper's second stage (Table 3, rows of 2,048 tokens and at most 7
pictures); no data are read. Seconds, and half a gigabyte for ten million.
"""

import argparse
import resource
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import paper_mixture  # pyright: ignore[reportMissingImports]  of the tests

from qwenvl_jax.data.order import Order

LENGTH, MAX_IMAGES, SLOTS, SHOWN = 2048, 7, 256, 20_000


def peak_megabytes() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kilobytes; bytes on macOS
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def main() -> None:
    parser = argparse.ArgumentParser(description="Plans rows of ten million sizes.")
    parser.add_argument("--samples", type=int, default=10_000_000)
    count = parser.parse_args().samples
    sizes = np.concatenate([*paper_mixture.task_sizes(count).values()])
    lengths = sizes[:, 0] + SLOTS * sizes[:, 1]
    too_long = int((lengths > LENGTH).sum())
    before, cpu, wall = peak_megabytes(), time.process_time(), time.perf_counter()
    order = Order([sizes], slots=SLOTS, length=LENGTH, max_images=MAX_IMAGES, seed=0)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    start = time.process_time()
    rows = order.rows(10**12 + np.arange(SHOWN))
    far = time.process_time() - start
    print(f"samples               {len(sizes):,}, {too_long:,} longer than a row")
    print(f"to plan               {cpu:.1f} s on a core ({wall:.1f} s of the clock)")
    print(
        f"memory for it         {peak_megabytes() - before:.0f} MB above {before:.0f} MB of input"
    )
    print(f"rows of an epoch      {order.num_rows:,}")
    print(f"token places in use   {rows.tokens.sum() / (SHOWN * LENGTH):.2%}")
    print(f"picture slots in use  {rows.pictures.sum() / (SHOWN * MAX_IMAGES):.1%}")
    print(f"a row, found far on   {far / SHOWN * 1e6:.0f} us")


if __name__ == "__main__":
    main()
