"""Breaks a small training run in every way that a fault list names, and prints what came of it.

    make faults                                  the whole table
    make faults ARGS="kill disk"                 the rows whose name holds one of these words

Every row runs `python train.py tests/fault_run.py` for real, most with `--simulate-fault`, and
compares with the uninterrupted run: weights, moments and the loss of every step, bit by bit. A row
that does not end as it should is FAILED, and so is the table.
"""

import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import hurry

from qwenvl_jax.training.faults import flip_bit

ROOT = Path(__file__).resolve().parents[1]
STEPS, SAVED_EVERY = 8, 2
PATIENCE = 900.0  # seconds for one run; a machine with other work on it compiles slowly

ENVIRONMENT = os.environ | {
    "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": hurry.flags(),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
}


class Row:
    """One fault: a folder to try it in, and the whole run to compare with."""

    def __init__(self, folder: Path, whole: Path):
        self.folder, self.whole = folder, whole

    def start(self, *options: str, run: str = "run", **environment: str) -> subprocess.Popen:
        command = [sys.executable, "train.py", "tests/fault_run.py", *options]
        command.append(f"--run-dir={self.folder / run}")
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env=ENVIRONMENT | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def start_two(
        self, *options: str, options_of_second: tuple[str, ...] = ()
    ) -> tuple[subprocess.Popen, subprocess.Popen]:
        """Starts two processes of one run."""
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{listener.getsockname()[1]}"
        cluster = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
        return (
            self.start(*options, JAX_PROCESS_ID="0", **cluster),
            self.start(*options, *options_of_second, JAX_PROCESS_ID="1", **cluster),
        )

    def finish(self, process: subprocess.Popen, code: int = 0) -> str:
        """Returns what a process said; its exit code must be `code`."""
        said, _ = process.communicate(timeout=PATIENCE)
        assert process.returncode == code, f"exit code {process.returncode}, not {code}: {said}"
        return said

    def train(self, *options: str, code: int = 0, run: str = "run", **environment: str) -> str:
        return self.finish(self.start(*options, run=run, **environment), code)

    def fault(self, *names: str, code: int = 0, more: tuple[str, ...] = ()) -> str:
        """Returns what a run said that met these faults."""
        return self.train("--simulate-fault", *names, *more, code=code)

    def lines(self, name: str = "metrics.jsonl", run: str = "run") -> list[dict]:
        path = self.folder / run / name
        text = path.read_text() if path.exists() else ""
        return [json.loads(line) for line in text.splitlines() if line.endswith("}")]

    def wait_for_step(self, process: subprocess.Popen, step: int) -> None:
        end = time.monotonic() + PATIENCE
        while not any(line["step"] >= step for line in self.lines()):
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < end, f"no step {step}"
            time.sleep(0.02)

    def saved(self, run: str = "run") -> list[str]:
        return sorted(path.name for path in (self.folder / run / "checkpoints").iterdir())

    def equals_whole(self, run: str = "run") -> str:
        """Returns a phrase, after comparing everything with the uninterrupted run."""
        ours = {line["step"]: line["loss"] for line in self.lines(run=run)}
        theirs = (self.whole / "metrics.jsonl").read_text().splitlines()
        assert ours == {json.loads(line)["step"]: json.loads(line)["loss"] for line in theirs}
        digests = [
            json.loads((path / "checkpoints" / str(STEPS) / "digest" / "metadata").read_text())
            for path in (self.folder / run, self.whole)
        ]
        assert digests[0]["items"] == digests[1]["items"], "weights or moments differ"
        return "bit-equal to the uninterrupted run"


# --- the faults ---------------------------------------------------------------------------------


def killed_at_steps(row: Row) -> str:
    """F1: kill -9 while compiling, in a step, beside a save; then at a random moment."""
    process = row.start()
    time.sleep(random.uniform(0.5, 8.0))
    process.kill()
    process.communicate()
    for step in (3, 5, 6):
        row.fault(f"kill@{step}", code=-signal.SIGKILL)
    row.train()
    return f"killed 4 times, {row.equals_whole()}"


def killed_in_the_first_save(row: Row) -> str:
    """F2: kill -9 beside the first save, twice in a row."""
    for _ in range(2):
        row.fault("kill@3", code=-signal.SIGKILL)
        left = [name for name in row.saved() if not name.isdigit()]
    row.train()
    assert all(name.isdigit() for name in row.saved()), row.saved()
    return f"left-overs {left or 'none'} removed, {row.equals_whole()}"


