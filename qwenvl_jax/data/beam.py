"""Preparation on Apache Beam: the same shards by the same function, on whatever runner there is.

The workers and the machine that starts them need to see the source and the new folder under the
same paths. A worker that dies is Beam's to replace; a shard that is done is not written again.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qwenvl_jax.config import ConfigError
from qwenvl_jax.data.prepare import Engine, Job
from qwenvl_jax.data.shard import Plan, write_shard


def on_beam(options: Sequence[str]) -> Engine:
    """Returns the engine of a Beam pipeline; `options` are Beam's own, as `--runner=FlinkRunner`.

    Progress is the runner's to show: nothing is known here before the pipeline has ended.

    Raises: ConfigError where apache-beam is not installed.
    """
    try:
        import apache_beam as beam  # pyright: ignore[reportMissingImports]
        from apache_beam.options.pipeline_options import (  # pyright: ignore[reportMissingImports]
            PipelineOptions,
        )
    except ImportError as error:
        raise ConfigError(
            "--beam needs Apache Beam, which is not installed: run pip install '.[beam]' "
            "in an environment of its own"
        ) from error

    def run(plan: Plan, jobs: Sequence[Job]) -> Iterator[Mapping[str, Any]]:
        with beam.Pipeline(options=PipelineOptions(list(options))) as pipeline:
            # without a shuffle a runner may keep all jobs on the worker that made them
            shards = pipeline | beam.Create([tuple(job) for job in jobs]) | beam.Reshuffle()
            _ = shards | beam.Map(_write, plan)
        yield from (write_shard(plan, *job) for job in jobs)  # reads the facts of what is there

    return run


def _write(job: tuple[str, int, int], plan: Plan) -> int:
    return write_shard(plan, *job)["rows"]
