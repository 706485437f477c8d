"""The loss on data that the run does not train on, taken now and then while it trains."""

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from qwenvl_jax.config import ConfigError, DataConfig, TrainConfig
from qwenvl_jax.data.example import Batch, DataError
from qwenvl_jax.data.pipeline import Batches, Share, batches
from qwenvl_jax.data.sources.scenes import Split
from qwenvl_jax.sharding import batch_sharding
from qwenvl_jax.training.feed import Feed, rows_of_process
from qwenvl_jax.training.loss import Sums, by_task, sum_up
from qwenvl_jax.training.state import Layout, Weights
from qwenvl_jax.training.step import batch_loss


class HeldOut(NamedTuple):
    """What a run is evaluated on."""

    data: DataConfig
    split: Split


def held_out(config: TrainConfig) -> HeldOut:
    """Returns the data of a run's evaluations: scenes never trained on, or rows of their own path.

    A batch has as many rows as a micro-batch of the run, so what fits there fits here.

    Raises: ConfigError where the source has no held-out part and none is named, one is named
    without effect, or it is what the run trains on.
    """
    path, rows = config.evaluation.path, config.data.rows // config.micro_batches
    if config.data.source == "rows":
        if not path:
            raise ConfigError(
                "evaluation.path is empty: got data.source='rows', which has no held-out part; "
                "name rows that the run does not train on, or set evaluation.every_steps=0"
            )
        trained_on = [config.data.path, *config.data.mixture]
        if Path(path).resolve() in [Path(trained).resolve() for trained in trained_on if trained]:
            raise ConfigError(
                f"evaluation.path is what the run trains on: got {path!r}; name other rows, or set "
                "evaluation.every_steps=0"
            )
        data = dataclasses.replace(
            config.data,
            path=path,
            mixture={},
            mixing="weights",
            temperature=1.0,
            rows=rows,
            num_workers=0,
        )
        return HeldOut(data, "train")
    if path:
        raise ConfigError(
            f"evaluation.path has no effect: got {path!r} together with data.source="
            f"{config.data.source!r}, which holds scenes out by itself; leave it out"
        )
    return HeldOut(dataclasses.replace(config.data, rows=rows, num_workers=0), "heldout")


@contextlib.contextmanager
def telling_path(config: TrainConfig) -> Iterator[None]:
    """Puts the setting before what is wrong with held-out rows, which else reads as of the run's.

    Raises: DataError where rows of `evaluation.path` were not usable.
    """
    try:
        yield
    except (DataError, OSError) as error:
        if not config.evaluation.path:
            raise
        raise DataError(f"--evaluation.path: {error}") from error


class HeldOutLoss:
    """Takes the loss of the same held-out batches at every call, with the weights of the moment.

    `digests` are of what all processes of a run must have alike, by name.
    """

    def __init__(self, config: TrainConfig, layout: Layout):
        """Makes the batches once, if they are of rows: evaluations hours later will read the same.

        Raises: as `held_out`, and DataError or OSError where too many rows are bad.
        """
        self._config, self._layout, self._held = config, layout, held_out(config)
        self._rows = rows_of_process(batch_sharding(layout.mesh), self._held.data.rows)
        self.digests: dict[str, str] = {}
        if self._held.data.source == "rows":
            made = self._batches()
            self.digests = {f"{x} of evaluation.path": y for x, y in made.digests.items()}
            for _ in itertools.islice(made, config.evaluation.batches):
                pass

        def sums(weights: Weights, batch: Batch) -> Sums:
            _, losses = batch_loss(layout.graphdef, weights, batch, config.loss_chunk)
            return sum_up(losses, batch)

        self._sums = jax.jit(sums, out_shardings=NamedSharding(layout.mesh, PartitionSpec()))

    def __call__(
        self, weights: Weights, unless: Callable[[], bool] = lambda: False
    ) -> dict[str, float] | None:
        """Returns `loss`, `scored_tokens`, and both by task, over all of the batches.

        None when `unless` comes true before the end.
        """
        config, sharding = self._config, batch_sharding(self._layout.mesh)
        total: Any = None  # Sums, of NumPy
        patience = config.guard.data_timeout
        made = iter(self._batches())
        with contextlib.closing(Feed(made, sharding, patience, held=self._rows)) as feed:
            for batch in itertools.islice(feed, config.evaluation.batches):
                if unless():
                    return None
                found = jax.device_get(self._sums(weights, batch))
                total = found if total is None else jax.tree.map(np.add, total, found)
        assert total is not None
        mean = float(total.loss / total.weight) if total.weight > 0 else float("nan")
        numbers = {"loss": mean, "scored_tokens": float(total.weight)}
        return numbers | by_task(total.task_loss, total.task_weight)

    def _batches(self) -> Batches:
        return batches(
            self._held.data,
            self._config.seed,
            slots=self._config.model.adapter.num_queries,
            split=self._held.split,
            share=Share(self._rows.rows, jax.process_index()),
        )
