"""Memory of a train step from shapes alone: for GPUs, and to tell hopeless settings early.

What is kept between the passes follows from the remat policy; what else is alive at the fullest
moment is taken to be one layer's working set and one chunk of logits. The TPU compiler's own totals
are the better answer where there are any; docs/pods.md has both side by side.
"""

import functools
import math

from jax.sharding import AbstractMesh

from qwenvl_jax.config import (
    ConfigError,
    DecoderConfig,
    ModelConfig,
    ParameterRule,
    RematPolicy,
    TrainConfig,
    VisionConfig,
)
from qwenvl_jax.model.qwenvl import abstract_state
from qwenvl_jax.planning.compile import abstract_batch
from qwenvl_jax.planning.memory import CLASSES
from qwenvl_jax.sharding import BATCH_AXES, MESH_AXES, mesh_sizes, parts_of
from qwenvl_jax.training.memory import bytes_per_device
from qwenvl_jax.training.optimizer import plan_parameters, trained_parts
from qwenvl_jax.training.state import make_layout


def state_memory(config: TrainConfig, num_devices: int) -> dict[str, int]:
    """Returns bytes a device of weights, optimizer and one set of gradients, from the shardings.

    Raises:
        ConfigError: the mesh does not fit the number of devices.
    """
    mesh = AbstractMesh(mesh_sizes(config.mesh, num_devices), MESH_AXES)
    state = make_layout(config, mesh).abstract
    return {
        "weights": bytes_per_device((state.trainable, state.frozen)),
        "optimizer": bytes_per_device(state.optimizer),
        "gradients": bytes_per_device(state.trainable),
    }


def num_parameters(config: TrainConfig, state: dict[str, int]) -> tuple[float, float]:
    """Returns how many trained and how many frozen parameters a device has, from `state_memory`."""
    frozen = config.frozen_dtype or config.model.param_dtype
    trained_bytes, all_bytes = state["gradients"], state["weights"]
    return trained_bytes / 4, (all_bytes - trained_bytes) / (2 if frozen == "bfloat16" else 4)


def estimate_memory(
    config: TrainConfig, num_devices: int, state: dict[str, int] | None = None
) -> dict[str, int]:
    """Returns bytes a device by class. State and batch are exact, the rest an estimate.

    `state`: what `state_memory` gave for the same mesh, where it is known already.

    Raises:
        ConfigError: the mesh does not fit the number of devices, or the rows do not divide.
    """
    model = config.model
    mesh = AbstractMesh(mesh_sizes(config.mesh, num_devices), MESH_AXES)
    shards = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    if config.data.rows % (config.micro_batches * shards):
        raise ConfigError(
            "data.rows must be a multiple of micro_batches x data x fsdp: got "
            f"{config.data.rows}, {config.micro_batches} and {shards}; {_fitting(config, shards)}"
        )
    state = state or state_memory(config, num_devices)
    rows = config.data.rows // config.micro_batches // shards
    tensor = mesh.shape["tensor"]
    wide = 2 if model.dtype == "bfloat16" else 4
    tokens = rows * config.data.length
    patches = (
        rows * config.data.max_images * (config.data.image_size // model.vision.patch_size) ** 2
    )
    decoder = _layer_floats(model.decoder, 3, tensor)
    vit = _layer_floats(model.vision, 2, tensor)
    vit_trains = is_vit_trained(model, config.parameters)
    vit_remat = model.vit_remat or model.remat
    kept = tokens * decoder[model.remat] * model.decoder.num_layers
    kept += patches * vit[vit_remat] * model.vision.num_layers * vit_trains
    working = max(tokens * decoder["none"], patches * vit["none"])
    block = _block_floats(model.decoder, 3, tensor)
    vit_block = _block_floats(model.vision, 2, tensor)
    vocab = model.decoder.vocab_size / parts_of(model.decoder.vocab_size, tensor)
    layer_weights = max(block, model.decoder.width * vocab)
    whole = block * model.decoder.num_layers * (model.remat == "weights")
    is_kept = vit_trains and vit_remat == "weights"
    whole += vit_block * model.vision.num_layers * is_kept
    chunk = min(config.loss_chunk, tokens)
    by_class = dict.fromkeys(CLASSES, 0)
    by_class |= state
    by_class["batch"] = bytes_per_device(abstract_batch(config, mesh))
    if config.micro_batches > 1:
        by_class["gradients"] *= 2  # the sum so far, and those of this micro-batch
    by_class["activations"] = int(kept * wide)
    by_class["gathered"] = int(whole * wide)
    by_class["logits"] = int(3 * 4 * chunk * vocab)
    by_class["pictures"] = int(patches * model.vision.patch_size**2 * 3 * wide)
    by_class["temporaries"] = int(working * wide + 2 * wide * layer_weights)
    return by_class


def _fitting(config: TrainConfig, shards: int) -> str:
    """Returns the most micro-batches that fit, as an option, or else rows that do."""
    rows = config.data.rows
    fewer = range(config.micro_batches, 0, -1)
    number = next((m for m in fewer if rows % (m * shards) == 0), None)
    if number is not None:
        return f"try --micro-batches={number}"
    return "split the rows over fewer devices, with --mesh.tensor, or change --data.rows"


@functools.cache  # a search asks for one model and table many times
def is_vit_trained(model: ModelConfig, table: tuple[ParameterRule, ...]) -> bool:
    """Returns whether any parameter of the tower trains, so that it has a backward pass."""
    return "vit" in trained_parts(plan_parameters(abstract_state(model)[1], table))


def _layer_floats(
    part: VisionConfig | DecoderConfig, matrices: int, tensor: int
) -> dict[RematPolicy, float]:
    """Returns how many numbers a token leaves behind in one layer, by remat policy.

    `matrices`: how many of the MLP's there are; a gated one keeps two hidden vectors.
    """
    width, hidden = part.width, part.mlp_dim / parts_of(part.mlp_dim, tensor)
    projected = 4 * width / parts_of(part.num_heads, tensor) + (matrices - 1) * hidden
    dots = width + projected + 2 * width
    everything = dots + 3 * width + 2 * hidden
    return {"full": float(width), "dots": dots, "weights": dots, "none": everything}


def _block_floats(part: VisionConfig | DecoderConfig, matrices: int, tensor: int) -> float:
    """Returns how many numbers the matrices of one layer have on one of `tensor` devices."""
    hidden = part.mlp_dim / parts_of(part.mlp_dim, tensor)
    return 4 * part.width**2 / parts_of(part.num_heads, tensor) + matrices * part.width * hidden
