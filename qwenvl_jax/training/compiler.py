"""What the train step asks of the compiler, by kind of device."""

from jax.sharding import Mesh

_TPU = {
    # Left alone, XLA turns a product with a split weight into a ring of small products, each beside
    # the exchange of the next piece. With whole rows on every chip that is no gain: gathering the
    # weight beside the product before it hides as much, moves less and compiles in a fraction of
    # the time.
    "xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000",
}
_ASYNC = {"xla_enable_async_all_gather": "true", "xla_enable_async_all_reduce": "true"}
# Gathers and sums of gradients cross in pieces, in the fusions of products. Of a v5e alone: newer
# compilers refuse it elsewhere, as a cause of hangs and of wrong results.
_IN_PRODUCTS = _ASYNC | {
    "xla_tpu_enable_async_collective_fusion": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_reduce": "true",
    "xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
    "xla_tpu_overlap_compute_collective_tc": "true",
}
# A v5p and a v6e have small cores for irregular work, which drive exchanges while the large ones
# multiply.
_ON_SPARSE_CORES = _ASYNC | {
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "false",
    "xla_tpu_enable_async_collective_fusion_fuse_all_reduce": "false",
    "xla_tpu_enable_async_collective_fusion_fuse_reduce_scatter": "false",
    "xla_tpu_enable_sparse_core_collective_offload_all_gather": "true",
    # And those over two dimensions of the torus, which older compilers leave out.
    "xla_tpu_enable_sparse_core_collective_offload_2d_all_gather": "true",
    "xla_tpu_enable_sparse_core_collective_offload_all_reduce": "true",
    "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter": "true",
    # The scheduler takes the part that a chip keeps for what crosses, and would start too late.
    "xla_tpu_sparse_core_reduce_scatter_latency_multiplier": "64",
}
_BY_KIND = {
    "TPU v4": _ASYNC,
    "TPU v5": _ON_SPARSE_CORES,
    "TPU v5 lite": _IN_PRODUCTS,
    "TPU v6 lite": _ON_SPARSE_CORES,
}


def compiler_options(mesh: Mesh) -> dict[str, str]:
    """Returns XLA options for `jax.jit`; none but for TPUs."""
    kind = mesh.devices.flat[0].device_kind
    return _TPU | _BY_KIND.get(kind, {}) if kind.startswith("TPU") else {}
