"""Time and memory of opening a fine-tuning file of a million rows, as a list and as lines.

Writes both files with the same synthetic rows (about 500 MB each) into a scratch folder, opens each
in a process of its own whose anonymous memory is sampled, and reads rows at random. Next to it
stands `json.load` of the list, which is what the original fine-tuning script does. It needs 1 GB of
disk and 3 GB of memory (for `json.load`; `--no-whole` leaves it out), and removes what it wrote.

    python benchmarks/open_conversations.py --scratch build/rows
"""

import contextlib
import dataclasses
import json
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import tyro

WORDS = "a red dog lies in front of the house 一只狗躺在房子前面 and looks at what comes".split()

OPEN = """
import random, sys, time
from qwenvl_jax.data.sources.conversations import Conversations
start = time.perf_counter()
source = Conversations(sys.argv[1])
opened = time.perf_counter() - start
rng = random.Random(0)
start = time.perf_counter()
for _ in range(20000):
    source[rng.randrange(len(source))]
read = time.perf_counter() - start
print(f"{len(source):,} rows open in {opened:.1f} s, then {20000 / read:,.0f} rows a second")
"""
WHOLE = """
import json, sys, time
start = time.perf_counter()
rows = json.load(open(sys.argv[1], encoding="utf-8"))
print(f"{len(rows):,} rows in {time.perf_counter() - start:.1f} s")
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    scratch: Path = Path("build/rows")
    rows: int = 1_000_000
    whole: bool = True
    """Also load the list with json.load, for comparison."""


def make_files(folder: Path, num_rows: int, picture: str = "train/{:08d}.jpg") -> tuple[Path, Path]:
    """Writes the rows as a list and as lines; returns both paths. No picture is made."""
    folder.mkdir(parents=True, exist_ok=True)
    as_list, as_lines = folder / "rows.json", folder / "rows.jsonl"
    rng = random.Random(0)
    with as_list.open("w", encoding="utf-8") as one, as_lines.open("w", encoding="utf-8") as other:
        for i in range(num_rows):
            line = json.dumps(make_row(i, rng, picture.format(i)), ensure_ascii=False)
            one.write(f"{'[' if i == 0 else ','}\n{line}")
            other.write(f"{line}\n")
        one.write("\n]\n")
    return as_list, as_lines


def make_row(i: int, rng: random.Random, picture: str) -> dict:
    """Returns a dialogue of two turns about one picture, with a box, quotes and line breaks."""
    x, y = rng.randrange(500), rng.randrange(500)
    turns = [
        ("user", f"Picture 1: <img>{picture}</img>\nWhat is it? {_words(rng, 8)}"),
        ("assistant", f'It is "{_words(rng, 12)}".'),
        ("user", f"Where?\n{_words(rng, 6)}"),
        ("assistant", f"<ref>it</ref><box>({x},{y}),({x + 300},{y + 400})</box>"),
    ]
    return {
        "id": f"identity_{i}",
        "conversations": [{"from": role, "value": value} for role, value in turns],
    }


def _words(rng: random.Random, count: int) -> str:
    return " ".join(rng.choices(WORDS, k=count))


def peak_bytes(process: subprocess.Popen) -> int:
    """Returns, once a process has ended, the most memory that it had of its own, mapped by no file.

    Of the process alone, without those that it has started.
    """
    peak = 0
    while process.poll() is None:
        with contextlib.suppress(OSError):  # it has ended between two looks
            status = Path(f"/proc/{process.pid}/status").read_text()
            found = re.search(r"RssAnon:\s+(\d+) kB", status)
            peak = max(peak, int(found[1]) * 1024 if found else 0)
        time.sleep(0.02)
    return peak


def run_measured(name: str, code: str, path: Path) -> None:
    """Runs the code in a process of its own; prints what it says and its peak anonymous memory."""
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True
    )
    peak = peak_bytes(process)
    if process.returncode or process.stdout is None:
        sys.exit(f"{name} ended with exit code {process.returncode}")
    size = path.stat().st_size
    print(
        f"{name}, {size / 1e6:.0f} MB: {process.stdout.read().strip()}; "
        f"peak anonymous memory {peak / 1e6:.0f} MB",
        flush=True,
    )


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    try:
        as_list, as_lines = make_files(options.scratch, options.rows)
        run_measured("list", OPEN, as_list)
        run_measured("lines", OPEN, as_lines)
        if options.whole:
            run_measured("json.load of the list", WHOLE, as_list)
    finally:
        shutil.rmtree(options.scratch, ignore_errors=True)


if __name__ == "__main__":
    main()
