"""Turns any source of training data into ArrayRecord files with an index, which training reads.

SOURCE is a folder of WebDataset tar shards or of img2dataset parquet files (GRIT's among them), a
conversation file (.json, .jsonl), a file of the original evaluation scripts, text or PDF files, a
folder of TensorFlow Datasets; or `collages`, `documents` or `scenes`, which are made. OUT is new; a
run that was stopped or killed goes on where it was when the same command is given again. Rows that
cannot be used are listed in OUT/refused.jsonl.

Example:
    qwenvl data prepare laion/ prepared/laion --rules web --tokenizer weights/chat
    qwenvl data prepare laion/ prepared/laion --beam --runner=DirectRunner
    qwenvl data prepare documents prepared/documents --limit 100000 --generated.languages zh
"""

import dataclasses
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from qwenvl_jax.cli.errors import SUCCESS, interrupted_by, leave, run_command
from qwenvl_jax.cli.options import check_positive, parse_options
from qwenvl_jax.config import ConfigError
from qwenvl_jax.data.clean import Limits
from qwenvl_jax.data.sources.generated import NAMES, GeneratedOptions, open_generated
from qwenvl_jax.words import counted

if TYPE_CHECKING:
    from qwenvl_jax.data.prepare import Engine, Progress
    from qwenvl_jax.data.sources.stream import Stream

