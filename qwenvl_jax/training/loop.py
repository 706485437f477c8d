"""The training run, start to end: one visible loop.

    run_dir/config.json      the resolved config
            manifest.json    who started it when, with which versions; one entry a start
            qwen.tiktoken    a copy of the vocabulary: the directory alone is a model
            checkpoints/     named by the number of finished steps
            metrics.jsonl    one line a finished step
            loss.png         the curve, when the run ends

The same command on the same run_dir goes on from the newest good checkpoint. The batch of a step
and everything random in it follow from (seed, step), so the resumed run equals the uninterrupted.
"""

import contextlib
import math
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from qwenvl_jax.checkpoint.store import CheckpointStore
from qwenvl_jax.config import ConfigError, TrainConfig
from qwenvl_jax.conversion.load import load_weights
from qwenvl_jax.data.example import Batch
from qwenvl_jax.sharding import batch_sharding, make_mesh, named_variables
from qwenvl_jax.training.feed import Feed, HeldRows, rows_of_process
from qwenvl_jax.training.optimizer import describe_plan
from qwenvl_jax.training.report import Report, plot_loss
from qwenvl_jax.training.run_dir import open_run
from qwenvl_jax.training.state import (
    Layout,
    TrainState,
    Weights,
    from_items,
    make_layout,
    random_weights,
    start_state,
    to_items,
)
from qwenvl_jax.training.step import Metrics, TrainStep, make_train_step

Batches = Callable[[int], Iterator[Batch]]  # first step -> the batches from there on


def train(
    config: TrainConfig, *, command: Sequence[str] = (), batches: Batches | None = None
) -> int:
    """Runs or resumes the run in `config.run_dir`; returns the number of finished steps.

    That is `config.steps`, or fewer when SIGTERM or Ctrl-C asked to stop: then the state of the
    last finished step has been saved. `batches` replaces the configured data.

    Raises:
        ConfigError: settings that cannot work, or that are not those of the run in this directory.
        CheckpointError: there are checkpoints, but none to go on from.
    """
    mesh = make_mesh(config.mesh)
    layout = make_layout(config, mesh)
    train_step = make_train_step(config, layout)
    notes = open_run(config, command)
    store = CheckpointStore(config.run_dir, keep=config.checkpoint.keep)
    # The mesh context serves sharding constraints that name mesh axes only.
    with jax.set_mesh(mesh), contextlib.closing(store):
        state = _restore_or_start(config, layout, store)
        first_step = int(state.step)
        report = Report(config.run_dir, first_step, config.steps, config.log_every)
        with contextlib.closing(report):
            for line in [*notes, *_introduction(config, layout, first_step)]:
                report.say(line)
            if first_step >= config.steps:
                report.say("nothing to do: this run is finished")
                return first_step
            if batches:
                held, source = None, batches(first_step)
            else:
                held = rows_of_process(batch_sharding(mesh), config.data.rows)
                source = _configured_batches(config, first_step, held)
            feed = Feed(source, batch_sharding(mesh), held=held)
            with contextlib.closing(feed), StopRequest() as stop:
                last_step = _loop(config, train_step, state, feed, store, report, stop)
    print(plot_loss(config.run_dir), flush=True)
    return last_step


def _loop(
    config: TrainConfig,
    train_step: TrainStep,
    state: TrainState,
    feed: Feed,
    store: CheckpointStore,
    report: Report,
    stop: "StopRequest",
) -> int:
    """Returns the number of finished steps; the state after the last one is saved."""
    first_step = step = int(state.step)
    unlogged: tuple[int, Metrics] | None = None
    for step in range(first_step + 1, config.steps + 1):
        state, metrics = train_step(state, next(feed))
        # Reading numbers waits for the device, so those of a step are read when the next one is
        # already on its way.
        if unlogged is not None:
            _log(report, feed, *unlogged)
        unlogged = (step, metrics)
        if stop.signal is not None:
            report.say(f"{stop.signal}: stopping after step {step}")
            break
        if step % config.checkpoint.every_steps == 0 and step < config.steps:
            # The line first: a resumed run does not make the steps before its checkpoint again.
            _log(report, feed, *unlogged)
            unlogged = None
            _tolerate(report, step, lambda: store.save(step, to_items(state)))  # noqa: B023
        _tolerate(report, step, store.check)
    if unlogged is not None:
        _log(report, feed, *unlogged)
    _tolerate(report, step, store.wait)
    store.save(step, to_items(state))
    store.wait()  # when this last save fails, the run fails
    report.say(f"saved step {step} in {Path(config.run_dir) / 'checkpoints'}")
    return step


