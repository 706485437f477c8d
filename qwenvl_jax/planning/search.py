"""Other settings of the same run: the nearest that fits, and the fastest.

Only what changes speed and memory is varied, never the recipe: how much is recomputed, in how many
micro-batches a step is made, and how the mesh is split. Every answer was compiled.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence

from qwenvl_jax.config import ConfigError, MeshConfig, RematPolicy, TrainConfig
from qwenvl_jax.planning.estimate import (
    estimate_memory,
    is_vit_trained,
    num_parameters,
    state_memory,
)
from qwenvl_jax.planning.plan import Plan, make_plan
from qwenvl_jax.planning.pods import Pod, num_links, rings
from qwenvl_jax.planning.useful import useful_flops
from qwenvl_jax.sharding import mesh_sizes

# From the fastest to the smallest: (decoder, tower).
REMATS: tuple[tuple[RematPolicy, RematPolicy], ...] = (
    ("none", "none"),
    ("weights", "weights"),
    ("weights", "dots"),
    ("dots", "dots"),
    ("dots", "full"),
    ("full", "full"),
)
_DEPTH: dict[RematPolicy, int] = {"none": 0, "weights": 1, "dots": 2, "full": 3}
# What is executed over what is useful, as compiled at full size (docs/pods.md).
_EXECUTED = {
    ("none", "none"): 1.0,
    ("weights", "weights"): 1.07,
    ("weights", "dots"): 1.07,
    ("dots", "dots"): 1.07,
    ("dots", "full"): 1.17,
    ("full", "full"): 1.25,
}
_TOWER = 0.2  # of the weights, of which remat has its own setting
_SUMS_OF_A_LAYER = 8  # of activations over `tensor`, counted per decoder layer, the tower's too
_WAITING = 0.5  # the share of exchanges that nothing hides
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

    def keeps_as_much_as(self, other: "Setting") -> bool:
        """Returns whether it needs no less memory, and no more time, than another of its mesh."""
        # With few tokens a chip, whole weights are more than all activations.
        if {self.remat, other.remat} == {"none", "weights"}:
            return False
        return (
            self.mesh == other.mesh
            and _recomputes_as_much(other, self)
            and self.micro_batches <= other.micro_batches
        )

    def options(self) -> str:
        """Returns the setting as options of `train.py`."""
        mesh = self.mesh
        return (
            f"--model.remat={self.remat} --model.vit-remat={self.vit_remat} "
            f"--micro-batches={self.micro_batches} --mesh.data={mesh.data} "
            f"--mesh.fsdp={mesh.fsdp} --mesh.tensor={mesh.tensor}"
        )


def _recomputes_as_much(one: Setting, other: Setting) -> bool:
    """Returns whether both parts keep no more for the backward pass than those of another."""
    mine = _DEPTH[one.remat], _DEPTH[one.vit_remat]
    return mine[0] >= _DEPTH[other.remat] and mine[1] >= _DEPTH[other.vit_remat]


def setting_of(config: TrainConfig, pod: Pod) -> Setting:
    """Returns what the config has chosen, with the sizes of its mesh on the pod."""
    data, fsdp, tensor = mesh_sizes(config.mesh, pod.num_chips)
    return Setting(
        mesh=MeshConfig(data=data, fsdp=fsdp, tensor=tensor),
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

    Nearest is what the estimate calls the fastest of what takes less memory: more recomputed, more
    micro-batches, or a model that is split further.
    """
    refused = [setting_of(config, pod)]
    tried = _tried(_smaller(config, pod), config, pod, plan, say, refused)
    for setting, found in itertools.islice(tried, tries):
        if found.fits:
            return setting, found
    return None


def search(
    config: TrainConfig, pod: Pod, *, plan: Planner = make_plan, tries: int = 6
) -> Iterator[tuple[Setting, Plan]]:
    """Yields settings with their plans, the most promising first, until `tries` of them fit.

    Those that do not fit are yielded too, and not counted: they take seconds to refuse.
    """
    for setting, found in _tried(settings(config, pod), config, pod, plan, lambda text: None):
        yield setting, found
        tries -= found.fits
        if not tries:
            return


def _tried(
    candidates: list[Setting],
    config: TrainConfig,
    pod: Pod,
    plan: Planner,
    say: Callable[[str], None],
    refused: Sequence[Setting] = (),
) -> Iterator[tuple[Setting, Plan]]:
    """Yields candidates with their plans, but for those whose answer follows from others'."""
    refused = list(refused)
    fitting: list[Setting] = []
    for setting in candidates:
        needs_more = any(setting.keeps_as_much_as(other) for other in refused)
        is_slower = any(other.keeps_as_much_as(setting) for other in fitting)
        if needs_more or is_slower:
            continue
        say(f"compiling {setting.options()}")
        found = plan(setting.apply(config), pod)
        (fitting if found.fits else refused).append(setting)
        yield setting, found


def _smaller(config: TrainConfig, pod: Pod) -> list[Setting]:
    now = setting_of(config, pod)
    further = (mesh for mesh in meshes_of(pod) if mesh.tensor > now.mesh.tensor)
    meshes = dict.fromkeys((now.mesh, *further))
    counts = [now.micro_batches * factor for factor in (1, 2, 4, 8)]
    ranked = _ranked(config, pod, meshes, counts)
    return [x for x in ranked if x != now and _recomputes_as_much(x, now)]


