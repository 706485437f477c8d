"""What the loop does with steps: send, settle, save, pass over, go back."""

import dataclasses
import enum
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax

from qwenvl_jax.checkpoint.store import CheckpointError, CheckpointStore
from qwenvl_jax.config import TrainConfig
from qwenvl_jax.data.example import Batch, DataError
from qwenvl_jax.files import why_not_written
from qwenvl_jax.training.faults import HostFaults, change_one_copy
from qwenvl_jax.training.feed import NOTHING_TOLD, Feed, Told
from qwenvl_jax.training.goodput import Goodput
from qwenvl_jax.training.guard import FINE, NOT_FINITE, NOTHING_SCORED, SPIKE, refuses_spikes
from qwenvl_jax.training.hosts import check_copies, first_says
from qwenvl_jax.training.incidents import Incidents, same_numbers
from qwenvl_jax.training.loss import by_task
from qwenvl_jax.training.report import Report, Seen
from qwenvl_jax.training.run_dir import RunDir
from qwenvl_jax.training.state import TrainState, Weights, to_items, with_scalars
from qwenvl_jax.training.step import Metrics
from qwenvl_jax.training.stop import grace

Step = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
# The weights, and what says that the look is not wanted any more: then it finds nothing.
Look = Callable[[Weights, Callable[[], bool]], Seen | None]


class Flight(NamedTuple):
    """A step that was sent to the device, and whose numbers have not been read."""

    step: int
    batch: Batch
    metrics: Metrics
    told: Told  # what the data side says of the batch
    waited: float  # seconds that the loop waited for the batch


class Outcome(enum.Enum):
    """What has become of a step once its numbers are read."""

    FINE = enum.auto()
    RELEASED = enum.auto()  # the state was on hold: the step sent behind it has not happened
    REWOUND = enum.auto()  # the state is an older one
    TOO_MANY = enum.auto()  # bad steps in a row


