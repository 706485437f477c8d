"""Steps that go wrong: refused, told apart, passed over, gone back from. Whole runs, in here."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from qwenvl_jax.checkpoint.store import CheckpointStore
from qwenvl_jax.config import CheckpointConfig, ConfigError, GuardConfig
from qwenvl_jax.sharding import make_mesh
from qwenvl_jax.training.faults import HostFaults, parse_faults
from qwenvl_jax.training.guard import ENOUGH, REASONS, WINDOW, fresh_guard, judge, spike_score
from qwenvl_jax.training.incidents import Incidents, RunStopped
from qwenvl_jax.training.loop import restore, train
from qwenvl_jax.training.run_dir import open_run
from qwenvl_jax.training.skips import joined, last_skipped, parse_skips
from qwenvl_jax.training.state import make_layout

pytestmark = pytest.mark.timeout(900)  # whole runs; a machine with other work compiles slowly


def run(run_dir, steps=6, **changes):
    """Returns the config of a run of the tiny model, after training it."""
    config = tiny.train_config(run_dir, steps=steps, **changes)
    go_on(config)
    return config


def go_on(config) -> int:
    return train(config, batches=lambda step: tiny.batches(config, step), devices=jax.devices()[:1])


def records(run_dir) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def incidents(run_dir) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "incidents.jsonl").read_text().splitlines()]


def final_state(config):
    store = CheckpointStore(config.run_dir, read_only=True)
    state = restore(config, make_layout(config, make_mesh()), store)
    store.close()
    return jax.device_get(state)


def assert_same_training(found, expected) -> None:
    """Compares weights and moments, bit by bit."""
    for name in ("step", "trainable", "frozen", "optimizer"):
        jax.tree.map(np.testing.assert_array_equal, getattr(found, name), getattr(expected, name))


BAD = ("nan-loss@3", "nan-gradient@4", "nan-loss@8", "nan-gradient@9", "nan-loss@10")


def test_refused_steps_are_as_steps_passed_over(tmp_path, capsys):
    refused, passed = tmp_path / "refused", tmp_path / "passed"
    with pytest.raises(RunStopped, match=r"stopped after step 10: 3 bad steps in a row.*skip"):
        run(refused, steps=12, simulate_fault=BAD)
    out = capsys.readouterr().out
    assert "step 3: not finite" in out
    assert "gave the same numbers, so the cause is data or model; update refused" in out
    config = tiny.train_config(refused, steps=12, simulate_fault=BAD)
    stopped = final_state(config)
    assert (stopped.step, stopped.guard.skipped, stopped.guard.in_a_row) == (10, 5, 3)
    assert stopped.guard.hold == 0
    assert go_on(config) == 12  # step 11 is fine, so the count begins anew
    assert int(final_state(config).guard.in_a_row) == 0
    assert [r["skipped"] for r in records(refused)] == [0, 0, 1, 2, 2, 2, 2, 3, 4, 5, 5, 5]
    assert [(i["step"], i["cause"], i["seed"]) for i in incidents(refused)] == [
        (step, "data or model", 7) for step in (3, 4, 8, 9, 10)
    ]

    # And on top, a chip that slips: that costs a replay and changes no number.
    faults = (*BAD, "hardware@6")
    again = run(passed, steps=12, simulate_fault=faults, skip_steps=("3:4", "8:10"))
    assert "gave other numbers, so the cause is hardware; update applied" in capsys.readouterr().out
    assert [(i["step"], i["cause"]) for i in incidents(passed)] == [(6, "hardware")]
    manifest = json.loads((passed / "manifest.json").read_text())
    assert manifest["skip_steps"] == [[3, 4], [8, 10]]
    assert_same_training(final_state(again), final_state(config))
    losses = [[r["loss"] for r in records(path)] for path in (refused, passed)]
    bad = {3, 4, 8, 9, 10}
    assert losses[1] == [None if i + 1 in bad else loss for i, loss in enumerate(losses[0])]

    with pytest.raises(ConfigError, match=r"skip_steps 2:5 comes too late: .* step 12"):
        go_on(dataclasses.replace(again, skip_steps=("2:5",)))


def spiky(run_dir, **changes):
    return run(
        run_dir,
        steps=ENOUGH + 8,
        simulate_fault=(f"spike@{ENOUGH + 4}",),
        guard=GuardConfig(spike="rewind", rewind_margin=1),
        checkpoint=CheckpointConfig(every_steps=10, keep=9),
        **changes,
    )


def test_going_back_before_a_spike_can_be_done_again_exactly(tmp_path, capsys):
    rewound = spiky(tmp_path / "rewound")
    assert "back to step 30, passing over 31:37" in capsys.readouterr().out
    (incident,) = incidents(tmp_path / "rewound")
    assert incident["spike_score"] > 6
    assert incident["cause"] == "data or model"
    assert incident["replay"]["loss"] == incident["loss"]
    manifest = json.loads((tmp_path / "rewound" / "manifest.json").read_text())
    assert manifest["skip_steps"] == [[31, 37]]
    replayed = spiky(tmp_path / "replayed", skip_steps=("31:37",))
    assert_same_training(final_state(rewound), final_state(replayed))
    losses = [[r["loss"] for r in records(tmp_path / name)] for name in ("rewound", "replayed")]
    assert losses[0] == losses[1]
    assert losses[0][30:37] == [None] * 7


def test_an_incident_names_the_samples_of_its_batch(tmp_path, monkeypatch):
    """Each process knows its own rows, and the first one's file stays whole."""
    numbers = {"step": 3, "verdict": 1, "loss": math.nan, "grad_norm": 1.0, "spike_score": 0.0}
    for process in (0, 1):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        noted = Incidents(tmp_path, 7)
        samples = {process * 4: ("shelf.json[3]", "shelf.json[9]"), process * 4 + 1: ()}
        noted.note(numbers | {"loss/vqa": 2.5}, "update refused", samples=samples)
    (first,), (second,) = (
        [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        for name in ("incidents.jsonl", "1-incidents.jsonl")
    )
    assert first["samples"] == {"0": ["shelf.json[3]", "shelf.json[9]"], "1": []}
    assert second["samples"] == {"4": ["shelf.json[3]", "shelf.json[9]"], "5": []}
    assert (first["loss/vqa"], first["action"]) == (2.5, "update refused")
    assert first["loss"] is None  # JSON has no NaN


# --- parts --------------------------------------------------------------------------------------


def guard_with(losses, seen):
    return fresh_guard()._replace(losses=jnp.asarray(losses), seen=jnp.int32(seen))


@pytest.mark.parametrize(
    ("policy", "is_applied", "hold"),
    [("off", True, 0), ("warn", True, 0), ("skip", False, 1), ("rewind", False, 1)],
)
def test_a_spike_is_judged_by_policy(policy, is_applied, hold):
    guard = guard_with(np.linspace(1.0, 2.0, WINDOW, dtype=np.float32), WINDOW)
    numbers = jnp.float32(20.0), jnp.float32(1.0), jnp.float32(8.0)
    applied, verdict, _, after = judge(guard, *numbers, GuardConfig(spike=policy))
    assert bool(applied) == is_applied
    assert REASONS[int(verdict)] == ("fine" if policy == "off" else "loss spike")
    assert (int(after.skipped), int(after.hold)) == (1 - is_applied, hold)
    assert int(after.seen) == WINDOW + is_applied
    assert float(after.losses[0]) == (20.0 if is_applied else 1.0)


def test_a_guard_on_hold_refuses_everything_and_stays_as_it_is():
    guard = guard_with(np.ones(WINDOW, np.float32), 5)._replace(hold=jnp.int32(1))
    numbers = jnp.float32(1.0), jnp.float32(1.0), jnp.float32(8.0)
    applied, verdict, _, after = judge(guard, *numbers, GuardConfig())
    assert (bool(applied), REASONS[int(verdict)]) == (False, "on hold")
    jax.tree.map(np.testing.assert_array_equal, after, guard)


def test_spike_score_waits_and_forgets():
    random = np.random.default_rng(0)
    losses = random.normal(2.0, 0.1, WINDOW).astype(np.float32)
    assert spike_score(guard_with(losses, ENOUGH - 1), jnp.float32(9.0)) == 0
    for known, seen in ((losses, 3 * WINDOW), (losses[:ENOUGH], ENOUGH)):
        score = spike_score(guard_with(losses, seen), jnp.float32(9.0))
        assert float(score) == pytest.approx((9.0 - known.mean()) / known.std(), rel=1e-3)


@pytest.mark.parametrize("text", ["3", "5:3", "0:2", "a:b", "1:2:3"])
def test_ranges_that_are_none(text):
    with pytest.raises(ConfigError, match="skip_steps is not A:B: got"):
        parse_skips([text])


def test_ranges_join_and_are_found():
    ranges = joined(parse_skips(["7:9", "1:3", "4:5", "8:12"]))
    assert ranges == [(1, 5), (7, 12)]
    found = {step: last_skipped(step, ranges) for step in (1, 5, 6, 7, 12, 13)}
    assert found == {1: 5, 5: 5, 6: None, 7: 12, 12: 12, 13: None}


def test_a_fault_may_strike_twice():
    faults = HostFaults(("hardware@7", "hardware@3", "kill@9"))
    assert [step for step in range(1, 9) if faults.strikes("hardware", step)] == [3, 7]


def test_steps_passed_over_may_be_asked_for_again_with_more_of_them(tmp_path):
    opened = open_run(tiny.train_config(tmp_path), [])
    opened.ask_to_skip(["31:37"], 20)
    opened.ask_to_skip(["31:40"], 37)
    assert opened.skips == [(31, 40)]
    with pytest.raises(ConfigError, match=r"skip_steps 30:41 comes too late: .* made step 30"):
        opened.ask_to_skip(["30:41"], 37)
    assert opened.skips == [(31, 40)]
    opened.close()


@pytest.mark.parametrize("text", ["kill", "kill@0", "flood@3", "kill@x"])
def test_faults_that_are_none(text):
    with pytest.raises(ConfigError, match=r"simulate_fault is not NAME@STEP: got .*kill"):
        parse_faults([text])
