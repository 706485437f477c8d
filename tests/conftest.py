"""What every test may rely on: eight CPU devices, and jaxtyping's shapes checked at every call."""

import os

# Before the first import of jax: it reads these once.
os.environ["JAX_PLATFORMS"] = "cpu"
_DEVICES = "--xla_force_host_platform_device_count=8"
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_DEVICES}".strip()

import pytest  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

install_import_hook("qwenvl_jax", "beartype.beartype")

from qwenvl_jax.cli import host_memory  # noqa: E402


@pytest.fixture(autouse=True)
def _usual_memory(monkeypatch):
    """Commands change how their process allocates, which would last for the tests after them."""
    monkeypatch.setattr(host_memory, "_set", lambda parameters: None)