def told_to_stop(row: Row) -> str:
    """F3: SIGTERM in a step, one process, no cluster variables."""
    said = row.fault("sigterm@3")
    assert "SIGTERM: stopping after step 3" in said
    assert "saved step 3" in said
    (took,) = re.findall(r"a stop takes ([\d.]+) s", said.split("saved step 3")[1])
    row.train()
    return f"step 3 saved, exit 0, {took} s after the signal, then {row.equals_whole()}"


def flipped_bit(row: Row) -> str:
    """F5: one bit of the newest checkpoint's largest file flips."""
    row.fault("flip-bit@6", code=-signal.SIGKILL)
    newest = max(name for name in row.saved() if name.isdigit())
    said = row.train()
    assert f"{newest} is damaged" in said, said
    assert f"{newest}.corrupt" in row.saved()
    return f"step {newest} named and set aside, older one used, {row.equals_whole()}"


def flipped_bit_of_the_frozen(row: Row) -> str:
    """F5: one bit of the weights that do not train flips, which all checkpoints share."""
    row.fault("kill@5", code=-signal.SIGKILL)
    (folder,) = (row.folder / "run" / "frozen").iterdir()
    files = [path for path in folder.rglob("*") if path.is_file() and path.name[0].isdigit()]
    flip_bit(max(files, key=lambda path: path.stat().st_size))
    said = row.train()
    assert f"renamed to {folder.name}.corrupt and taken from where the run began" in said, said
    assert f"{folder.name}.corrupt" in {path.name for path in folder.parent.iterdir()}
    return f"named and set aside, taken from where the run began, {row.equals_whole()}"


def all_damaged(row: Row) -> str:
    """F7: every checkpoint is damaged."""
    row.fault("kill@5", code=-signal.SIGKILL)
    for record in (row.folder / "run").glob("checkpoints/*/digest/metadata"):
        record.write_text(record.read_text().replace("0", "1"))
    for _ in range(2):
        said = row.train(code=2)
        assert "no good checkpoint is left" in said
    return "refused to start, twice, exit 2"


def full_disk(row: Row) -> str:
    """F8: the disk is full in one save."""
    said = row.fault("disk-full@4")
    assert "CHECKPOINT NOT SAVED (seen at step 4)" in said
    assert row.lines()[-1]["failed_saves"] == 1
    assert {"2", "4"} & set(row.saved()) != {"4"}
    return f"told, counted, next save works, {row.equals_whole()}"


def read_only_directory(row: Row) -> str:
    """F9: the checkpoints' directory becomes read-only; then it can be written to again."""
    row.fault("sigterm@2")
    folder = row.folder / "run" / "checkpoints"
    # Root may write where the mode forbids it: to keep it out, the directory is made immutable.
    tool, shut, opened = ("chattr", "+i", "-i") if os.geteuid() == 0 else ("chmod", "555", "755")
    subprocess.run([tool, shut, str(folder)], check=True)
    try:
        said = row.train(code=2)
    finally:
        subprocess.run([tool, opened, str(folder)], check=True)
    assert "CHECKPOINT NOT SAVED" in said
    assert "the last save, of step 8, failed" in said
    assert "it goes on after step 2" in said
    assert "Traceback" not in said
    assert "resumes after step 2" in row.train()
    return f"told at each save, training goes on, exit 2 at the end; then {row.equals_whole()}"


def one_of_two_told_to_stop(row: Row) -> str:
    """F4: SIGTERM to one of two processes; then resumed by one."""
    both = row.start_two("--steps=4000")
    row.wait_for_step(both[0], 3)
    both[1].send_signal(signal.SIGTERM)
    said = [row.finish(process) for process in both]
    assert "SIGTERM: stopping after step" in said[0]
    (took,) = re.findall(r"a stop takes ([\d.]+) s", said[0].split("saved step")[1])
    stopped = max(int(name) for name in row.saved() if name.isdigit())
    assert row.lines()[-1]["step"] == stopped
    assert f"resumes after step {stopped}" in row.train(
        "--steps=4000", "--simulate-fault", "sigterm@1"
    )
    return (
        f"both exit 0, one checkpoint, of step {stopped}, {took} s after what was under way "
        "at the request began; one process goes on from it"
    )


