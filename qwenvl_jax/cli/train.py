"""`python train.py CONFIG [--a.b=c ...]`: starts a training run, or goes on with it."""

import os
import shlex
import time
from collections.abc import Sequence
from pathlib import Path

from qwenvl_jax.cli.config_file import read_config
from qwenvl_jax.cli.errors import (
    SUCCESS,
    USAGE_ERROR,
    has_cut_work,
    leave,
    note_cut_work,
    run_command,
)
from qwenvl_jax.cli.host_memory import computes_on_cpu, keep_freed_memory, share_one_pool
from qwenvl_jax.config import ConfigError, ModelConfig, TrainConfig, to_dict

_USAGE = """usage: python train.py CONFIG [--a.b=c ...]

Trains by a config file, a Python file whose get_config() returns a TrainConfig. The same command on
the same run_dir goes on where the run stopped. Ctrl-C or SIGTERM saves and ends with exit code 0.
--skip-steps A:B passes over the batches of these steps; --allow-change NAME lets a run that has
begun go on with another value of a setting.

  python train.py configs/nano/stage1.py
  python train.py configs/nano/stage1.py --run-dir=runs/try --optimizer.peak-lr=1e-3 --steps=500
  python train.py configs/nano/stage1.py --help        lists every setting and its value

exit codes: 0 finished, or saved on request; 2 a wrong command, setting or directory
"""

_MOST_SIZES = 3  # that a message names
# After how long without a sign of life a process counts as dead, and the others end.
_HEARTBEAT_SECONDS = 30
# For how long a process that has finished waits for the others.
_LEAVE_SECONDS = 60
# So long after an error process 0 ends, if that has not ended the others.
_LAST_SECONDS = 5


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code of the command."""
    return run_command("train", _run, argv)


def _run(argv: Sequence[str]) -> int:
    if not argv or argv[0].startswith("-"):
        print(_USAGE, end="")
        return SUCCESS if argv and argv[0] in ("-h", "--help") else USAGE_ERROR
    config = read_config(argv[0], argv[1:])
    check_init(config)
    if computes_on_cpu():
        share_one_pool()
    join_cluster()
    from qwenvl_jax.evaluation.glance import AnswerPage
    from qwenvl_jax.training.feed import is_feed_hanging
    from qwenvl_jax.training.loop import train

    command = ["train.py", *argv]
    try:
        train(config, command=command, open_page=AnswerPage, when_loaded=_keep_memory)
    except Exception:
        _leave_at_once()
        raise
    finally:
        if is_feed_hanging():  # as in a read from a dead disk
            note_cut_work()
    _take_leave()
    return SUCCESS


def _keep_memory() -> None:
    if computes_on_cpu():
        keep_freed_memory()


def _leave_at_once() -> None:
    """Lets this process of several end after an error without waiting for the others.

    They may be waiting for it in a step, and are told by the end of the connection. Without the
    first process, which carries them all, jax aborts them: so that they can tell an error that all
    have met, it ends last.
    """
    import jax

    if jax.process_count() > 1:
        note_cut_work()
        if jax.process_index() == 0:
            time.sleep(_LAST_SECONDS)


def _take_leave() -> None:
    """Waits for the other processes here where a hanging read keeps the usual end from it."""
    import jax

    if has_cut_work() and jax.distributed.is_initialized():
        jax.distributed.shutdown()


def check_init(config: TrainConfig) -> None:
    """Raises what is wrong with a folder that weights and vocabulary are to come from.

    A run that goes on has weights of its own, and may have a vocabulary elsewhere.
    """
    init = config.init
    if init is None or config.data.tokenizer != init:
        return
    if not init or not Path(init).exists():
        way_out = "download it (README, Install), or name another with --init"
        own = Path(config.run_dir)
        if (own / "checkpoints").is_dir() and (own / "qwen.tiktoken").is_file():
            way_out = f"the run goes on from its own checkpoint with --init={shlex.quote(str(own))}"
        raise ConfigError(f"init: there is no folder {init!r}: {way_out}")
    from qwenvl_jax.conversion.load import read_config as read_model_config

    found = read_model_config(init)  # before its vocabulary is asked for: what is no model has none
    if not any(Path(config.run_dir, "checkpoints").glob("[0-9]*")):
        _check_sizes(config, found)


def _check_sizes(config: TrainConfig, found: ModelConfig) -> None:
    """Raises ConfigError where the model of `init` is of other sizes than the run's.

    Before the vocabularies are compared: those of two models are of two sizes as well.
    """
    from qwenvl_jax.training.changes import flat_fields
    from qwenvl_jax.training.run_dir import SIZES

    there, here = (flat_fields({"model": to_dict(model)}) for model in (found, config.model))
    other = [
        f"{name} is {there[name]} there and {here[name]} here"
        for name in SIZES
        if there[name] != here[name]
    ]
    if other:
        more = f", and {len(other) - _MOST_SIZES} more" if len(other) > _MOST_SIZES else ""
        raise ConfigError(
            f"init: {config.init!r} holds a model of other sizes: {', '.join(other[:_MOST_SIZES])}"
            f"{more}; name one of these sizes with --init, or take a config of those"
        )


def join_cluster() -> None:
    """Joins the other processes of the job, when the environment names a coordinator.

    `JAX_COORDINATOR_ADDRESS` alone serves where jax knows the cluster (TPU pods, Slurm, ...);
    elsewhere `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID` say the rest.

    Raises: ConfigError where one of these two is missing or no number.
    """
    if "JAX_COORDINATOR_ADDRESS" not in os.environ:
        return
    import jax

    numbers = {}
    if "JAX_NUM_PROCESSES" in os.environ or "JAX_PROCESS_ID" in os.environ:
        numbers["num_processes"] = _whole_number("JAX_NUM_PROCESSES", 1)
        numbers["process_id"] = _whole_number("JAX_PROCESS_ID", 0)
    # jax waits for five minutes, and then names neither.
    who = "process {process_id} of {num_processes}".format(**numbers) if numbers else "a process"
    address = os.environ["JAX_COORDINATOR_ADDRESS"]
    print(f"{who} waits for the others at {address} (JAX_COORDINATOR_ADDRESS)", flush=True)
    jax.distributed.initialize(
        heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
        shutdown_timeout_seconds=_LEAVE_SECONDS,
        **numbers,
    )


def _whole_number(name: str, least: int) -> int:
    text = os.environ.get(name, "none")
    if not text.isascii() or not text.isdigit() or int(text) < least:
        raise ConfigError(
            f"{name} is not a number of at least {least}: got {text}; set JAX_COORDINATOR_ADDRESS, "
            "JAX_NUM_PROCESSES and JAX_PROCESS_ID for every process, or only the first of them "
            "where jax knows the cluster"
        )
    return int(text)


if __name__ == "__main__":
    leave(main())
