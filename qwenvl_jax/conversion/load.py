"""A model's config and weights from any folder that holds them: released, ours, or a run's.

Released weights go tensor by tensor from the mapped file straight into their sharding and dtype;
no intermediate folder is written.
"""

import dataclasses
import shlex
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from qwenvl_jax.checkpoint.leaves import Leaf
from qwenvl_jax.checkpoint.store import restore_weights
from qwenvl_jax.checkpoint.weights import (
    WeightsError,
    is_weights_folder,
    load_weights_folder,
    model_config_from_dict,
    read_weights_config,
)
from qwenvl_jax.config import LoraConfig, ModelConfig
from qwenvl_jax.conversion.config import model_config_from_released
from qwenvl_jax.conversion.peft import is_adapter
from qwenvl_jax.conversion.placement import check_released, released_leaves
from qwenvl_jax.conversion.reader import ReleasedFolder, read_json
from qwenvl_jax.conversion.rules import qwen_vl_rules
from qwenvl_jax.conversion.slots import ConversionError
from qwenvl_jax.model.lora import fold, is_lora, kernel_of
from qwenvl_jax.model.qwenvl import abstract_state
from qwenvl_jax.sharding import fill, named_arrays, select


def read_config(path: str | Path) -> ModelConfig:
    """Returns the sizes of the model in a folder: released, ours, or a training run's.

    LoRA pairs of a run are not in it: loading folds them into the kernels.

    Raises:
        ConversionError, WeightsError: there is no folder, or its `config.json` is of no use.
    """
    path = Path(path)
    if not path.is_dir():
        told = "no such folder; name one that holds config.json and weights (README, Install)"
        raise ConversionError(path, [told])
    if is_weights_folder(path):
        return read_weights_config(path)
    if is_run(path):
        return dataclasses.replace(run_config(path), lora=LoraConfig())
    if path.parent.name == "checkpoints" and is_run(path.parent.parent):
        raise ConversionError(
            path,
            [
                f"is one checkpoint of a run: name the run, {path.parent.parent}, for its newest; "
                "docs/training.md says how to take an older one"
            ],
        )
    if is_adapter(path):
        raise ConversionError(
            path,
            [
                "holds a LoRA adapter and no model; join them: "
                f"python convert.py import MODEL DST --lora {shlex.quote(str(path))}"
            ],
        )
    return model_config_from_released(read_json(path / "config.json"), path / "config.json")


def load_weights(path: str | Path, abstract: nnx.State, *, verify: bool = True) -> nnx.State:
    """Returns the model's state from any such folder, placed and cast as `abstract` is.

    `abstract` is `model.qwenvl.abstract_state(config, mesh)[1]`, with `config` as `read_config`
    gives it (dtypes may differ). `verify` looks for damage: every array's sha256 in a folder of
    ours, NaN and infinity in a released one. A run's newest good checkpoint is always verified.

    Raises:
        ConversionError, WeightsError, CheckpointError: naming everything that is wrong.
    """
    path = Path(path)
    if is_weights_folder(path):
        return load_weights_folder(path, abstract, verify=verify)
    if is_run(path):
        arrays = _arrays_of_run(path, abstract)
        for name, wanted in named_arrays(abstract).items():
            arrays[name] = arrays[name].astype(wanted.dtype)  # and one is let go
        return fill(abstract, arrays)
    rules = qwen_vl_rules(read_config(path))
    with ReleasedFolder(path) as folder:
        check_released(folder, rules, values=verify)
        leaves = released_leaves(folder, rules)
        arrays = {}
        for name, wanted in named_arrays(abstract).items():
            if name not in leaves or leaves[name].shape != wanted.shape:
                raise WeightsError(
                    f"{path} does not hold this model: {name} is {wanted.shape} in the model and "
                    f"{leaves[name].shape if name in leaves else 'missing'} in the folder"
                )
            arrays[name] = _place(leaves[name], wanted)
    return fill(abstract, arrays)


def is_run(path: Path) -> bool:
    """Returns whether `path` is the directory of a training run."""
    return (path / "checkpoints").is_dir()


def run_config(path: Path) -> ModelConfig:
    """Returns the model of a run as it is trained, with LoRA pairs if it has any."""
    fields = read_json(path / "config.json").get("model", {})
    return model_config_from_dict(fields, path / "config.json")


def load_run(path: Path, abstract: nnx.State) -> nnx.State:
    """Returns the weights of a run as its newest good checkpoint has them, LoRA pairs folded in.

    Placed as `abstract` is; but what was frozen in bfloat16 is bfloat16.

    Raises: CheckpointError where there is none, or it is of another model.
    """
    return fill(abstract, _arrays_of_run(path, abstract))


def _arrays_of_run(path: Path, abstract: nnx.State) -> dict[str, jax.Array]:
    wanted = named_arrays(abstract)
    lora = run_config(path).lora
    restored = restore_weights(path, wanted | _abstract_pairs(path, wanted))
    if lora.rank:
        restored = fold(restored, lora)
    return {name: restored[name] for name in wanted}


def _abstract_pairs(
    path: Path, wanted: dict[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the LoRA pairs of a run, each placed as a whole beside what is wanted."""
    _, state = abstract_state(run_config(path))
    pairs = {}
    for name, x in named_arrays(select(state, is_lora)).items():
        beside = wanted[kernel_of(name)].sharding
        if isinstance(beside, NamedSharding):
            beside = NamedSharding(beside.mesh, PartitionSpec())
        pairs[name] = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=beside)
    return pairs


def _place(leaf: Leaf, wanted: jax.ShapeDtypeStruct) -> jax.Array:
    """Returns the array where `wanted` says; each device's part is read apart from the others."""
    sharding = wanted.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def read(index: Any) -> np.ndarray:
        return np.ascontiguousarray(leaf.read(index)).astype(wanted.dtype, copy=False)

    return jax.make_array_from_callback(leaf.shape, sharding, read, dtype=wanted.dtype)
