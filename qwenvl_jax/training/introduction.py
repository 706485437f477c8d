"""What a person wants to know before the first step, and after the last."""

import shlex
from pathlib import Path
from typing import Any

from qwenvl_jax.checkpoint.weights import TOKENIZER
from qwenvl_jax.config import TrainConfig, to_dict
from qwenvl_jax.data.mixture import Round
from qwenvl_jax.sharding import replicated, replicated_lines
from qwenvl_jax.training.expectation import expected_step_time
from qwenvl_jax.training.memory import bytes_per_device
from qwenvl_jax.training.optimizer import describe_plan
from qwenvl_jax.training.plot import plot_curves
from qwenvl_jax.training.run_dir import RunDir
from qwenvl_jax.training.state import Layout
from qwenvl_jax.words import counted


def introduction(
    config: TrainConfig, layout: Layout, first_step: int, run_dir: RunDir, repeats: Round | None
) -> list[str]:
    """Returns lines: what has changed since the last start, all settings, what trains, memory a
    device, what is not split that should be, what a step is and takes, where the run stands.

    repeats: what repeats of the data, None where they have no end.
    """
    data = config.data
    size = {name: bytes_per_device(part) / 1e9 for name, part in layout.abstract._asdict().items()}
    copied = replicated(layout.model_state, layout.mesh)
    start = f"starts from {config.init or 'random weights'}"
    begin = f"resumes after step {first_step}" if first_step else start
    return [
        *run_dir.notes,
        *_settings("", to_dict(config)),
        describe_plan(layout.model_state, layout.plan),
        f"mesh {dict(layout.mesh.shape)}, {layout.mesh.devices.flat[0].device_kind}; GB a device: "
        f"trained {size['trainable']:.3f}, frozen {size['frozen']:.3f}, "
        f"optimizer {size['optimizer']:.3f}",
        *(replicated_lines(copied) if copied else ()),
        f"a step: {counted(data.rows, 'row')} x {data.length} tokens, at most "
        f"{counted(data.max_images, 'picture')} a row of {data.image_size} x {data.image_size}, "
        f"{counted(config.micro_batches, 'micro-batch')}",
        *_rounds(config, repeats),
        expected_step_time(config, layout, run_dir.start),
        *_evaluation(config),
        f"{config.run_dir}: {begin}, {counted(config.steps, 'step')}",
    ]


def conclusion(run_dir: str) -> list[str]:
    """Returns lines: where the curves are drawn, and the command that talks with the result."""
    has_vocabulary = (Path(run_dir) / TOKENIZER).is_file()  # else nobody can
    chat = [f"try it: qwenvl chat --model {shlex.quote(run_dir)}"] if has_vocabulary else []
    return [plot_curves(run_dir), *chat]


def _rounds(config: TrainConfig, repeats: Round | None) -> list[str]:
    """Returns how often a run sees its data: those of a mixture that it sees least and most."""
    if repeats is None:
        return []
    rounds = config.steps * config.data.rows / repeats.num_rows
    seen = sorted((times * rounds, source) for source, times in repeats.passes.items())
    told = f"{counted(config.steps, 'step')} see{'s' if config.steps == 1 else ''}"
    if len(seen) == 1:
        rows = counted(repeats.num_rows, "packed row")
        whom = "it" if repeats.num_rows == 1 else "them"
        return [f"the data: {rows}; {told} {whom} {_times(seen[0][0])} times"]
    (least, rarest), (most, commonest) = seen[0], seen[-1]
    return [
        f"the data: {len(seen)} sources; {told} them {_times(least)} times ({rarest}) to "
        f"{_times(most)} times ({commonest})"
    ]


def _times(times: float) -> str:
    return f"{times:,.0f}" if times >= 10 else f"{times:.2g}"


def _settings(name: str, fields: dict[str, Any]) -> list[str]:
    """Returns a line for each group of settings; the table of what trains is told by itself."""
    own = {k: v for k, v in fields.items() if not isinstance(v, dict) and k != "parameters"}
    line = f"{name or 'settings'}: {' '.join(f'{k}={v}' for k, v in own.items())}"
    groups = {f"{name}.{k}".strip("."): v for k, v in fields.items() if isinstance(v, dict) and v}
    return [line, *(text for path, group in groups.items() for text in _settings(path, group))]


def _evaluation(config: TrainConfig) -> list[str]:
    """Returns what is looked at while the run trains, if anything is."""
    asked = config.evaluation
    if not asked.every_steps:
        return []
    rows = config.data.rows // config.micro_batches
    every = "every step" if asked.every_steps == 1 else f"every {asked.every_steps} steps"
    told = f"{every}: loss of {counted(asked.batches, 'held-out batch')} of {counted(rows, 'row')}"
    if asked.samples:
        told += f", {counted(asked.samples, 'answer')} to samples with one picture drawn in "
        told += f"{config.run_dir}/samples"
    return [told]
