"""Prefill and decode of a served model, compiled for a slice that is not there."""

import dataclasses
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from qwenvl_jax.config import ConfigError, MeshConfig, ModelConfig
from qwenvl_jax.inference import sampling
from qwenvl_jax.inference.generate import SMALLEST_STOP_LIST, Request, decode, start
from qwenvl_jax.inference.prompts import Prompts
from qwenvl_jax.model.qwenvl import abstract_state
from qwenvl_jax.planning.compile import read_refusal
from qwenvl_jax.planning.hlo import Program
from qwenvl_jax.planning.pods import GB, Pod, quiet
from qwenvl_jax.planning.work import measure
from qwenvl_jax.sharding import decoding_sharding, make_mesh
from qwenvl_jax.training.memory import bytes_per_device
from qwenvl_jax.words import counted


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phase:
    """Prefill of all rows, or one token of each."""

    name: str
    weights: int  # bytes a chip
    cache: int
    temporaries: int
    compute: float  # seconds at the chip's peak
    hbm: float  # seconds at its full bandwidth
    refusal: str | None

    @property
    def best(self) -> float:
        return max(self.compute, self.hbm)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Load:
    """What is asked of a server at once."""

    rows: int
    prompt: int  # tokens of each row, picture slots included
    answer: int  # tokens
    images: int  # pictures of each row


def serving_plan(model: ModelConfig, load: Load, mesh: MeshConfig, pod: Pod) -> list[Phase]:
    """Returns prefill and decode in bf16 weights; a phase that does not fit has a refusal.

    Raises:
        ConfigError: nothing is asked, the pictures are longer than the prompt, it and the answer
            longer than the model's positions, or the mesh does not fit the slice.
    """
    _check(load, model)
    model = dataclasses.replace(
        model, param_dtype="bfloat16", dtype="bfloat16", attention_backend="auto", remat="none"
    )
    devices = make_mesh(mesh, pod.devices())
    graphdef, state = abstract_state(model, devices)
    prompts, request = _arguments(model, load, devices)
    fixed = (graphdef, model, devices)
    begin = jax.jit(partial(start, *fixed), static_argnames="answer_slots")
    go_on = jax.jit(partial(decode, *fixed), donate_argnames="decoding")
    with jax.set_mesh(devices), quiet():
        lowered = begin.lower(state, prompts, request, answer_slots=load.answer)
        decoding = _placed(lowered.out_info, devices)
        until = jax.ShapeDtypeStruct((), np.int32)
        rest = go_on.lower(state, request, decoding=decoding, until=until)
        sizes = (bytes_per_device(state), bytes_per_device(decoding.cache))
        return [
            _phase("prefill", lowered, sizes, pod, devices),
            _phase("decode, a token", rest, sizes, pod, devices),
        ]


def _check(load: Load, model: ModelConfig) -> None:
    for name, least in {"rows": 1, "prompt": 1, "answer": 1, "images": 0}.items():
        if getattr(load, name) < least:
            raise ConfigError(f"--{name} must be at least {least}: got {getattr(load, name)}")
    slots = model.adapter.num_queries + 2  # with the two marks around them
    if load.images * slots > load.prompt:
        raise ConfigError(
            f"--prompt counts the {slots} tokens of each picture: got {load.prompt} for "
            f"{counted(load.images, 'picture')}, expected at least {load.images * slots}"
        )
    if load.prompt + load.answer > model.decoder.max_positions:
        raise ConfigError(
            f"prompt and answer must fit {model.decoder.max_positions} positions: got "
            f"{load.prompt} + {load.answer}"
        )


def _phase(name: str, lowered: Any, sizes: tuple[int, int], pod: Pod, mesh: Mesh) -> Phase:
    weights, cache = sizes
    try:
        executable = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        refusal = str(read_refusal(str(error)))
        return Phase(
            name=name,
            weights=weights,
            cache=cache,
            temporaries=0,
            compute=0.0,
            hbm=0.0,
            refusal=refusal,
        )
    # The loop over tokens ends by itself; one turn of it is a token.
    program = Program(executable.as_text(), open_loops_run_once=True)
    work = measure(program, mesh, causal_block=512)
    return Phase(
        name=name,
        weights=weights,
        cache=cache,
        temporaries=executable.memory_analysis().temp_size_in_bytes,
        compute=work.flops / pod.chip.peak_flops,
        hbm=work.hbm_bytes / pod.chip.hbm_bandwidth,
        refusal=None,
    )


def _arguments(model: ModelConfig, load: Load, mesh: Mesh) -> tuple[Prompts, Request]:
    rows = load.rows

    def array(dtype: Any, *shape: int) -> Any:
        return jax.ShapeDtypeStruct((rows, *shape), dtype)

    slots = (load.images, model.adapter.num_queries, model.decoder.width)
    prompts = Prompts(
        tokens_BL=array(np.int32, load.prompt),
        length_B=array(np.int32),
        ntk_length_B=array(np.int32),
        position_start_B=array(np.int32),
        visual_BIQD=array(model.dtype, *slots) if load.images else None,
        image_start_BI=array(np.int32, load.images) if load.images else None,
    )
    request = Request(
        sampling=sampling.stack([sampling.Sampling()] * rows),
        max_new_B=array(np.int32),
        stop_BX=array(np.int32, SMALLEST_STOP_LIST),
    )
    return _placed(prompts, mesh), _placed(request, mesh)


def _placed(tree: Any, mesh: Mesh) -> Any:
    """Returns the shapes of a tree with the shardings that an answer has."""

    def place(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=decoding_sharding(x.shape, mesh))

    return jax.tree.map(place, tree)


def serving_text(phases: list[Phase], load: Load, pod: Pod) -> str:
    """Returns both phases as text."""
    lines = [f"{pod.title}: {counted(load.rows, 'row')}, {load.prompt} + {load.answer} tokens"]
    for phase in phases:
        used = phase.weights + phase.cache + phase.temporaries
        room = f"{used / GB:.2f} of {pod.chip.hbm_bytes / GB:.1f} GB a chip"
        lines.append(
            f"{phase.name}: DOES NOT FIT: {phase.refusal}"
            if phase.refusal
            else f"{phase.name}: {room} (weights {phase.weights / GB:.2f}, "
            f"cache {phase.cache / GB:.2f}, temporaries {phase.temporaries / GB:.2f}); "
            f"at least {phase.best * 1e3:.2f} ms "
            f"(compute {phase.compute * 1e3:.2f}, memory {phase.hbm * 1e3:.2f})"
        )
    if phases[-1].best:
        lines.append(f"at most {load.rows / phases[-1].best:,.0f} tokens a second")
    return "\n".join(lines)
