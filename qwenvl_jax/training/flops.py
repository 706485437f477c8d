"""How much arithmetic a step needs, and which share of the device's peak that is (MFU).

Convention: two operations a multiplication with its addition. Counted is what the model needs for
the tokens and pictures that are there: vision is counted, padding and empty picture slots are not,
and nothing for what remat computes again. Matrix products count once forward, once for the
gradient of their input where something before them is trained, once for their kernel's where that
is trained: a frozen part costs one third or two thirds of a trained one. Attention counts the pairs
of tokens that may look at each other, the head scored tokens only. Norms, softmax, optimizer and
loss count nothing.
"""

import math
import re
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax.sharding import AbstractMesh, NamedSharding

from qwenvl_jax.config import ModelConfig, TrainConfig, VisionConfig
from qwenvl_jax.sharding import MESH_AXES, named_variables, partition_spec, parts_of
from qwenvl_jax.training.optimizer import ParameterPlan, trained_parts

# Dense bf16 operations a second of one device, as its maker states them.
PEAKS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA L4": 121e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}
_MATRICES = (".kernel", ".lora.down", ".lora.up")
_PER_QUERY = ("adapter.attn.o_proj", "adapter.proj")
# The learned queries are the same for all pictures: projected once a step, which is nothing.
_PER_STEP = "adapter.attn.q_proj"
_HEAD = "decoder.lm_head"


def peak_flops(device_kind: str) -> float | None:
    """Returns the peak of one device of this kind; None where it is not known, as of a CPU."""
    known = [kind for kind in PEAKS if re.match(rf"{kind}\b", device_kind)]  # an L40 is no L4
    return PEAKS[max(known, key=len)] if known else None


def step_flops(
    model: ModelConfig,
    abstract: nnx.State,
    plan: dict[str, ParameterPlan],
    image_size: int,
    tensor: int = 1,
) -> Callable[[dict[str, Any]], float]:
    """Returns a function from a step's record to its operations.

    Of the record it takes `tokens`, `scored_tokens`, `pairs` and `images`. Without
    `scored_tokens`, which no plan knows, every token counts as scored. `tensor`: then what one of
    so many devices does that split matrices and heads; what they do not divide, each does whole.
    """
    patches = (image_size // model.vision.patch_size) ** 2
    queries = model.adapter.num_queries
    trains = trained_parts(plan)
    # Gradients pass through a part when something in it or before it is trained.
    passes = {
        "vit": "vit" in trains,
        "adapter": bool(trains & {"vit", "adapter"}),
        "decoder": bool(trains),
    }
    per_image = per_token = per_scored = 0.0
    for path, variable in named_variables(abstract).items():
        if not path.endswith(_MATRICES) or path.startswith(_PER_STEP):
            continue
        part = path.split(".")[0]
        # Pixels have no gradient, and what comes out of a frozen tower needs none.
        ends = {"vit.patch_embed": False, "adapter.kv_proj": passes["vit"]}
        module = path.removesuffix(".kernel").removesuffix(".lora.down")
        times = 1 + ends.get(module, passes[part]) + plan[path].is_trained
        operations = 2.0 * times * _part_size(variable, tensor)
        if path.startswith(_HEAD):
            per_scored += operations
        elif part == "decoder":
            per_token += operations
        else:
            per_image += operations * (queries if path.startswith(_PER_QUERY) else patches)

    def attention(width: int, num_heads: int, num_layers: int, part: str) -> float:
        """Returns operations a pair: scores and weighted sum, and both again for each gradient."""
        mine = width / parts_of(num_heads, tensor)
        return 4.0 * mine * num_layers * (3 if passes[part] else 1)

    vision, decoder = model.vision, model.decoder
    pairs = _tower_pairs(vision, image_size)
    per_image += pairs * attention(vision.width, vision.num_heads, 1, "vit")
    per_image += patches * queries * attention(decoder.width, model.adapter.num_heads, 1, "adapter")
    wide, heads = decoder.num_heads * decoder.head_dim, decoder.num_heads
    per_pair = attention(wide, heads, decoder.num_layers, "decoder")

    def count(record: dict[str, Any]) -> float:
        tokens = record["tokens"]
        scored = record.get("scored_tokens", tokens)
        language = per_token * tokens + per_scored * scored + per_pair * record["pairs"]
        return language + per_image * record["images"]

    return count


def full_step_flops(
    config: TrainConfig, abstract: nnx.State, plan: dict[str, ParameterPlan], tensor: int = 1
) -> float:
    """Returns the operations of a step whose places are all taken, by rows of one sample each."""
    data = config.data
    count = step_flops(config.model, abstract, plan, data.image_size, tensor)
    pairs = data.length * (data.length + 1) // 2
    return data.rows * count({"images": data.max_images, "tokens": data.length, "pairs": pairs})


def _tower_pairs(vision: VisionConfig, image_size: int) -> int:
    """Returns how many pairs of patches see each other in one picture, over all of its blocks."""
    side, layers = image_size // vision.patch_size, vision.num_layers
    everything = side**4
    if vision.attention == "global":
        return layers * everything
    window = vision.window_side
    whole, rest = divmod(side, window)
    within = (whole * window**2 + rest**2) ** 2  # windows at the edges are smaller
    num_global = layers // vision.global_every
    return num_global * everything + (layers - num_global) * within


def _part_size(variable: nnx.Variable, tensor: int) -> int:
    """Returns how many numbers of a parameter one of `tensor` devices has."""
    shape = variable.get_value().shape
    mesh = AbstractMesh((1, 1, tensor), MESH_AXES)
    return math.prod(
        NamedSharding(mesh, partition_spec(variable.axes, shape, mesh)).shard_shape(shape)
    )


def all_peaks() -> float | None:
    """Returns the peak of all devices of this job together."""
    peak = peak_flops(jax.devices()[0].device_kind)
    return peak and peak * jax.device_count()
