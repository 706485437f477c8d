"""A run from outside: started, stopped, killed, resumed, refused."""

import dataclasses
import errno
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import hurry
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from qwenvl_jax.checkpoint.store import CheckpointError, CheckpointStore, restore_weights
from qwenvl_jax.cli.config_file import load_config, read_config
from qwenvl_jax.cli.options import option_names
from qwenvl_jax.cli.plot import main as plot_main
from qwenvl_jax.cli.train import check_init, main
from qwenvl_jax.config import ConfigError, LoraConfig, MeshConfig, OptimizerConfig, to_dict
from qwenvl_jax.data.example import TASKS, DataError
from qwenvl_jax.data.pipeline import check_config
from qwenvl_jax.files import Lines
from qwenvl_jax.inference.shipped import SHIPPED_MODEL
from qwenvl_jax.presets import stage_2, stage_3
from qwenvl_jax.sharding import batch_sharding, make_mesh
from qwenvl_jax.training.changes import differences, with_newer_settings
from qwenvl_jax.training.faults import HostFaults
from qwenvl_jax.training.feed import Feed
from qwenvl_jax.training.goodput import Goodput
from qwenvl_jax.training.incidents import Incidents
from qwenvl_jax.training.loop import loop, train
from qwenvl_jax.training.manifest import fingerprint
from qwenvl_jax.training.plot import plot_curves
from qwenvl_jax.training.report import Report
from qwenvl_jax.training.run import Run
from qwenvl_jax.training.run_dir import open_run, truncate_metrics
from qwenvl_jax.training.state import make_layout
from qwenvl_jax.training.stop import StopRequest

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
    # One device, as `python train.py` has it; half of the compile time, and just as repeatable.
    environment = hurry.environment(compiled)
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
    assert (whole / "curves.png").stat().st_size > 1000

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


def opened(config) -> list[str]:
    """Returns the notes of a start, after giving the lock back."""
    run_dir = open_run(config, ["train.py"])
    run_dir.begin()
    run_dir.close()
    return run_dir.notes


def begin(config) -> None:
    """Makes a run directory look as after the first step."""
    assert opened(config) == []
    (Path(config.run_dir) / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')


def test_a_start_that_failed_at_once_may_be_mended(tmp_path):
    opened(tiny.train_config(tmp_path))
    assert opened(tiny.train_config(tmp_path, seed=8)) == []
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
        opened(other)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["seed"] == 7, "a refused start must leave the directory as it was"


def test_a_start_that_fails_at_loading_leaves_the_directory_as_it_was(tmp_path, capsys):
    config = tiny.train_config(tmp_path, steps=3)
    opened(config)
    store = CheckpointStore(tmp_path, keep=2)
    assert loop_with(config, store, lambda *_: None) == 3
    store.close()
    before = {name: (tmp_path / name).read_text() for name in ("config.json", "manifest.json")}
    other = dataclasses.replace(
        config, parameters=stage_3(weight_decay=0.0), allow_change=("parameters",)
    )
    with pytest.raises(CheckpointError, match=r"fit this config .*start a new run with --init"):
        train(other, batches=lambda first: tiny.batches(config, first), devices=jax.devices()[:1])
    assert {name: (tmp_path / name).read_text() for name in before} == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"checkpoint": {"keep": 0}}, r"CheckpointConfig\.keep must be positive: got 0"),
        ({"checkpoint": {"every_steps": 0}}, r"CheckpointConfig\.every_steps must be positive"),
        ({"optimizer": {"beta2": 1.0}}, r"OptimizerConfig\.beta2 must be in \[0, 1\): got 1\.0"),
        ({"optimizer": {"warmup_steps": -5}}, r"warmup_steps must not be negative: got -5"),
        ({"optimizer": {"peak_lr": math.nan}}, r"peak_lr must be positive: got nan"),
        ({"optimizer": {"clip_norm": math.inf}}, r"clip_norm must be positive: got inf"),
        ({"optimizer": {"peak_lr": 1e38}}, r"between 0 and peak_lr, and that below 1: .* 1e\+38"),
        ({"seed": 2**32}, r"seed must lie in 0 \.\. 2\*\*32 - 1: got 4294967296"),
        ({"data": {"length": 3000}}, r"must not exceed decoder\.max_positions: got 3000"),
        (
            {"evaluation": {"every_steps": 9, "max_new_tokens": 10**6}},
            r"must not exceed decoder.* and 1000000",
        ),
        ({"model": {"param_dtype": "bfloat16"}}, r"kept in float32: .*use frozen_dtype=bfloat16"),
        (
            {"data": {"image_size": 30}},
            r"data\.image_size must be a multiple of vision\.patch_size",
        ),
        ({"run_dir": ""}, r"run_dir is empty: name a folder"),
    ],
)
def test_settings_that_would_ruin_a_run_are_refused(change, words):
    config = tiny.train_config()
    with pytest.raises(ConfigError, match=words):
        dataclasses.replace(
            config,
            **{
                name: dataclasses.replace(getattr(config, name), **value)
                if isinstance(value, dict)
                else value
                for name, value in change.items()
            },
        )


