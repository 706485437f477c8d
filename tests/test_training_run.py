"""A run from outside: started, stopped, killed, resumed, refused."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from qwenvl_jax.checkpoint.store import CheckpointStore, restore_weights
from qwenvl_jax.cli.train import main, read_config
from qwenvl_jax.config import ConfigError, OptimizerConfig
from qwenvl_jax.data.example import DataError
from qwenvl_jax.sharding import batch_sharding, make_mesh
from qwenvl_jax.training.feed import Feed
from qwenvl_jax.training.loop import StopRequest, _loop
from qwenvl_jax.training.report import Report, plot_loss
from qwenvl_jax.training.run_dir import differences, open_run, truncate_metrics
from qwenvl_jax.training.state import make_layout

TESTS = Path(__file__).parent
PATIENCE = 550  # seconds; a machine with other work on it compiles slowly
STEPS = 9  # with a checkpoint every second step, so the last one is no multiple

# Slow batches leave time to hit the run between two steps.
PROGRAM = """
import itertools, sys, time
import tiny
from qwenvl_jax.training.loop import train
run_dir, steps, pause = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
config = tiny.train_config(run_dir, steps=steps)
def batches(first_step):
    for batch in tiny.batches(config, first_step):
        time.sleep(pause)
        yield batch
train(config, batches=batches)
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Returns a folder where the runs of this file share what they have compiled."""
    return tmp_path_factory.mktemp("compiled")


def start(run_dir: Path, compiled: Path, pause: float) -> subprocess.Popen:
    environment = os.environ | {
        "PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}",
        # One device, as `python train.py` has it; half of the compile time, and just as repeatable.
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        "JAX_COMPILATION_CACHE_DIR": str(compiled),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [sys.executable, "-c", PROGRAM, str(run_dir), str(STEPS), str(pause)]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process: subprocess.Popen) -> str:
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, out + err
    return out


def records(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def wait_for(condition, process: subprocess.Popen) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)


def num_lines(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def final_weights(run_dir: Path) -> dict[str, np.ndarray]:
    layout = layout_of(tiny.train_config())
    found = restore_weights(run_dir, layout.abstract.trainable | layout.abstract.frozen)
    return jax.device_get(found)


@pytest.mark.timeout(1800)
def test_stopped_and_killed_run_equals_the_uninterrupted(tmp_path, compiled):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    out = finish(start(whole, compiled, 0.0))
    assert f"step {STEPS}/{STEPS}" in out
    assert [r["step"] for r in records(whole)] == list(range(1, STEPS + 1))
    assert (whole / "loss.png").stat().st_size > 1000

    process = start(broken, compiled, 0.3)
    wait_for(lambda: num_lines(broken) >= 3, process)
    process.send_signal(signal.SIGTERM)
    out = finish(process)  # exit code 0
    stopped_at = records(broken)[-1]["step"]
    assert 3 <= stopped_at < STEPS
    assert f"saved step {stopped_at}" in out
    assert (broken / "checkpoints" / str(stopped_at)).is_dir()

    process = start(broken, compiled, 0.3)
    wait_for(lambda: num_lines(broken) > stopped_at + 1, process)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert num_lines(broken) < STEPS

    out = finish(start(broken, compiled, 0.0))
    assert "resumes after step" in out
    for name in ("step", "loss", "grad_norm", "lr", "tokens", "scored_tokens"):
        assert [r[name] for r in records(broken)] == [r[name] for r in records(whole)], name
    expected = final_weights(whole)
    for path, array in final_weights(broken).items():
        np.testing.assert_array_equal(array, expected[path], err_msg=path)
    starts = json.loads((broken / "manifest.json").read_text())["starts"]
    assert len(starts) == 3

    assert "this run is finished" in finish(start(broken, compiled, 0.0))


# --- run directory ------------------------------------------------------------------------------


def begin(config) -> None:
    """Makes a run directory look as after the first step."""
    assert open_run(config, ["train.py"]) == []
    (Path(config.run_dir) / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')


def test_a_start_that_failed_at_once_may_be_mended(tmp_path):
    open_run(tiny.train_config(tmp_path), ["train.py"])
    assert open_run(tiny.train_config(tmp_path, seed=8), ["train.py"]) == []
    assert json.loads((tmp_path / "config.json").read_text())["seed"] == 8


def test_another_recipe_in_the_same_directory_is_refused(tmp_path):
    begin(tiny.train_config(tmp_path))
    other = tiny.train_config(
        tmp_path,
        seed=8,
        optimizer=OptimizerConfig(peak_lr=1e-3, end_lr=1e-4, warmup_steps=2),
    )
    with pytest.raises(
        ConfigError, match=r"optimizer\.peak_lr: was 0\.003, now 0\.001; seed: was 7"
    ):
        open_run(other, ["train.py"])
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["seed"] == 7, "a refused start must leave the directory as it was"


def test_speed_settings_may_change_and_are_told(tmp_path):
    begin(tiny.train_config(tmp_path))
    notes = open_run(tiny.train_config(tmp_path, micro_batches=2, log_every=5), ["train.py"])
    assert notes == [
        "changed since the last start: log_every: was 1, now 5",
        "changed since the last start: micro_batches: was 1, now 2",
    ]
    assert len(json.loads((tmp_path / "manifest.json").read_text())["starts"]) == 2


def test_another_tokenizer_under_the_same_name_is_refused(tmp_path):
    vocabulary = tmp_path / "qwen.tiktoken"
    data = tiny.train_config().data
    data = type(data)(**{**vars(data), "tokenizer": str(vocabulary)})
    config = tiny.train_config(tmp_path / "run", data=data)
    vocabulary.write_text("IQ== 0\n")
    begin(config)
    assert (tmp_path / "run" / "qwen.tiktoken").read_text() == "IQ== 0\n"
    vocabulary.write_text("IQ== 0\nIg== 1\n")
    with pytest.raises(ConfigError, match="tokenizer file is not the one"):
        open_run(config, [])


def test_differences_name_the_leaf():
    old = {"a": {"b": 1, "c": [1, 2]}, "d": "x"}
    assert differences(old, {"a": {"b": 1, "c": (1, 2)}, "d": "x"}) == {}
    assert differences(old, {"a": {"b": 2, "c": [1, 2]}, "d": "x", "e": 0}) == {
        "a.b": "a.b: was 1, now 2",
        "e": "e: was None, now 0",
    }


def test_metrics_after_the_checkpoint_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "loss": step / 2}) for step in range(1, 8)]
    path.write_text("\n".join(lines) + '\n{"step": 8, "lo')
    assert truncate_metrics(path, 5) == 3
    assert path.read_text() == "\n".join(lines[:5]) + "\n"
    assert truncate_metrics(path, 5) == 0
    assert truncate_metrics(tmp_path / "none.jsonl", 0) == 0


def test_curve_of_a_run_with_skipped_steps(tmp_path):
    lines = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": None}, {"step": 3, "loss": 2.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    assert "loss.png" in plot_loss(tmp_path)
    assert (tmp_path / "loss.png").is_file()


# --- feed ---------------------------------------------------------------------------------------


def test_feed_keeps_the_order_and_places_the_rows():
    config = tiny.train_config()
    sharding = batch_sharding(make_mesh(tiny.MeshConfig(data=2, fsdp=4)))
    feed = Feed(tiny.batches(config, 3), sharding)
    for step in (3, 4, 5):
        batch = next(feed)
        np.testing.assert_array_equal(batch.tokens, tiny.batch(config, step).tokens)
        assert batch.images.sharding.is_equivalent_to(sharding, batch.images.ndim)
    feed.close()


def test_feed_raises_an_error_at_the_step_it_belongs_to():
    config = tiny.train_config()

    def source():
        yield tiny.batch(config, 0)
        raise DataError("row 17 of part 3 is broken")

    feed = Feed(source(), batch_sharding(make_mesh()))
    assert next(feed).tokens.shape == (8, 19)
    with pytest.raises(DataError, match="row 17"):
        next(feed)
    feed.close()


def test_feed_that_ends_is_an_error():
    feed = Feed(iter([]), batch_sharding(make_mesh()))
    with pytest.raises(DataError, match="the data ended"):
        next(feed)
    feed.close()


# --- command ------------------------------------------------------------------------------------

CONFIG = """
import tiny
def get_config():
    return tiny.train_config("unused")
