"""Two processes that talk over gloo train as one process does."""

import json
import socket
import subprocess
import sys
import time
from pathlib import Path

import finetune_rows
import hurry
import pytest
import tiny

from qwenvl_jax.cli.train import join_cluster
from qwenvl_jax.config import ConfigError, MeshConfig
from qwenvl_jax.data.example import Batch
from qwenvl_jax.sharding import batch_sharding, make_mesh
from qwenvl_jax.training.feed import Feed, rows_of_process
from qwenvl_jax.training.state import make_layout, random_weights, start_state
from qwenvl_jax.training.step import make_train_step

TESTS = Path(__file__).parent
PATIENCE = 550  # seconds; a machine with other work on it compiles slowly

PROGRAM = """
import json, sys
from qwenvl_jax.cli.train import join_cluster
join_cluster()
import jax
from qwenvl_jax.config import MeshConfig
from test_two_processes import losses
assert jax.process_count() == 2 and jax.device_count() == 4 and jax.local_device_count() == 2
meshes = [MeshConfig(**sizes) for sizes in json.loads(sys.argv[1])]
print(json.dumps([losses(mesh) for mesh in meshes]), flush=True)
"""
# Split over the two processes: the batch in the first, the weights in the second.
MESHES = [{"data": 2, "fsdp": 2, "tensor": 1}, {"data": 1, "fsdp": 2, "tensor": 2}]


def losses(mesh_config: MeshConfig | None) -> list[list[float]]:
    """Returns loss and gradient norm of three steps of the tiny run on a mesh."""
    import jax

    config = tiny.train_config()
    mesh = make_mesh(mesh_config)
    layout = make_layout(config, mesh)
    step = make_train_step(config, layout)
    found = []
    with jax.set_mesh(mesh):
        state = start_state(config, layout, random_weights(config, layout))
        held = rows_of_process(batch_sharding(mesh), config.data.rows)
        ours = (Batch(*(x[list(held.rows)] for x in b)) for b in tiny.batches(config))
        feed = Feed(ours, batch_sharding(mesh), patience=60.0, held=held)
        for _ in range(3):
            state, metrics = step(state, next(feed))
            found.append([float(metrics["loss"]), float(metrics["grad_norm"])])
        feed.close()
    return found


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def run_two(program: str, *words: str, cache: Path, folders=(None, None)) -> list[tuple]:
    """Returns (exit code, standard output, standard error) of two processes of one run."""
    cluster = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "JAX_NUM_PROCESSES": "2"}
    environment = hurry.environment(cache, num_devices=2) | cluster
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, *words],
            cwd=folder,
            env=environment | {"JAX_PROCESS_ID": str(number)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number, folder in enumerate(folders)
    ]
    try:
        said = [process.communicate(timeout=PATIENCE) for process in processes]
    finally:
        for process in processes:
            process.kill()
    codes = [process.returncode for process in processes]
    return [(code, *streams) for code, streams in zip(codes, said, strict=True)]


@pytest.mark.timeout(600)
def test_two_processes_give_the_losses_of_one(tmp_path):
    outputs = []
    for code, out, err in run_two(PROGRAM, json.dumps(MESHES), cache=tmp_path):
        assert code == 0, err
        outputs.append(json.loads(out.splitlines()[-1]))
    assert outputs[0] == outputs[1]
    alone = losses(None)
    for sizes, ours in zip(MESHES, outputs[0], strict=True):
        for step, (together, single) in enumerate(zip(ours, alone, strict=True)):
            assert together == pytest.approx(single, rel=2e-5), (sizes, step)


TRAIN = """
import sys
from qwenvl_jax.cli import train
train.leave(train.main(sys.argv[1:]))
"""


@pytest.mark.timeout(600)
def test_hosts_whose_copies_of_the_data_differ_are_refused(tmp_path):
    folders = [tmp_path / "first", tmp_path / "second"]
    for number, folder in enumerate(folders):
        folder.mkdir()
        finetune_rows.write_rows(folder, 40, first=number)
        finetune_rows.write_rows(folder, 9, "held.json", first=50 + number)
    words = [str(TESTS / "rows_run.py"), f"--run-dir={tmp_path / 'run'}"]
    words += ["--evaluation.path=held.json", "--evaluation.every-steps=2", "--evaluation.samples=0"]
    for code, _, err in run_two(TRAIN, *words, cache=tmp_path / "c", folders=folders):
        assert code == 2, err
        told = "the data of evaluation.path on processes [1]; the data on processes [1]: start all"
        assert f"differ from process 0 in {told}" in err
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


ALONE = """
import sys
from qwenvl_jax.cli import train as command
from qwenvl_jax.config import ConfigError
from qwenvl_jax.training import loop
from qwenvl_jax.training.hosts import check_agreement, telling_the_lost
def train(*_, **__):
    import jax
    check_agreement({"both": "are here"})
    if jax.process_index() == 1:
        raise {error}("this one alone is wrong")
    with telling_the_lost():
        check_agreement({"both": "are here still"})
loop.train = train
command.leave(command.main(sys.argv[1:]))
"""


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("error", "code"), [("ConfigError", 2), ("KeyError", 1)])
def test_an_error_of_one_process_ends_the_others_in_time(error, code, tmp_path):
    began = time.monotonic()
    config = str(TESTS / "fault_run.py")
    program = ALONE.replace("{error}", error)
    both = run_two(program, config, cache=tmp_path, folders=(TESTS.parent, TESTS.parent))
    assert [code for code, _, _ in both] == [2, code], both
    assert both[0][1].startswith("process 0 of 2 waits for the others at 127.0.0.1:")
    assert "another process of this run has ended" in both[0][2]
    assert "this one alone is wrong" in both[1][2]
    assert "Traceback" not in both[0][2]
    assert ("Traceback" in both[1][2]) == (error == "KeyError")  # of a bug alone
    assert time.monotonic() - began < PATIENCE / 2


def test_a_cluster_that_is_half_described_is_refused(monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "127.0.0.1:1")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    monkeypatch.delenv("JAX_PROCESS_ID", raising=False)
    with pytest.raises(ConfigError, match="JAX_PROCESS_ID is not a number of at least 0: got none"):
        join_cluster()
