"""Any stream to a folder of prepared rows, by many processes, in as many runs as it takes.

`plan.json` in the folder says what is under way, so the same command goes on where a killed one
ended, and another is refused. When all shards are done it gives way to `index.json`.
"""

import contextlib
import fcntl
import functools
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from qwenvl_jax.data.shard import PARTS, Plan, PrepareError, appearing_file, write_shard
from qwenvl_jax.data.sources.prepared import INDEX, REFUSED, check_files, read_index
from qwenvl_jax.data.workers import WorkerKilled, spread
from qwenvl_jax.files import HALF
from qwenvl_jax.words import counted

_PLAN = "plan.json"


class Job(NamedTuple):
    """One shard to write: its name in the stream, its number, and how many there are."""

    shard: str
    number: int
    num_shards: int


class Progress(NamedTuple):
    """How far a preparation is."""

    shards: int
    num_shards: int
    rows: int
    refused: int


Engine = Callable[[Plan, Sequence[Job]], Iterable[Mapping[str, Any]]]


def prepare(
    plan: Plan, engine: Engine, report: Callable[[Progress], None] = lambda progress: None
) -> dict[str, Any]:
    """Returns the index of the prepared rows, after writing what is not yet there.

    `engine` writes jobs and yields their facts in any order: `processes(n)`, or Beam's.

    Raises: PrepareError where the folder holds something else, the source has changed, no row was
    kept, or a file cannot be written; OSError where the source cannot be read.
    """
    plan.folder.mkdir(parents=True, exist_ok=True)
    with _alone(plan.folder):
        facts = plan.facts()
        if (plan.folder / INDEX).exists():
            return _finished(plan, facts)
        _begin(plan.folder, facts)
        shards = plan.stream.shards()
        jobs = [Job(shard, number, len(shards)) for number, shard in enumerate(shards)]
        done, rows, refused = 0, 0, 0
        for shard in engine(plan, jobs):
            done, rows = done + 1, rows + shard["rows"]
            refused += shard["read"] - shard["rows"]
            report(Progress(done, len(shards), rows, refused))
        if plan.facts() != facts:
            raise PrepareError(
                f"the source changed while {plan.folder} was being prepared; delete the folder, "
                "and prepare it again when nobody writes to the source"
            )
        return _finish(plan.folder, facts)


# --- processes ----------------------------------------------------------------------------------


def processes(num_workers: int) -> Engine:
    """Returns the engine of one machine: that many processes, or this one where it is one.

    They import nothing that starts an accelerator.
    """

    def run(plan: Plan, jobs: Sequence[Job]) -> Iterator[Mapping[str, Any]]:
        write = functools.partial(_write, plan)
        if num_workers == 1:
            yield from map(write, jobs)
            return
        try:
            yield from spread(write, jobs, num_workers, in_order=False)
        except WorkerKilled as error:
            raise PrepareError(
                f"{error}; use a smaller --num-workers, and run the same command to go on"
            ) from error

    return run


def _write(plan: Plan, job: Job) -> dict[str, Any]:
    return write_shard(plan, *job)


# --- the folder ---------------------------------------------------------------------------------


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Holds the folder, so that two preparations do not write into one."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise PrepareError(
            f"{folder} is being prepared by another process: wait for it, or choose another folder"
        ) from error
    finally:
        os.close(handle)


def _begin(folder: Path, facts: Mapping[str, Any]) -> None:
    """Writes the plan of a new folder; or clears away what a killed run of it left half written."""
    try:
        begun = json.loads((folder / _PLAN).read_text(encoding="utf-8"))
    except FileNotFoundError:
        half = {PARTS, *(path.name for path in folder.glob(f"{_PLAN}.*{HALF}"))}  # of a killed run
        if names := sorted({path.name for path in folder.iterdir()} - half):
            raise PrepareError(
                f"{folder} holds something else: got {', '.join(names[:5])}, expected a new or "
                "empty folder; choose another one"
            ) from None
        with appearing_file(folder / _PLAN) as file:
            file.write(json.dumps(facts, indent=1).encode())
    else:
        _check_same(folder, begun, facts)
    (folder / PARTS).mkdir(exist_ok=True)
    for path in [*folder.glob(f"*{HALF}"), *(folder / PARTS).glob(f"*{HALF}")]:
        path.unlink()


def _check_same(folder: Path, begun: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    # Older versions did not note where pictures lie.
    differing = [name for name in facts if begun.get(name, facts[name]) != facts[name]]
    if not differing:
        return
    if "source" in differing:
        what = "from another source, or the source has changed since"
    elif "pictures" in differing:
        what = "with the pictures of another folder (--pictures)"
    elif "cut" in differing:
        what = "with another --limit or --rows-per-shard"
    else:
        name = differing[0]
        what = f"with other settings: its {name} was {begun.get(name)}, now {facts[name]}"
    raise PrepareError(
        f"{folder} was begun {what}; prepare into a new folder, or delete this one first"
    )


def _finished(plan: Plan, facts: Mapping[str, Any]) -> dict[str, Any]:
    index = read_index(plan.folder)
    _check_same(plan.folder, index["made_from"], facts)
    check_files(plan.folder, index["shards"])
    _clear(plan.folder)
    return index


def _finish(folder: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the index, after writing it and the list of refused rows from the shards' facts."""
    parts = sorted((folder / PARTS).glob("*.json"), key=lambda path: int(path.stem))
    shards = [json.loads(path.read_text(encoding="utf-8")) for path in parts]
    if len(shards) != facts["shards"]:
        raise PrepareError(
            f"{folder} is not whole: got {counted(len(shards), 'shard')}, expected "
            f"{facts['shards']}; run the same command to go on"
        )
    index = {
        "format": facts["format"],
        **{name: sum(shard[name] for shard in shards) for name in _SUMS},
        "tokens": sum(shard["tokens"] for shard in shards) if facts["tokenizer"] else None,
        "tokenizer": facts["tokenizer"],
        **{name: _summed(shard[name] for shard in shards) for name in _COUNTS},
        "made_from": facts,
        "shards": [{name: shard[name] for name in _SHARD_FACTS} for shard in shards],
    }
    with appearing_file(folder / REFUSED) as file:
        for path in parts:
            with path.with_suffix(".refused.jsonl").open("rb") as part:
                shutil.copyfileobj(part, file)
    if not index["rows"]:
        raise PrepareError(
            f"no row of {index['read']} was kept: {_told(index['refused'])}; see {folder / REFUSED}"
            ", delete the folder, and mend the source or the rules"
        )
    check_files(folder, shards)
    with appearing_file(folder / INDEX) as file:
        file.write(json.dumps(index, indent=1).encode())
    _clear(folder)
    return index


_SUMS = ("rows", "bytes", "read", "pictures")
_COUNTS = ("tasks", "refused", "changed")
_SHARD_FACTS = ("file", "rows", "bytes", "sha256")


def _clear(folder: Path) -> None:
    shutil.rmtree(folder / PARTS, ignore_errors=True)
    (folder / _PLAN).unlink(missing_ok=True)


def _summed(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total = Counter[str]()
    for count in counts:
        total.update(count)
    return dict(sorted(total.items()))


def _told(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{number} {name}" for name, number in counts.items()) or "nothing was read"
