"""Batches as a pure function of (seed, step), made ahead of need.

Generated scenes are an endless source: sample n of step s is drawn from a random stream of its own,
and rows are filled from the samples of one step. Finite sources are packed by plan (`rows.py`).
Either way any step can be made alone: resuming at step one million costs nothing more, and neither
workers, nor prefetching, nor the number of hosts can change what a step sees.
"""

import dataclasses
import functools
import itertools
import logging
import multiprocessing
import multiprocessing.connection
import os
import random
import signal
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from qwenvl_jax.checks import unused
from qwenvl_jax.config import ConfigError, DataConfig
from qwenvl_jax.data.canvas import Canvases
from qwenvl_jax.data.example import Batch, DataError, Example
from qwenvl_jax.data.holes import QUARANTINE, Tally
from qwenvl_jax.data.lent import Borrower, LendingCanvases, can_lend
from qwenvl_jax.data.mixture import Round
from qwenvl_jax.data.packing import fill, fill_rows, pack
from qwenvl_jax.data.rows import (
    Notes,
    RowMaker,
    canvas_shape,
    contents,
    digest_of_unusable,
    fingerprint,
    keys_of,
    open_rows,
    open_sources,
    unusable_rows,
)
from qwenvl_jax.data.sources.scene_rows import TASKS, scene_example
from qwenvl_jax.data.sources.scenes import Split
from qwenvl_jax.data.unchanged import KeptData
from qwenvl_jax.files import name_for
from qwenvl_jax.prompt.tokenizer import Tokenizer, load_tokenizer
from qwenvl_jax.words import counted, did_you_mean

MAX_REFUSED = 0.05  # of the samples of a step of scenes; past it the limits are wrong
_LAST_STEP = 2**31 - 1
_PREFETCH = 4  # batches
_MAX_THREADS = 16  # each makes a batch of its own; past these Python's lock is what they wait for
_KEPT_STEPS = 64  # what was told of them; more than can be under way at once
_GENERATED = ("scenes", "text")
_ONLY_ROWS = (
    "path",
    "mixture",
    "mixing",
    "temperature",
    "mask",
    "cut_turns",
    "same_task_rows",
    "vary_pictures",
)
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Share:
    """What one process of a run makes: some rows of each global batch."""

    rows: Sequence[int] | None = None  # in rising order; None: all
    process: int = 0


class Batches:
    """Iterates over the batches of successive steps; says afterwards what went into one.

    `repeats` is an epoch, or a round of the mixture; None for endless sources. `digests` are of
    what decides which samples a step holds, by name: processes that share a run must have the same.
    """

    def __init__(
        self,
        made: Iterator[tuple[Batch, Notes]],
        first_step: int,
        tally: Tally,
        rows: Sequence[int],
        repeats: Round | None = None,
        digests: Mapping[str, str] = {},
    ):
        """`rows` are the rows of the global batch that are made."""
        self.repeats, self.digests = repeats, digests
        self._made, self._step, self._tally, self._rows = made, first_step, tally, rows
        self._told: OrderedDict[int, tuple[dict[str, int | float], Notes]] = OrderedDict()

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> Batch:
        batch, notes = next(self._made)
        self._tally.add(self._step, notes.num_samples, notes.holes)
        share = fill(batch)
        metrics = {
            "samples": notes.num_samples - len(notes.holes),
            "fill": round(share.tokens, 4),
            "image_fill": round(share.images, 4),
            "bad_samples": self._tally.num_bad,
            **{f"bad_{reason}": count for reason, count in sorted(self._tally.reasons.items())},
        }
        self._told[self._step] = metrics, notes
        while len(self._told) > _KEPT_STEPS:
            self._told.popitem(last=False)
        self._step += 1
        return batch

    def metrics(self, step: int) -> dict[str, int | float]:
        """Returns samples, shares of places and picture slots in use, and bad samples so far.

        `step` counts from 0, as `first_step` does. Of this process's rows, bad samples since its
        start. Empty for a step that is not made yet, or was long ago.
        """
        return self._told[step][0] if step in self._told else {}

    def samples(self, step: int) -> dict[int, tuple[str, ...]]:
        """Returns row of the global batch -> the keys of its samples, of this process's rows.

        For the same steps as `metrics`.
        """
        if step not in self._told:
            return {}
        return dict(zip(self._rows, self._told[step][1].keys, strict=True))


