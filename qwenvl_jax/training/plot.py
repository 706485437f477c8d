"""The curves of a run as one picture, drawn from its metrics.jsonl."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from qwenvl_jax.config import ConfigError
from qwenvl_jax.files import read_records
from qwenvl_jax.prompt.fonts import font_for
from qwenvl_jax.training.manifest import MANIFEST
from qwenvl_jax.training.run_files import EVALUATIONS, LINES_WAYS_OUT, METRICS
from qwenvl_jax.words import counted

_BY_TASK = "loss by task"
# Panels from the top: what is drawn, on which scale, and how high.
PANELS = {
    "loss": ("linear", 2),
    _BY_TASK: ("linear", 2),
    "lr": ("linear", 1),
    "grad_norm": ("log", 1),
}


class NoMatplotlib(RuntimeError):
    """The optional plotting library is not installed."""


def plot_curves(run_dir: str | Path) -> str:
    """Draws run_dir/curves.png at the end of a run; returns a line that says what was done."""
    try:
        return f"curves: {draw_curves(run_dir)}"
    except (NoMatplotlib, ConfigError, OSError) as error:
        return f"no curves.png: {error}"


def draw_curves(run_dir: str | Path, output: str | Path | None = None) -> Path:
    """Returns the path of the PNG: loss, loss by task, rate and gradient norm by step.

    The loss of a run with one task, or none, is that by task: it has no such panel.

    Raises:
        ConfigError: the directory has no metrics.jsonl with a loss, or a damaged one; or `output`
            is a folder, of no known format or in no folder.
        NoMatplotlib: the extra `plot` is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise NoMatplotlib("matplotlib is not installed; run pip install '.[plot]'") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    records = read_metrics(run_dir)
    path = Path(output or Path(run_dir) / "curves.png")
    tasks = tasks_of(records)
    shown = {name: form for name, form in PANELS.items() if name != _BY_TASK or len(tasks) > 1}
    heights = [height for _, height in shown.values()]
    figure, panels = plt.subplots(
        len(shown),
        1,
        figsize=(8, 2.25 * sum(heights)),
        sharex=True,
        height_ratios=heights,
        layout="constrained",
    )
    _check_format(path, figure.canvas.get_supported_filetypes())
    for panel, (name, (scale, _)) in zip(panels, shown.items(), strict=True):
        if name == _BY_TASK:
            draw_tasks(panel, records, tasks)
        else:
            draw_series(panel, records, name)
        panel.set(ylabel=name, yscale=scale)
    looks = Path(run_dir) / EVALUATIONS
    found = [e for e in read_lines(looks) if e.get("loss") is not None] if looks.exists() else []
    if found:
        points = [e["step"] for e in found], [e["loss"] for e in found]
        panels[0].plot(*points, "o-", color="black", markersize=3, label="on held-out data")
    _write_name(panels[0], str(run_dir))
    panels[0].legend(frameon=False)
    panels[-1].set(xlabel="step")
    panels[-1].xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def _write_name(panel: Any, name: str) -> None:
    """Puts a path over a panel, letter by letter: a `$` in it begins no formula."""
    font, writable = font_for(name, size=12)
    title = panel.set_title(writable, parse_math=False)
    file = getattr(font, "path", None)  # Pillow's own lies in no file; nor need it: it is Latin
    if isinstance(file, str):
        title.get_fontproperties().set_file(file)


def _check_format(path: Path, known: Collection[str]) -> None:
    if path.is_dir():
        raise ConfigError(f"cannot draw into {path}: it is a folder; name a file in it")
    if path.suffix[1:].lower() not in known:
        raise ConfigError(
            f"cannot draw into {path}: got a name that ends in {path.suffix or 'nothing'!r}, "
            f"expected .png or another of {', '.join(sorted(known))}"
        )
    if not path.parent.is_dir():
        raise ConfigError(f"cannot draw into {path}: there is no folder {path.parent}")