_BEAM = "--beam"
LINES = 20  # of progress at most, where there is no terminal


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrepareOptions:
    """What to prepare, and how."""

    source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="SOURCE")]
    """A file or folder with the rows; or collages, documents or scenes."""
    out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")]
    """The new folder; or one that the same command has begun."""
    num_workers: int = dataclasses.field(default_factory=lambda: os.cpu_count() or 1)
    """Processes; the number changes no byte of the result."""
    limit: int | None = None
    """Only the first rows, for a look, all if left out; of what is made, how many."""
    skip: int = 0
    """Rows to leave out before those; of what is made, for others than a folder has already."""
    rows_per_shard: int = 10_000
    """Of sources read in any order; other sources have one file for each of theirs."""
    tokenizer: Path | None = None
    """A qwen.tiktoken file or a folder with one: rows that do not fit their task are then refused,
    and token counts stored, which planned packing reads; neither if left out."""
    pictures: Path | None = None
    """Where the picture paths in a JSON file start; its own folder if left out."""
    rules: tuple[str, ...] = ()
    """Cleaning of captions: web, academic, or single rules in order."""
    generated: GeneratedOptions = dataclasses.field(default_factory=GeneratedOptions)
    """How collages, documents or scenes are made."""
    limits: Annotated[Limits, tyro.conf.arg(name="limits")] = dataclasses.field(
        default_factory=Limits
    )
    """Thresholds of the rules."""


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code of the command."""
    return run_command("data prepare", _run, argv)


def _run(argv: Sequence[str]) -> int:
    argv, beam = list(argv), None
    if _BEAM in argv:  # what follows is Beam's
        at = argv.index(_BEAM)
        argv, beam = argv[:at], argv[at + 1 :]
    options = parse_options(PrepareOptions, argv, "qwenvl data prepare", __doc__)
    _check(options)

    from qwenvl_jax.data.prepare import prepare, processes
    from qwenvl_jax.data.shard import Plan

    plan = Plan(
        stream=_stream(options),
        folder=options.out.absolute(),  # Beam's workers start in folders of their own
        rules=options.rules,
        limits=options.limits,
        tokenizer=options.tokenizer.absolute() if options.tokenizer else None,
    )
    engine: Engine
    if beam is None:
        engine = processes(options.num_workers)
    else:
        from qwenvl_jax.data.beam import on_beam

        engine = on_beam(beam)
    # a terminated preparation stops its processes as an interrupted one does
    with interrupted_by(signal.SIGTERM), _watch(options.out) as report:
        index = prepare(plan, engine, report)
    print(_summary(options.out, index))
    if options.tokenizer is None and not is_generated(options):
        print("whether rows fit their tasks was not checked: give --tokenizer for that")
    return SUCCESS


def _check(options: PrepareOptions) -> None:
    check_positive(options, "num_workers", "limit", "rows_per_shard")
    if options.skip < 0:
        raise ConfigError(f"--skip must not be negative: got {options.skip}")
    if not options.rules and options.limits != Limits():
        raise ConfigError(
            "--limits.* has no effect without rules: got no --rules; add --rules web, or the names "
            "of single rules"
        )
    if options.generated != GeneratedOptions() and not is_generated(options):
        raise ConfigError(
            f"--generated.* has no effect on {options.source}: it is for {', '.join(NAMES)}"
        )
    if options.out.absolute().is_relative_to(options.source.absolute()):
        raise ConfigError(
            f"OUT lies in SOURCE: got {str(options.out)!r}, expected a folder elsewhere, as what "
            "is written there would count as a change of the source"
        )


def is_generated(options: PrepareOptions) -> bool:
    """Returns whether SOURCE names data that are made; a file of that name is opened instead."""
    return str(options.source) in NAMES and not options.source.exists()


def _stream(options: PrepareOptions) -> "Stream":
    from qwenvl_jax.data.sources.open_stream import open_stream
    from qwenvl_jax.data.sources.stream import First, InRanges

    if is_generated(options):
        if options.limit is None:
            raise ConfigError(
                f"--limit is missing: {options.source} has as many rows as are asked for; "
                "e.g. --limit 100000"
            )
        end = options.skip + options.limit
        made = open_generated(str(options.source), end, options.generated)
        return InRanges(made, options.rows_per_shard, end, options.skip)

    place = options.source.absolute()
    stream = open_stream(place, options.pictures)
    if stream is not None:
        if options.skip:
            raise ConfigError(
                f"--skip needs rows that can be read in any order: got {options.skip} for "
                f"{options.source}, which is read from front to back; leave it out"
            )
        return stream if options.limit is None else First(stream, options.limit)

    from qwenvl_jax.data.sources.open import open_source

    source = open_source(place, options.pictures)
    if options.skip >= len(source):
        raise ConfigError(
            f"--skip leaves nothing: got {options.skip}, {options.source} has "
            f"{counted(len(source), 'row')}"
        )
    end = len(source) if options.limit is None else options.skip + options.limit
    return InRanges(source, options.rows_per_shard, min(end, len(source)), options.skip)


def _summary(out: Path, index: Mapping[str, Any]) -> str:
    def told(counts: Mapping[str, int]) -> str:
        return ", ".join(f"{name} {number}" for name, number in counts.items())

    lines = [
        f"{out}: {counted(index['rows'], 'row')} of {index['read']:,}, "
        f"{index['bytes'] / 1e6:.1f} MB, {counted(len(index['shards']), 'file')}; "
        f"{told(index['tasks'])}"
    ]
    if index["changed"]:
        lines.append(f"mended by rule: {told(index['changed'])}")
    if index["refused"]:
        lines.append(f"refused, see {out / 'refused.jsonl'}: {told(index['refused'])}")
    return "\n".join(lines)


@contextmanager
def _watch(out: Path) -> Iterator[Callable[["Progress"], None]]:
    """Yields what shows the progress: a bar on a terminal, else a few lines."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    if console.is_terminal:
        counts = TextColumn("shards, {task.fields[rows]} rows, {task.fields[refused]} refused")
        columns = (BarColumn(), MofNCompleteColumn(), counts, TimeRemainingColumn())
        with Bar(*columns, console=console) as bar:
            task = bar.add_task("", total=None, rows=0, refused=0)
            yield lambda done: bar.update(
                task,
                completed=done.shards,
                total=done.num_shards,
                rows=done.rows,
                refused=done.refused,
            )
        return

    def line(done: "Progress") -> None:
        part = max(done.num_shards // LINES, 1)
        if done.shards % part == 0 or done.shards == done.num_shards:
            print(
                f"{out}: {done.shards} of {done.num_shards} shards, {counted(done.rows, 'row')}, "
                f"{done.refused} refused",
                file=sys.stderr,
                flush=True,
            )

    yield line


if __name__ == "__main__":
    leave(main())
