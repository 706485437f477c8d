"""Another number of queries for weights: the adapter sees a picture through another grid.

The learned queries lie on a square grid with a sine table, and the release resizes that table
wherever a picture has another number of patches. Resizing both to another square puts new queries
between old ones. A model that goes on training takes a few hundred steps to read the new grid,
where a new adapter would begin again.

Axes: Q queries, D width.
"""

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from qwenvl_jax.checkpoint.leaves import Leaf
from qwenvl_jax.checkpoint.weights import (
    check_ours,
    copy_tokenizer,
    new_folder,
    open_weights,
    read_weights_config,
    verify_weights,
    write_weights,
)
from qwenvl_jax.config import ModelConfig
from qwenvl_jax.model.vit import resize_table

TABLES = ("adapter.query", "adapter.position_embed")  # [Q, D] each


def change_queries(source: str | Path, target: str | Path, num_queries: int) -> ModelConfig:
    """Writes the weights folder `source` once more, with `num_queries` embeddings a picture.

    The two tables of the adapter are resized as position tables are, bicubic, and keep their
    dtypes; everything else keeps its bits.

    Raises:
        ConfigError: `num_queries` is no square number.
        WeightsError: `source` is no folder of ours, is damaged, or `target` is there already.
    """
    source = Path(source)
    check_ours(source)
    config = read_weights_config(source)
    config = dataclasses.replace(
        config, adapter=dataclasses.replace(config.adapter, num_queries=num_queries)
    )
    verify_weights(source)
    leaves = open_weights(source)
    for name in TABLES:
        leaves[name] = _resized(leaves[name], num_queries)
    with new_folder(target) as folder:
        write_weights(folder, config, leaves)
        copy_tokenizer(source, folder)
    return config


def _resized(leaf: Leaf, num_queries: int) -> Leaf:
    table_QD = jnp.asarray(leaf.read((slice(None),) * 2))
    resized = np.asarray(resize_table(table_QD, num_queries)).astype(leaf.dtype)
    return Leaf(resized.shape, leaf.dtype, resized.__getitem__)
