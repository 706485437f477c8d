"""A model's config and weights from any folder that holds them: released, ours, or a run's.

Released weights go tensor by tensor from the mapped file straight into their sharding and dtype;
no intermediate folder is written.
"""

from pathlib import Path

import jax
import numpy as np
from flax import nnx

from qwenvl_jax.checkpoint.leaves import Leaf
from qwenvl_jax.checkpoint.weights import (
    WeightsError,
    fill,
    is_weights_folder,
    load_weights_folder,
    read_weights_config,
)
from qwenvl_jax.config import ModelConfig
from qwenvl_jax.conversion.config import model_config_from_released
from qwenvl_jax.conversion.placement import check_released, released_leaves
from qwenvl_jax.conversion.reader import ReleasedFolder, read_json
from qwenvl_jax.conversion.rules import qwen_vl_rules
from qwenvl_jax.conversion.slots import ConversionError
from qwenvl_jax.sharding import named_variables


def read_config(path: str | Path) -> ModelConfig:
    """Returns the sizes of the model in a folder, released or ours.

    Raises:
        ConversionError, WeightsError: there is no folder, or its `config.json` is of no use.
    """
    path = Path(path)
    if not path.is_dir():
        raise ConversionError(path, ["no such folder; name one that holds config.json and weights"])
    if is_weights_folder(path):
        return read_weights_config(path)
    return model_config_from_released(read_json(path / "config.json"), path / "config.json")


def load_weights(path: str | Path, abstract: nnx.State, *, verify: bool = True) -> nnx.State:
    """Returns the model's state from a folder, released or ours, placed and cast as `abstract` is.

    `abstract` is `model.qwenvl.abstract_state(config, mesh)[1]`, with `config` as `read_config`
    gives it (dtypes may differ). `verify` looks for damage: every array's sha256 in a folder of
    ours, NaN and infinity in a released one.

    Raises:
        ConversionError, WeightsError: naming everything that is wrong.
    """
    path = Path(path)
    if is_weights_folder(path):
        return load_weights_folder(path, abstract, verify=verify)
    rules = qwen_vl_rules(read_config(path))
    with ReleasedFolder(path) as folder:
        check_released(folder, rules, values=verify)
        leaves = released_leaves(folder, rules)
        arrays = {}
        for name, variable in named_variables(abstract).items():
            wanted = variable.get_value()
            if name not in leaves or leaves[name].shape != wanted.shape:
                raise WeightsError(
                    f"{path} does not hold this model: {name} is {wanted.shape} in the model and "
                    f"{leaves[name].shape if name in leaves else 'missing'} in the folder"
                )
            arrays[name] = _place(leaves[name], wanted)
    return fill(abstract, arrays)


def _place(leaf: Leaf, wanted: jax.ShapeDtypeStruct) -> jax.Array:
    """Returns the array where `wanted` says; each device's part is read apart from the others."""
    sharding = wanted.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def read(index: tuple[slice, ...]) -> np.ndarray:
        return np.ascontiguousarray(leaf.read(index)).astype(wanted.dtype, copy=False)

    return jax.make_array_from_callback(leaf.shape, sharding, read, dtype=wanted.dtype)
