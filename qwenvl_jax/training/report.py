"""What a person sees of a run: metrics.jsonl, TensorBoard, and the terminal."""

import contextlib
import errno
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from PIL import Image

from qwenvl_jax.config import TrainConfig
from qwenvl_jax.files import Lines, discard_output, json_line
from qwenvl_jax.training.board import Board
from qwenvl_jax.training.flops import all_peaks, step_flops
from qwenvl_jax.training.guard import FINE, REASONS
from qwenvl_jax.training.run_dir import truncate_metrics
from qwenvl_jax.training.run_files import EVALUATIONS, METRICS
from qwenvl_jax.training.state import Layout

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

_RATE_WINDOW = 50  # steps that the speed is averaged over, between one mark more
_RATES = {"tokens": "tokens_per_second", "images": "images_per_second", "flops": "flops_per_second"}


class Seen(NamedTuple):
    """What an evaluation has found."""

    numbers: dict[str, float]
    page_YXC: np.ndarray | None  # uint8: answers drawn on their pictures


class Report:
    """Takes one record a step and shows it: a progress bar on a terminal, plain lines elsewhere.

    With several processes only the first one writes and speaks.
    """

    def __init__(self, config: TrainConfig, layout: Layout, first_step: int):
        """Continues after `first_step` finished steps; later lines of the file are dropped."""
        self.failed_saves = 0
        self._is_refusal_told = False
        self.seconds_per_step = 0.0  # mean of the last steps
        self._config, self._run_dir = config, Path(config.run_dir)
        self._flops = step_flops(
            config.model, layout.model_state, layout.plan, config.data.image_size
        )
        self._peak = all_peaks()
        self._is_speaker = jax.process_index() == 0
        self._open(first_step)
        is_watched = self._is_speaker and sys.stdout.isatty()
        self._bar = _ProgressBar(first_step, config.steps) if is_watched else None

    def step(self, numbers: dict[str, Any]) -> None:
        """Writes the numbers of one finished step, as `make_train_step` names them."""
        record = self._timed(numbers)
        self._write(record)
        if self._bar is not None:
            self._bar.show(record)
        if record["step"] % self._config.log_every == 0 or record["step"] == self._config.steps:
            self.say(_line(record, self._config.steps, self._is_compiling))

    def paused(self, seconds: float) -> None:
        """Keeps what was no step, as a save, out of the speeds."""
        for sums in self._sums:
            sums["time"] += seconds

    def passed_over(self, step: int) -> None:
        """Writes a line for a step that was not made."""
        self._write({"step": step, "loss": None, "passed_over": True})

    def evaluated(self, step: int, seen: Seen) -> None:
        """Writes down what an evaluation after `step` has found: a line, and a page of answers."""
        if not self._is_speaker:
            return
        where = ""
        if seen.page_YXC is not None:
            page = self._run_dir / "samples" / f"{step}.png"
            page.parent.mkdir(exist_ok=True)
            Image.fromarray(seen.page_YXC).save(page)
            where = f", answers in {page}"
        # Last: the line says that this evaluation is there, and need not be made up for.
        self._evaluations.write(json_line({"step": step} | seen.numbers))
        self.say(f"step {step}: loss on held-out data {seen.numbers['loss']:.4f}{where}")
        numbers, page = {f"heldout/{k}": v for k, v in seen.numbers.items()}, seen.page_YXC
        self._on_board(lambda board: board.scalars(numbers, step))
        if page is not None:
            self._on_board(lambda board: board.picture("samples", page, step))

    def rewind(self, step: int) -> None:
        """Forgets the steps after `step`: they will be made again."""
        self._close_files()
        self._open(step)

    def say(self, text: str) -> None:
        """Prints a line without breaking the progress bar."""
        if self._bar is not None:
            self._bar.print(text)
        elif self._is_speaker:
            tell(text)

    def close(self) -> None:
        self._close_files()
        if self._bar is not None:
            self._bar.stop()

    def _open(self, first_step: int) -> None:
        self._lines = Lines(self._run_dir / METRICS)
        self._evaluations = Lines(self._run_dir / EVALUATIONS)
        self._board = None
        if self._is_speaker:
            for lines in (self._lines, self._evaluations):
                truncate_metrics(lines.path, first_step)
            with contextlib.suppress(ImportError):  # without it the JSON lines hold everything
                self._board = Board(self._run_dir / "tensorboard", first_step + 1)
        self._sums: deque[dict[str, float]] = deque([self._sum_after({})], _RATE_WINDOW + 1)
        self._is_first, self._is_compiling = True, False

    def _close_files(self) -> None:
        for lines in (self._lines, self._evaluations):
            try:
                lines.flush()
            except OSError as error:
                self.say(f"the last {lines.num_waiting} bytes of metrics are lost: {error}")
            lines.close()
        self._on_board(lambda board: board.close())

    def _on_board(self, write: Callable[[Board], None]) -> None:
        """Writes on the board, if there is one; a full disk ends the board, not the run."""
        if self._board is None:
            return
        try:
            write(self._board)
        except OSError as error:
            self._board = None
            self.say(f"TENSORBOARD ENDS HERE: {error}; metrics.jsonl goes on")

    def _sum_after(self, numbers: dict[str, Any]) -> dict[str, float]:
        """Returns the running totals after one more step, and the time."""
        before = self._sums[-1] if numbers else {}
        added = numbers | {"flops": self._flops(numbers)} if numbers else {}
        sums = {name: before.get(name, 0.0) + added.get(name, 0.0) for name in _RATES}
        return sums | {"time": time.perf_counter()}

    def _timed(self, numbers: dict[str, Any]) -> dict[str, Any]:
        """Returns the record of a step: its numbers, and speeds over the last steps."""
        now = self._sum_after(numbers)
        self._sums.append(now)
        start, steps = self._sums[0], len(self._sums) - 1
        seconds = now["time"] - start["time"]
        self._is_compiling = self._is_first
        if self._is_first:
            # The first step holds the compilation: told in its line, kept out of the mean.
            self._sums, self._is_first = deque([now], _RATE_WINDOW + 1), False
        rates = {name: (now[key] - start[key]) / seconds for key, name in _RATES.items()}
        flops = rates.pop("flops_per_second")
        places = self._config.data.rows * self._config.data.length
        self.seconds_per_step = seconds / steps
        return numbers | {
            "verdict": REASONS[numbers.get("verdict", FINE)],
            "seconds_per_step": round(self.seconds_per_step, 4),
            **{name: round(rate, 2) for name, rate in rates.items()},
            "tflops_per_second": round(flops / 1e12, 4),
            "mfu": round(flops / self._peak, 4) if self._peak else None,
            "padding": round(1.0 - numbers["tokens"] / places, 4),
            "failed_saves": self.failed_saves,
        }

    def _write(self, record: dict[str, Any]) -> None:
        if not self._is_speaker:
            return
        try:
            self._lines.write(json_line(record))
        except OSError as error:  # a full disk, where space may come back
            if not self._is_refusal_told:
                self.say(f"NOT WRITTEN: {error}; training goes on, and lines wait in memory")
        self._is_refusal_told = self._lines.num_waiting > 0
        known = {k: v for k, v in record.items() if k != "step" and isinstance(v, int | float)}
        numbers = {k: float(v) for k, v in known.items()}
        self._on_board(lambda board: board.scalars(numbers, record["step"]))