def one_of_two_killed(row: Row) -> str:
    """F21: kill -9 of one of two processes."""
    both = row.start_two("--steps=4000")
    row.wait_for_step(both[0], 3)
    both[1].kill()
    start = time.monotonic()
    said = row.finish(both[0], code=2)
    seconds = time.monotonic() - start
    assert "another process of this run has ended" in said
    assert "Traceback" not in said
    both[1].communicate()
    assert "resumes after step" in row.train("--steps=4000", "--simulate-fault", "sigterm@1")
    return f"the other says so and exits 2 after {seconds:.0f} s; the run resumes"


def two_that_differ(row: Row) -> str:
    """F20: two processes with different settings."""
    both = row.start_two(options_of_second=("--seed=8",))
    said = [row.finish(process, code=2) for process in both]
    assert all("differ from process 0 in the setting seed" in text for text in said), said
    return "both stop and name the setting, exit 2"


def other_number_of_devices(row: Row) -> str:
    """F10: saved on 8 devices, resumed on 1."""
    eight = {"XLA_FLAGS": hurry.flags(8)}
    mesh = ("--mesh.data=2", "--mesh.fsdp=2", "--mesh.tensor=2")
    row.train("--simulate-fault", "sigterm@4", *mesh, **eight)
    before = json.loads(
        (row.folder / "run/checkpoints/4/digest/metadata").read_text()
    )  # the restore on one device compares its arrays with these
    row.train()
    assert before["items"]["weights"]
    ours = [line["loss"] for line in row.lines()]
    theirs = [json.loads(x)["loss"] for x in (row.whole / "metrics.jsonl").read_text().splitlines()]
    worst = max(abs(a - b) / b for a, b in zip(ours, theirs, strict=True))
    assert worst < 1e-4, worst
    return f"arrays bit-equal (digests), losses within {worst:.1e}"


def other_number_of_workers(row: Row) -> str:
    """F11: started with 2 data workers, resumed with none."""
    row.fault("sigterm@4", more=("--data.num-workers=2",))
    row.train("--data.num-workers=0")
    return row.equals_whole()


def other_settings(row: Row) -> str:
    """F12: resumed with another learning rate."""
    row.fault("sigterm@4")
    said = row.train("--optimizer.peak-lr=1e-4", code=2)
    assert "--allow-change optimizer.peak_lr" in said
    row.train("--optimizer.peak-lr=1e-4", "--allow-change", "optimizer.peak_lr")
    assert row.lines()[5]["lr"] < 1.1e-4
    return "refused; with --allow-change the new rate is used"


def not_finite(row: Row) -> str:
    """F13: NaN in the loss, in a gradient, and three times in a row."""
    said = row.fault("nan-loss@3", "nan-loss@5", "nan-gradient@6", "nan-loss@7", code=2)
    assert "3 bad steps in a row" in said
    causes = [line["cause"] for line in row.lines("incidents.jsonl")]
    assert causes == ["data or model"] * 4
    keys = [key for keys in row.lines("incidents.jsonl")[0]["samples"].values() for key in keys]
    assert len(keys) >= 8, keys
    assert "7" in row.saved()
    return (
        "updates refused, cause: data or model, "
        f"{len(keys)} samples of the first one named; stopped after 3 in a row, saved"
    )


def slipped_chip(row: Row) -> str:
    """F13: NaN on the first try only."""
    row.fault("hardware@3")
    assert row.lines("incidents.jsonl")[0]["cause"] == "hardware"
    return f"cause: hardware, replay used, {row.equals_whole()}"


def other_versions(row: Row) -> str:
    """F18: the run was begun with another version of a package."""
    row.fault("sigterm@4")
    manifest = row.folder / "run" / "manifest.json"
    facts = json.loads(manifest.read_text())
    facts["starts"][-1]["versions"]["numpy"] = "1.0"
    manifest.write_text(json.dumps(facts))
    said = row.train()
    assert "numpy was 1.0 at the last start and is" in said
    return f"both versions told, {row.equals_whole()}"


def killed_worker(row: Row) -> str:
    """F19: a data worker is killed with -9."""
    process = row.start("--data.num-workers=1", "--steps=4000")
    row.wait_for_step(process, 3)
    workers = children_of(process.pid)
    assert workers
    start = time.monotonic()
    for worker in workers:
        os.kill(worker, signal.SIGKILL)
    said, _ = process.communicate(timeout=PATIENCE)
    seconds = time.monotonic() - start
    assert process.returncode not in (0, None), said
    return f"error after {seconds:.0f} s, exit {process.returncode}"


