"""How fast a step can be at best, from its work and a chip's peaks.

Three clocks run: matrix products at the peak rate, memory at its full bandwidth, and each mesh axis
over the links of the torus dimensions that it takes, both ways around where a ring closes. `best`
has all of them side by side, so the slowest one counts; `apart` has links wait for compute;
`scheduled` has those exchanges wait that the compiler's schedule puts beside no product. A real
step lies between, above what kernels lose and what is no matrix product. No number here was
measured on a TPU.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

import numpy as np
from jax.sharding import Mesh

from qwenvl_jax.planning.pods import Chip, PlanError, num_links
from qwenvl_jax.planning.work import Collective, Work


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bound:
    """Seconds of one step, by what they are spent on."""

    compute: float
    hbm: float
    links: dict[str, float]  # by mesh axis
    waiting: float = 0.0  # of the links, for exchanges beside no compute

    @property
    def best(self) -> float:
        return max(self.compute, self.hbm, *self.links.values(), 0.0)

    @property
    def scheduled(self) -> float:
        return max(self.best, max(self.compute, self.hbm) + self.waiting)

    @property
    def apart(self) -> float:
        return max(self.compute, self.hbm) + sum(self.links.values())


def bound(work: Work, chip: Chip, mesh: Mesh) -> Bound:
    """Returns the bound of one step."""

    def seconds(collective: Collective) -> float:
        return collective.num_bytes / axis_bandwidth("+".join(collective.axes), chip, mesh)

    exchanges = [x for x in work.collectives if x.axes]
    return Bound(
        waiting=sum(seconds(x) for x in exchanges if not x.is_overlapped),
        compute=work.flops / chip.peak_flops,
        hbm=work.hbm_bytes / chip.hbm_bandwidth,
        links={
            axes: num_bytes / axis_bandwidth(axes, chip, mesh)
            for axes, num_bytes in sorted(work.link_bytes().items())
            if axes
        },
    )


def axis_bandwidth(axes: str, chip: Chip, mesh: Mesh) -> float:
    """Returns bytes a second that a chip exchanges over the mesh axes `axes` ("data+fsdp").

    So many links as `num_links` counts in the dimensions of the torus that differ along them; or
    the network between slices.

    Raises:
        PlanError: the axes go over slices of a chip whose network is not published.
    """
    names = axes.split("+")
    index = tuple(slice(None) if name in names else 0 for name in mesh.axis_names)
    devices = np.ravel(mesh.devices[index])
    if len({getattr(device, "slice_index", None) for device in devices}) > 1:
        if chip.slow_bandwidth is None:
            raise PlanError(f"no published rate of the network between slices of {chip.generation}")
        return chip.slow_bandwidth
    shape, extents = (_extents(some) for some in (np.ravel(mesh.devices), devices))
    return chip.link_bandwidth * num_links(chip, shape, extents)


def _extents(devices: Iterable[Any]) -> list[int]:
    """Returns how many places devices take in each dimension of the torus."""
    return [len(set(places)) for places in zip(*(device.coords for device in devices), strict=True)]
