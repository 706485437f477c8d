"""The feeds of a run: what its settings say of the data, looked at and opened at any step."""

from collections.abc import Callable, Iterator

import jax

from qwenvl_jax.config import ConfigError, TrainConfig
from qwenvl_jax.data import pipeline
from qwenvl_jax.data.example import Batch, DataError
from qwenvl_jax.data.pipeline import Share
from qwenvl_jax.data.rows import open_sources
from qwenvl_jax.prompt.tokenizer import load_tokenizer
from qwenvl_jax.sharding import batch_sharding
from qwenvl_jax.training.faults import HostFaults
from qwenvl_jax.training.feed import Feed, HeldRows, rows_of_process
from qwenvl_jax.training.goodput import Goodput
from qwenvl_jax.training.state import Layout
from qwenvl_jax.training.step import check_rows

GivenBatches = Callable[[int], Iterator[Batch]]  # first step -> the batches from there on


def open_feeds(
    config: TrainConfig,
    layout: Layout,
    faults: HostFaults,
    goodput: Goodput,
    given: GivenBatches | None,
) -> Callable[[int], Feed]:
    """Returns a function from the first step to the feed of batches from there on.

    Opening it, and what is looked at here, counts as time for data.
    """
    check_rows(config, layout.mesh)
    sharding = batch_sharding(layout.mesh)
    held = None
    if not given:
        with goodput.spend("data"):
            _check_data(config)  # what is wrong with them is told before gigabytes are loaded
        held = rows_of_process(sharding, config.data.rows)

    def watched(batches: Iterator[Batch], step: int) -> Iterator[Batch]:
        for number, batch in enumerate(batches, start=step):
            faults.hang_data(number)
            yield batch

    @goodput.spend("data")
    def open_feed(step: int) -> Feed:
        # Steps are counted from 1 here, batches from 0.
        if given:
            source, teller = given(step - 1), None
        else:
            assert held is not None
            source = teller = _configured_batches(config, step - 1, held)
        patience = config.guard.data_timeout
        return Feed(watched(source, step), sharding, patience, held=held, teller=teller)

    return open_feed


def _check_data(config: TrainConfig) -> None:
    """Raises what the data will raise that can be known at once: of settings, vocabulary, paths."""
    slots = config.model.adapter.num_queries
    tokenizer = load_tokenizer(config.data.tokenizer, slots=slots)
    if tokenizer.image_start_id != config.model.image_start_id:
        raise ConfigError(
            f"model.image_start_id is not the id of <img> in {config.data.tokenizer}: got "
            f"{config.model.image_start_id}, expected {tokenizer.image_start_id}"
        )
    if tokenizer.vocab_size > config.model.decoder.vocab_size:
        raise ConfigError(
            f"decoder.vocab_size has no rows for every id of {config.data.tokenizer}: got "
            f"{config.model.decoder.vocab_size}, expected at least {tokenizer.vocab_size}"
        )
    pipeline.check_config(config.data, slots)
    if config.data.source == "rows":
        try:
            open_sources(config.data, tokenizer)
        except DataError as error:
            name = "mixture" if config.data.mixture else "path"
            raise DataError(f"--data.{name}: {error}") from error


def _configured_batches(config: TrainConfig, first_step: int, held: HeldRows) -> pipeline.Batches:
    share = Share(held.rows, jax.process_index())
    return pipeline.batches(
        config.data,
        config.seed,
        first_step,
        slots=config.model.adapter.num_queries,
        share=share,
        folder=config.run_dir,
        allow_change=config.allow_change,
    )
