"""What can be planned for: TPU slices by public name, their shapes, the peaks of a chip; GPUs.

Names of v5e and v6e count chips; names of v4 and v5p count cores, two a chip: "v5p-256" is 128
chips. Peaks are the vendor's, per chip. Source: the "System architecture" tables of Google Cloud's
pages on TPU v4, v5e, v5p and v6e; link rates are the chip's total over its links, one way.
"""

import contextlib
import dataclasses
import difflib
import math
import os
from collections.abc import Iterator, Sequence
from typing import Any

from qwenvl_jax.config import ConfigError
from qwenvl_jax.training.flops import PEAKS

GB, GiB = 10**9, 2**30


class PlanError(ValueError):
    """A plan that cannot be made: what is wrong, what was got, what is expected."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """What one chip can do at best."""

    generation: str
    peak_flops: float  # bf16, a second
    hbm_bytes: int
    hbm_bandwidth: float  # bytes a second
    link_bandwidth: float  # bytes a second over one link, one way
    num_dimensions: int  # of the torus, in which a chip has two neighbours each
    slow_bandwidth: float | None  # bytes a second a chip between slices; None: not published
    cores_in_name: int


CHIPS = {
    chip.generation: chip
    for chip in (
        Chip(
            generation="v4",
            peak_flops=PEAKS["TPU v4"],
            hbm_bytes=32 * GiB,
            hbm_bandwidth=1200e9,
            link_bandwidth=50e9,
            num_dimensions=3,
            slow_bandwidth=None,
            cores_in_name=2,
        ),
        Chip(
            generation="v5e",
            peak_flops=PEAKS["TPU v5e"],
            hbm_bytes=16 * GiB,
            hbm_bandwidth=800e9,
            link_bandwidth=50e9,
            num_dimensions=2,
            slow_bandwidth=3.1e9,  # 6.4 Tbit/s a pod of 256
            cores_in_name=1,
        ),
        Chip(
            generation="v5p",
            peak_flops=PEAKS["TPU v5p"],
            hbm_bytes=95 * GiB,
            hbm_bandwidth=2765e9,
            link_bandwidth=100e9,
            num_dimensions=3,
            slow_bandwidth=6.25e9,  # 50 Gbit/s
            cores_in_name=2,
        ),
        Chip(
            generation="v6e",
            peak_flops=PEAKS["TPU v6e"],
            hbm_bytes=32 * GiB,
            hbm_bandwidth=1600e9,
            link_bandwidth=100e9,
            num_dimensions=2,
            slow_bandwidth=12.5e9,  # 25.6 Tbit/s a pod of 256
            cores_in_name=1,
        ),
    )
}
# Memory and peak of a GPU. Source: the vendor's data sheets, dense bf16.
GPU_KINDS = {
    "l4": (24 * GiB, PEAKS["NVIDIA L4"]),
    "a100-40": (40 * GiB, PEAKS["NVIDIA A100"]),
    "a100-80": (80 * GiB, PEAKS["NVIDIA A100"]),
    "h100": (80 * GiB, PEAKS["NVIDIA H100"]),
    "h200": (141 * GB, PEAKS["NVIDIA H200"]),
}
_SHAPES_2D = {
    1: "1x1",
    4: "2x2",
    8: "2x4",
    16: "4x4",
    32: "4x8",
    64: "8x8",
    128: "8x16",
    256: "16x16",
}
_SHAPES_3D = {
    4: "2x2x1",
    8: "2x2x2",
    16: "2x2x4",
    32: "2x4x4",
    64: "4x4x4",
    128: "4x4x8",
    256: "4x8x8",
    512: "8x8x8",
    1024: "8x8x16",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pod:
    """One or more equal slices; slices are joined by the data-centre network."""

    name: str
    chip: Chip
    chips_per_slice: int
    shape: str
    num_slices: int = 1

    @property
    def num_chips(self) -> int:
        return self.chips_per_slice * self.num_slices

    @property
    def sizes(self) -> tuple[int, ...]:
        """The shape of a slice as numbers."""
        return tuple(map(int, self.shape.split("x")))

    @property
    def title(self) -> str:
        """The name with what it counts, e.g. "v5p-256 (counts cores: 128 chips, 4x4x8)"."""
        counts = "cores" if self.chip.cores_in_name > 1 else "chips"
        size = f"counts {counts}: {self.chips_per_slice} chips, {self.shape}"
        return f"{self.name} ({size})" + (f" x {self.num_slices} slices" * (self.num_slices > 1))

    def devices(self) -> list[Any]:
        """Returns compile-only devices, one a chip.

        Raises:
            PlanError: no `libtpu`, or one that does not know this shape.
        """
        # libtpu would ask a server of the cloud which TPU it runs on, and wait for the answer.
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        # And it lets one process a machine in, to guard chips that are not touched here.
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        from jax.experimental import topologies

        options: dict[str, Any] = {"num_slices": self.num_slices} if self.num_slices > 1 else {}
        if self.chip.generation == "v4":
            options["chip_config_name"] = "megacore"  # both cores of a chip are one device
        if self.chips_per_slice == 1:
            options["chips_per_host_bounds"] = (1, 1, 1)
        name = f"{self.chip.generation}:{self.shape}"
        try:
            with quiet():
                found = topologies.get_topology_desc(name, "tpu", **options)
        except Exception as error:
            raise PlanError(
                f"cannot compile for {self.name}: {_first_line(error)}; the TPU compiler comes "
                "with pip install '.[tpu]', and its version must match jaxlib's"
            ) from error
        return list(found.devices)


def rings(chip: Chip, shape: Sequence[int]) -> list[bool]:
    """Returns of each dimension of a slice whether links join its ends.

    Source: Google Cloud's pages on TPU v4, v5e, v5p and v6e. A v5e or v6e has them along whole
    sides of a pod, 16 chips; a v4 or v5p in slices of cubes of 4 x 4 x 4.
    """
    if chip.num_dimensions == 2:
        return [size == 16 for size in shape]
    return [all(size % 4 == 0 for size in shape)] * len(shape)


def num_links(chip: Chip, shape: Sequence[int], extents: Sequence[int]) -> int:
    """Returns over how many links at once a chip exchanges with a group that spans `extents`.

    Two for each dimension of the slice that the group goes all around, one for each other.

    >>> num_links(CHIPS["v5e"], (16, 16), (16, 8)), num_links(CHIPS["v6e"], (2, 4), (1, 4))
    (3, 1)
    """
    each = zip(rings(chip, shape), shape, extents, strict=True)
    links = [1 + (is_ring and n == size) for is_ring, size, n in each if n > 1]
    return max(1, sum(links))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps what the TPU library writes to standard error out of the terminal.

    It looks for the machine's own TPU first, and complains at length that there is none. With
    `QWENVL_DEBUG=1` nothing is hidden.
    """
    if os.environ.get("QWENVL_DEBUG") == "1":
        yield
        return
    saved, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nothing)


