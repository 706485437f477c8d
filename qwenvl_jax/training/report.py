"""What a person sees of a run: metrics.jsonl, TensorBoard, the terminal and the loss curve."""

import json
import math
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

from qwenvl_jax.training.run_dir import truncate_metrics

_RATE_WINDOW = 50  # steps that the speed is averaged over


class Report:
    """Takes one record a step and shows it: a progress bar on a terminal, plain lines elsewhere."""

    def __init__(self, run_dir: str | Path, first_step: int, num_steps: int, log_every: int):
        """Continues after `first_step` finished steps; later lines of the file are dropped."""
        self._run_dir, self._num_steps, self._log_every = Path(run_dir), num_steps, log_every
        path = self._run_dir / "metrics.jsonl"
        truncate_metrics(path, first_step)
        self._file = path.open("a", encoding="utf-8")
        self._board = _tensorboard(self._run_dir, first_step)
        self._times: deque[tuple[float, float]] = deque([(time.perf_counter(), 0.0)], _RATE_WINDOW)
        self._is_first = True
        self._bar = _ProgressBar(first_step, num_steps) if sys.stdout.isatty() else None

    def step(self, record: dict[str, Any]) -> None:
        """Writes the record of one finished step; it holds at least step, loss, lr and tokens."""
        now, tokens = time.perf_counter(), self._times[-1][1] + record["tokens"]
        self._times.append((now, tokens))
        (start, before), steps = self._times[0], len(self._times) - 1
        if self._is_first:
            # The first step holds the compilation: told in its line, kept out of the mean.
            self._times, self._is_first = deque([(now, tokens)], _RATE_WINDOW), False
        record = record | {
            "seconds_per_step": round((now - start) / steps, 4),
            "tokens_per_second": round((tokens - before) / (now - start), 1),
        }
        self._file.write(json.dumps({k: _finite(v) for k, v in record.items()}) + "\n")
        self._file.flush()  # to the system, not to the disk: a kill loses nothing, a step no time
        if self._board is not None:
            for name, value in record.items():
                if name != "step":
                    self._board.add_scalar(name, value, record["step"])
        if self._bar is not None:
            self._bar.show(record)
        elif record["step"] % self._log_every == 0 or record["step"] == self._num_steps:
            self.say(_line(record, self._num_steps))

    def say(self, text: str) -> None:
        """Prints a line without breaking the progress bar."""
        if self._bar is not None:
            self._bar.print(text)
        else:
            print(text, flush=True)

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()
        if self._bar is not None:
            self._bar.stop()


class _ProgressBar:
    def __init__(self, first_step: int, num_steps: int):
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        self._progress = Progress(
            MofNCompleteColumn(),
            BarColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[text]}"),
        )
        self._task = self._progress.add_task("", total=num_steps, completed=first_step, text="")
        self._progress.start()

    def show(self, record: dict[str, Any]) -> None:
        self._progress.update(self._task, completed=record["step"], text=_numbers(record))

    def print(self, text: str) -> None:
        self._progress.console.print(text, markup=False, highlight=False)

    def stop(self) -> None:
        self._progress.stop()


def _line(record: dict[str, Any], num_steps: int) -> str:
    left = round((num_steps - record["step"]) * record["seconds_per_step"])
    clock = f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02}"
    return f"step {record['step']}/{num_steps}  {_numbers(record)}  left {clock}"


def _numbers(record: dict[str, Any]) -> str:
    text = (
        f"loss {record['loss']:.4f}  lr {record['lr']:.2e}  grad {record['grad_norm']:.2f}  "
        f"{record['tokens_per_second']:,.0f} tokens/s  {record['seconds_per_step']:.3f} s/step"
    )
    return text + (f"  skipped {record['skipped']}" if record["skipped"] else "")


def _finite(value: Any) -> Any:
    """Returns None for NaN and infinities, which JSON does not know."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _tensorboard(run_dir: Path, first_step: int) -> Any | None:
    try:
        from tensorboardX import SummaryWriter
    except ImportError:  # the JSON lines hold everything
        return None
    return SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step + 1, flush_secs=30)


def plot_loss(run_dir: str | Path) -> str:
    """Draws run_dir/loss.png from metrics.jsonl; returns a line that says what was done."""
    try:
        import matplotlib
    except ImportError:
        return "no loss.png: matplotlib is not installed (pip install 'qwenvl-jax[plot]')"
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    path = Path(run_dir) / "metrics.jsonl"
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    records = [r for r in records if r["loss"] is not None]
    if not records:
        return "no loss.png: no step has been logged"
    steps, losses = [r["step"] for r in records], [r["loss"] for r in records]
    width = max(1, len(losses) // 50)
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    axes.plot(steps, losses, color="0.8", linewidth=0.8, label="each step")
    axes.plot(steps, _smooth(losses, width), color="C0", label=f"mean of {width} steps")
    axes.set(xlabel="step", ylabel="loss", title=str(run_dir))
    axes.legend(frameon=False)
    figure.savefig(Path(run_dir) / "loss.png", dpi=120)
    plt.close(figure)
    return f"loss curve: {Path(run_dir) / 'loss.png'}"


def _smooth(values: list[float], width: int) -> list[float]:
    """Returns the mean of each value and those before it, `width` at most."""
    window: deque[float] = deque(maxlen=width)
    means = []
    for value in values:
        window.append(value)
        means.append(sum(window) / len(window))
    return means
