"""Attention by jax's splash kernel for TPUs: scores stay on the chip, masked blocks are skipped.

Axes: B rows  T queries  S keys  N heads  H head dimension.

A Pallas kernel cannot be partitioned by the compiler, so the call is wrapped in `jax.shard_map`:
rows over the batch axes and heads over `tensor`, as the table in `sharding.py` places them. On a
CPU the kernel is interpreted, which is slow and serves the tests; models that ask for it there are
refused (`attention.check_backend`).
Source: `jax.experimental.pallas.ops.tpu.splash_attention`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import PartitionSpec

from qwenvl_jax import axes
from qwenvl_jax.sharding import context_platform, partition_spec

LANES = 128  # the kernel's blocks are multiples of the lanes of a TPU register


def splash_attention(
    q_BTNH: jax.Array,
    k_BSNH: jax.Array,
    v_BSNH: jax.Array,
    q_segment_BT: jax.Array | None,
    kv_segment_BS: jax.Array | None,
    *,
    is_causal: bool,
    block: int,
) -> jax.Array:
    """Returns softmax(q k / sqrt(H)) v, [B, T, N, H].

    Order is by index, so a causal call needs T = S and positions that grow with the index. Segment
    0 looks at nothing: its output is zero. A query of another segment must have a key to look at.
    `block` queries and keys are worked on at once, fewer when there are fewer.

    Raises:
        ValueError: `block` is no multiple of 128.
    """
    if block % LANES:
        raise ValueError(
            f"attention_block must be a multiple of {LANES}: got {block}; "
            f"try {max(LANES, block // LANES * LANES)}"
        )
    T, S, H = q_BTNH.shape[1], k_BSNH.shape[1], q_BTNH.shape[3]
    num_q, num_kv = _padded(T, block), _padded(S, block)
    if q_segment_BT is None and (num_q, num_kv) != (T, S):
        # What fills up the last block must be told apart.
        q_segment_BT = jnp.ones(q_BTNH.shape[:2], jnp.int32)
        kv_segment_BS = jnp.ones(k_BSNH.shape[:2], jnp.int32)
    # The kernel does not scale. In float32: in bf16 the scale itself would be off by 0.2 %.
    q_BTNH = (q_BTNH.astype(jnp.float32) * H**-0.5).astype(q_BTNH.dtype)
    q, k, v = _pad(q_BTNH, num_q), _pad(k_BSNH, num_kv), _pad(v_BSNH, num_kv)
    call = functools.partial(
        _local, is_causal=is_causal, block=block, interpret=context_platform() == "cpu"
    )
    if q_segment_BT is None or kv_segment_BS is None:
        return _on_every_device(call, (q, k, v))
    q_segment = _pad(q_segment_BT.astype(jnp.int32), num_q)
    kv_segment = _pad(kv_segment_BS.astype(jnp.int32), num_kv)
    out_BTNH = _on_every_device(call, (q, k, v, q_segment, kv_segment))[:, :T]
    # Padding shares segment 0 and would look at itself.
    return jnp.where((q_segment_BT > 0)[:, :, None, None], out_BTNH, 0)


def _padded(length: int, block: int) -> int:
    """Returns the least length that whole blocks fill; short inputs are one shorter block."""
    unit = min(block, -(-length // LANES) * LANES)
    return -(-length // unit) * unit


def _pad(x: jax.Array, length: int) -> jax.Array:
    """Returns [B, length, ...], filled up with zeros."""
    return jnp.pad(x, [(0, length - n if i == 1 else 0) for i, n in enumerate(x.shape)])


def _on_every_device(call, arrays: tuple[jax.Array, ...]) -> jax.Array:
    """Returns `call(*arrays)`, each device of the mesh in context working on its rows and heads."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return call(*arrays)

    def spec(x: jax.Array) -> PartitionSpec:
        heads = (axes.HEADS, axes.HEAD_DIM) if x.ndim == 4 else ()
        return partition_spec((axes.BATCH, None, *heads), x.shape, mesh)

    specs = tuple(map(spec, arrays))
    # check_vma: the kernel's outputs do not say over which axes they vary.
    return jax.shard_map(call, in_specs=specs, out_specs=specs[0], check_vma=False)(*arrays)


def _local(
    q_BTNH: jax.Array,
    k_BSNH: jax.Array,
    v_BSNH: jax.Array,
    *segments: jax.Array,
    is_causal: bool,
    block: int,
    interpret: bool,
) -> jax.Array:
    """Returns the attention of one device's rows and heads."""
    _, T, N, _ = q_BTNH.shape
    S = k_BSNH.shape[1]
    mask = masks.CausalMask((T, S)) if is_causal else masks.FullMask((T, S))
    q_block, kv_block = min(block, T), min(block, S)
    sizes = kernel.BlockSizes(
        block_q=q_block,
        block_kv=kv_block,
        block_q_dkv=q_block,
        block_kv_dkv=kv_block,
        block_q_dq=q_block,
        block_kv_dq=kv_block,
    )
    run = kernel.make_splash_mha(
        masks.MultiHeadMask([mask] * N),
        block_sizes=sizes,
        head_shards=1,  # shard_map has dealt out heads and rows already
        q_seq_shards=1,
        interpret=interpret,
    )
    q, k, v = (x.swapaxes(1, 2) for x in (q_BTNH, k_BSNH, v_BSNH))
    packed = (kernel.SegmentIds(*segments),) if segments else ()
    out_BNTH: Any = jax.vmap(run)(q, k, v, *packed)
    return out_BNTH.swapaxes(1, 2)
