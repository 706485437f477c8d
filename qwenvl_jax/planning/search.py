"""Other settings of the same run: the nearest that fits, and the fastest.

Only what changes speed and memory is varied, never the recipe: how much is recomputed, in how many
micro-batches a step is made, and how the mesh is split. Every answer was compiled.
"""

import dataclasses
import hashlib
import itertools
import json
import math
import os
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

from qwenvl_jax.config import ConfigError, MeshConfig, RematPolicy, TrainConfig, to_dict
from qwenvl_jax.planning.estimate import estimate_memory, state_memory
from qwenvl_jax.planning.plan import Plan, make_plan, plan_from_dict
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


class PlanCache:
    """Plans of earlier calls, on the disk: a compilation takes minutes."""

    def __init__(self, folder: Path):
        self._folder = folder

    def __call__(self, config: TrainConfig, pod: Pod) -> Plan:
        """Returns the plan, from the disk if these very settings were compiled before."""
        path = self._folder / f"{self._key(config, pod)}.json"
        if path.exists():
            return plan_from_dict(json.loads(path.read_text(encoding="utf-8")))
        plan = make_plan(config, pod)
        self._folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(to_dict(plan), indent=1) + "\n", encoding="utf-8")
        partial.replace(path)  # whole, or not there
        return plan

    def _key(self, config: TrainConfig, pod: Pod) -> str:
        """Everything that decides what is compiled: settings, pod, versions, and our own source."""
        package = Path(__file__).parents[1]
        rooms = ("model", "training", "planning")
        source = [package / "sharding.py", *(p for r in rooms for p in (package / r).glob("*.py"))]
        digest = hashlib.sha256()
        for path in sorted(source):
            digest.update(path.read_bytes())
        settings = to_dict(config) | {"run_dir": "", "init": "", "seed": 0}
        digest.update(json.dumps([settings, pod.title], sort_keys=True).encode())
        for name in ("jax", "jaxlib", "libtpu"):
            digest.update(metadata.version(name).encode())
        return digest.hexdigest()[:24]
