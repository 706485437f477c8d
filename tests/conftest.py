"""What every test may rely on: eight CPU devices, and jaxtyping's shapes checked at every call."""

import os

# Before the first import of jax: it reads these once.
os.environ["JAX_PLATFORMS"] = "cpu"
_DEVICES = "--xla_force_host_platform_device_count=8"
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_DEVICES}".strip()

import jax  # noqa: E402
import pytest  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

install_import_hook("qwenvl_jax", "beartype.beartype")

from qwenvl_jax.cli import host_memory  # noqa: E402


@pytest.fixture(autouse=True)
def _usual_memory(monkeypatch):
    """Commands change how their process allocates, which would last for the tests after them."""
    monkeypatch.setattr(host_memory, "_set", lambda parameters: None)


@pytest.fixture(scope="module")
def quick_compiles(tmp_path_factory):
    """Has XLA hurry, and the runs of a file share what they have compiled: for whole runs.

    They are then compiled in half of the time. What a file compares is compiled alike.
    """
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    before["jax_disable_most_optimizations"] = False  # a flag that is written, not read
    jax.config.update(names[0], str(tmp_path_factory.mktemp("compiled")))
    jax.config.update(names[1], 0.0)
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
