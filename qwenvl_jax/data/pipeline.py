"""Batches as a pure function of (seed, step): drawn, tokenised, packed, and made ahead of need.

Sample n of step s is drawn from a random stream of its own, so any step can be made alone: resuming
at step one million costs nothing, and neither workers nor prefetching can change what a step sees.
"""

import difflib
import functools
import itertools
import logging
import random
from collections.abc import Iterator

from qwenvl_jax.config import ConfigError, DataConfig
from qwenvl_jax.data.example import Batch, DataError, Example
from qwenvl_jax.data.packing import fill_rows, pack
from qwenvl_jax.data.sources.scene_rows import TASKS, scene_example
from qwenvl_jax.data.sources.scenes import Split
from qwenvl_jax.prompt.tokenizer import Tokenizer, load_tokenizer

MAX_REFUSED = 0.05  # of the samples of a step; past it the limits or the data are wrong
_LAST_STEP = 2**31 - 1
_PREFETCH = 4  # batches
_log = logging.getLogger(__name__)


def batches(
    config: DataConfig, seed: int, first_step: int = 0, *, slots: int, split: Split = "train"
) -> Iterator[Batch]:
    """Returns the batches of steps `first_step`, `first_step + 1`, ... without end.

    `slots` is the number of ids that one picture takes: the adapter's queries. They are made by a
    thread in the background, or by `config.num_workers` processes.

    Raises: ConfigError for settings that cannot be served; DataError at the step of a bad sample.
    """
    # grain imports jax: not at the top, so that tokenising and drawing never do
    import grain
    from absl import flags

    check_config(config, slots)
    tokenizer = load_tokenizer(config.tokenizer, slots=slots)
    make = functools.partial(make_batch, config, tokenizer, seed, split)
    steps = grain.MapDataset.range(first_step, _LAST_STEP).map(make)
    ahead = grain.ReadOptions(num_threads=1, prefetch_buffer_size=_PREFETCH)
    dataset = steps.to_iter_dataset(ahead)
    if config.num_workers:
        if not flags.FLAGS.is_parsed():  # grain reads its own absl flags when a worker starts
            flags.FLAGS.mark_as_parsed()
        workers = grain.MultiprocessingOptions(config.num_workers, per_worker_buffer_size=2)
        dataset = dataset.mp_prefetch(workers)
    return iter(dataset)


def make_batch(
    config: DataConfig, tokenizer: Tokenizer, seed: int, split: Split, step: int
) -> Batch:
    """Returns the batch of one step; samples that no row can hold are skipped with a warning.

    Raises: DataError where too many are, or where a picture and its slots do not match.
    """
    examples = (draw(config, tokenizer, seed, split, step, n) for n in itertools.count())
    rows, refusals = fill_rows(examples, config.rows, config.length, config.max_images)
    for refusal in refusals:
        _log.warning("step %d: %s", step, refusal)
    if len(refusals) > MAX_REFUSED * sum(map(len, rows)):
        raise DataError(
            f"step {step} refused {len(refusals)} samples for {sum(map(len, rows))} that it took, "
            f"more than {MAX_REFUSED:.0%}; the first: {refusals[0]}"
        )
    return pack(rows, config.length, config.max_images, config.image_size, tokenizer)


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


def check_config(config: DataConfig, slots: int) -> None:
    """Raises ConfigError where no batch can be made as the config asks."""
    if config.source not in ("scenes", "text"):
        raise ConfigError(
            f"data.source is unknown: got {config.source!r}, expected 'scenes' or 'text'"
        )
    for task in config.tasks:
        if task not in TASKS:
            near = difflib.get_close_matches(task, TASKS, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(
                f"data.tasks names an unknown task: got {task!r}, expected some of {TASKS}{hint}"
            )
    shows = config.source == "scenes" and set(config.tasks) != {"text"}
    if shows and (config.max_images < 1 or config.length < slots + 2):
        raise ConfigError(
            "data.max_images and data.length must leave room for a picture: got "
            f"{config.max_images} pictures and {config.length} tokens, expected at least 1 and "
            f"{slots + 2}; source='text' needs none"
        )