def read_metrics(run_dir: str | Path) -> list[dict[str, Any]]:
    """Returns the finished steps of a run that have a loss. Raises: ConfigError for none."""
    path = Path(run_dir) / METRICS
    if Path(run_dir).is_file():
        raise ConfigError(f"{run_dir} is no training run: it is a file; name the run's directory")
    if not path.is_file() and not (Path(run_dir) / MANIFEST).is_file():
        raise ConfigError(f"{run_dir} is no training run: it has no metrics.jsonl")
    lines = read_lines(path) if path.is_file() else []
    records = [record for record in lines if record.get("loss") is not None]
    made = [record for record in lines if not record.get("passed_over")]
    if made and not records:
        raise ConfigError(
            f"{run_dir} has nothing to draw: got {counted(len(made), 'step')} without a finite "
            "loss; its incidents.jsonl says why"
        )
    if not records:
        raise ConfigError(f"{run_dir} has no finished step yet")
    for record in records:
        _check_numbers(path, record)
    return records


def _check_numbers(path: Path, record: dict[str, Any]) -> None:
    """Raises ConfigError for what no run has written, and no curve can show."""
    tasks = tasks_of([record])
    drawn = {name for name in (*PANELS, *(f"loss/{task}" for task in tasks)) if name in record}
    for name in (*drawn, *(f"scored_tokens/{task}" for task in tasks)):
        value = record.get(name, "nothing")
        if not isinstance(value, int | float | None):
            raise ConfigError(
                f"{path} is damaged: expected a number as {name!r} of step {record['step']}, got "
                f"{value!r:.60}; {LINES_WAYS_OUT}"
            )


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Returns the lines of a file that have a step. Raises: ConfigError for what is no record."""
    records = read_records(path, LINES_WAYS_OUT)
    return [record for record in records if isinstance(record.get("step"), int)]


def draw_series(panel: Any, records: list[dict[str, Any]], name: str) -> None:
    """Draws one quantity: its values in grey, and their running mean; the rate as it is."""
    points = [(r["step"], r[name]) for r in records if r.get(name) is not None]
    steps, values = [step for step, _ in points], [value for _, value in points]
    marker = _marker(steps)
    if name == "lr":  # a schedule has no noise, and a mean would trail behind it
        panel.plot(steps, values, linewidth=1.2, marker=marker)
        return
    width = max(1, len(values) // 50)
    label = name if width == 1 else f"{name}, mean of {width} steps"
    panel.plot(steps, values, color="0.8", linewidth=0.8)
    panel.plot(steps, running_mean(values, width), linewidth=1.2, marker=marker, label=label)


def tasks_of(records: list[dict[str, Any]]) -> list[str]:
    """Returns the tasks that any step has a loss of, in alphabetical order."""
    names = {name for record in records for name in record if name.startswith("loss/")}
    return sorted(name.removeprefix("loss/") for name in names)


def draw_tasks(panel: Any, records: list[dict[str, Any]], tasks: list[str]) -> None:
    """Draws a line a task: the running mean of its loss, each step by its scored tokens.

    One colour map over all tasks, because ten lines of the usual cycle would repeat a colour.
    """
    from matplotlib import colormaps

    for number, task in enumerate(tasks):
        found = [r for r in records if r.get(f"loss/{task}") is not None]
        losses = [r[f"loss/{task}"] for r in found]
        weights = [r[f"scored_tokens/{task}"] for r in found]
        width = max(1, len(records) // 50)
        means = running_mean(losses, width, weights)
        colour = colormaps["turbo"]((number + 0.5) / len(tasks))
        steps = [r["step"] for r in found]
        look = {"linewidth": 1.2, "color": colour, "marker": _marker(steps)}
        panel.plot(steps, means, **look, label=task)
    panel.legend(frameon=False, fontsize="small", ncols=3)


def _marker(steps: list[int]) -> str | None:
    return "o" if len(steps) == 1 else None  # one point makes no line, and would not be seen


def running_mean(values: list[float], width: int, weights: list[float] | None = None) -> np.ndarray:
    """Returns the (weighted) mean of each value and those before it, `width` at most."""
    weight = np.ones(len(values)) if weights is None else np.array(weights)
    sums = np.cumsum([np.array(values) * weight, weight], axis=1)
    sums[:, width:] -= sums[:, :-width].copy()
    return sums[0] / sums[1]