def test_rows_that_the_devices_do_not_divide_are_told_before_anything_is_written(tmp_path):
    config = tiny.train_config(tmp_path / "run", mesh=MeshConfig(fsdp=3))
    with pytest.raises(ConfigError, match=r"data\.rows must be a multiple of .*over 3 devices"):
        train(config, devices=jax.devices()[:3])
    assert not (tmp_path / "run").exists()


def test_a_run_whose_checkpoints_are_gone_does_not_begin_anew(tmp_path):
    config = tiny.train_config(tmp_path, steps=3)
    opened(config)
    store = CheckpointStore(tmp_path, keep=2)
    run_dir = open_run(config, [])
    run_dir.check_new()  # nothing is saved yet, as after a kill before the first save
    run_dir.close()
    assert loop_with(config, store, lambda *_: None) == 3
    store.close()
    shutil.rmtree(tmp_path / "checkpoints")
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(ConfigError, match=r"no checkpoint, but its manifest\.json tells of saves"):
        train(config, batches=lambda first: tiny.batches(config, first), devices=jax.devices()[:1])
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "manifest.json").unlink()
    opened(config)


def test_a_lost_config_is_known_from_the_manifest(tmp_path):
    begin(tiny.train_config(tmp_path))
    (tmp_path / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"holds a run with other settings: seed: was 7, now 8"):
        opened(tiny.train_config(tmp_path, seed=8))
    assert opened(tiny.train_config(tmp_path)) == []
    (tmp_path / "config.json").unlink()
    (tmp_path / "manifest.json").unlink()
    lost, note = opened(tiny.train_config(tmp_path, allow_change=("manifest",)))
    assert "has lost its manifest.json" in lost
    assert "has neither config.json nor manifest.json" in note


@pytest.mark.parametrize("text", ["[]", '{"starts": 3}', '{"starts": [1]}'])
def test_a_manifest_that_is_none_is_refused(tmp_path, text):
    begin(tiny.train_config(tmp_path))
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(ConfigError, match=r"is (no manifest of a run|damaged): expected an object"):
        opened(tiny.train_config(tmp_path))
    (tmp_path / "manifest.json").write_text('{"starts": []}')
    assert opened(tiny.train_config(tmp_path)) == []


def test_allow_change_knows_the_settings(tmp_path):
    opened(tiny.train_config(tmp_path, allow_change=("tokenizer", "data", "optimizer.peak_lr")))
    with pytest.raises(ConfigError, match=r"got 'optimizr', .* did you mean 'optimizer'\?"):
        opened(tiny.train_config(tmp_path, allow_change=("optimizr",)))


def test_the_order_of_tasks_is_part_of_the_recipe():
    old = {"data": {"tasks": {"caption": 1.0, "vqa": 2.0}, "length": 8}}
    new = {"data": {"length": 8, "tasks": {"vqa": 2.0, "caption": 1.0}}}
    said = "data.tasks: the order was ['caption', 'vqa'], now ['vqa', 'caption']"
    assert differences(old, new) == {"data.tasks": said}