class _ProgressBar:
    """A bar, and below it the numbers, on as many lines as the terminal's width asks for."""

    def __init__(self, first_step: int, num_steps: int, console: "Console | None" = None):
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
        from rich.text import Text

        class Bar(Progress):
            def get_renderables(self) -> "Iterable[RenderableType]":
                yield from super().get_renderables()
                yield from (Text(task.fields["text"]) for task in self.tasks)

        columns = (MofNCompleteColumn(), BarColumn(), TimeRemainingColumn())
        self._progress = Bar(*columns, console=console)
        self._task = self._progress.add_task("", total=num_steps, completed=first_step, text="")
        self._progress.start()

    def show(self, record: dict[str, Any]) -> None:
        self._progress.update(self._task, completed=record["step"], text=_numbers(record))

    def print(self, text: str) -> None:
        self._progress.console.print(text, markup=False, highlight=False)

    def stop(self) -> None:
        self._progress.stop()


def tell(text: str) -> None:
    """Prints a line, or drops it: a run is worth more than who reads its log, or the log's disk.

    Ctrl-C ends the reader of a pipe too (`| tee log`), before the run has saved.
    """
    try:
        print(text, flush=True)
    except BrokenPipeError:
        discard_output()
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            raise


def _line(record: dict[str, Any], num_steps: int, is_compiling: bool) -> str:
    if is_compiling:
        return f"step {record['step']}/{num_steps}  {_numbers(record)}  with compiling"
    left = round((num_steps - record["step"]) * record["seconds_per_step"])
    clock = f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02}"
    return f"step {record['step']}/{num_steps}  {_numbers(record)}  left {clock}"


def _numbers(record: dict[str, Any]) -> str:
    text = (
        f"loss {record['loss']:.4f}  lr {record['lr']:.2e}  grad {record['grad_norm']:.2f}  "
        f"{record['tokens_per_second']:,.0f} tokens/s  "
        f"{record['images_per_second']:,.1f} pictures/s  {record['seconds_per_step']:.3f} s/step  "
        f"padding {record['padding']:.1%}"
    )
    if record["mfu"] is not None:
        text += f"  MFU {record['mfu']:.1%}"
    if record.get("bad_samples"):
        text += f"  unusable samples {record['bad_samples']}"
    return text + (f"  skipped {record['skipped']}" if record["skipped"] else "")