def batches(
    config: DataConfig,
    seed: int,
    first_step: int = 0,
    *,
    slots: int,
    split: Split = "train",
    share: Share = Share(),
    folder: str | Path | None = None,
    allow_change: Sequence[str] = (),
) -> Batches:
    """Returns the batches of steps `first_step`, `first_step + 1`, ... without end.

    `slots` is the number of ids that one picture takes: the adapter's queries. They are made by
    threads in the background, or by `config.num_workers` processes. `folder` is the run directory:
    bad samples are listed there, and data that have changed since the run began are noticed, and
    refused unless `allow_change` names them.

    Raises: ConfigError for settings that cannot be served, and changed data; DataError for data
    that cannot be used, later at the step of too many bad samples.
    """
    check_config(config, slots, split)
    tokenizer = load_tokenizer(config.tokenizer, slots=slots)
    rows = tuple(range(config.rows) if share.rows is None else share.rows)
    file = None if folder is None else Path(folder) / name_for(share.process, QUARANTINE)
    tally = Tally(config.max_bad_fraction if config.source == "rows" else 1.0, file)
    repeats, num_threads, digests = None, 1, dict[str, str]()
    lending = LendingCanvases if config.num_workers and can_lend() else Canvases
    canvases = lending(canvas_shape(config, len(rows)))
    make: Callable[[int], tuple[Batch, Notes]]
    if config.source == "rows":
        sources = open_sources(config, tokenizer)
        digests["the data"] = fingerprint(config, tokenizer, sources)
        kept = folder and KeptData(Path(folder), first_step, share.process, allow_change)
        if kept:
            kept.check(digests["the data"], contents(config, sources))
        opened = open_rows(config, tokenizer, seed, sources)
        digests["which rows can be used"] = digest_of_unusable(opened)
        if kept and kept.check_usable(opened) and share.process == 0:
            holes = unusable_rows(opened.sources, opened.unusable, tokenizer, config)
            tally.list(first_step, holes)
        # Decoding leaves Python's lock alone; drawing scenes does not.
        num_threads = 1 if config.num_workers else min(_num_cores(), _MAX_THREADS)
        make = RowMaker(config, tokenizer, opened, rows, canvases)
        repeats = Round(
            opened.order.num_rows, dict(zip(opened.sources, opened.order.passes, strict=True))
        )
    else:
        make = functools.partial(_make_scenes, config, tokenizer, seed, split, rows)
    made = _made_ahead(make, first_step, config.num_workers, num_threads, canvases)
    return Batches(made, first_step, tally, rows, repeats, digests)


def _made_ahead(
    make: Callable[[int], tuple[Batch, Notes]],
    first_step: int,
    num_workers: int,
    num_threads: int,
    canvases: Canvases,
) -> Iterator[tuple[Batch, Notes]]:
    """Iterates over what `make` makes of the steps, made in the background."""
    # grain imports jax: not at the top, so that tokenising and drawing never do
    import grain
    from absl import flags

    steps = grain.MapDataset.range(first_step, _LAST_STEP).map(make)
    if isinstance(canvases, LendingCanvases):
        steps = steps.map(lambda made: (canvases.lend(made[0]), made[1]))
    ahead = grain.ReadOptions(num_threads, prefetch_buffer_size=max(_PREFETCH, num_threads))
    dataset = steps.to_iter_dataset(ahead)
    if not num_workers:
        return iter(dataset)
    if not flags.FLAGS.is_parsed():  # grain reads its own absl flags when a worker starts
        flags.FLAGS.mark_as_parsed()
    workers = grain.MultiprocessingOptions(num_workers, per_worker_buffer_size=2)
    borrower = Borrower()
    dataset = dataset.mp_prefetch(workers, worker_init_fn=_obey_the_parent)
    return iter(dataset.map(lambda made: (borrower.open(made[0]), made[1])))


