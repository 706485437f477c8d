"""What the train step asks of the compiler, by kind of device."""

from jax.sharding import Mesh

_TPU = {
    # Left alone, XLA turns a product with a split weight into a ring of small products, each beside
    # the exchange of the next piece. With whole rows on every chip that is no gain: gathering the
    # weight beside the product before it hides as much, moves less and compiles in a fraction of
    # the time.
    "xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000",
    # Gathers start early by themselves; sums of gradients do only where these ask for it.
    "xla_enable_async_all_reduce": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_reduce": "true",
}


def compiler_options(mesh: Mesh) -> dict[str, str]:
    """Returns XLA options for `jax.jit`; none but for TPUs."""
    return dict(_TPU) if mesh.devices.flat[0].device_kind.startswith("TPU") else {}
