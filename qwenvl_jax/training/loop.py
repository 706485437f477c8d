"""The training run, start to end: one visible loop.

    run_dir/config.json      the resolved config
            manifest.json    one entry a start: who, when, with which versions, how it ended
            qwen.tiktoken    a copy of the vocabulary: the directory alone is a model
            checkpoints/     named by the number of finished steps
            frozen/          the weights that do not train, written once
            metrics.jsonl    one line a finished step
            evaluations.jsonl, samples/  what evaluations found, where they are asked for
            incidents.jsonl  one line a step that went wrong
            curves.png       when the run ends

The same command on the same run_dir goes on from the newest good checkpoint. The batch of a step
and everything random in it follow from (seed, step), so the resumed run equals the uninterrupted.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from qwenvl_jax.checkpoint.store import CheckpointStore
from qwenvl_jax.config import ConfigError, EvaluationConfig, TrainConfig, to_dict
from qwenvl_jax.conversion.load import load_weights
from qwenvl_jax.data.example import Batch, DataError
from qwenvl_jax.model.attention import check_backend
from qwenvl_jax.model.lora import is_lora, without_lora
from qwenvl_jax.sharding import make_mesh, named_arrays, platform_of
from qwenvl_jax.training.changes import flat_fields
from qwenvl_jax.training.faults import HostFaults
from qwenvl_jax.training.feed import Feed
from qwenvl_jax.training.feeds import GivenBatches, open_feeds
from qwenvl_jax.training.goodput import Goodput
from qwenvl_jax.training.heldout import HeldOutLoss, telling_path
from qwenvl_jax.training.hosts import check_agreement, telling_the_lost
from qwenvl_jax.training.incidents import Incidents, RunStopped
from qwenvl_jax.training.introduction import conclusion, introduction
from qwenvl_jax.training.memory import describe_memory, explained
from qwenvl_jax.training.report import Report, Seen
from qwenvl_jax.training.run import Look, Outcome, Run
from qwenvl_jax.training.run_dir import RunDir, open_run
from qwenvl_jax.training.skips import last_skipped
from qwenvl_jax.training.state import (
    Layout,
    TrainState,
    Weights,
    check_frozen_dtype,
    from_items,
    make_layout,
    new_items,
    random_weights,
    start_state,
    to_items,
)
from qwenvl_jax.training.step import Metrics, make_train_step
from qwenvl_jax.training.stop import StopRequest, grace
from qwenvl_jax.words import counted

_NOTHING_TO_DO = (
    "nothing to do: this run is finished, with {steps}; ask for more of them with --steps=N "
    "--allow-change steps, or name another run_dir to begin anew"
)
OpenPage = Callable[[TrainConfig, Layout], Callable[[Weights], np.ndarray | None]]


@telling_the_lost()
def train(
    config: TrainConfig,
    *,
    command: Sequence[str] = (),
    batches: GivenBatches | None = None,
    open_page: OpenPage | None = None,
    devices: Sequence[Any] | None = None,
    when_loaded: Callable[[], None] = lambda: None,
) -> int:
    """Runs or resumes the run in `config.run_dir`; returns the number of finished steps.

    That is `config.steps`, or fewer after SIGTERM or Ctrl-C: then the last finished step is saved.
    `batches` replaces the configured data, `devices` the job's; `open_page` draws at evaluations,
    `when_loaded` is called once the state is in memory.

    Raises:
        ConfigError: settings that cannot work, or that are not those of the run in this directory.
        CheckpointError: there are checkpoints, but none to go on from.
        HostsDiffer, HostLost: the processes do not agree; another one does not answer any more.
        RunStopped: too many bad steps in a row; the state is saved.
        OutOfMemory: the device cannot hold the step; what is on disk is whole.
    """
    goodput, faults = Goodput(), HostFaults(config.simulate_fault)
    layout = _layout_on(config, make_mesh(config.mesh, devices))
    open_feed = open_feeds(config, layout, faults, goodput, batches)
    look, held = open_look(config, layout, open_page)
    # The mesh context serves sharding constraints that name mesh axes only.
    with jax.set_mesh(layout.mesh), explained(layout), ExitStack() as stack:
        run_dir = stack.enter_context(closing(open_run(config, command)))
        store = stack.enter_context(closing(_open_store(config, layout)))
        with goodput.spend("restore"):
            state = _first_state(config, layout, run_dir, store)
        when_loaded()
        begun = int(state.step)
        feed = stack.enter_context(closing(open_feed(begun + 1)))  # refuses other data
        report = stack.enter_context(closing(_report(config, layout, run_dir, feed, held, begun)))
        run = Run(
            config=config,
            run_dir=run_dir,
            store=store,
            report=report,
            goodput=goodput,
            faults=faults,
            incidents=Incidents(config.run_dir, config.seed),
            compile_step=lambda batch: _compile(config, layout, batch, report),
            restore=lambda: restore(config, layout, store),
            open_feed=open_feed,
            look=look,
            state=state,
            feed=feed,
        )
        stack.enter_context(closing(run))
        if begun == config.steps and not run.is_look_missed(begun):
            report.say(_NOTHING_TO_DO.format(steps=counted(begun, "step")))
            return begun
        goodput.started()
        last_step = loop(run, stack.enter_context(StopRequest()))
        run.end(last_step)
    _print_end(config)
    return last_step


def loop(run: Run, stop: StopRequest) -> int:
    """Returns the number of finished steps; the state after the last one is saved.

    While the device computes a step, its predecessor's numbers are read: reading waits for the
    device. So a bad step is found when the next one has been sent, which then was on hold, changed
    nothing, and is sent again.
    """
    config, ahead, end = run.config, None, ""
    tick = step = int(run.state.step)  # a tick is never behind a step: Orbax asks by steps
    if run.is_look_missed(step):
        run.evaluate(step, stop.is_asked)
    while True:
        tick += 1
        if not end and (asked := stop.reached(tick)):
            end = f"{asked}: stopping after step {step}; the same command goes on from there"
        is_last = bool(end) or step == config.steps
        is_due = ahead is not None and run.is_pause_due(step)
        skip_to = last_skipped(step + 1, run.run_dir.skips)
        try:
            is_sent = not (is_last or is_due or skip_to)
            flight = run.send(step + 1, unless=stop.is_asked) if is_sent else None
        except Exception as error:
            if isinstance(error, DataError) or run.has_no_data:
                run.save_what_is_done(ahead)
            raise
        outcome = Outcome.FINE if ahead is None else run.settle(ahead)
        ahead = None
        if outcome is Outcome.REWOUND:
            step = int(run.state.step)
        elif outcome is Outcome.TOO_MANY:
            bad = counted(config.guard.stop_after, "bad step")
            end = f"stopped after step {step}: {bad} in a row"
            break
        elif is_last:
            break
        elif is_due:
            run.pause(step, stop.is_asked)
        elif skip_to:
            step = run.pass_over(step + 1, min(skip_to, config.steps))
        elif flight is not None:
            was_on_hold = outcome is Outcome.RELEASED
            ahead = run.start(flight.step, flight.batch) if was_on_hold else flight
            step = ahead.step
    if end:
        run.report.say(end)
    run.save_last(step)
    if stop.asked_at is not None:
        run.report.say(grace(time.monotonic() - stop.asked_at, config.guard.grace_seconds))
    if not end:
        run.evaluate(step, stop.is_asked)
    if outcome is Outcome.TOO_MANY:
        run.end(step)
        raise RunStopped(
            f"{end}; their updates were refused, the state is saved, and {run.incidents.path} "
            "names their batches. The same command goes on behind them: mend the data first, pass "
            f"over more of them with --skip-steps {step + 1}:B, or lower the rate with "
            "--optimizer.peak-lr=... --allow-change optimizer.peak_lr"
        )
    return step


def _layout_on(config: TrainConfig, mesh: Mesh) -> Layout:
    check_backend(config.model, platform_of(mesh))
    layout = make_layout(config, mesh)
    check_frozen_dtype(config, layout)
    return layout


def _print_end(config: TrainConfig) -> None:
    if jax.process_index() == 0:
        print("\n".join(conclusion(config.run_dir)), flush=True)


def _open_store(config: TrainConfig, layout: Layout) -> CheckpointStore:
    frozen = layout.abstract.frozen
    return CheckpointStore(config.run_dir, keep=config.checkpoint.keep, frozen=frozen)


def _report(
    config: TrainConfig,
    layout: Layout,
    run_dir: RunDir,
    feed: Feed,
    held_out: Mapping[str, str],
    first_step: int,
) -> Report:
    """Returns the report, after it has told what is about to happen. `held_out`: digests.

    Raises: HostsDiffer where each host has a copy of the data, and they are not equal; then nothing
    can refuse the start any more.
    """
    check_agreement({**feed.digests, **held_out})
    run_dir.begin()
    report = Report(config, layout, first_step)
    report.say("\n".join(introduction(config, layout, first_step, run_dir, feed.repeats)))
    return report


def open_look(
    config: TrainConfig, layout: Layout, open_page: OpenPage | None
) -> tuple[Look | None, Mapping[str, str]]:
    """Returns what evaluates the run, and digests of its data as `Batches` has them.

    None where it is not asked for.

    Raises: ConfigError where there is nothing to evaluate on, DataError where it is not usable.
    """
    if not config.evaluation.every_steps:
        if config.evaluation != EvaluationConfig():
            raise ConfigError(
                f"evaluation has no effect: got {config.evaluation} with every_steps=0; set "
                "evaluation.every_steps, or leave the others out"
            )
        return None, {}
    with telling_path(config):
        loss = HeldOutLoss(config, layout)
        page = open_page(config, layout) if open_page and config.evaluation.samples else None

    def look(weights: Weights, unless: Callable[[], bool]) -> Seen | None:
        with telling_path(config):
            numbers = loss(weights, unless)
            if numbers is None or unless():
                return None
            return Seen(numbers, page and page(weights))

    return look, loss.digests


def restore(config: TrainConfig, layout: Layout, store: CheckpointStore) -> TrainState | None:
    """Returns the state of the newest good checkpoint, or None where there is none."""
    found = store.restore_newest(
        to_items(layout.abstract),
        new_items(layout),
        spare=lambda: initial_weights(config, layout),
    )
    return found and from_items(found[1], layout.abstract)


def new_state(config: TrainConfig, layout: Layout) -> TrainState:
    """Returns the state of a run that begins."""
    return start_state(config, layout, initial_weights(config, layout))


def _first_state(
    config: TrainConfig, layout: Layout, run_dir: RunDir, store: CheckpointStore
) -> TrainState:
    """Returns the state that this start begins with. Raises: what keeps it from beginning."""
    _check_processes(config, run_dir)
    state = restore(config, layout, store)
    if state is None:
        run_dir.check_new()
        state = new_state(config, layout)
    _check_first_step(config, run_dir, int(state.step))
    return state


def initial_weights(config: TrainConfig, layout: Layout) -> Weights:
    """Returns the weights that a new run starts from, placed on the mesh.

    `init` None draws them from the seed; the run_dir of an earlier run gives its newest
    checkpoint's; any other folder is a weights folder, ours or a released one. LoRA pairs are new.
    """
    if config.init is None:
        return random_weights(config, layout)
    state = load_weights(config.init, without_lora(layout.model_state))
    loaded = named_arrays(state)
    if not config.model.lora.rank:
        return loaded
    return loaded | random_weights(config, layout, only=is_lora)


def _compile(
    config: TrainConfig, layout: Layout, batch: Batch, report: Report
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Returns the step as one executable, which cannot compile again: other shapes are an error."""
    compiled = make_train_step(config, layout).lower(layout.abstract, batch).compile()
    report.say(describe_memory(compiled))
    return compiled


def _check_processes(config: TrainConfig, run_dir: RunDir) -> None:
    """Raises HostsDiffer unless all processes have the same settings, code and inputs."""
    start = run_dir.start
    facts = {
        "the commit": start["commit"],
        "package versions": start["versions"],
        "inputs": start["inputs"],
        "skip_steps": run_dir.skips,
        **{f"the setting {path}": value for path, value in flat_fields(to_dict(config)).items()},
    }
    check_agreement({name: json.dumps(value) for name, value in facts.items()})


def _check_first_step(config: TrainConfig, run_dir: RunDir, first_step: int) -> None:
    """Raises what keeps a run from going on where it stands."""
    check_agreement({"the newest good checkpoint": str(first_step)})  # all have read the directory
    if first_step > config.steps:
        raise ConfigError(
            f"steps lies behind the run: got {config.steps}, and {config.run_dir} has made "
            f"{first_step}; name at least as many, or another run_dir"
        )
    run_dir.ask_to_skip(config.skip_steps, first_step)
