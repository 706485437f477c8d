"""The paper's three runs, made small, compiled for a TPU slice that is not there.

`tests/golden/plans/` holds where each parameter lies and what crosses the links; a change of either
is seen as a difference of text. `python tests/test_planning_compile.py` writes them again.
"""

import dataclasses
import difflib
import functools
import re
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from qwenvl_jax.cli.train import read_config
from qwenvl_jax.config import MeshConfig, TrainConfig
from qwenvl_jax.model.splash import splash_attention
from qwenvl_jax.planning.cache import CompiledProgram, ProgramCache
from qwenvl_jax.planning.compile import CompiledStep, compile_step
from qwenvl_jax.planning.plan import Plan, describe
from qwenvl_jax.planning.pods import find_pod, quiet
from qwenvl_jax.planning.report import plan_text, table_row
from qwenvl_jax.planning.serving import Load, serving_plan, serving_text
from qwenvl_jax.sharding import MESH_AXES, make_mesh
from qwenvl_jax.sharding import describe as describe_placement
from qwenvl_jax.training.state import make_layout

pytestmark = pytest.mark.full_compiles

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden" / "plans"
STAGES = ("stage1_pretrain", "stage2_multitask", "stage3_chat")
POD = "v5e-8"
SNAPSHOT_JAX = (0, 10)  # whose compiler the snapshots are of


def reduced(stage: str) -> TrainConfig:
    """Returns the stage's config with few layers and narrow widths; the recipe stays."""
    config = read_config(str(ROOT / "configs" / f"{stage}.py"))
    model = config.model
    model = dataclasses.replace(
        model,
        image_size=112,
        image_start_id=1000,
        attention_block=128,
        vision=dataclasses.replace(model.vision, width=208, num_heads=2, mlp_dim=512, num_layers=3),
        adapter=dataclasses.replace(model.adapter, num_queries=64, num_heads=2),
        decoder=dataclasses.replace(
            model.decoder, width=256, num_heads=2, mlp_dim=768, num_layers=2, vocab_size=1024
        ),
    )
    data = dataclasses.replace(config.data, length=256, max_images=2, image_size=112, rows=16)
    return dataclasses.replace(
        config,
        model=model,
        data=data,
        micro_batches=2,
        loss_chunk=128,
        mesh=MeshConfig(data=1, fsdp=4, tensor=2),
    )


def placements_text(stage: str) -> str:
    config = reduced(stage)
    layout = make_layout(config, AbstractMesh((1, 4, 2), MESH_AXES))
    return describe_placement(layout.model_state, layout.mesh) + "\n"


def collectives_text(plan: Plan) -> str:
    """Returns one line a kind of exchange: how often a step makes it, over which axes, of what."""
    assert plan.work is not None
    count: Counter[str] = Counter()
    for x in plan.work.collectives:
        count[f"{x.kind} over {'+'.join(x.axes)} of {x.shape}"] += x.times
    return "".join(f"{times:>5} x {what}\n" for what, times in sorted(count.items()))


def differences(name: str, text: str) -> list[str]:
    before = (GOLDEN / name).read_text(encoding="utf-8").splitlines()
    return [*difflib.unified_diff(before, text.splitlines(), "before", "now", lineterm="", n=0)]


@pytest.mark.parametrize("stage", STAGES)
def test_parameters_lie_where_they_lay(stage):
    assert differences(f"{stage}_placements.txt", placements_text(stage)) == []


# --- with the TPU compiler ------------------------------------------------------------------------


@pytest.mark.parametrize(("pod", "slices"), [("v5e-256", 1), ("v6e-256", 1), ("v5e-256", 2)])
def test_two_copies_in_128_parts_lie_on_a_square_of_chips(pod, slices):
    mesh = make_mesh(MeshConfig(data=-1, fsdp=128, tensor=1), find_pod(pod, slices).devices())
    assert dict(mesh.shape) == {"data": 2 * slices, "fsdp": 128, "tensor": 1}
    for copy in mesh.devices[:, :, 0]:
        assert len({getattr(device, "slice_index", 0) for device in copy}) == 1, (
            "a copy is within one slice"
        )


@functools.cache
def compiled_stage(stage: str) -> CompiledStep:
    return compile_step(reduced(stage), find_pod(POD))


@functools.cache
def planned_stage(stage: str) -> Plan:
    return describe(compiled_stage(stage), find_pod(POD))


@pytest.fixture
def compiled() -> CompiledStep:
    return compiled_stage("stage2_multitask")


@pytest.fixture
def plan() -> Plan:
    return planned_stage("stage2_multitask")


@pytest.mark.parametrize("stage", STAGES)
def test_exchanges_are_those_of_the_snapshot(stage):
    """Another compiler splits and joins them otherwise, but they cross the same axes."""
    name, plan = f"{stage}_collectives.txt", planned_stage(stage)
    if jax.__version_info__[:2] == SNAPSHOT_JAX:
        assert differences(name, collectives_text(plan)) == []
    crossed = re.compile(r"over (\S+) of")
    before = (GOLDEN / name).read_text(encoding="utf-8")
    assert set(crossed.findall(collectives_text(plan))) == set(crossed.findall(before))


