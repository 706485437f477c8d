"""What every test may rely on: eight CPU devices, and jaxtyping's shapes checked at every call."""

import os

# Before the first import of jax: it reads these once.
os.environ["JAX_PLATFORMS"] = "cpu"
_DEVICES = "--xla_force_host_platform_device_count=8"
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_DEVICES}".strip()

import hurry  # noqa: E402
import pytest  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

install_import_hook("qwenvl_jax", "beartype.beartype")

from qwenvl_jax.cli import host_memory  # noqa: E402


@pytest.fixture(autouse=True)
def _usual_memory(monkeypatch):
    """Commands change how their process allocates, which would last for the tests after them."""
    monkeypatch.setattr(host_memory, "_set", lambda parameters: None)


@pytest.fixture(scope="module", autouse=True)
def _quick_compiles(request, tmp_path_factory):
    """Has XLA hurry, and all tests share what they have compiled: they take half of the time.

    What a file compares is compiled alike. The mark `full_compiles` leaves a file as users have it:
    those with the published numbers, and those that ask what the compiler makes of a program.
    """
    if request.node.get_closest_marker("full_compiles"):
        yield
        return
    folder = tmp_path_factory.getbasetemp()
    if os.environ.get("PYTEST_XDIST_WORKER"):
        folder = folder.parent  # of all workers
    with hurry.in_a_hurry(folder / "compiled"):
        yield
