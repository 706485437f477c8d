"""The curves of a run as one picture, drawn from its metrics.jsonl."""

import json
from collections import deque
from pathlib import Path
from typing import Any

from qwenvl_jax.config import ConfigError

# Panels from the top: what is drawn, and on which scale.
PANELS = {"loss": "linear", "lr": "linear", "grad_norm": "log"}


class NoMatplotlib(RuntimeError):
    """The optional plotting library is not installed."""


def plot_curves(run_dir: str | Path) -> str:
    """Draws run_dir/curves.png at the end of a run; returns a line that says what was done."""
    try:
        return f"curves: {draw_curves(run_dir)}"
    except (NoMatplotlib, ConfigError) as error:
        return f"no curves.png: {error}"


def draw_curves(run_dir: str | Path, output: str | Path | None = None) -> Path:
    """Returns the path of the PNG: loss, rate and gradient norm by step.

    Raises:
        ConfigError: the directory has no metrics.jsonl with a finished step.
        NoMatplotlib: the extra `plot` is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise NoMatplotlib(
            "matplotlib is not installed; run pip install 'qwenvl-jax[plot]'"
        ) from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    records = read_metrics(run_dir)
    path = Path(output or Path(run_dir) / "curves.png")
    figure, panels = plt.subplots(
        len(PANELS), 1, figsize=(8, 9), sharex=True, height_ratios=(2, 1, 1), layout="constrained"
    )
    for panel, (name, scale) in zip(panels, PANELS.items(), strict=True):
        draw_series(panel, records, name)
        panel.set(ylabel=name, yscale=scale)
    panels[0].set(title=str(run_dir))
    panels[0].legend(frameon=False)
    panels[-1].set(xlabel="step")
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def read_metrics(run_dir: str | Path) -> list[dict[str, Any]]:
    """Returns the finished steps of a run that have a loss. Raises: ConfigError for none."""
    path = Path(run_dir) / "metrics.jsonl"
    if not path.is_file():
        raise ConfigError(f"{run_dir} is no training run: it has no metrics.jsonl")
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:  # a run under way is in the middle of its last line
            continue
    records = [record for record in records if record.get("loss") is not None]
    if not records:
        raise ConfigError(f"{path} has no finished step yet")
    return records


def draw_series(panel: Any, records: list[dict[str, Any]], name: str) -> None:
    """Draws one quantity: its values in grey, and their running mean."""
    points = [(r["step"], r[name]) for r in records if r.get(name) is not None]
    steps, values = [step for step, _ in points], [value for _, value in points]
    width = max(1, len(values) // 50)
    panel.plot(steps, values, color="0.8", linewidth=0.8)
    panel.plot(steps, running_mean(values, width), linewidth=1.2, label=f"{name}, mean of {width}")


def running_mean(values: list[float], width: int) -> list[float]:
    """Returns the mean of each value and those before it, `width` at most."""
    window: deque[float] = deque(maxlen=width)
    means = []
    for value in values:
        window.append(value)
        means.append(sum(window) / len(window))
    return means