def test_rows_stay_where_they_are(plan):
    """Over `fsdp` weights and their gradients travel, never the activations of the rows."""
    rows, length, patches = 2, 256, 64  # of a chip in a micro-batch; a picture
    for exchange in plan.work.collectives:
        if "fsdp" in exchange.axes and exchange.num_bytes > 1e5:
            dims = [int(n) for n in exchange.shape.split("[")[1][:-1].split(",") if n]
            assert [rows * 4, length] != dims[:2], exchange
            assert [rows * 4 * 2, patches] != dims[:2], exchange


def test_state_is_given_up_and_counted(compiled, plan):
    sizes = compiled.program.sizes
    new = sizes.results - sizes.shared
    assert new < 1e5, "only the metrics are new: the state takes the place of the old one"
    assert plan.memory.total == sizes.total
    by_class = plan.memory.by_class
    assert by_class["optimizer"] > 1.5 * by_class["weights"]
    assert plan.replicated == ()


def test_an_executable_is_compiled_anew_and_its_program_kept(tmp_path, monkeypatch):
    made = CompiledProgram(text=None, sizes=None, too_large=None, seconds=1.0, host_bytes=1)
    asked = []

    def compiled(lowered, begin):
        asked.append(lowered)
        return made, "executable"

    monkeypatch.setattr("qwenvl_jax.planning.compile._compile", compiled)
    config, pod, programs = reduced("stage3_chat"), find_pod(POD), ProgramCache(tmp_path)
    executables = [
        compile_step(config, pod, programs, anew=anew).executable for anew in (True, False, True)
    ]
    assert executables == ["executable", None, "executable"]
    assert len(asked) == 2
    assert len(list(tmp_path.iterdir())) == 1


def test_gradients_are_counted():
    """Of a model whose arrays are too large for the cores' own memory."""
    config = reduced("stage3_chat")
    deep = dataclasses.replace(
        config.model.decoder, width=512, num_heads=4, mlp_dim=1376, num_layers=64
    )
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, decoder=deep))
    pod = find_pod(POD)
    by_class = describe(compile_step(config, pod), pod).memory.by_class
    assert by_class["gradients"] > by_class["weights"] / 2 > 5e7


def test_executed_work_is_useful_work_and_what_remat_adds(plan):
    """The tower is computed twice going forward; the decoder keeps its products."""
    assert 1.0 < plan.recompute < 1.4
    text = plan_text(plan)
    assert "v5e-8 (counts chips: 8 chips, 2x4)" in text
    assert f"executed {plan.work.flops / 1e12:.2g} (x {plan.recompute:.2f})" in text
    assert table_row("stage 2", plan).count("|") == 14


@pytest.mark.parametrize("pod", ["v4-8", "v5e-4", "v5p-8", "v6e-4"])
def test_the_attention_kernel_compiles_for_every_generation(pod):
    """Packed and causal with heads of 128, and the tower's heads of 104; forward and backward."""
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2), find_pod(pod).devices())
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))

    def loss(text, patches, segment):
        packed = splash_attention(text, text, text, segment, segment, is_causal=True, block=128)
        whole = splash_attention(patches, patches, patches, None, None, is_causal=False, block=128)
        return packed.astype(jnp.float32).sum() + whole.astype(jnp.float32).sum()

    def array(dtype, *shape):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=rows)

    shapes = array(jnp.bfloat16, 4, 256, 2, 128), array(jnp.bfloat16, 4, 256, 2, 104)
    with jax.set_mesh(mesh), quiet():
        step = jax.jit(jax.grad(loss, argnums=(0, 1)))
        text = step.lower(*shapes, array(jnp.int32, 4, 256)).compile().as_text()
    kernels = re.findall(r'custom_call_target="tpu_custom_call"', text)
    assert len(kernels) == 6, "forward, and gradients of queries and of keys and values, twice"


def test_prefill_and_decode_of_a_server():
    load = Load(rows=4, prompt=128, answer=32, images=1)
    model, pod = reduced("stage3_chat").model, find_pod("v5e-4")
    prefill, decode = serving_plan(model, load, MeshConfig(data=1, fsdp=2, tensor=2), pod)
    assert prefill.refusal is None
    assert decode.refusal is None
    # Keys and values of 160 tokens, two layers, four rows and two heads of 128, on four chips.
    assert decode.cache >= 2 * 2 * 4 * 160 * 2 * 128 * 2 / 4
    assert decode.compute < prefill.compute / 50, "one token of a row, not 128"
    assert decode.hbm > decode.compute, "decoding is bound by memory"
    text = serving_text([prefill, decode], load, pod)
    assert re.search(r"at most [\d,]+ tokens a second", text)


# An older compiler gives the sparse cores of a v5p little to do.
@pytest.mark.parametrize(("pod", "least"), [("v4-16", 0.3), ("v5p-16", 0.1), ("v6e-8", 0.3)])
def test_exchanges_cross_beside_compute_where_they_do_not_by_themselves(pod, least):
    plan = describe(compile_step(reduced("stage1_pretrain"), find_pod(pod)), find_pod(pod))
    assert plan.work is not None
    assert plan.work.overlapped_share > least, "0.03 without the options of training/compiler.py"
    assert any(x.is_overlapped for x in plan.work.collectives if x.kind == "all-gather")


def write_snapshots() -> None:
    """Writes every snapshot again; look at the differences before committing them."""
    for stage in STAGES:
        (GOLDEN / f"{stage}_placements.txt").write_text(placements_text(stage), encoding="utf-8")
        plan = planned_stage(stage)
        (GOLDEN / f"{stage}_collectives.txt").write_text(collectives_text(plan), encoding="utf-8")


if __name__ == "__main__":
    write_snapshots()
