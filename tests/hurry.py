"""Has XLA hurry with programs that run once: optimizing them takes most of the time of tests."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
from jax._src import compiler

# What makes XLA's loops on a CPU since 2025 takes twice as long as what it replaced, which is gone
# from newer releases.
_OLD_LOOPS = {"xla_cpu_use_fusion_emitters": False} if jax.__version_info__ < (0, 11) else {}
_OPTIONS = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    **_OLD_LOOPS,
}


def flags(num_devices: int = 1) -> str:
    """Returns XLA_FLAGS for a process that a test starts, with so many CPU devices."""
    options = {"xla_force_host_platform_device_count": num_devices, **_OPTIONS}
    return " ".join(f"--{name}={str(value).lower()}" for name, value in options.items())


def environment(cache: Path, num_devices: int = 1) -> dict[str, str]:
    """Returns what such a process has in its environment; `cache` holds what it compiles."""
    tests = Path(__file__).parent
    return os.environ | {
        "PYTHONPATH": f"{tests.parent}{os.pathsep}{tests}",
        "XLA_FLAGS": flags(num_devices),
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


@contextlib.contextmanager
def in_a_hurry(cache: Path) -> Iterator[None]:
    """Compiles what this process runs likewise, and shares it through the folder `cache`."""
    compile_options = compiler.get_compile_options

    def with_old_loops(*args, **kwargs):
        options = compile_options(*args, **kwargs)
        options.env_option_overrides = [*options.env_option_overrides, *_OLD_LOOPS.items()]
        return options

    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    before["jax_disable_most_optimizations"] = False  # a flag that is written, not read
    with pytest.MonkeyPatch.context() as patch:
        if _OLD_LOOPS:  # JAX has no setting for options of every compilation
            patch.setattr(compiler, "get_compile_options", with_old_loops)
        jax.config.update(names[0], str(cache))
        jax.config.update(names[1], 0.0)
        jax.config.update("jax_disable_most_optimizations", True)
        yield
        for name, value in before.items():
            jax.config.update(name, value)