@dataclasses.dataclass(kw_only=True)
class Run:
    """One start of a run: its state, and all that acts on it."""

    config: TrainConfig
    run_dir: RunDir
    store: CheckpointStore
    report: Report
    goodput: Goodput
    faults: HostFaults
    incidents: Incidents
    compile_step: Callable[[Batch], Step]
    restore: Callable[[], TrainState | None]
    open_feed: Callable[[int], Feed]
    look: Look | None  # None: the run is not evaluated
    state: TrainState
    feed: Feed | None = None  # opened when a batch is wanted, where it is not yet
    _step: Step | None = None
    _save_began: float | None = None  # of the save under way, by the monotonic clock
    _has_saved: bool = False
    _is_save_noted: bool = False
    _is_grace_told: bool = False
    _looked_at: int | None = None  # the step

    @property
    def has_no_data(self) -> bool:
        """Whether the data could not be opened, or have failed since."""
        return self.feed is None or self.feed.has_failed

    def close(self) -> None:
        if self.feed is not None:
            self.feed.close()

    def send(self, step: int, unless: Callable[[], bool]) -> Flight | None:
        """Starts a step on the next batch and does not wait for it.

        Returns None when `unless` comes true before there is a batch.
        """
        began = time.perf_counter()
        self.feed = self.feed or self.open_feed(step)
        with self.goodput.spend("data"):
            batch = self.feed.take(unless)
        waited = time.perf_counter() - began
        return None if batch is None else self.start(step, batch, waited)

    def start(self, step: int, batch: Batch, waited: float = 0.0) -> Flight:
        """Starts a step on a batch, for which the loop has waited so long."""
        if self._step is None:
            with self.goodput.spend("compile"):
                self._step = self.compile_step(batch)
        seen = self.faults.before_step(step, batch)
        self.state, metrics = self._step(self.state, seen)
        self.faults.after_step(step)
        told = NOTHING_TOLD if self.feed is None else self.feed.told(step - 1)
        return Flight(step, batch, metrics, told, waited)

    def settle(self, flight: Flight) -> Outcome:
        """Reads the numbers of a step, logs them, and acts on what the guard found."""
        first = numbers = _read(flight)
        verdict, outcome = first["verdict"], Outcome.FINE
        if verdict == NOT_FINITE or (verdict == SPIKE and refuses_spikes(self.config.guard)):
            numbers, found, facts = self._replay(flight, first)
            outcome = Outcome.RELEASED
            if numbers["verdict"] == SPIKE and self.config.guard.spike == "rewind":
                if self._rewind(flight, first, found, facts):
                    return Outcome.REWOUND
            else:
                action = f"{found}; {self._done(numbers['verdict'])}"
                self._tell(flight, first, action, **facts)
        elif verdict in (SPIKE, NOTHING_SCORED):
            self._tell(flight, first, self._done(verdict))
        if numbers["refused_in_a_row"] >= self.config.guard.stop_after:
            outcome = Outcome.TOO_MANY
        if outcome is not Outcome.FINE:
            self.state = with_scalars(self.state, flight.step, hold=0)
        self.report.step(numbers)
        self._tolerate(flight.step, self.store.check)
        self._note_first_save()
        self._tell_grace()
        return outcome

    def is_pause_due(self, step: int) -> bool:
        """Returns whether a step ends with something that needs the state at rest."""
        return self._is_save_due(step) or self._is_comparison_due(step) or self._is_look_due(step)

    def pause(self, step: int, unless: Callable[[], bool]) -> None:
        """Compares copies, saves and evaluates, as far as this step is one for it.

        The evaluation is left when `unless` comes true.
        """
        began = time.perf_counter()
        if self.faults.strikes("replica", step):
            self._change_a_copy()
        if self._is_comparison_due(step):
            with self.goodput.spend("compare"):
                check_copies(self.state.trainable | self.state.frozen)
        if self._is_save_due(step):
            self._check_place(step)
            self._save(step)
            if self._is_look_due(step) and not self._is_grace_told:
                # Once: a save that ends while something else is done would seem to take as long.
                self._tolerate(step, self.store.wait)
                self._tell_grace()
        self.faults.damage(step, Path(self.config.run_dir) / "checkpoints")
        if self._is_look_due(step):
            self.evaluate(step, unless)
        self.report.paused(time.perf_counter() - began)

    def evaluate(self, step: int, unless: Callable[[], bool]) -> None:
        """Looks at held-out data with the weights as they are, if the run is evaluated at all.

        Once a step. What is left because `unless` came true is made up for by the next start.

        Data that cannot be read, and a disk that is full, are told and survived: the run does not
        depend on them. Not so with several processes, of which only this one may have met them: it
        would take a step while the others wait for it here.
        """
        if self.look is None or self._looked_at == step:
            return
        with self.goodput.spend("evaluate"):
            try:
                seen = self.look(self.state.trainable | self.state.frozen, unless)
                if seen is None:
                    self.report.say(f"NOT EVALUATED (step {step}): the next start does it")
                    return
                self.report.evaluated(step, seen)
                self._looked_at = step
            except (DataError, OSError) as error:
                if jax.process_count() > 1:
                    raise
                self.report.say(f"NOT EVALUATED (step {step}): {error}; training goes on")

    def is_look_missed(self, step: int) -> bool:
        """Returns whether an evaluation was due after the step that this start begins with."""
        if self.look is None or step == 0:
            return False
        is_due = self._is_look_due(step) or step == self.config.steps
        if not is_due:
            return False
        # The first process alone reads the file, which it has just cut to whole lines.
        is_first = jax.process_index() == 0
        return first_says(is_first and step not in self.run_dir.evaluated_steps())

    def save_what_is_done(self, ahead: Flight | None) -> None:
        """Saves the steps before the one whose batch could not be had.

        Nothing with several processes, of which only this one may have met an error.
        """
        if jax.process_count() > 1:
            return
        if ahead is not None:
            self.settle(ahead)
        if (step := int(self.state.step)) > 0:
            self.save_last(step)

    def save_last(self, step: int) -> None:
        """Saves and waits for it.

        Raises: CheckpointError where this save fails: nothing would come after it.
        """
        self._check_place(step)
        with self.goodput.spend("save"):
            self._tolerate(step, self.store.wait)
            try:
                if step not in self.store.steps():
                    self.store.save(step, to_items(self.state))
                    self.store.wait()
            except Exception as error:  # a full disk has many names
                newest = max(self.store.steps(), default=0)
                why = why_not_written(error, Path(self.config.run_dir))
                then = f"goes on after step {newest}" if newest else "begins anew"
                raise CheckpointError(
                    f"the last save, of step {step}, failed: {why}; mend the storage and give "
                    f"the same command again: it {then}"
                ) from error
        self._has_saved = True
        self._note_first_save()
        self.report.say(f"saved step {step} in {Path(self.config.run_dir) / 'checkpoints'}")

    def end(self, step: int) -> None:
        """Says where the time went, and notes it in the manifest."""
        self.report.say(f"time: {self.goodput.summary()}")
        self._note(lambda: self.run_dir.end(step=step, seconds=self.goodput.split()))

    def pass_over(self, first: int, last: int) -> int:
        """Returns `last`, after counting the steps up to there without making them."""
        self.report.say(f"passing over the batches of steps {first} to {last} (skip_steps)")
        for step in range(first, last + 1):
            self.report.passed_over(step)
        self._move_to(last)
        return last

    def _move_to(self, step: int) -> None:
        self.state = with_scalars(self.state, step)
        self.close()
        self.feed = None

    def _replay(
        self, flight: Flight, first: dict[str, Any]
    ) -> tuple[dict[str, Any], str, dict[str, Any]]:
        """Makes a bad step again, from the same state and batch.

        Returns its numbers, what they say of the cause in words, and as facts for the incident.
        """
        assert self._step is not None
        with self.goodput.spend("replay"):
            before = with_scalars(
                self.state,
                flight.step - 1,
                hold=0,
                skipped=first["skipped"] - 1,
                in_a_row=first["refused_in_a_row"] - 1,
            )
            self.state, metrics = self._step(before, flight.batch)
            again = _read(flight._replace(metrics=metrics))
        is_same = same_numbers(first, again)
        cause = "data or model" if is_same else "hardware"
        found = (
            f"a replay on the same inputs gave {'the same' if is_same else 'other'} numbers, so "
            f"the cause is {cause}"
        )
        replay = {name: again[name] for name in ("loss", "grad_norm")}
        return again, found, {"cause": cause, "replay": replay}

    def _done(self, verdict: int) -> str:
        """Returns what the step has done with an update of this verdict."""
        is_applied = verdict == FINE or (verdict == SPIKE and not refuses_spikes(self.config.guard))
        return "update applied" if is_applied else "update refused"

    def _rewind(
        self, flight: Flight, first: dict[str, Any], found: str, facts: dict[str, Any]
    ) -> bool:
        """Goes back to the newest checkpoint and passes over what led to a spike, if it can.

        `found` and `facts` are what a replay of the step has said.
        """
        spike = flight.step
        self._tolerate(spike, self.store.wait)
        if not self.store.steps():
            action = f"{found}; no checkpoint to go back to; update refused"
            self._tell(flight, first, action, **facts)
            return False
        for leaf in jax.tree.leaves(self.state):
            leaf.delete()  # two states may not fit
        with self.goodput.spend("restore"):
            state = self.restore()
        assert state is not None
        self.state, step = state, int(state.step)
        skipped = (step + 1, spike + self.config.guard.rewind_margin)
        self._note(lambda: self.run_dir.skip(skipped))
        action = f"{found}; back to step {step}, passing over {skipped[0]}:{skipped[1]}"
        self._tell(flight, first, action, skipped=skipped, **facts)
        self.report.rewind(step)
        self._move_to(step)
        return True

    def _tell(self, flight: Flight, numbers: dict[str, Any], action: str, **facts: Any) -> None:
        samples = flight.told.samples
        self.report.say(self.incidents.note(numbers, action, **facts, samples=samples))

    def _note(self, write: Callable[[], None]) -> None:
        """Writes the manifest; what a full disk does not take is told, and in its next write."""
        try:
            write()
        except OSError as error:
            self.report.say(f"NOT NOTED in manifest.json: {error}")

    def _is_save_due(self, step: int) -> bool:
        return step % self.config.checkpoint.every_steps == 0

    def _is_comparison_due(self, step: int) -> bool:
        every = self.config.guard.digest_every
        return every > 0 and step % every == 0

    def _is_look_due(self, step: int) -> bool:
        every = self.config.evaluation.every_steps
        return self.look is not None and step % every == 0

    def _check_place(self, step: int) -> None:
        """Raises CheckpointError where a save would not lie with the rest of the run."""
        if first_says(self.run_dir.is_lost()):
            raise CheckpointError(
                f"step {step} is not saved: {self.run_dir.path} is not the folder that this run "
                "began in; it was moved, removed, or begun in anew. Name where it lies now with "
                "--run-dir, and the run goes on from its newest checkpoint there"
            )

    def _save(self, step: int) -> None:
        # The first save may have to write what does not train: later ones, and a stop, do not.
        is_usual = self._has_saved or not self.state.frozen
        self._has_saved = True

        def start() -> None:
            self._save_began = time.monotonic() if is_usual else None
            self.faults.before_save(step)
            self.store.save(step, to_items(self.state))

        with self.goodput.spend("save"):
            # What the save before has met is no reason not to try.
            self._tolerate(step, self.store.wait)
            self._tolerate(step, start)

    def _note_first_save(self) -> None:
        """Notes, once a save is on the disk, that a start without checkpoints has lost them."""
        if self._is_save_noted or not self._has_saved or self.store.is_saving:
            return
        if self.store.steps():
            self._note(self.run_dir.saved)
            self._is_save_noted = True

    def _tell_grace(self) -> None:
        """Says, once a save is on the disk, how long a stop would take: a step, and a save."""
        if self._is_grace_told or self._save_began is None or self.store.is_saving:
            return
        seconds = time.monotonic() - self._save_began + self.report.seconds_per_step
        self.report.say(grace(seconds, self.config.guard.grace_seconds))
        self._is_grace_told = True

    def _tolerate(self, step: int, action: Callable[[], None]) -> None:
        """Runs a save or a look at saves under way; a failure is told, counted and survived.

        The older checkpoints are whole, and the space on the disk may come back.
        """
        try:
            action()
        except Exception as error:  # noqa: BLE001  a full disk has many names
            self.report.failed_saves += 1
            self._save_began = None
            why = why_not_written(error, Path(self.config.run_dir))
            self.report.say(f"CHECKPOINT NOT SAVED (seen at step {step}): {why}; training goes on")

    def _change_a_copy(self) -> None:
        path = min(self.state.trainable)
        changed = change_one_copy(self.state.trainable[path])
        self.state = self.state._replace(trainable=self.state.trainable | {path: changed})


def _read(flight: Flight) -> dict[str, Any]:
    """Returns the step's numbers as Python's, by task last; waits for the device."""
    metrics = jax.device_get(flight.metrics)
    task_loss, task_weight = metrics.pop("task_loss"), metrics.pop("task_weight")
    numbers = {name: value.item() for name, value in metrics.items()}
    numbers |= {"step": flight.step, "data_wait": round(flight.waited, 4)}
    return numbers | flight.told.metrics | by_task(task_loss, task_weight)