def test_a_storage_without_locks_is_told_and_taken(tmp_path, monkeypatch, capsys):
    def no_locks(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    opened(tiny.train_config(tmp_path))
    assert "cannot be locked (No locks available)" in capsys.readouterr().out


def elsewhere(run_dir: Path) -> None:
    run_dir.rename(run_dir.with_name("elsewhere"))


def begun_anew(run_dir: Path) -> None:
    (run_dir / "lock").unlink()
    opened(tiny.train_config(run_dir, allow_change=("manifest",)))


@pytest.mark.parametrize("happens", [elsewhere, shutil.rmtree, begun_anew])
def test_a_run_directory_that_is_lost_gets_no_save(tmp_path, happens):
    config = tiny.train_config(tmp_path / "run", steps=9)
    store = CheckpointStore(config.run_dir, keep=5)

    def lose(step, _):
        if step == 3:
            store.wait()
            happens(tmp_path / "run")

    with pytest.raises(CheckpointError, match=r"step 4 is not saved: .* is not the folder that"):
        loop_with(config, store, lose)
    store.close()
    assert not (tmp_path / "run" / "checkpoints" / "4").exists()


def test_a_lock_that_alone_is_lost_is_taken_again(tmp_path):
    config = tiny.train_config(tmp_path, steps=6)
    store = CheckpointStore(tmp_path, keep=5)

    def lose(step, _):
        if step == 3:
            (tmp_path / "lock").unlink()
        if step == 6:
            with pytest.raises(ConfigError, match="another process trains"):
                opened(config)

    assert loop_with(config, store, lose) == 6
    assert store.steps() == [2, 4, 6]
    store.close()


def test_a_vocabulary_is_copied_whole_or_not_at_all(tmp_path, monkeypatch):
    vocabulary = tmp_path / "qwen.tiktoken"
    vocabulary.write_text("IQ== 0\n")
    data = dataclasses.replace(tiny.train_config().data, tokenizer=str(vocabulary))
    config = tiny.train_config(tmp_path / "run", data=data)
    opened(config)
    copy = tmp_path / "run" / "qwen.tiktoken"
    inode = copy.stat().st_ino
    opened(config)
    assert copy.stat().st_ino == inode  # the same bytes are not written again

    def dies(source, target):
        Path(target).write_text("IQ")
        raise OSError(errno.ENOSPC, "No space left on device")

    vocabulary.write_text("IQ== 0\nIg== 1\n")
    monkeypatch.setattr("shutil.copyfile", dies)
    with pytest.raises(OSError, match="No space"):
        opened(config)
    assert copy.read_text() == "IQ== 0\n"


def test_speed_settings_may_change_and_are_told(tmp_path):
    begin(tiny.train_config(tmp_path))
    notes = opened(tiny.train_config(tmp_path, micro_batches=2, log_every=5))
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
    with pytest.raises(
        ConfigError,
        match=r"was trained with has changed.*tokenizer: was .*--allow-change tokenizer",
    ):
        opened(config)


def test_another_recipe_is_taken_by_name(tmp_path):
    begin(tiny.train_config(tmp_path))
    other = tiny.train_config(
        tmp_path,
        seed=8,
        parameters=stage_2(tower_decay=0.9, weight_decay=0.1),
        allow_change=("seed", "parameters"),
    )
    changed = [note.removeprefix("changed since the last start: ") for note in opened(other)]
    assert "seed: was 7, now 8" in changed
    assert "parameters.5.weight_decay: was 0.05, now 0.1" in changed
    only_one = tiny.train_config(tmp_path, seed=9, steps=7, allow_change=("steps",))
    with pytest.raises(ConfigError, match=r"seed: was 8, now 9; .*--allow-change parameters"):
        opened(only_one)


def test_another_table_of_what_trains_is_told_row_by_row(tmp_path):
    begin(tiny.train_config(tmp_path))
    with pytest.raises(ConfigError) as refusal:
        opened(tiny.train_config(tmp_path, parameters=stage_3(weight_decay=0.05)))
    told = str(refusal.value)
    assert "parameters: rows that are gone: 'vit.*.scale' layer_decay=0.9, " in told
    assert "; new: 'vit.*' is_trained=False; give" in told
    assert "[{" not in told
    assert told.endswith(f"with another --run-dir and --init={tmp_path}")
    table = tiny.train_config().parameters
    with pytest.raises(
        ConfigError, match=r"the order of rows was 'vit.*--allow-change parameters;"
    ):
        opened(tiny.train_config(tmp_path, parameters=(*table[3:], *table[:3])))


def test_other_versions_are_told_with_both(tmp_path):
    begin(tiny.train_config(tmp_path))
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    manifest["starts"][-1]["versions"] |= {"numpy": "1.0", "gone": "2.0"}
    manifest["starts"][-1] |= {"devices": "64 x TPU v9", "processes": 16}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    notes = opened(tiny.train_config(tmp_path))
    assert any(f"numpy was 1.0 at the last start and is {np.__version__}" in n for n in notes)
    assert any("gone was 2.0 at the last start and is not there now" in n for n in notes)
    here = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    was = f"what it runs on was 64 x TPU v9 at the last start and is {here} now"
    assert any(was in note for note in notes)
    assert any("number of processes was 16 at the last start and is 1 now" in n for n in notes)


def test_a_manifest_of_version_0_1_is_read(tmp_path):
    begin(tiny.train_config(tmp_path))
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    start = manifest["starts"][-1]
    start["tokenizer_sha256"] = start.pop("inputs")["tokenizer"]
    (tmp_path / "manifest.json").write_text(json.dumps({"starts": [start]}))
    assert opened(tiny.train_config(tmp_path)) == []


def test_one_run_at_a_time(tmp_path):
    first = open_run(tiny.train_config(tmp_path), [])
    with pytest.raises(ConfigError, match=rf"another process trains in .*process {os.getpid()}"):
        open_run(tiny.train_config(tmp_path), [])
    first.close()
    opened(tiny.train_config(tmp_path))


def test_fingerprints_see_names_sizes_and_indices(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "index.json").write_text('{"rows": 3}')
    (folder / "part-0").write_bytes(b"abc")
    found = {fingerprint(folder), fingerprint(folder / "part-0")}
    (folder / "part-0").write_bytes(b"abcd")
    found.add(fingerprint(folder))
    (folder / "index.json").write_text('{"rows": 4}')
    found.add(fingerprint(folder))
    (folder / "part-0").rename(folder / "part-1")
    found.add(fingerprint(folder))
    assert len(found) == 5
    assert fingerprint(tmp_path / "none") is None


def test_differences_name_the_leaf():
    old = {"a": {"b": 1, "c": [1, 2]}, "d": "x"}
    assert differences(old, {"a": {"b": 1, "c": (1, 2)}, "d": "x"}) == {}
    assert differences(old, {"a": {"b": 2, "c": [1, 2]}, "d": "x", "e": 0}) == {
        "a.b": "a.b: was 1, now 2",
        "e": "e: was None, now 0",
    }


def test_run_of_a_version_without_a_setting_goes_on_where_its_default_is_kept(tmp_path):
    config = tiny.train_config(tmp_path)
    saved = json.loads(json.dumps(to_dict(config)))
    del saved["model"]["lora"], saved["frozen_dtype"], saved["data"]["mixture"]
    del saved["parameters"][1]["layer_decay"]
    rate = config.parameters[1].layer_decay
    found = differences(with_newer_settings(saved, config), to_dict(config))
    assert found == {"parameters.1.layer_decay": f"parameters.1.layer_decay: was 1.0, now {rate}"}
    lora = LoraConfig(rank=2, targets=("vit.*",))
    other = dataclasses.replace(config, model=tiny.model_config(lora=lora))
    found = differences(with_newer_settings(saved, other), to_dict(other))
    assert found["model.lora.rank"] == "model.lora.rank: was 0, now 2"
    del saved["steps"]  # has no default
    assert "steps" in differences(with_newer_settings(saved, config), to_dict(config))


def test_metrics_after_the_checkpoint_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "loss": step / 2}) for step in range(1, 8)]
    path.write_text("\n".join(lines) + '\n{"step": 8, "lo')
    assert truncate_metrics(path, 5) == 3
    assert path.read_text() == "\n".join(lines[:5]) + "\n"
    assert truncate_metrics(path, 5) == 0
    assert truncate_metrics(tmp_path / "none.jsonl", 0) == 0


