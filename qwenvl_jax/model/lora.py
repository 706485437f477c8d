"""LoRA: a frozen kernel W and a trained pair of thin matrices, x W + (alpha / rank) x down up.

`up` starts at zero, so a model with fresh pairs computes what it did without them. Pairs live
beside their kernel in the tree (`decoder.blocks.attn.q_proj.lora.down`), are trained by a row of
the parameter table, saved and sharded as any other parameter, and folded into the kernels wherever
the weights leave the run: whoever reads a run sees an ordinary model.

Source: arXiv 2106.09685. Differs from the original `finetune.py`: queries, keys and values have
separate kernels here, so each has its own `down` (the release has one for the three). They drop the
same numbers, as there.
"""

import fnmatch
import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from qwenvl_jax import axes
from qwenvl_jax.config import ConfigError, LoraConfig
from qwenvl_jax.model.layers import Dense, param
from qwenvl_jax.model.narrow import from_held, held_dtype, to_held
from qwenvl_jax.model.noise import dropout
from qwenvl_jax.model.products import matmul
from qwenvl_jax.sharding import select

_READ_WITHOUT_CALL = "decoder.lm_head"  # its kernel goes into the chunked loss
_DOWN, _UP = ".lora.down", ".lora.up"
_QKV = re.compile(r"[qkv]_proj$")  # these read the same, and drop the same


class LowRank(nnx.Module):
    """x [..., in dims] -> [..., out dims] through `rank` numbers."""

    def __init__(self, dense: Dense, number: int, config: LoraConfig, dtype: str, rngs: nnx.Rngs):
        """`number` tells apart which pairs of a layer drop different numbers."""
        self.number, self.dropout = number, config.dropout
        kernel, rank = dense.kernel, config.rank
        shape, logical = kernel.get_value().shape, kernel.axes
        split = int(logical[0] == axes.LAYERS) + dense.num_inputs
        stack = split - dense.num_inputs
        inputs, outputs = dense.logical[: dense.num_inputs], dense.logical[dense.num_inputs :]
        self.down_axes, self.up_axes = (*inputs, axes.RANK), (axes.RANK, *outputs)
        fan_in = math.prod(shape[stack:split])
        self.num_inputs, self.scale = dense.num_inputs, config.alpha / rank
        # The variance of the uniform draw that PyTorch's users know.
        std = (3 * fan_in) ** -0.5
        self.down = param((*shape[:split], rank), (*logical[:split], axes.RANK), std, dtype, rngs)
        up_shape = (*shape[:stack], rank, *shape[split:])
        up_axes = (*logical[:stack], axes.RANK, *logical[split:])
        self.up = nnx.Param(jnp.zeros(up_shape, dtype), axes=up_axes)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = dropout(x, self.dropout, self.number)
        low: Any = matmul(x, self.down[...].astype(x.dtype), None, self.num_inputs, self.down_axes)
        return matmul(low * self.scale, self.up[...].astype(x.dtype), None, 1, self.up_axes)


def add_lora(model: nnx.Module, config: LoraConfig, dtype: str, rngs: nnx.Rngs) -> None:
    """Puts a pair beside every matrix that a target matches.

    Raises:
        ConfigError: a target matches no matrix that can have one.
    """
    if not config.rank:
        return
    found = {
        ".".join(map(str, path)): module
        for path, module in nnx.iter_modules(model)
        if isinstance(module, Dense)
    }
    del found[_READ_WITHOUT_CALL]
    for target in config.targets:
        if not fnmatch.filter(found, target):
            raise ConfigError(
                f"model.lora.targets has {target!r}, which matches no matrix; these can have a "
                f"pair: {', '.join(sorted(found))}"
            )
    inputs = sorted({_QKV.sub("qkv", path) for path in found})
    for path, dense in sorted(found.items()):
        number = inputs.index(_QKV.sub("qkv", path))
        if any(fnmatch.fnmatchcase(path, target) for target in config.targets):
            dense.lora = nnx.data(LowRank(dense, number, config, dtype, rngs))


def is_lora(path: str) -> bool:
    """Returns whether a dotted parameter path is that of one half of a pair."""
    return path.endswith((_DOWN, _UP))


def pair_of(kernel: str) -> tuple[str, str]:
    """Returns the paths of the two halves of the pair beside a kernel, should it have one."""
    module = kernel.removesuffix(".kernel")
    return module + _DOWN, module + _UP


def kernel_of(path: str) -> str:
    """Returns the path of the kernel that one half of a pair stands beside."""
    return f"{path.rpartition('.lora.')[0]}.kernel"


def without_lora(state: nnx.State) -> nnx.State:
    """Returns the same state, as it is without pairs."""
    return select(state, lambda path: not is_lora(path))


def fold(weights: Mapping[str, jax.Array], config: LoraConfig) -> dict[str, jax.Array]:
    """Returns the weights with each pair multiplied, added to its kernel, and gone.

    Kernels keep dtype and placement; those with a pair are given up (donated).
    """
    folded = {path: array for path, array in weights.items() if not is_lora(path)}
    for path in [path for path in weights if path.endswith(_DOWN)]:
        name = kernel_of(path)
        kernel, down, up = folded[name], weights[path], weights[path.removesuffix(_DOWN) + _UP]
        add = jax.jit(_added, donate_argnums=0, out_shardings=kernel.sharding, static_argnums=3)
        folded[name] = add(kernel, down, up, config.alpha / config.rank)
    return folded


def _added(kernel: jax.Array, down: jax.Array, up: jax.Array, scale: float) -> jax.Array:
    """Returns kernel + scale x down up, in place: one layer at a time is float32."""
    is_stacked = down.ndim + up.ndim - kernel.ndim == 3  # the layers count twice, the rank too

    def one(*layer: jax.Array) -> jax.Array:
        kernel, down, up = (part.astype(jnp.float32) for part in layer)
        return kernel + scale * jnp.tensordot(down, up, axes=1)

    if not is_stacked:
        return one(kernel, down, up).astype(kernel.dtype)

    def write(k: jax.Array, held: jax.Array) -> jax.Array:
        return held.at[k].set(to_held(one(from_held(held[k]), down[k], up[k]), held.dtype))

    held = to_held(kernel, held_dtype(kernel.dtype))
    return from_held(jax.lax.fori_loop(0, len(kernel), write, held))
