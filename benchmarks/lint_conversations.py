"""CPU time and memory of `qwenvl data lint` on a fine-tuning file of a million rows.

Writes a synthetic file (about 450 MB) and one picture that every row names, lints it in a process
of its own and removes it. Pictures are found in a cache, so the figure is that of the text checks.

    python benchmarks/lint_conversations.py --scratch build/lint
"""

import dataclasses
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import tyro
from open_conversations import make_files, peak_bytes
from PIL import Image


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    scratch: Path = Path("build/lint")
    rows: int = 1_000_000
    processes: int = 2
    tokenizer: Path = Path("qwenvl_jax/assets/nano")
    """Whose tokens rows are measured in."""


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    try:
        rows, as_lines = make_files(options.scratch, options.rows, picture="one.jpg")
        as_lines.unlink()
        Image.new("RGB", (448, 448), (90, 120, 60)).save(options.scratch / "one.jpg")
        words = [str(rows), "--tokenizer", str(options.tokenizer), "--slots", "256"]
        words += ["--processes", str(options.processes)]
        start = time.perf_counter()
        command = [sys.executable, "-m", "qwenvl_jax.cli.main", "data", "lint", *words]
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        peak = peak_bytes(process)
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        print(
            f"exit code {process.returncode}, {time.perf_counter() - start:.0f} s with "
            f"{options.processes} processes, {used.ru_utime + used.ru_stime:.0f} s of CPU time; "
            f"peak anonymous memory of the first process {peak / 1e6:.0f} MB"
        )
    finally:
        shutil.rmtree(options.scratch, ignore_errors=True)


if __name__ == "__main__":
    main()
