"""Which devices jax looks for, where asking for all of them would only make noise."""

import importlib.util
import os
from pathlib import Path

# Device files of a TPU machine: up to v4, and from v5e on.
_TPU_FILES = ("accel*", "vfio/*")
_GPU_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin", "jax_rocm60_plugin", "jax_rocm7_plugin")


def leave_out_absent_tpu(devices: Path = Path("/dev")) -> None:
    """Keeps jax from looking for a TPU that is not there; before the first import of jax.

    With libtpu installed for `qwenvl plan`, on a machine without a TPU, it would complain at length
    on standard error. Nothing is decided where `JAX_PLATFORMS` is set, or where there may be a GPU.
    """
    if "JAX_PLATFORMS" in os.environ or importlib.util.find_spec("libtpu") is None:
        return
    has_tpu = any(file for pattern in _TPU_FILES for file in devices.glob(pattern))
    has_gpu = any(importlib.util.find_spec(plugin) for plugin in _GPU_PLUGINS)
    if not has_tpu and not has_gpu:
        os.environ["JAX_PLATFORMS"] = "cpu"
