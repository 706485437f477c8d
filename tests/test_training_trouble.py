"""What a run does when data, disk or the person who started it get in its way: nothing is lost."""

import dataclasses
import errno
import functools
import json
import threading
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from test_training_run import loop_with, records

from qwenvl_jax.checkpoint.frozen import FrozenFolder
from qwenvl_jax.checkpoint.store import CheckpointStore
from qwenvl_jax.config import ConfigError, GuardConfig
from qwenvl_jax.data.example import DataError
from qwenvl_jax.files import Lines
from qwenvl_jax.sharding import batch_sharding, make_mesh
from qwenvl_jax.training.board import Board
from qwenvl_jax.training.feed import NOTHING_TOLD, Feed
from qwenvl_jax.training.guard import NOT_FINITE, SPIKE
from qwenvl_jax.training.incidents import Incidents
from qwenvl_jax.training.loop import train
from qwenvl_jax.training.run import Flight, Outcome, Run
from qwenvl_jax.training.run_dir import open_run

FULL = OSError(errno.ENOSPC, "No space left on device")


def full(*_args, **_kwargs):
    raise FULL


def feed_of(config, step, trouble):
    """Returns the batches from a step on, with `trouble` called before each."""

    def source():
        for number, batch in enumerate(tiny.batches(config, step - 1), start=step):
            trouble(number)
            yield batch

    return Feed(source(), batch_sharding(make_mesh()), patience=60.0)


# --- data ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), RuntimeError("died")])
def test_data_that_fail_in_any_way_lose_no_finished_step(tmp_path, error):
    config = tiny.train_config(tmp_path, steps=9)
    store = CheckpointStore(tmp_path, keep=9)

    def trouble(step):
        if step == 6:
            raise error

    with pytest.raises(type(error)) as met:
        loop_with(config, store, lambda *_: None, lambda step: feed_of(config, step, trouble))
    assert met.value is error
    assert store.steps() == [2, 4, 5]
    store.close()


def test_a_stop_does_not_wait_for_data(tmp_path):
    config = tiny.train_config(tmp_path, steps=9)
    store, hangs = CheckpointStore(tmp_path, keep=9), threading.Event()

    def trouble(step):
        if step == 4:
            hangs.wait(300.0)

    def ask(step, stop):
        if step == 3:
            stop.signal = "SIGTERM"

    made = loop_with(config, store, ask, lambda step: feed_of(config, step, trouble))
    hangs.set()
    assert (made, store.steps()[-1]) == (3, 3)
    store.close()


def test_a_start_that_other_data_refuse_leaves_the_run_as_it_was(tmp_path, capsys):
    config = tiny.train_config(tmp_path, steps=4)
    own = functools.partial(tiny.batches, config)
    train(config, batches=own, devices=jax.devices()[:1])
    assert "qwenvl chat" not in capsys.readouterr().out, "without a vocabulary nobody can chat"
    names = ("config.json", "manifest.json", "metrics.jsonl")
    before = {name: (tmp_path / name).read_bytes() for name in names}

    def others(first):
        raise ConfigError(f"the data are others from step {first} on")

    for steps in (4, 6):  # finished, and not
        longer = tiny.train_config(
            tmp_path, steps=steps, skip_steps=("5:5",), allow_change=("steps",)
        )
        with pytest.raises(ConfigError, match="the data are others from step 4 on"):
            train(longer, batches=others, devices=jax.devices()[:1])
        assert {name: (tmp_path / name).read_bytes() for name in names} == before
    with pytest.raises(ConfigError, match=r"steps lies behind the run: got 3, and .* has made 4"):
        train(
            tiny.train_config(tmp_path, steps=3, allow_change=("steps",)),
            batches=others,
            devices=jax.devices()[:1],
        )
    assert train(config, batches=own, devices=jax.devices()[:1]) == 4
    assert "nothing to do: this run is finished, with 4 steps" in capsys.readouterr().out


# --- a full disk --------------------------------------------------------------------------------