def hanging_data(row: Row) -> str:
    """F19: the data do not come any more."""
    said = row.fault("data-hang@4", code=2, more=("--guard.data-timeout=30",))
    assert "the data have stopped coming: got no batch for 30 seconds" in said
    row.train()
    return f"error after 30 s, then {row.equals_whole()}"


def copy_that_differs(row: Row) -> str:
    """F20: one copy of a replicated parameter changes, on one of 2 devices."""
    two = {"XLA_FLAGS": hurry.flags(2)}
    faults = ("--simulate-fault", "replica@4", "--guard.digest-every=4")
    said = row.train(*faults, "--mesh.data=2", "--mesh.fsdp=1", code=2, **two)
    assert "the copies of adapter.attn.k_proj.bias are not equal" in said, said
    return "stopped, first array and devices named, exit 2"


def foreign_files(row: Row) -> str:
    """F22: files in the run directory that are not ours."""
    row.fault("sigterm@4")
    run = row.folder / "run"
    foreign = [run / "notes.txt", run / "checkpoints" / "notes.txt", run / "checkpoints/old/x"]
    for path in foreign:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    row.train()
    assert all(path.read_text() == "mine" for path in foreign)
    return f"left alone, {row.equals_whole()}"


def two_runs(row: Row) -> str:
    """F23: two runs in one directory; then a lock left by a killed one."""
    first = row.start("--steps=4000")
    row.wait_for_step(first, 3)
    said = row.train("--steps=4000", code=2)
    assert "another process trains in" in said
    first.kill()
    first.communicate()
    row.train("--steps=4000", "--simulate-fault", "sigterm@4")
    return "second refused, exit 2; after kill -9 the lock is free"


def out_of_memory(row: Row) -> str:
    """F24: the device has no memory left in a step."""
    said = row.fault("out-of-memory@5", code=2)
    assert "its largest parameters are decoder.embed.embedding" in said
    row.train()
    return f"largest arrays and hints told, exit 2, then {row.equals_whole()}"


def broken_data(row: Row) -> str:
    """F15: the data end in an error."""
    said = row.fault("data-error@4", code=2)
    assert "the data of step 4 cannot be read" in said
    assert "saved step 3 in" in said
    row.train()
    return f"step 3 saved, one line, exit 2, then {row.equals_whole()}"


ROWS: list[Callable[[Row], str]] = [
    killed_at_steps,
    killed_in_the_first_save,
    told_to_stop,
    flipped_bit,
    flipped_bit_of_the_frozen,
    all_damaged,
    full_disk,
    read_only_directory,
    one_of_two_told_to_stop,
    two_that_differ,
    one_of_two_killed,
    other_number_of_devices,
    other_number_of_workers,
    other_settings,
    not_finite,
    slipped_chip,
    broken_data,
    other_versions,
    killed_worker,
    hanging_data,
    copy_that_differs,
    foreign_files,
    two_runs,
    out_of_memory,
]


def children_of(process: int) -> list[int]:
    """Returns the processes that `process` has started, itself or through them."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rsplit(")", 1)[1].split()[1])
        except OSError:  # it has ended meanwhile
            continue
        if parent == process:
            found += [int(path.parent.name), *children_of(int(path.parent.name))]
    return found


def main(words: list[str]) -> int:
    """Returns 0 when every row that was asked for ended as it should."""
    rows = [row for row in ROWS if not words or any(word in row.__name__ for word in words)]
    if not rows:
        names = ", ".join(row.__name__ for row in ROWS)
        print(f"faults: no row has {' or '.join(words)} in its name: expected part of {names}")
        return 2
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    ENVIRONMENT.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder / "compiled"))
    try:
        Row(folder, folder).train(run="whole")
        failed = 0
        for fault in rows:
            start = time.monotonic()
            try:
                came = fault(Row(folder / fault.__name__, folder / "whole"))
            except AssertionError as error:
                failed, came = failed + 1, f"FAILED: {str(error)[-2000:] or 'assertion'}"
            name = (fault.__doc__ or "").rstrip(".")
            print(f"| {name} | {came} | {time.monotonic() - start:.0f} s |", flush=True)
            shutil.rmtree(folder / fault.__name__, ignore_errors=True)
    finally:
        shutil.rmtree(folder)
    print(f"{len(rows) - failed} of {len(rows)} faults ended as they should")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
