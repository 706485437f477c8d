"""Two processes that talk over gloo train as one process does."""

import json
import socket
import subprocess
import sys
from pathlib import Path

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


@pytest.mark.timeout(600)
def test_two_processes_give_the_losses_of_one(tmp_path):
    address = f"127.0.0.1:{free_port()}"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, json.dumps(MESHES)],
            env=hurry.environment(tmp_path, num_devices=2)
            | {
                "JAX_COORDINATOR_ADDRESS": address,
                "JAX_NUM_PROCESSES": "2",
                "JAX_PROCESS_ID": str(number),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    outputs = []
    try:
        for process in processes:
            out, err = process.communicate(timeout=PATIENCE)
            assert process.returncode == 0, err
            outputs.append(json.loads(out.splitlines()[-1]))
    finally:
        for process in processes:
            process.kill()
    assert outputs[0] == outputs[1]
    alone = losses(None)
    for sizes, ours in zip(MESHES, outputs[0], strict=True):
        for step, (together, single) in enumerate(zip(ours, alone, strict=True)):
            assert together == pytest.approx(single, rel=2e-5), (sizes, step)


def test_a_cluster_that_is_half_described_is_refused(monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "127.0.0.1:1")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    monkeypatch.delenv("JAX_PROCESS_ID", raising=False)
    with pytest.raises(ConfigError, match="JAX_PROCESS_ID is not a number of at least 0: got none"):
        join_cluster()