def _obey_the_parent(_worker: int, _num_workers: int) -> None:
    """Leaves Ctrl-C, which a terminal sends to all, to the parent, and ends when that is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    multiprocessing.connection.wait([sentinel])
    os._exit(1)


def _num_cores() -> int:
    """Returns how many cores this process may use, where the system tells."""
    mask = getattr(os, "sched_getaffinity", None)
    return len(mask(0)) if mask is not None else os.cpu_count() or 1


# --- generated scenes ----------------------------------------------------------------------------


def _make_scenes(
    config: DataConfig,
    tokenizer: Tokenizer,
    seed: int,
    split: Split,
    rows: Sequence[int],
    step: int,
) -> tuple[Batch, Notes]:
    drawn = scene_rows(config, tokenizer, seed, split, step)
    ours = [drawn[row] for row in rows]
    batch = pack(
        ours, config.length, config.max_images, config.image_size, tokenizer, config.attend_across
    )
    return batch, Notes(sum(map(len, ours)), (), keys_of(ours))


def scene_rows(
    config: DataConfig, tokenizer: Tokenizer, seed: int, split: Split, step: int
) -> list[list[Example]]:
    """Returns the rows of one step; samples that no row can hold are skipped with a warning.

    Raises: DataError where too many are.
    """
    examples = (draw(config, tokenizer, seed, split, step, n) for n in itertools.count())
    rows, refusals = fill_rows(examples, config.rows, config.length, config.max_images)
    for refusal in refusals:
        _log.warning("step %d: %s", step, refusal)
    if len(refusals) > MAX_REFUSED * sum(map(len, rows)):
        raise DataError(
            f"step {step} refused {counted(len(refusals), 'sample')} for {sum(map(len, rows))} "
            f"that it took, more than {MAX_REFUSED:.0%}; the first: {refusals[0]}"
        )
    return rows


def draw(
    config: DataConfig, tokenizer: Tokenizer, seed: int, split: Split, step: int, index: int
) -> Example:
    """Returns sample `index` of a step: its task drawn by weight, its scene from all scenes."""
    rng = random.Random(f"draw/{split}/{seed}/{step}/{index}")
    (task,) = rng.choices(list(config.tasks), list(config.tasks.values()))
    return scene_example(
        task,
        rng.getrandbits(48),
        split,
        config.image_size,
        tokenizer,
        has_picture=config.source == "scenes",
    )


# --- settings ------------------------------------------------------------------------------------


def check_config(config: DataConfig, slots: int, split: Split = "train") -> None:
    """Raises ConfigError where no batch can be made as the config asks."""
    if config.source not in (*_GENERATED, "rows"):
        raise ConfigError(
            f"data.source is unknown: got {config.source!r}, expected 'scenes', 'text' or 'rows'"
        )
    if config.source == "rows":
        _check_rows(config, split)
    else:
        _check_scenes(config, slots)


def _check_scenes(config: DataConfig, slots: int) -> None:
    without_effect = [*_ONLY_ROWS, "max_bad_fraction"]
    unused(config, "data", without_effect, f"data.source={config.source!r}; set data.source='rows'")
    if not config.tasks:
        raise ConfigError("data.tasks is empty: name at least one task and its weight")
    for task in config.tasks:
        if task not in TASKS:
            raise ConfigError(
                f"data.tasks names an unknown task: got {task!r}, expected some of {TASKS}"
                f"{did_you_mean(task, TASKS)}"
            )
    shows = config.source == "scenes" and set(config.tasks) != {"text"}
    if shows and (config.max_images < 1 or config.length < slots + 2):
        raise ConfigError(
            "data.max_images and data.length must leave room for a picture: got "
            f"{counted(config.max_images, 'picture')} and {counted(config.length, 'token')}, "
            f"expected at least 1 and {slots + 2}; source='text' needs none"
        )


def _check_rows(config: DataConfig, split: Split) -> None:
    unused(config, "data", ["tasks"], "data.source='rows'; use data.mixture to weigh sources")
    if bool(config.path) == bool(config.mixture):
        raise ConfigError(
            "data.source='rows' needs data.path or data.mixture, one of them: got path "
            f"{config.path!r} and mixture {config.mixture}"
        )
    if config.path:
        unused(config, "data", ["mixing"], "data.path; name several paths in data.mixture")
    if config.mixing != "temperature":
        unused(
            config, "data", ["temperature"], f"mixing={config.mixing!r}; set mixing='temperature'"
        )
    if split != "train":
        raise ConfigError(
            f"data.source='rows' has no part {split!r}: give held-out rows a path of their own"
        )