def find_pod(name: str, num_slices: int = 1) -> Pod:
    """Returns the pod of a public name.

    >>> find_pod("v5p-256").num_chips
    128

    Raises:
        ConfigError: no such name (the nearest are told), or no rate between its slices is known.
    """
    pods, small = known_pods(), name.lower()
    if small not in pods:
        same = [pod for pod in pods if pod.startswith(f"{small.split('-')[0]}-")]
        near = same or difflib.get_close_matches(small, pods, n=3, cutoff=0.5) or ["v5e-256"]
        kinds = f"; or GPUs, a kind and a number: {'-8, '.join(GPU_KINDS)}-8" if not same else ""
        raise ConfigError(
            f"unknown topology: got {name!r}, expected for example {', '.join(near)}{kinds}"
        )
    if num_slices < 1:
        raise ConfigError(f"slices must be at least 1: got {num_slices}")
    chip = pods[small].chip
    if num_slices > 1 and chip.slow_bandwidth is None:
        raise ConfigError(
            f"no rate of the network between slices of {chip.generation} was published: got "
            f"{num_slices} slices, expected one"
        )
    return dataclasses.replace(pods[small], num_slices=num_slices)


def known_pods() -> dict[str, Pod]:
    """Returns every pod by name, each generation from small to large."""
    pods = {}
    for chip in CHIPS.values():
        for chips, shape in (_SHAPES_2D if chip.num_dimensions == 2 else _SHAPES_3D).items():
            name = f"{chip.generation}-{chips * chip.cores_in_name}"
            pods[name] = Pod(name=name, chip=chip, chips_per_slice=chips, shape=shape)
            assert math.prod(pods[name].sizes) == chips
    return pods


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
