"""Another vocabulary for weights: rows of the embedding and of the head move with their tokens.

A token that both vocabularies know keeps its rows bit for bit, wherever its id goes; special tokens
go by their names. A new one starts as the mean of the tokens that spelled it before, so a model
that is trained on does not begin again.

Axes: V rows of the table, D width.
"""

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from qwenvl_jax.checkpoint.leaves import Leaf
from qwenvl_jax.checkpoint.weights import (
    TOKENIZER,
    check_ours,
    new_folder,
    open_weights,
    read_weights_config,
    verify_weights,
    write_weights,
)
from qwenvl_jax.config import ModelConfig

EMBEDDING, HEAD = "decoder.embed.embedding", "decoder.lm_head.kernel"  # [V, D] and [D, V]

Spelling = tuple[int, ...]


def change_vocabulary(
    source: str | Path,
    target: str | Path,
    spelled: Sequence[Spelling],
    *,
    image_start_id: int,
    vocabulary: Path,
) -> ModelConfig:
    """Writes the weights folder `source` once more, with the file `vocabulary` in it.

    `spelled` says for every new id the old ids whose rows it starts from (`prompt/respelling.py`);
    `image_start_id` is the new id of `<img>`. The new model has as many rows as there are ids; rows
    of the old one that no id used are dropped. One array is held in memory at a time.

    Raises:
        WeightsError: `source` is no folder of ours, is damaged, or `target` is there already.
    """
    source = Path(source)
    check_ours(source)
    config = read_weights_config(source)
    verify_weights(source)
    leaves = open_weights(source)
    leaves[EMBEDDING] = _changed(leaves[EMBEDDING], spelled, vocab_axis=0)
    leaves[HEAD] = _changed(leaves[HEAD], spelled, vocab_axis=1)
    decoder = dataclasses.replace(config.decoder, vocab_size=len(spelled))
    config = dataclasses.replace(config, decoder=decoder, image_start_id=image_start_id)
    with new_folder(target) as folder:
        write_weights(folder, config, leaves)
        shutil.copyfile(vocabulary, folder / TOKENIZER)
    return config


def moved_rows(table_VD: np.ndarray, spelled: Sequence[Spelling]) -> np.ndarray:
    """Returns the table of the new ids, [len(spelled), D], in the dtype of the old one.

    >>> moved_rows(np.array([[1.0], [3.0]]), [(1,), (0, 1)]).tolist()
    [[3.0], [2.0]]
    """
    rows = np.empty((len(spelled), table_VD.shape[1]), table_VD.dtype)
    for new, ids in enumerate(spelled):
        if len(ids) == 1:
            rows[new] = table_VD[ids[0]]
        else:  # in float32: a mean of bfloat16 would round each sum
            rows[new] = table_VD[list(ids)].astype(np.float32).mean(axis=0)
    return rows


def _changed(leaf: Leaf, spelled: Sequence[Spelling], vocab_axis: int) -> Leaf:
    """Returns the array for the new vocabulary, made when it is first read."""
    shape = list(leaf.shape)
    shape[vocab_axis] = len(spelled)
    made: list[np.ndarray] = []

    def read(index: tuple[slice, ...]) -> np.ndarray:
        if not made:
            table = np.asarray(leaf.read((slice(None),) * 2))
            rows = moved_rows(table if vocab_axis == 0 else table.T, spelled)
            made.append(rows if vocab_axis == 0 else np.ascontiguousarray(rows.T))
        return made[0][index]

    return Leaf(tuple(shape), leaf.dtype, read)
