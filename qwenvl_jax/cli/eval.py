"""Scores a model on drawn scenes that no training run has seen, and prints the table.

Example:
    qwenvl eval --num-scenes 200
    qwenvl eval --model runs/nano/stage3 --form chat --output runs/scores
"""

import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from qwenvl_jax.cli.errors import SUCCESS, run_command
from qwenvl_jax.cli.opening import SHIPPED_MODEL, AnswerOptions, open_model
from qwenvl_jax.cli.options import parse_options
from qwenvl_jax.config import ConfigError

if TYPE_CHECKING:
    from qwenvl_jax.evaluation.scenes import Form, Paper
    from qwenvl_jax.inference.vl import VL


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """What to score."""

    model: Path | None = None
    """A folder with weights, config and tokenizer; the shipped model if left out."""
    num_scenes: int = 200
    """Scenes of each kind: to describe, to ask about, to find things in, to read in."""
    seed: int = 0
    """Which held-out scenes; the same seed always draws the same ones."""
    form: Literal["task", "chat", "both"] = "both"
    """Prompts of the multi-task stage, chat turns, or both, one table each."""
    dtype: Literal["bfloat16", "float32"] | None = None
    """Of weights and arithmetic; float32 for the shipped model, bfloat16 for others."""
    output: Path | None = None
    """A folder for the tables as Markdown, and all scores and answers as JSON."""


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code of the command."""
    return run_command("eval", _run, argv)


def _run(argv: Sequence[str]) -> int:
    options = parse_options(EvalOptions, argv, "qwenvl eval", __doc__)
    if options.num_scenes <= 0:
        raise ConfigError(f"--num-scenes must be positive: got {options.num_scenes}")

    from rich.console import Console

    from qwenvl_jax.evaluation import report
    from qwenvl_jax.evaluation.scenes import FORMS, examination, summarise

    folder = options.model or SHIPPED_MODEL
    vl = open_model(AnswerOptions(model=options.model, dtype=options.dtype))
    console = Console()
    forms = FORMS if options.form == "both" else (options.form,)
    for form in forms:
        papers = examination(
            vl.tokenizer, vl.config.image_size, options.num_scenes, options.seed, form
        )
        answers, seconds = _sit(vl, papers, form)
        scores = summarise(papers, answers)
        title = (
            f"{folder.name}: {form} prompts, {options.num_scenes} scenes of each kind, "
            f"seed {options.seed}"
        )
        console.print(report.to_table(title, scores))
        console.print(f"{len(papers)} answers in {seconds:.0f} s")
        if options.output is not None:
            run = dataclasses.asdict(options) | {"model": str(folder), "form": form}
            run = run | {"output": str(options.output), "seconds": round(seconds, 1)}
            record = report.to_json(run, scores, papers, answers)
            page = f"{title}\n\n{report.to_markdown(scores)}"
            for path in report.write(options.output, f"scenes_{form}", page, record):
                console.print(f"wrote {path}")
    return SUCCESS


def _sit(vl: "VL", papers: "Sequence[Paper]", form: "Form") -> tuple[list[str], float]:
    """Returns the answers and the seconds they took, with a bar on a terminal."""
    from rich.progress import Progress

    from qwenvl_jax.evaluation.scenes import sit

    start = time.perf_counter()
    if not sys.stderr.isatty():
        answers = sit(
            vl, papers, lambda done: print(f"{form}: {done} of {len(papers)}", file=sys.stderr)
        )
    else:
        with Progress(transient=True) as progress:
            bar = progress.add_task(f"{form} prompts", total=len(papers))
            answers = sit(vl, papers, lambda done: progress.update(bar, completed=done))
    return answers, time.perf_counter() - start


if __name__ == "__main__":
    sys.exit(main())