def _log(report: Report, feed: Feed, step: int, metrics: Metrics) -> None:
    numbers = {name: value.item() for name, value in jax.device_get(metrics).items()}
    report.step({"step": step} | numbers | feed.metrics(step - 1))


def _tolerate(report: Report, step: int, action: Callable[[], None]) -> None:
    """Runs a save or a look at saves under way; a failure is told and survived.

    The older checkpoints are whole, and the space on the disk may come back.
    """
    try:
        action()
    except Exception as error:  # noqa: BLE001  a full disk has many names
        report.say(f"CHECKPOINT NOT SAVED (seen at step {step}): {error}; training goes on")


class StopRequest:
    """Notes the first SIGTERM or Ctrl-C in `signal`; the second one ends the process at once."""

    def __init__(self):
        self.signal: str | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():  # elsewhere Python refuses
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: Any) -> None:
        if self.signal is not None:
            os._exit(128 + number)
        self.signal = signal.Signals(number).name


def _restore_or_start(config: TrainConfig, layout: Layout, store: CheckpointStore) -> TrainState:
    found = store.restore_newest(to_items(layout.abstract))
    if found is not None:
        return from_items(found[1], layout.abstract)
    return start_state(config, layout, initial_weights(config, layout))


def initial_weights(config: TrainConfig, layout: Layout) -> Weights:
    """Returns the weights that a new run starts from, placed on the mesh.

    `init` None draws them from the seed; the run_dir of an earlier run gives its newest
    checkpoint's; any other folder is a weights folder, ours or a released one.
    """
    if config.init is None:
        return random_weights(config, layout.mesh)
    state = load_weights(config.init, layout.model_state)
    return {path: variable.get_value() for path, variable in named_variables(state).items()}


def _configured_batches(config: TrainConfig, first_step: int, held: HeldRows) -> Iterator[Batch]:
    from qwenvl_jax.data.pipeline import Share, batches
    from qwenvl_jax.prompt.tokenizer import load_tokenizer

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
    share = Share(held.rows, jax.process_index())
    return batches(
        config.data, config.seed, first_step, slots=slots, share=share, folder=config.run_dir
    )


def _introduction(config: TrainConfig, layout: Layout, first_step: int) -> list[str]:
    """Returns what a person wants to know before the first step."""
    data = config.data
    size = {name: _gigabytes(part) for name, part in layout.abstract._asdict().items()}
    start = f"resumes after step {first_step}" if first_step else f"starts from {config.init}"
    return [
        describe_plan(layout.model_state, layout.plan),
        f"mesh {dict(layout.mesh.shape)}, {layout.mesh.devices.flat[0].device_kind}; GB a device: "
        f"trained {size['trainable']:.3f}, frozen {size['frozen']:.3f}, "
        f"optimizer {size['optimizer']:.3f}",
        f"a step: {data.rows} rows x {data.length} tokens, at most {data.max_images} pictures "
        f"a row of {data.image_size} x {data.image_size}, {config.micro_batches} micro-batches",
        f"{config.run_dir}: {start}, {config.steps} steps",
    ]


def _gigabytes(tree: Any) -> float:
    """Returns how much of an abstract tree one device holds."""
    leaves = jax.tree.leaves(tree)
    sizes = [math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves]
    return sum(sizes) / 1e9
