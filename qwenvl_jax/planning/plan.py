"""One config on one pod: does it fit, what does it do, how fast can it be."""

import dataclasses
from typing import Any

from qwenvl_jax.config import TrainConfig
from qwenvl_jax.planning.bound import Bound, bound
from qwenvl_jax.planning.cache import ProgramCache
from qwenvl_jax.planning.compile import CompiledStep, compile_step
from qwenvl_jax.planning.estimate import estimate_memory
from qwenvl_jax.planning.hlo import Program
from qwenvl_jax.planning.memory import Memory, classes
from qwenvl_jax.planning.pods import GB, Pod
from qwenvl_jax.planning.useful import useful_flops
from qwenvl_jax.planning.work import Work, measure
from qwenvl_jax.sharding import replicated
from qwenvl_jax.training.compiler import compiler_options


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What is known of a run without running it. Without `memory` the program did not fit."""

    pod: str
    num_chips: int
    mesh: dict[str, int]
    rows: int
    micro_batches: int
    remat: str  # decoder, then tower
    compiler_options: dict[str, str]
    hbm_bytes: int  # a chip's
    refusal: str | None
    memory: Memory | None
    work: Work | None
    bound: Bound | None
    useful_flops: float  # a chip's share
    peak_flops: float
    replicated: tuple[str, ...]  # parameters that no axis splits, with bytes and reason
    compile_seconds: float
    compile_cpu_seconds: float | None
    host_bytes: int

    @property
    def fits(self) -> bool:
        return self.memory is not None

    @property
    def recompute(self) -> float:
        """Executed over useful work."""
        return self.work.flops / self.useful_flops if self.work else float("nan")

    def mfu(self, seconds: float) -> float:
        """Returns the share of the peak that useful work has in a step of `seconds`."""
        return self.useful_flops / self.peak_flops / seconds


def make_plan(config: TrainConfig, pod: Pod, programs: ProgramCache | None = None) -> Plan:
    """Returns the plan of `config` on `pod`, having compiled it, now or before (`programs`).

    Raises:
        ConfigError: mesh or rows do not go with the number of chips.
        PlanError: no TPU compiler.
    """
    return describe(compile_step(config, pod, programs), pod)


def describe(compiled: CompiledStep, pod: Pod) -> Plan:
    """Returns what a compiled step tells."""
    config, layout, made = compiled.config, compiled.layout, compiled.program
    known: dict[str, Any] = {"memory": None, "work": None, "bound": None}
    if made.text is not None and made.sizes is not None:
        program = Program(made.text)
        work = measure(program, layout.mesh, causal_block=config.model.attention_block)
        known = {
            "memory": classes(program, made.sizes, config, layout, compiled.batch),
            "work": work,
            "bound": bound(work, pod.chip, layout.mesh),
        }
    return Plan(
        pod=pod.title,
        num_chips=pod.num_chips,
        mesh=dict(layout.mesh.shape),
        rows=config.data.rows,
        micro_batches=config.micro_batches,
        remat=f"{config.model.remat}, {config.model.vit_remat or config.model.remat}",
        compiler_options=compiler_options(layout.mesh),
        hbm_bytes=pod.chip.hbm_bytes,
        refusal=_refusal(compiled, pod),
        useful_flops=useful_flops(config) / pod.num_chips,
        peak_flops=pod.chip.peak_flops,
        replicated=replicated(layout.model_state, layout.mesh),
        compile_seconds=made.seconds,
        compile_cpu_seconds=made.cpu_seconds,
        host_bytes=made.host_bytes,
        **known,
    )


def _refusal(compiled: CompiledStep, pod: Pod) -> str | None:
    """Returns why it does not fit; what is largest comes from shapes if the compiler is silent."""
    refusal = compiled.program.too_large
    if refusal is None or refusal.largest:
        return str(refusal) if refusal else None
    by_class = estimate_memory(compiled.config, pod.num_chips)
    sizes = sorted(by_class.items(), key=lambda item: -item[1])
    largest = tuple(f"{kind} about {size / GB:.1f} GB" for kind, size in sizes)
    return str(dataclasses.replace(refusal, largest=largest))