def _ranked(
    config: TrainConfig, pod: Pod, meshes: Iterable[MeshConfig], counts: Sequence[int]
) -> list[Setting]:
    """Returns the settings that are worth a try, by the estimate the fastest first."""
    useful, found = useful_flops(config), []
    for mesh in meshes:
        state = state_memory(dataclasses.replace(config, mesh=mesh), pod.num_chips)
        for micro_batches, (remat, vit_remat) in itertools.product(counts, REMATS):
            setting = Setting(
                mesh=mesh, micro_batches=micro_batches, remat=remat, vit_remat=vit_remat
            )
            if _is_worth_a_try(setting, config, pod, state):
                seconds = estimated_seconds(setting.apply(config), pod, state, useful)
                found.append((seconds, setting))
    return [setting for _, setting in sorted(found, key=lambda item: item[0])]


def estimated_seconds(config: TrainConfig, pod: Pod, state: dict[str, int], useful: float) -> float:
    """Returns the estimate of a step's time that settings are ranked by, from shapes alone.

    `state`: of `state_memory`; `useful`: `useful_flops(config)`.
    """
    model = config.model
    vit_remat = model.vit_remat or model.remat
    data, fsdp, tensor = mesh_sizes(config.mesh, pod.num_chips)
    executed = _EXECUTED[model.remat, vit_remat]
    compute = executed * useful / pod.num_chips / pod.chip.peak_flops
    trained, frozen = num_parameters(config, state)
    # A tower that does not train has no backward pass.
    tower_once = vit_remat == "weights" or not is_vit_trained(model, config.parameters)
    kept = (1 - _TOWER) * (model.remat == "weights") + _TOWER * tower_once
    # In a micro-batch every weight is gathered forward and backward, and gradients are summed of
    # what trains; all in bfloat16, of the other chips.
    exchanged = 2 * ((2 - kept) * (trained + frozen) + trained)
    weights = config.micro_batches * exchanged * (fsdp - 1)
    tokens = config.data.rows / (data * fsdp) * config.data.length
    layers = model.decoder.num_layers * _SUMS_OF_A_LAYER
    sums = layers * tokens * model.decoder.width * 2 * 2 * (tensor - 1) / tensor
    links = weights / _links(fsdp, pod) + sums / _links(tensor, pod)
    return compute + _WAITING * links / pod.chip.link_bandwidth


def _links(size: int, pod: Pod) -> int:
    """Returns the links of an axis that takes whole dimensions of a slice as far as it goes."""
    extents = []
    for whole in reversed(pod.sizes):
        extents.append(math.gcd(size, whole))
        size //= extents[-1]
    return num_links(pod.chip, pod.sizes, extents[::-1])


def _is_worth_a_try(setting: Setting, config: TrainConfig, pod: Pod, state: dict[str, int]) -> bool:
    """Returns whether the rows divide and the estimate does not call it hopeless."""
    if config.data.rows % setting.micro_batches:
        return False
    if setting.remat == "weights" and setting.mesh.fsdp == 1:
        return False  # nothing is gathered
    return estimated_share(setting.apply(config), pod, state) <= HOPELESS


def settings(config: TrainConfig, pod: Pod) -> list[Setting]:
    """Returns the config's own setting, where it goes with the pod, and then every other that the
    estimate does not call hopeless, the most promising first."""
    rows = config.data.rows
    counts = [n for n in range(1, rows + 1) if rows % n == 0]
    own = _own(config, pod)
    meshes = dict.fromkeys([*(setting.mesh for setting in own), *meshes_of(pod)])
    return [*own, *(x for x in _ranked(config, pod, meshes, counts) if x not in own)]


def _own(config: TrainConfig, pod: Pod) -> list[Setting]:
    """Returns what the config has chosen, if the pod and its rows can be split so."""
    try:
        own = setting_of(config, pod)
        estimate_memory(config, pod.num_chips)
    except ConfigError:
        return []  # made for another pod
    return [own]


def meshes_of(pod: Pod) -> list[MeshConfig]:
    """Returns the splits worth a look: `fsdp` as wide as the widths allow, `tensor` up to eight,
    and the widest `fsdp` in rings of the torus that leaves `data` a dimension of its own.

    1664 = 2^7 x 13 and 151,936 = 2^7 x 1187: beyond 128 ways a width would be copied, not split.
    """
    found = []
    for tensor in (1, 2, 4, 8):
        rest = pod.chips_per_slice // tensor
        if rest * tensor != pod.chips_per_slice:
            continue
        widths = [math.gcd(rest, 128)]
        if all(rings(pod.chip, pod.sizes)) and tensor == 1:
            fewer = itertools.combinations(pod.sizes, len(pod.sizes) - 1)
            widths += [math.gcd(max(map(math.prod, fewer)), 128)]
        for fsdp in dict.fromkeys(widths):
            data = pod.num_chips // tensor // fsdp
            found.append(MeshConfig(data=data, fsdp=fsdp, tensor=tensor))
    return found


def estimated_share(config: TrainConfig, pod: Pod, state: dict[str, int]) -> float:
    """Returns the estimated memory as a share of a chip's; infinite where rows do not divide."""
    try:
        return sum(estimate_memory(config, pod.num_chips, state).values()) / pod.chip.hbm_bytes
    except ConfigError:
        return math.inf
