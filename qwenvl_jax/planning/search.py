"""Other settings of the same run: the nearest that fits, and the fastest.

Only what changes speed and memory is varied, never the recipe: how much is recomputed, in how many
micro-batches a step is made, and how the mesh is split. Every answer was compiled.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator

from qwenvl_jax.config import ConfigError, MeshConfig, RematPolicy, TrainConfig
from qwenvl_jax.planning.estimate import estimate_memory, state_memory
from qwenvl_jax.planning.plan import Plan, make_plan
from qwenvl_jax.planning.pods import Pod

# From the fastest to the smallest: (decoder, tower).
REMATS: tuple[tuple[RematPolicy, RematPolicy], ...] = (
    ("none", "none"),
    ("dots", "dots"),
    ("dots", "full"),
    ("full", "full"),
)
HOPELESS = 1.5  # times the capacity, by the estimate: not worth compiling

Planner = Callable[[TrainConfig, Pod], Plan]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """What may be changed about a run to make it fit or faster."""

    mesh: MeshConfig
    micro_batches: int
    remat: RematPolicy
    vit_remat: RematPolicy

    def apply(self, config: TrainConfig) -> TrainConfig:
        """Returns the config with this setting."""
        model = dataclasses.replace(config.model, remat=self.remat, vit_remat=self.vit_remat)
        return dataclasses.replace(
            config, model=model, mesh=self.mesh, micro_batches=self.micro_batches
        )

    def options(self) -> str:
        """Returns the setting as options of `train.py`."""
        mesh = self.mesh
        return (
            f"--model.remat={self.remat} --model.vit-remat={self.vit_remat} "
            f"--micro-batches={self.micro_batches} --mesh.data={mesh.data} "
            f"--mesh.fsdp={mesh.fsdp} --mesh.tensor={mesh.tensor}"
        )


def setting_of(config: TrainConfig) -> Setting:
    """Returns what the config has chosen."""
    return Setting(
        mesh=config.mesh,
        micro_batches=config.micro_batches,
        remat=config.model.remat,
        vit_remat=config.model.vit_remat or config.model.remat,
    )


def nearest_fit(
    config: TrainConfig,
    pod: Pod,
    *,
    plan: Planner = make_plan,
    tries: int = 6,
    say: Callable[[str], None] = lambda text: None,
) -> tuple[Setting, Plan] | None:
    """Returns the nearest setting that fits and its plan, or None when `tries` did not find one.

    First more is recomputed, then micro-batches are made smaller, then the model is split further:
    in this order a change costs more speed.
    """
    for setting in itertools.islice(_smaller(config, pod), tries):
        say(f"compiling {setting.options()}")
        found = plan(setting.apply(config), pod)
        if found.fits:
            return setting, found
    return None


def _smaller(config: TrainConfig, pod: Pod) -> Iterator[Setting]:
    now = setting_of(config)
    first = REMATS.index((now.remat, now.vit_remat)) if (now.remat, now.vit_remat) in REMATS else 0
    for mesh in (now.mesh, *(mesh for mesh in meshes_of(pod) if mesh.tensor > now.mesh.tensor)):
        state = state_memory(dataclasses.replace(config, mesh=mesh), pod.num_chips)
        for factor, remat in itertools.product((1, 2, 4, 8), REMATS[first:]):
            setting = Setting(
                mesh=mesh,
                micro_batches=now.micro_batches * factor,
                remat=remat[0],
                vit_remat=remat[1],
            )
            if setting != now and _is_worth_a_try(setting, config, pod, state):
                yield setting


def _is_worth_a_try(setting: Setting, config: TrainConfig, pod: Pod, state: dict[str, int]) -> bool:
    """Returns whether the rows divide and the estimate does not call it hopeless."""
    if config.data.rows % setting.micro_batches:
        return False
    return estimated_share(setting.apply(config), pod, state) <= HOPELESS


def settings(config: TrainConfig, pod: Pod) -> list[Setting]:
    """Returns every setting that the estimate does not call hopeless, the most promising first.

    Promising is little recomputation, then few micro-batches: weights are gathered once in each.
    """
    found = []
    for mesh in meshes_of(pod):
        state = state_memory(dataclasses.replace(config, mesh=mesh), pod.num_chips)
        shards = pod.num_chips // mesh.tensor
        most = config.data.rows // shards if config.data.rows % shards == 0 else 0
        counts = [n for n in range(1, most + 1) if most % n == 0]
        for (remat, vit_remat), micro_batches in itertools.product(REMATS, counts):
            setting = Setting(
                mesh=mesh, micro_batches=micro_batches, remat=remat, vit_remat=vit_remat
            )
            if _is_worth_a_try(setting, config, pod, state):
                found.append(setting)
    found.sort(key=lambda x: (REMATS.index((x.remat, x.vit_remat)), x.mesh.tensor, x.micro_batches))
    return found


def meshes_of(pod: Pod) -> list[MeshConfig]:
    """Returns the splits worth a look: `fsdp` as wide as the widths allow, `tensor` up to eight.

    1664 = 2^7 x 13 and 151,936 = 2^7 x 1187: beyond 128 ways a width would be copied, not split.
    """
    found = []
    for tensor in (1, 2, 4, 8):
        rest = pod.chips_per_slice // tensor
        if rest * tensor != pod.chips_per_slice:
            continue
        fsdp = math.gcd(rest, 128)
        data = pod.num_chips // tensor // fsdp
        found.append(MeshConfig(data=data, fsdp=fsdp, tensor=tensor))
    return found


def estimated_share(config: TrainConfig, pod: Pod, state: dict[str, int]) -> float:
    """Returns the estimated memory as a share of a chip's; infinite where rows do not divide."""
    try:
        return sum(estimate_memory(config, pod.num_chips, state).values()) / pod.chip.hbm_bytes
    except ConfigError:
        return math.inf