"""


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(CONFIG)
    return str(path)


def test_overrides(config_file):
    config = read_config(config_file, ["--optimizer.peak-lr=0.5", "--steps=11"])
    assert (config.optimizer.peak_lr, config.steps) == (0.5, 11)
    rule = read_config(config_file, ["--parameters.5.weight-decay=0.5"]).parameters[5]
    assert (rule.pattern, rule.weight_decay) == ("*", 0.5)
    assert read_config(config_file, ["--data.rows=16"]).data.rows == 16


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--optimizer.peak_rate=1"], "Unrecognized options: --optimizer.peak_rate"),
        (["--step=3"], "--steps"),  # the nearest name
        (["--steps=many"], "invalid literal"),
        (["--optimizer.warmup-steps=100"], "warmup_steps must be smaller than steps: got 100 of 6"),
    ],
)
def test_wrong_settings_are_one_line(config_file, capsys, options, words):
    assert main([config_file, *options]) == 2
    err = capsys.readouterr().err
    assert words in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no config file"),
        ("x = 1", "no get_config"),
        ("def get_config(): return 3", "got int"),
        ("def get_config(:", "line 1 is not Python"),
    ],
)
def test_files_that_are_no_config(tmp_path, capsys, content, words):
    path = tmp_path / "wrong.py"
    if content is not None:
        path.write_text(content)
    assert main([str(path)]) == 2
    assert words in capsys.readouterr().err


def test_help_shows_an_example(capsys):
    assert main(["--help"]) == 0
    assert "python train.py configs/nano/stage1.py --run-dir" in capsys.readouterr().out
    assert main([]) == 2


# --- loop, with a step that costs nothing -------------------------------------------------------


class FullDisk(CheckpointStore):
    """A store whose disk is full while `is_full`, seen at the save or only in the background."""

    is_full = True

    def save(self, step, items):
        if self.is_full:
            raise OSError(28, "No space left on device")
        super().save(step, items)


def fake_step(state, batch):
    step = state.step + 1
    loss = jnp.where(step == 3, jnp.nan, 2.0)
    metrics = dict.fromkeys(("grad_norm", "lr"), jnp.float32(0.5)) | {"loss": loss}
    return state._replace(step=step), metrics | {"tokens": jnp.int32(9), "skipped": step // 3}


def loop_with(config, store, before_step):
    state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), layout_of(config).abstract)
    report = Report(config.run_dir, 0, config.steps, config.log_every)
    stop = StopRequest()

    def step(state, batch):
        before_step(int(state.step) + 1, stop)
        return fake_step(state, batch)

    feed = Feed(tiny.batches(config), batch_sharding(make_mesh()))
    try:
        return _loop(config, step, state, feed, store, report, stop)
    finally:
        feed.close()
        report.close()


def layout_of(config):
    return make_layout(config, make_mesh())


def test_full_disk_is_told_and_survived(tmp_path, capsys):
    config = tiny.train_config(tmp_path, steps=6)
    store = FullDisk(tmp_path, keep=2)

    def space_returns(step, _):
        store.is_full = step < 4

    assert loop_with(config, store, space_returns) == 6
    out = capsys.readouterr().out
    assert "CHECKPOINT NOT SAVED (seen at step 2): [Errno 28] No space left" in out
    assert store.steps() == [4, 6]
    store.close()


def test_a_last_save_that_fails_fails_the_run(tmp_path):
    store = FullDisk(tmp_path, keep=2)
    with pytest.raises(OSError, match="No space left"):
        loop_with(tiny.train_config(tmp_path, steps=3), store, lambda *_: None)
    store.close()


def test_a_request_to_stop_saves_the_step_it_met(tmp_path, capsys):
    store = CheckpointStore(tmp_path, keep=5)

    def ask(step, stop):
        if step == 3:
            stop._note(signal.SIGTERM, None)

    assert loop_with(tiny.train_config(tmp_path, steps=50), store, ask) == 3
    assert store.steps() == [2, 3]
    assert "SIGTERM: stopping after step 3" in capsys.readouterr().out
    store.close()


def test_metrics_are_json_even_when_a_loss_is_not_a_number(tmp_path, capsys):
    store = CheckpointStore(tmp_path, keep=2)
    loop_with(tiny.train_config(tmp_path, steps=5), store, lambda *_: None)
    store.close()
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    assert [r["loss"] for r in records(tmp_path)] == [2.0, 2.0, None, 2.0, 2.0]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines if line.startswith("step")] == [
        "1/5", "2/5", "3/5", "4/5", "5/5",
    ]  # fmt: skip
    assert "skipped 1" in lines[-2]
