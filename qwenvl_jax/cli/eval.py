"""Scores a model on drawn scenes that no training run has seen, and prints the table.

With --rows it is scored on rows instead, of any source that training reads: each is asked as
training shows it, and its answer marked by task and language.

Example:
    qwenvl eval --num-scenes 200
    qwenvl eval --rows runs/nano/rows/heldout/food --num-rows 500
    qwenvl eval --model runs/nano/stage3 --form chat --output runs/scores
"""

import dataclasses
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qwenvl_jax.cli.errors import SUCCESS, leave, one_line, run_command
from qwenvl_jax.cli.opening import SHIPPED_MODEL, AnswerOptions, check_seed, open_model
from qwenvl_jax.cli.options import check_positive, parse_options
from qwenvl_jax.cli.outputs import check_folder
from qwenvl_jax.config import ConfigError, DType
from qwenvl_jax.words import counted

if TYPE_CHECKING:
    from qwenvl_jax.data.example import DataError
    from qwenvl_jax.data.record import Source
    from qwenvl_jax.evaluation.marks import Score
    from qwenvl_jax.evaluation.rows import RowPaper
    from qwenvl_jax.evaluation.scenes import Form
    from qwenvl_jax.inference.vl import VL

MAX_NAMED = 3  # rows that a message names


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """What to score."""

    model: Path | None = None
    """A folder with weights, config and tokenizer; the shipped model if left out."""
    num_scenes: int = 200
    """Scenes of each kind: to describe, to ask about, to find things in, to read in."""
    seed: int = 0
    """Which held-out scenes, or rows; the same seed always draws the same ones."""
    rows: tuple[Path, ...] = ()
    """Prepared folders, conversation files or TFDS folders to score on, one table each."""
    num_rows: int = 500
    """Rows of each of them."""
    form: Literal["task", "chat", "both"] = "both"
    """Prompts of the multi-task stage, chat turns, or both, one table each."""
    dtype: DType | None = None
    """Of weights and arithmetic; float32 for the shipped model, bfloat16 for others."""
    tensor: int = 1
    """Devices to spread the model over."""
    output: Path | None = None
    """A folder for the tables as Markdown, and all scores and answers as JSON; nothing is written
    if left out."""


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code of the command."""
    return run_command("eval", _run, argv)


def _run(argv: Sequence[str]) -> int:
    options = parse_options(EvalOptions, argv, "qwenvl eval", __doc__)
    _check(options)
    sources = _open_sources(options.rows)
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
        check_folder(options.output)
    vl = open_model(AnswerOptions(model=options.model, dtype=options.dtype, tensor=options.tensor))
    if options.rows:
        for path, name, source in zip(options.rows, row_names(options.rows), sources, strict=True):
            _score_rows(path, name, source, options, vl)
    else:
        from qwenvl_jax.evaluation.scenes import FORMS

        for form in FORMS if options.form == "both" else (options.form,):
            _score_scenes(form, options, vl)
    return SUCCESS


def _check(options: EvalOptions) -> None:
    check_positive(options, "num_scenes", "num_rows")
    check_seed(options.seed)
    if options.output is not None:
        there = next(p for p in (options.output, *options.output.parents) if p.exists())
        if not there.is_dir():
            raise ConfigError(f"--output is no folder: got the file {str(there)!r}; name another")
    whole = [path.resolve() for path in options.rows]
    for path in options.rows:
        if whole.count(path.resolve()) > 1:
            raise ConfigError(f"--rows names {str(path)!r} more than once; name it once")
    idle = ("num_scenes", "form") if options.rows else ("num_rows",)
    for name in idle:
        if getattr(options, name) != getattr(EvalOptions(), name):
            raise ConfigError(
                f"--{name.replace('_', '-')} has no effect {'with' if options.rows else 'without'} "
                "--rows; leave it out"
            )


def _open_sources(paths: Sequence[Path]) -> "list[Source]":
    """Returns the rows of each path; what is not there is found before the model is loaded."""
    from qwenvl_jax.data.sources.open import open_source

    return [open_source(path) for path in paths]


def row_names(paths: Sequence[Path]) -> list[str]:
    """Returns a name for the results of each path: its last part, and more where two are alike.

    >>> row_names([Path("en/heldout"), Path("zh/heldout"), Path("food.json")])
    ['en_heldout', 'zh_heldout', 'food']
    """
    whole = [path.resolve() for path in paths]
    short = [path if path.is_dir() else path.with_suffix("") for path in whole]
    # a folder beside a file of its name: the file keeps its ending
    told = [s if short.count(s) == 1 else w for s, w in zip(short, whole, strict=True)]
    parts = [path.parts[1:] for path in told]  # without the root
    names = []
    for own in parts:
        depths = range(1, len(own))
        alone = (d for d in depths if sum(other[-d:] == own[-d:] for other in parts) == 1)
        names.append("_".join(own[-next(alone, len(own)) :]))
    return names


def _score_scenes(form: "Form", options: EvalOptions, vl: "VL") -> None:
    from qwenvl_jax.evaluation.scenes import examination, facts, sit, summarise

    side, count = vl.config.image_size, options.num_scenes
    papers = examination(vl.tokenizer, side, count, options.seed, form)
    with _watch(f"{form} prompts", len(papers)) as on_progress:
        start = time.perf_counter()
        answers = sit(vl, papers, on_progress)
        seconds = time.perf_counter() - start
    title = f"{form} prompts, {counted(count, 'scene')} of each kind, seed {options.seed}"
    kept = [facts(*pair) for pair in zip(papers, answers, strict=True)]
    run = {"form": form, "seconds": round(seconds, 1)}
    _tell(title, options, f"scenes_{form}", run, summarise(papers, answers), kept)


def _score_rows(path: Path, name: str, source: "Source", options: EvalOptions, vl: "VL") -> None:
    from qwenvl_jax.evaluation.rows import facts, sit_rows, summarise_rows

    papers = _papers_that_fit(path, source, options, vl)
    with _watch(str(path), len(papers)) as on_progress:
        start = time.perf_counter()
        answers = sit_rows(vl, papers, on_progress)
        seconds = time.perf_counter() - start
    title = f"{path}, {counted(len(papers), 'row')}, seed {options.seed}"
    kept = [facts(*pair) for pair in zip(papers, answers, strict=True)]
    run = {"rows": str(path), "seconds": round(seconds, 1)}
    _tell(title, options, f"rows_{name}", run, summarise_rows(papers, answers), kept)


def _papers_that_fit(
    path: Path, source: "Source", options: EvalOptions, vl: "VL"
) -> "list[RowPaper]":
    """Returns what the rows ask; says which are left out: unusable, or too long for the model."""
    from qwenvl_jax.evaluation.rows import row_papers, split_by_length

    side, most = vl.config.image_size, vl.config.decoder.max_positions
    refused: list[DataError] = []
    drawn = row_papers(
        source, options.num_rows, vl.tokenizer, side, options.seed, on_unusable=refused.append
    )
    for error in refused[:MAX_NAMED]:
        print(f"{path}: a row is left out: {one_line(error)}", file=sys.stderr)
    if len(refused) > MAX_NAMED:
        print(f"{path}: and {len(refused) - MAX_NAMED} more that cannot be used", file=sys.stderr)
    papers, too_long = split_by_length(drawn, vl.tokenizer, most)
    if too_long:
        named = ", ".join(paper.key for paper in too_long[:MAX_NAMED])
        more = ", ..." if len(too_long) > MAX_NAMED else ""
        print(
            f"{path}: {len(too_long)} of {counted(len(drawn), 'row')} left out: question and "
            f"answer exceed the model's {most} positions: {named}{more}",
            file=sys.stderr,
        )
    if not papers:
        raise ConfigError(
            f"--rows {path} has nothing to ask: got {counted(len(drawn), 'row')} with a question, "
            f"{len(too_long)} of them longer than the model's {most} positions, and "
            f"{len(refused)} that cannot be used; name other rows"
        )
    return papers


def _tell(
    title: str,
    options: EvalOptions,
    name: str,
    run: dict[str, Any],
    scores: "list[Score]",
    answers: list[dict[str, Any]],
) -> None:
    """Prints the table, and writes it with all answers where a folder is given."""
    from rich.console import Console

    from qwenvl_jax.evaluation import report

    folder = options.model or SHIPPED_MODEL
    title = f"{folder.name}: {title}"
    Console().print(report.to_table(title, scores))
    print(f"{counted(len(answers), 'answer')} in {run['seconds']:.0f} s")
    if options.output is not None:
        settings = dataclasses.asdict(options)
        settings |= {"model": str(folder), "output": str(options.output), "rows": None} | run
        record = report.to_json(settings, scores, answers)
        page = f"{title}\n\n{report.to_markdown(scores)}"
        for path in report.write(options.output, name, page, record):
            print(f"wrote {path}")


@contextmanager
def _watch(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Yields what shows how many answers are there: a bar on a terminal, else lines."""
    if not sys.stderr.isatty():
        yield lambda done: print(f"{what}: {done} of {total}", file=sys.stderr)
        return
    from rich.markup import escape
    from rich.progress import Progress

    with Progress(transient=True) as progress:
        bar = progress.add_task(escape(what), total=total)
        yield lambda done: progress.update(bar, completed=done)


if __name__ == "__main__":
    leave(main())