def test_a_full_disk_ends_tensorboards_file_and_not_the_run(tmp_path, monkeypatch, capsys):
    config = tiny.train_config(tmp_path, steps=6)
    store, made = CheckpointStore(tmp_path, keep=2), []
    scalars = Board.scalars

    def until_full(board, values, step):
        made.append(step)
        full() if step == 3 else scalars(board, values, step)

    monkeypatch.setattr(Board, "scalars", until_full)
    assert loop_with(config, store, lambda *_: None) == 6
    store.close()
    assert made == [1, 2, 3]
    assert [record["step"] for record in records(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert capsys.readouterr().out.count("TENSORBOARD ENDS HERE") == 1


def test_tensorboard_reads_what_the_board_writes(tmp_path):
    from tensorboardX.proto.event_pb2 import Event

    board = Board(tmp_path, 3)
    board.scalars({"loss": 2.5}, 3)
    board.picture("samples", np.full((4, 6, 3), 7, np.uint8), 3)
    board.close()
    (file,) = tmp_path.iterdir()
    data, events = file.read_bytes(), []
    while data:  # length, its checksum, the event, its checksum
        size = int.from_bytes(data[:8], "little")
        events.append(Event.FromString(data[12 : 12 + size]))
        data = data[16 + size :]
    assert [event.step for event in events] == [0, 3, 3, 3]
    assert events[1].session_log.status == 1  # START: hides older steps
    (loss,), (picture,) = events[2].summary.value, events[3].summary.value
    assert (loss.tag, loss.simple_value) == ("loss", 2.5)
    assert (picture.image.height, picture.image.width) == (4, 6)


def test_an_incident_waits_for_room_on_the_disk(tmp_path):
    numbers = {"step": 3, "verdict": 1, "loss": 9.0, "grad_norm": 1.0, "spike_score": 0.0}
    incidents = Incidents(tmp_path, 7)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Lines, "flush", full)
        told = incidents.note(numbers, "update refused")
        assert "NOT WRITTEN into incidents.jsonl yet: [Errno 28]" in told
    incidents.note(numbers | {"step": 5}, "update refused")
    lines = (tmp_path / "incidents.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [3, 5]


def test_a_manifest_that_cannot_be_written_is_told_and_whole(tmp_path):
    run_dir = open_run(tiny.train_config(tmp_path), [])
    run_dir.begin()
    before = (tmp_path / "manifest.json").read_text()
    said = []
    run = SimpleNamespace(report=SimpleNamespace(say=said.append))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.replace", full)
        Run._note(run, lambda: run_dir.skip((3, 4)))  # type: ignore[arg-type]
    assert said == [f"NOT NOTED in manifest.json: {FULL}"]
    assert (tmp_path / "manifest.json").read_text() == before
    assert not list(tmp_path.glob("*.new"))
    run_dir.end(step=2)
    assert json.loads((tmp_path / "manifest.json").read_text())["skip_steps"] == [[3, 4]]
    run_dir.close()


def test_half_of_the_frozen_weights_does_not_stay_on_a_full_disk(tmp_path, monkeypatch):
    def half(_checkpointer, path, **_):
        (path.parent / f"{path.name}.orbax-checkpoint-tmp").mkdir(parents=True)
        raise FULL

    monkeypatch.setattr("orbax.checkpoint.Checkpointer.save", half)
    with pytest.raises(OSError, match="No space left"):
        FrozenFolder(tmp_path).keep({"kernel": jnp.arange(6.0)})
    assert list((tmp_path / "frozen").iterdir()) == []
    (tmp_path / "frozen" / "0123.orbax-checkpoint-tmp").mkdir()  # of a start that was killed
    CheckpointStore(tmp_path, keep=1).close()
    assert list((tmp_path / "frozen").iterdir()) == []


# --- settings and signals -----------------------------------------------------------------------


def test_a_setting_that_is_gone_can_be_allowed(tmp_path):
    run_dir = open_run(tiny.train_config(tmp_path), [])
    run_dir.begin()
    run_dir.close()
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    data = dataclasses.replace(tiny.train_config().data, tasks={"vqa": 1.0})
    with pytest.raises(ConfigError, match=r"--allow-change data\.tasks\.caption data\.tasks\.vqa"):
        open_run(tiny.train_config(tmp_path, data=data), [])
    names = ("data.tasks.caption", "data.tasks.vqa")
    open_run(tiny.train_config(tmp_path, data=data, allow_change=names), []).close()


def test_an_unusable_run_dir_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    for run_dir in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(ConfigError, match=r"run_dir '.*' cannot be made \(.*\): name a folder"):
            open_run(tiny.train_config(run_dir), [])


def test_a_spike_that_only_the_replay_shows_is_gone_back_from(monkeypatch):
    first = {"verdict": NOT_FINITE, "refused_in_a_row": 1}
    monkeypatch.setattr("qwenvl_jax.training.run._read", lambda flight: first)
    config = tiny.train_config(guard=GuardConfig(spike="rewind"))
    again = first | {"verdict": SPIKE}
    gone_back = []
    run = SimpleNamespace(
        config=config,
        _replay=lambda flight, numbers: (again, "the cause is data or model", {}),
        _rewind=lambda flight, numbers, *_: gone_back.append(numbers) or True,
    )
    flight = Flight(1, tiny.batch(config, 0), {}, NOTHING_TOLD, 0.0)
    assert Run.settle(run, flight) is Outcome.REWOUND  # type: ignore[arg-type]
    assert gone_back == [first]


def test_a_feed_that_has_ended_says_so():
    feed = Feed(iter([]), batch_sharding(make_mesh()), patience=60.0)
    assert not feed.has_failed
    with pytest.raises(DataError, match="the data ended"):
        feed.take()
    assert feed.has_failed
    feed.close()