def test_curve_of_a_run_with_skipped_steps(tmp_path):
    numbers = {"lr": 1e-3, "grad_norm": 0.5}
    lines = [{"step": s, "loss": loss} | numbers for s, loss in ((1, 3.0), (2, None), (3, 2.0))]
    lines.insert(2, {"step": 2, "loss": None, "passed_over": True})
    text = "".join(json.dumps(x) + "\n" for x in lines)
    (tmp_path / "metrics.jsonl").write_text(text + '{"step": 4, "lo')  # in the middle of a line
    assert plot_main([str(tmp_path), "--output", str(tmp_path / "mine.png")]) == 0
    assert (tmp_path / "mine.png").stat().st_size > 1000
    assert plot_curves(tmp_path) == f"curves: {tmp_path / 'curves.png'}"


def test_curves_of_nothing_are_an_error(tmp_path, capsys):
    assert plot_main([str(tmp_path)]) == 2
    assert "is no training run" in capsys.readouterr().err
    opened(tiny.train_config(tmp_path))  # and stopped before its first step
    assert plot_curves(tmp_path) == f"no curves.png: {tmp_path} has no finished step yet"
    (tmp_path / "metrics.jsonl").write_text("")
    assert "has no finished step" in plot_curves(tmp_path)
    lines = [{"step": 1, "loss": None, "passed_over": True}, {"step": 2, "loss": None}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "got 1 step without a finite loss; its incidents.jsonl says why" in plot_curves(tmp_path)
    assert plot_main([str(tmp_path / "metrics.jsonl")]) == 2
    assert "it is a file; name the run's directory" in capsys.readouterr().err


@pytest.mark.filterwarnings("error")  # of a glyph that is missing
def test_the_name_of_a_run_is_drawn_as_it_is(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    save, drawn = Figure.savefig, []

    def noted(figure, *args, **options):
        drawn.append(figure.axes[0].title)
        save(figure, *args, **options)

    monkeypatch.setattr(Figure, "savefig", noted)
    for name in ("a $b_$ run", "\u6d4b\u8bd5"):  # half a formula; characters of another font
        (tmp_path / name).mkdir()
        line = {"step": 1, "loss": 3.0, "lr": 1e-3, "grad_norm": 0.5}
        (tmp_path / name / "metrics.jsonl").write_text(json.dumps(line) + "\n")
        assert plot_curves(tmp_path / name) == f"curves: {tmp_path / name / 'curves.png'}"
        assert drawn[-1].get_text() == str(tmp_path / name)
        assert drawn[-1].get_fontsize() == drawn[0].get_fontsize()
    assert plot_main([str(tmp_path / name), "--output", str(tmp_path)]) == 2


# --- feed ---------------------------------------------------------------------------------------


def test_feed_keeps_the_order_and_places_the_rows():
    config = tiny.train_config()
    sharding = batch_sharding(make_mesh(tiny.MeshConfig(data=2, fsdp=4)))
    feed = Feed(tiny.batches(config, 3), sharding, patience=60.0)
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

    feed = Feed(source(), batch_sharding(make_mesh()), patience=60.0)
    assert next(feed).tokens.shape == (8, 19)
    with pytest.raises(DataError, match="row 17"):
        next(feed)
    feed.close()


def test_feed_that_ends_is_an_error():
    feed = Feed(iter([]), batch_sharding(make_mesh()), patience=60.0)
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


@pytest.mark.parametrize("stage", ["stage1_pretrain", "stage2_multitask", "stage3_chat"])
def test_rows_of_the_command_take_the_place_of_the_configs_own(stage):
    path = str(Path(__file__).parents[1] / f"configs/{stage}.py")
    data = read_config(path, ["--data.source=rows", "--data.path=my.json"]).data
    assert (data.source, data.path, data.mixture, data.tasks) == ("rows", "my.json", {}, {})
    check_config(data, slots=256)
    assert read_config(path, ["--data.source", "rows", "--data.path", "my.json"]).data == data


def test_a_named_vocabulary_stays_whatever_the_weights():
    stage = str(TESTS.parent / "configs" / "stage1_pretrain.py")
    for init in ("None", "weights/other"):
        assert read_config(stage, [f"--init={init}"]).data.tokenizer == "weights/start"


def test_a_config_made_from_another_takes_what_its_file_says():
    tuned = TESTS.parent / "configs" / "finetune_adapter.py"
    assert load_config(tuned).data.tokenizer == ""
    assert read_config(str(tuned), ["--init=weights/chat"]).data.tokenizer == "weights/chat"


def test_weights_that_are_not_there_are_told_before_their_vocabulary(tmp_path, capsys):
    tuned = str(TESTS.parent / "configs" / "finetune.py")
    assert main([tuned, "--init=weights/nowhere"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("train: init: there is no folder 'weights/nowhere': download it")
    own = tmp_path / "a run"
    (own / "checkpoints").mkdir(parents=True)
    (own / "qwen.tiktoken").touch()
    assert main([tuned, "--init=weights/nowhere", f"--run-dir={own}"]) == 2
    assert f"goes on from its own checkpoint with --init='{own}'" in capsys.readouterr().err


def test_weights_of_other_sizes_are_told_before_their_vocabulary(tmp_path):
    tuned = str(TESTS.parent / "configs" / "finetune.py")
    config = read_config(tuned, [f"--init={SHIPPED_MODEL}", f"--run-dir={tmp_path}"])
    with pytest.raises(ConfigError) as refusal:
        check_init(config)
    told = str(refusal.value)
    assert told.startswith(f"init: {str(SHIPPED_MODEL)!r} holds a model of other sizes: ")
    assert "model.vision.width is 160 there and 1664 here" in told
    assert re.search(r", and \d+ more; name one of these sizes with --init", told)
    small = str(TESTS.parent / "configs" / "nano" / "finetune.py")
    check_init(read_config(small, [f"--init={SHIPPED_MODEL}", f"--run-dir={tmp_path}"]))
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    check_init(config)  # weights are not read from there


def test_the_vocabulary_comes_with_the_weights_where_none_is_named(config_file):
    config = read_config(config_file, ["--data.tokenizer=", "--init=weights/chat"])
    assert config.data.tokenizer == "weights/chat"
    # Also in a config made from one that has an `init` of its own.
    tuned = str(TESTS.parent / "configs" / "finetune_lora.py")
    assert read_config(tuned).data.tokenizer == "Qwen-VL-Chat"
    assert read_config(tuned, ["--init=weights/chat"]).data.tokenizer == "weights/chat"
    with pytest.raises(ConfigError, match="no init to take it from"):
        read_config(config_file, ["--data.tokenizer="])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--optimizer.peak_rate=1"], "Unrecognized options: --optimizer.peak_rate"),
        (["--step=3"], "did you mean --steps?"),
        (["--data.pth=x"], "did you mean --data.path?"),
        (["--peak-lr", "1"], "did you mean --optimizer.peak-lr?"),
        (["--learning_rate=1"], "did you mean --optimizer.peak-lr?"),
        (["--optimizer.lr=1"], "did you mean --optimizer.peak-lr?"),
        (["--batch-size=4"], "did you mean --data.rows?"),
        (["data.length=4"], "did you mean --data.length?"),
        (["--path=x"], "did you mean --data.path or --evaluation.path?"),
        (["--checkpoint.every=5"], "did you mean --checkpoint.every-steps?"),
        (["--steps=many"], "--steps takes a whole number: got 'many'"),
        (
            ["--data.tasks", "vqa", "1"],
            "--data.tasks is set part by part, e.g. --data.tasks.caption=",
        ),
        (
            ["--data.mixture=a.json"],
            "takes pairs of a name and a number, with spaces between: got o",
        ),
        (["--data.mixture=a.json"], "e.g. --data.mixture first 1 second 0.5"),
        (["--optimizer.warmup-steps=100"], "warmup_steps must be smaller than steps: got 100 of 6"),
    ],
)
def test_wrong_settings_are_one_line(config_file, capsys, options, words):
    assert main([config_file, *options]) == 2
    err = capsys.readouterr().err
    assert words in err
    assert err.count("\n") == 1


def test_what_is_wrong_with_data_is_told_before_anything_is_loaded(tmp_path):
    config = read_config("configs/nano/stage2_lines.py", [f"--run-dir={tmp_path}/run"])
    rows = dataclasses.replace(config.data, mixture={}, mixing="weights", path="any.json")
    for change, error, words in (
        (
            {"path": "typo.json"},
            DataError,
            r"--data\.path: no data at 'typo\.json': .*; check the path$",
        ),
        ({"source": "row"}, ConfigError, "data.source is unknown: got 'row'"),
        ({"tasks": {"vqa": 1.0}}, ConfigError, "data.tasks has no effect"),
    ):
        data = dataclasses.replace(rows, **change)
        with pytest.raises(error, match=words):
            train(dataclasses.replace(config, data=data, init="nowhere"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no config file"),
        ("x = 1", "that returns a TrainConfig: got no get_config at all"),
        ("def get_config(): pass", "got None; is `return` missing?"),
        ("def get_config(): return 3", "got int"),
        ("def get_config(:", "line 1 is not Python"),
        ("\nfrom qwenvl_jax.config import TrainConfg", "line 2: qwenvl_jax.config has no 'TrainC"),
        ("from qwenvl_jax.presetz import nano", "line 1: ModuleNotFoundError"),
        ("def get_config():\n    return TrainConfig()", "line 2: NameError: name 'TrainConfig' is"),
    ],
)
def test_files_that_are_no_config(tmp_path, capsys, content, words):
    path = tmp_path / "wrong.py"
    if content is not None:
        path.write_text(content)
    assert main([str(path)]) == 2
    assert words in capsys.readouterr().err


def test_the_config_file_of_the_docs_builds(tmp_path):
    page = (TESTS.parent / "docs" / "training.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(import dataclasses\n.*?)```", page, re.DOTALL)
    (tmp_path / "mine.py").write_text(code)
    config = read_config(str(tmp_path / "mine.py"))
    assert config.data.mixture == {"my.json": 2.0, "prepared/my": 1.0}
    make_layout(config, make_mesh())  # raises where the table does not fit the model


@pytest.mark.parametrize(
    ("made", "words"),
    [
        ("TrainConfig(stepz=1)", "line 3: TrainConfig has no 'stepz'; did you mean 'steps'?"),
        ("replace(MeshConfig(), fdsp=1)", "line 3: MeshConfig has no 'fdsp'; did you mean 'fsdp'?"),
    ],
)
def test_a_wrong_field_in_a_config_file_has_a_near_one(tmp_path, made, words):
    path = tmp_path / "wrong.py"
    imports = "from dataclasses import replace\nfrom qwenvl_jax.config import *\n"
    path.write_text(f"{imports}def get_config(): return {made}\n")
    # Apart: the checks of shapes in these tests give such an error other words.
    run = [sys.executable, "train.py", str(path)]
    done = subprocess.run(run, check=False, capture_output=True, text=True, cwd=TESTS.parent)
    assert (done.returncode, done.stderr) == (2, f"train: {path} {words}\n")


def test_the_options_that_are_named_are_those_that_there_are(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    stage = str(TESTS.parent / "configs" / "stage2_multitask.py")
    config = load_config(stage)
    with pytest.raises(SystemExit):
        read_config(stage, ["--help"])
    shown = set(re.findall(r"--[a-z][\w./-]*", capsys.readouterr().out))
    assert set(option_names(type(config), config)) <= shown


def test_a_config_file_that_is_not_there_has_a_near_one(tmp_path):
    (tmp_path / "finetune_mine.py").touch()
    with pytest.raises(ConfigError, match=r"did you mean .*finetune_mine\.py\?"):
        load_config(tmp_path / "finetun_mine.py")


def test_a_bug_of_the_package_under_a_config_keeps_its_traceback(tmp_path, monkeypatch):
    monkeypatch.setattr("qwenvl_jax.presets.LoraConfig", None)
    path = tmp_path / "mine.py"
    path.write_text("from qwenvl_jax import presets\nget_config = lambda: presets.released_lora()")
    with pytest.raises(TypeError):
        load_config(path)


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
    numbers = dict.fromkeys(("grad_norm", "lr", "spike_score"), jnp.float32(0.5)) | {"loss": loss}
    counts = dict.fromkeys(("tokens", "pairs", "images", "verdict"), jnp.int32(0))
    counts |= {"skipped": step // 3, "refused_in_a_row": jnp.int32(0)}
    by_task = jnp.zeros(len(TASKS)).at[1].set(loss)
    tasks = {"task_loss": 6 * by_task, "task_weight": jnp.sign(jnp.abs(by_task)) * 3}
    return state._replace(step=step), numbers | counts | tasks


def layout_of(config):
    return make_layout(config, make_mesh())


def loop_with(config, store, before_step, open_feed=None):
    layout = layout_of(config)
    state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), layout.abstract)
    stop = StopRequest()

    def plain_feed(step):
        return Feed(tiny.batches(config, step - 1), batch_sharding(make_mesh()), patience=60.0)

    def step(state, batch):
        before_step(int(state.step) + 1, stop)
        return fake_step(state, batch)

    run = Run(
        config=config,
        run_dir=open_run(config, []),
        store=store,
        report=Report(config, layout, 0),
        goodput=Goodput(),
        faults=HostFaults(config.simulate_fault),
        incidents=Incidents(config.run_dir, config.seed),
        compile_step=lambda batch: step,
        restore=lambda: None,
        open_feed=open_feed or plain_feed,
        look=None,
        state=state,
    )
    try:
        return loop(run, stop)
    finally:
        run.close()
        run.report.close()
        run.run_dir.close()


def test_full_disk_is_told_and_survived(tmp_path, capsys):
    config = tiny.train_config(tmp_path, steps=6)
    store = FullDisk(tmp_path, keep=2)

    def space_returns(step, _):
        store.is_full = step < 4

    assert loop_with(config, store, space_returns) == 6
    out = capsys.readouterr().out
    told = f"No space left on device: '{tmp_path}'; training goes on"
    assert f"CHECKPOINT NOT SAVED (seen at step 2): {told}\n" in out
    assert store.steps() == [4, 6]
    store.close()


def test_a_save_that_fails_in_the_background_is_told_once_and_hinders_no_other(
    tmp_path, capsys, monkeypatch
):
    store = CheckpointStore(tmp_path, keep=2)
    handler = store._manager._checkpointer._handler

    def full(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    def fails_at_first(step, _):
        if step == 4:
            while store.is_saving:  # step 2
                time.sleep(0.01)
            monkeypatch.undo()

    monkeypatch.setattr(handler, "finalize", full)
    assert loop_with(tiny.train_config(tmp_path, steps=6), store, fails_at_first) == 6
    assert capsys.readouterr().out.count("CHECKPOINT NOT SAVED") == 1
    assert records(tmp_path)[-1]["failed_saves"] == 1
    store.close()
    left = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert left == ["4", "6"]


def test_a_full_disk_does_not_end_the_run_through_its_metrics(tmp_path, capsys):
    store = CheckpointStore(tmp_path, keep=2)
    config = tiny.train_config(tmp_path, steps=6)
    room = {"is_there": True}
    write = Lines.flush

    def flush(lines):
        if not room["is_there"]:
            written = os.write(lines._descriptor, lines._waiting[:3])  # a part
            lines._waiting = lines._waiting[written:]
            raise OSError(errno.ENOSPC, "No space left on device")
        write(lines)

    def comes_and_goes(step, _):
        room["is_there"] = step not in (3, 4)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Lines, "flush", flush)
        assert loop_with(config, store, comes_and_goes) == 6
    store.close()
    assert [r["step"] for r in records(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert capsys.readouterr().out.count("NOT WRITTEN") == 1


def test_data_that_end_lose_no_finished_step(tmp_path, capsys):
    config = tiny.train_config(tmp_path, steps=9, simulate_fault=("data-error@6",))
    store = CheckpointStore(tmp_path, keep=5)
    with pytest.raises(DataError, match="the data of step 6 cannot be read"):
        loop_with(config, store, lambda *_: None)
    assert store.steps() == [2, 4, 5]
    assert [r["step"] for r in records(tmp_path)] == [1, 2, 3, 4, 5]
    store.close()


def test_speeds_leave_out_what_is_no_step(tmp_path):
    config = tiny.train_config(tmp_path, steps=6)
    store = CheckpointStore(tmp_path, keep=2)
    save = store.save

    def slow(step, items):
        time.sleep(1.0)
        save(step, items)

    store.save = slow
    loop_with(config, store, lambda *_: None)
    store.close()
    assert records(tmp_path)[-1]["seconds_per_step"] < 0.2  # two saves of a second lie between


def test_a_last_save_that_fails_fails_the_run(tmp_path):
    store = FullDisk(tmp_path, keep=2)
    with pytest.raises(CheckpointError, match=r"last save, of step 3, failed: .*No space left"):
        loop_with(tiny.train_config(tmp_path, steps=3), store, lambda *_: None)
    store.close()


@pytest.mark.parametrize("asked", [signal.SIGTERM, signal.SIGINT])
def test_a_request_to_stop_saves_the_step_it_met(tmp_path, capsys, asked):
    store = CheckpointStore(tmp_path, keep=5)

    def ask(step, stop):
        if step == 3:
            with stop:  # the handlers are there
                signal.raise_signal(asked)

    assert loop_with(tiny.train_config(tmp_path, steps=50), store, ask) == 3
    assert store.steps() == [2, 3]
    assert f"{asked.name}: stopping after step 3" in capsys.readouterr().out
    store.close()


def test_metrics_are_json_even_when_a_loss_is_not_a_number(tmp_path, capsys):
    store = CheckpointStore(tmp_path, keep=2)
    loop_with(tiny.train_config(tmp_path, steps=5), store, lambda *_: None)
    store.close()
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    assert [r["loss"] for r in records(tmp_path)] == [2.0, 2.0, None, 2.0, 2.0]
    assert [r.get(f"loss/{TASKS[1]}") for r in records(tmp_path)] == [4.0, 4.0, None, 4.0, 4.0]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines if line.startswith("step")] == [
        "1/5", "2/5", "3/5", "4/5", "5/5",
    ]  # fmt: skip
    assert "skipped 1" in lines[-2]
