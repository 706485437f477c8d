"""How fast a step can be at best, from its work and a chip's peaks.

Three clocks run: matrix products at the peak rate, memory at its full bandwidth, and each mesh axis
over the links of the torus dimensions that it takes, both ways around. `best` has all of them side
by side, so the slowest one counts; `apart` has nothing beside anything. A real step lies between,
above what kernels lose and what is no matrix product. No number here was measured on a TPU.
"""

import dataclasses

import numpy as np
from jax.sharding import Mesh

from qwenvl_jax.planning.pods import Chip, PlanError
from qwenvl_jax.planning.work import Work


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bound:
    """Seconds of one step, by what they are spent on."""

    compute: float
    hbm: float
    links: dict[str, float]  # by mesh axis

    @property
    def best(self) -> float:
        return max(self.compute, self.hbm, *self.links.values(), 0.0)

    @property
    def apart(self) -> float:
        return max(self.compute, self.hbm) + sum(self.links.values())


def bound(work: Work, chip: Chip, mesh: Mesh) -> Bound:
    """Returns the bound of one step."""
    return Bound(
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

    Two links, there and back, for each dimension of the torus that differs along them; or the
    network between slices.

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
    places = np.array([device.coords for device in devices])
    dimensions = max(1, int((np.ptp(places, axis=0) > 0).sum()))
    return 2 * chip.link_bandwidth * dimensions
