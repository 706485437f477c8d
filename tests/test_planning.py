"""Reading a compiled program back: loops, products, exchanges, memory; and what is made of it."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
import tiny
from jax.sharding import AbstractMesh, Mesh

from qwenvl_jax import presets
from qwenvl_jax.cli.plan import main, split_options
from qwenvl_jax.cli.train import read_config
from qwenvl_jax.config import ConfigError, MeshConfig
from qwenvl_jax.model.qwenvl import abstract_state
from qwenvl_jax.planning.bound import Bound, axis_bandwidth
from qwenvl_jax.planning.compile import read_refusal
from qwenvl_jax.planning.estimate import estimate_memory, state_memory
from qwenvl_jax.planning.gpus import find_gpus, gpu_text
from qwenvl_jax.planning.hlo import ArrayShape, Program
from qwenvl_jax.planning.liveness import fullest_moment, places_of
from qwenvl_jax.planning.memory import Memory
from qwenvl_jax.planning.plan import Plan
from qwenvl_jax.planning.pods import CHIPS, find_pod, known_pods, num_links
from qwenvl_jax.planning.search import (
    REMATS,
    estimated_seconds,
    meshes_of,
    nearest_fit,
    search,
    setting_of,
    settings,
)
from qwenvl_jax.planning.serving import Load, serving_plan
from qwenvl_jax.planning.useful import useful_flops
from qwenvl_jax.planning.work import exchange_groups, measure
from qwenvl_jax.sharding import MESH_AXES, mesh_sizes, placements

pytestmark = pytest.mark.full_compiles

ROOT = Path(__file__).resolve().parents[1]

# A loop of five turns around a product and an exchange in flight, which is listed in both fusions
# that it overlaps; a gather of a weight before it; 2 x 3 x 4 devices.
PROGRAM = """HloModule jit_step, is_scheduled=true

%start (p: bf16[8,4]) -> bf16[8,16] {
  %p = bf16[8,4]{1,0} parameter(0)
  ROOT %ag = bf16[8,16]{1,0} all-gather(%p), channel_id=7, replica_groups=[6,4]<=[24], chain_id="3"
}

%goes_on (q: bf16[8,4]) -> bf16[8,16] {
  %q = bf16[8,4]{1,0} parameter(0)
  ROOT %ag2 = bf16[8,16]{1,0} all-gather(%q), channel_id=7, replica_groups=[6,4]<=[24], chain_id="3"
}

%condition (c: (s32[], f32[6,8], f32[5,6,16])) -> pred[] {
  %c = (s32[], f32[6,8]{1,0}, f32[5,6,16]{2,1,0}) parameter(0)
  %turns = s32[] constant(5)
  %i = s32[] get-tuple-element(%c), index=0
  ROOT %less = pred[] compare(%i, %turns), direction=LT
}

%body (b: (s32[], f32[6,8], f32[5,6,16])) -> (s32[], f32[6,8], f32[5,6,16]) {
  %b = (s32[], f32[6,8]{1,0}, f32[5,6,16]{2,1,0}) parameter(0)
  %j = s32[] get-tuple-element(%b), index=0
  %x = f32[6,8]{1,0} get-tuple-element(%b), index=1
  %kept = f32[5,6,16]{2,1,0} get-tuple-element(%b), index=2
  %w = bf16[8,4]{1,0} convert(%x)
  %one = bf16[8,16]{1,0} fusion(%w), kind=kCustom, calls=%start
  %two = bf16[8,16]{1,0} fusion(%w), kind=kCustom, calls=%goes_on
  %dot = f32[6,16]{1,0} dot(%x, %two), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %row = f32[1,6,16]{2,1,0} bitcast(%dot)
  %zero = s32[] constant(0)
  %kept2 = f32[5,6,16]{2,1,0} dynamic-update-slice(%kept, %row, %j, %zero, %zero)
  ROOT %next = (s32[], f32[6,8]{1,0}, f32[5,6,16]{2,1,0}) tuple(%j, %x, %kept2)
}

ENTRY %main (a: f32[6,8], n: s32[]) -> f32[5,6,16] {
  %a = f32[6,8]{1,0} parameter(0)
  %n = s32[] parameter(1)
  %sum = f32[6,8]{1,0} all-reduce(%a), channel_id=1, replica_groups=mesh['x'=2,'y'=3,'z'=4] {'x'}
  %room = f32[5,6,16]{2,1,0} custom-call(), custom_call_target="AllocateBuffer"
  %init = (s32[], f32[6,8]{1,0}, f32[5,6,16]{2,1,0}) tuple(%n, %sum, %room)
  %loop = (s32[], f32[6,8]{1,0}, f32[5,6,16]{2,1,0}) while(%init), condition=%condition, body=%body
  ROOT %out = f32[5,6,16]{2,1,0} get-tuple-element(%loop), index=2
}
"""


MESH = AbstractMesh((2, 3, 4), MESH_AXES)


@pytest.fixture
def program() -> Program:
    return Program(PROGRAM)


def test_work_is_multiplied_by_the_loops_around_it(program):
    work = measure(program, MESH, causal_block=512)
    assert work.flops == 5 * 2 * 6 * 8 * 16
    # Four chips each gather 8 x 16 numbers of two bytes, a quarter of which they had.
    gathered = 5 * 8 * 16 * 2 * 3 / 4
    summed = 2 * (6 * 8 * 4) / 2  # there and back, half of it each of two chips
    assert work.link_bytes() == {"tensor": gathered, "data": summed}
    (gather,) = [x for x in work.collectives if x.kind == "all-gather"]
    assert (gather.times, gather.shape) == (5, "bf16[8,16]"), "one exchange, though listed twice"


def test_an_exchange_that_goes_on_beside_a_loop_counts_where_it_begins():
    begun = 'ROOT %c = bf16[8,16] custom-call(%ag), custom_call_target="AsyncCollectiveStart"'
    text = PROGRAM.replace("ROOT %ag =", "%ag =").replace(
        "}\n\n%goes_on", f"  {begun}\n}}\n\n%goes_on"
    )
    outside = "  %w0 = bf16[8,4]{1,0} convert(%a)\n"
    outside += "  %begun = bf16[8,16]{1,0} fusion(%w0), kind=kCustom, calls=%start\n"
    text = text.replace("  %one = bf16[8,16]{1,0} fusion(%w), kind=kCustom, calls=%start\n", "")
    text = text.replace("  %room = ", outside + "  %room = ")
    work = measure(Program(text), MESH, causal_block=512)
    gathers = [x for x in work.collectives if x.kind == "all-gather"]
    assert [(x.times, x.is_overlapped) for x in gathers] == [(1, False)]
    once = measure(Program(PROGRAM), MESH, causal_block=512).hbm_bytes - work.hbm_bytes
    moved, converted = 8 * 4 * 2 + 8 * 16 * 2, 6 * 8 * 4 + 8 * 4 * 2
    assert once == 4 * moved - converted, "read and written where it begins"


def test_exchanges_of_one_channel_are_told_apart():
    (line,) = [x for x in PROGRAM.splitlines(keepends=True) if "%sum =" in x]
    again = line.replace("%a)", "%sum)").replace("%sum =", "%sum2 =")
    text = PROGRAM.replace("  %room = ", again + "  %room = ")
    sums = [
        x
        for x in measure(Program(text), MESH, causal_block=512).collectives
        if x.kind == "all-reduce"
    ]
    assert [x.times for x in sums] == [1, 1]


def test_a_loop_without_a_bound_is_an_error(program):
    loop = program.computations["main"]["loop"]
    assert program.trip_count(loop) == 5
    del program.computations["condition"]["turns"]
    with pytest.raises(ValueError, match="how often the loop loop runs: no constant bound"):
        program.trip_count(loop)


def test_a_slice_update_costs_its_slice(program):
    work = measure(program, MESH, causal_block=512)
    x, w, gathered, row = 6 * 8 * 4, 8 * 4 * 2, 8 * 16 * 2, 6 * 16 * 4
    each = (x + w) + (w + gathered) + (x + gathered + row) + 2 * row  # in flight twice, moved once
    whole = 2 * x + 5 * 6 * 16 * 4  # the sum, and the room that is set aside
    assert work.hbm_bytes == pytest.approx(5 * each + whole, rel=0.01)


# A product with a weight that an inner fusion only turns, and an exchange that is started and
# awaited beside nothing, in fusions of the compiler's own calls.
VIEWS = """HloModule jit_step, is_scheduled=true

%turned (p: f32[4,8]) -> f32[8,4] {
  %p = f32[4,8]{1,0} parameter(0)
  ROOT %v = f32[8,4]{1,0} bitcast(%p)
}

%product (x: f32[6,8], w: f32[4,8]) -> f32[6,4] {
  %x = f32[6,8]{1,0} parameter(0)
  %w = f32[4,8]{1,0} parameter(1)
  %t = f32[8,4]{1,0} fusion(%w), kind=kLoop, calls=%turned
  ROOT %dot = f32[6,4]{1,0} dot(%x, %t), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%started (q: f32[6,4]) -> f32[24,4] {
  %q = f32[6,4]{1,0} parameter(0)
  %ag = f32[24,4]{1,0} all-gather(%q), channel_id=7, replica_groups=[6,4]<=[24], chain_id="3"
  ROOT %c = f32[24,4]{1,0} custom-call(%q, %ag), custom_call_target="AsyncCollectiveStart"
}

%awaited (r: f32[6,4], s: f32[24,4]) -> f32[24,4] {
  %r = f32[6,4]{1,0} parameter(0)
  %s = f32[24,4]{1,0} parameter(1)
  %ag2 = f32[24,4]{1,0} all-gather(%r), channel_id=7, replica_groups=[6,4]<=[24], chain_id="3"
  ROOT %d = f32[24,4]{1,0} custom-call(%r, %s, %ag2), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (a: f32[6,8], b: f32[4,8]) -> f32[24,4] {
  %a = f32[6,8]{1,0} parameter(0)
  %b = f32[4,8]{1,0} parameter(1)
  %part = f32[6,4]{1,0} fusion(%a, %b), kind=kOutput, calls=%product
  %begun = f32[24,4]{1,0} fusion(%part), kind=kCustom, calls=%started
  ROOT %whole = f32[24,4]{1,0} fusion(%part, %begun), kind=kCustom, calls=%awaited
}
"""


def test_a_weight_that_is_only_looked_at_is_read_and_an_exchange_is_written_once():
    work = measure(Program(VIEWS), MESH, causal_block=512)
    assert work.hbm_bytes == 4 * (6 * 8 + 4 * 8 + 6 * 4) + 4 * (6 * 4 + 24 * 4)
    assert [x.is_overlapped for x in work.collectives] == [False]


_BESIDE = 'async_execution_thread="sparsecore", to_apply=%gathered'
_AGAIN = "%again = f32[6,4]{1,0} fusion(%a, %b), kind=kOutput, calls=%product"
_STARTED = "%begun = ((f32[6,4]{1,0}, token[]), f32[24,4]{1,0}) call-start(%part), " + _BESIDE
_AHEAD = "%ahead = ((), (), (s32[1]{0:T(128)S(2)})) call-start(), " + _BESIDE
_UPDATE = "%begun = ((f32[6,4]{1,0}), f32[24,4]{1,0}) call-update(%ahead, %part)"


@pytest.mark.parametrize(
    ("schedule", "is_overlapped"),
    [
        ((_STARTED, _AGAIN), True),
        # Started ahead and empty-handed: what crosses does so from the update on.
        ((_AHEAD, _UPDATE, _AGAIN), True),
        ((_AHEAD, _AGAIN, _UPDATE), False),
    ],
)
def test_an_exchange_of_the_sparse_cores_crosses_beside_products_before_its_end(
    schedule, is_overlapped
):
    text = VIEWS.replace("%started (q: f32[6,4])", "%gathered (q: f32[6,4])")
    text = re.sub(r"  ROOT %c = .*", "", text).replace("%ag = ", "ROOT %ag = ")
    text = re.sub(r"%begun = .*", "\n  ".join(schedule), text)
    program = Program(re.sub(r"fusion.%part, %begun., .*", "call-done(%begun)", text))
    work = measure(program, MESH, causal_block=512)
    assert [(x.kind, x.times, x.is_overlapped) for x in work.collectives] == [
        ("all-gather", 1, is_overlapped)
    ]
    assert work.hbm_bytes == 2 * 4 * (6 * 8 + 4 * 8 + 6 * 4) + 4 * (6 * 4 + 24 * 4)
    alive = fullest_moment(program).arrays
    assert {x.maker.name for x in alive if x.shape.num_bytes} == {"part", "again"}


def test_fullest_moment_follows_what_is_written_in_place(program):
    peak = fullest_moment(program)
    names = sorted(array.maker.name for array in peak.arrays)
    # In the loop: what it carries, and beside the product the weight of this turn. What the program
    # returns is no temporary, an update lies where the array before it lay, a result that nobody
    # reads is gone at once.
    assert names == ["dot", "sum", "two"]
    assert peak.num_bytes == sum(array.shape.num_bytes for array in peak.arrays)


# The compiler says which results of a fusion lie where an operand lay: the sum where %big lay, and
# what an exchange in flight hands through. The loop's second element outlives the first.
SHARING = """
%pair (p: f32[8], q: f32[4]) -> (f32[8], f32[4]) {
  %p = f32[8]{0} parameter(0)
  %q = f32[4]{0} parameter(1)
  %p2 = f32[8]{0} negate(%p)
  %q2 = f32[4]{0} negate(%q)
  ROOT %both = (f32[8]{0}, f32[4]{0}) tuple(%p2, %q2)
}

%body (b: (s32[], f32[32], f32[16])) -> (s32[], f32[32], f32[16]) {
  ROOT %b = (s32[], f32[32]{0}, f32[16]{0}) parameter(0)
}

%condition (c: (s32[], f32[32], f32[16])) -> pred[] {
  %c = (s32[], f32[32]{0}, f32[16]{0}) parameter(0)
  %turns = s32[] constant(2)
  %i = s32[] get-tuple-element(%c), index=0
  ROOT %less = pred[] compare(%i, %turns), direction=LT
}

ENTRY %main (a: f32[8], n: s32[]) -> f32[1] {
  %a = f32[8]{0} parameter(0)
  %n = s32[] parameter(1)
  %big = f32[8]{0} negate(%a)
  %small = f32[4]{0} slice(%a), slice={[0:4]}
  %f = (f32[8]{0}, f32[4]{0}) fusion(%big, %small), kind=kLoop, calls=%pair, \
backend_config={"aliasing_operands":{"lists":[{"indices":["0","2"]}]}}
  %f0 = f32[8]{0} get-tuple-element(%f), index=0
  %f1 = f32[4]{0} get-tuple-element(%f), index=1
  %kept = f32[32]{0} broadcast(%f0), dimensions={0}
  %long = f32[16]{0} broadcast(%f1), dimensions={0}
  %init = (s32[], f32[32]{0}, f32[16]{0}) tuple(%n, %kept, %long)
  %loop = (s32[], f32[32]{0}, f32[16]{0}) while(%init), condition=%condition, body=%body
  %long2 = f32[16]{0} get-tuple-element(%loop), index=2
  %wide = f32[64]{0} broadcast(%long2), dimensions={0}
  %last = f32[16]{0} slice(%wide), slice={[0:16]}
  %sum = f32[16]{0} add(%last, %long2)
  ROOT %out = f32[1]{0} slice(%sum), slice={[0:1]}
}
""".replace("\\\n", "")


def test_places_are_followed_through_tuples_loops_and_fusions():
    program = Program(SHARING)
    places = places_of(program, program.computations["main"])
    assert places["f"] == (("big", 0), ("f", 1)), "one of two results is written over an operand"
    assert places["f0"] == (("big", 0),)
    assert places["loop"] == (None, ("kept", 0), ("long", 0))
    assert places["long2"] == (("long", 0),)
    assert places["out"] == (None,), "what is returned is no temporary"
    peak = fullest_moment(program)
    # The loop's other element is gone when the widest array comes.
    assert sorted(array.maker.name for array in peak.arrays) == ["last", "long", "wide"]


@pytest.mark.parametrize(
    ("between", "is_overlapped"),
    [
        ("%c = f32[6,16]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}", 1),
        ("%c = f32[6,8]{1,0} negate(%a)", 0),
    ],
)
def test_an_exchange_overlaps_with_products_between_its_start_and_its_end(between, is_overlapped):
    text = f"""ENTRY %main (a: f32[6,8], b: f32[8,16], w: f32[4,4]) -> f32[16,4] {{
  %a = f32[6,8]{{1,0}} parameter(0)
  %b = f32[8,16]{{1,0}} parameter(1)
  %w = f32[4,4]{{1,0}} parameter(2)
  %s = (f32[4,4]{{1,0}}, f32[16,4]{{1,0}}) all-gather-start(%w), channel_id=1, \
replica_groups=[6,4]<=[24]
  {between}
  %d = f32[16,4]{{1,0}} all-gather-done(%s)
  %e = f32[6,16]{{1,0}} dot(%a, %b), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}
  ROOT %g = f32[16,4]{{1,0}} all-gather(%w), channel_id=2, replica_groups=[6,4]<=[24]
}}
""".replace("\\\n", "")
    work = measure(Program(text), MESH, causal_block=512)
    assert [x.is_overlapped for x in work.collectives] == [bool(is_overlapped), False]
    assert work.overlapped_share == is_overlapped / 2


@pytest.mark.parametrize(
    ("text", "dims", "stored", "in_hbm"),
    [
        ("bf16[3,5]{1,0}", (3, 5), 30, True),
        ("bf16[3,5]{1,0:T(8,128)(2,1)}", (3, 5), 8 * 128 * 2, True),
        ("f32[2,3,200]{1,2,0:T(8,128)S(1)}", (2, 3, 200), 2 * 128 * 200 * 4, False),
        ("pred[]", (), 1, True),
        ("s4[16]{0}", (16,), 8, True),
    ],
)
def test_arrays_are_padded_to_their_tiles(text, dims, stored, in_hbm):
    dtype, _, rest = text.partition("[")
    sizes, _, layout = rest.partition("]")
    shape = ArrayShape.parse(dtype, sizes, layout.strip("{}"))
    assert (shape.dims, shape.num_bytes, shape.is_in_hbm) == (dims, stored, in_hbm)


CONVOLUTIONS = [
    # A plain product; one whose batch of three became a window; and a real 3 x 3 convolution.
    ("f32[6,8]", "f32[8,16]", "f32[6,16]", "dim_labels=bf_io->bf", 2 * 6 * 8 * 16),
    (
        "f32[3,6,8]",
        "f32[3,8,16]",
        "f32[3,6,16]",
        "window={size=3 stride=2 pad=0_0 lhs_dilate=3}, dim_labels=0bf_0io->0bf",
        2 * 3 * 6 * 8 * 16,
    ),
    (
        "f32[1,4,4,2]",
        "f32[3,3,2,5]",
        "f32[1,4,4,5]",
        "window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01io->b01f",
        2 * 2 * 5 * (4 * 3 - 2) ** 2,  # at the edges one of three rows meets padding
    ),
]


@pytest.mark.parametrize(("left", "right", "out", "how", "expected"), CONVOLUTIONS)
def test_products_count_what_meets(left, right, out, how, expected):
    text = (
        f"ENTRY %main (a: {left}, b: {right}) -> {out} {{\n  %a = {left} parameter(0)\n"
        f"  %b = {right} parameter(1)\n  ROOT %c = {out} convolution(%a, %b), {how}\n}}\n"
    )
    assert measure(Program(text), MESH, causal_block=512).flops == expected


KERNELS = [
    # Two products forward, three and four backward; of causal squares the blocks that are not above
    # the diagonal: 10 of 16.
    ("splash_mha_fwd_residuals.4", "bf16[7,16,256,104]", "bf16[7,16,1024,104]", 2.0),
    ("splash_mha_dq_segmented_no_residuals.1", "bf16[16,2048,128]", "bf16[16,2048,128]", 3 * 0.625),
    ("splash_mha_dkv_segmented_no_residuals", "bf16[16,2048,128]", "bf16[16,2048,128]", 4 * 0.625),
]


@pytest.mark.parametrize(("name", "query", "key", "products"), KERNELS)
def test_the_attention_kernel_counts_though_its_line_is_broken(name, query, key, products):
    rows = 16 * (7 if "7," in query else 1)
    length, keys, head = (256, 1024, 104) if "7," in query else (2048, 2048, 128)
    text = (
        f"ENTRY %main (q: {query}, k: {key}, v: {key}) -> {query} {{\n"
        f"  %q = {query} parameter(0)\n  %k = {key} parameter(1)\n  %v = {key} parameter(2)\n"
        f'  ROOT %{name} = {query} custom-call(%q, %k, %v), custom_call_target="tpu_custom_call", '
        'frontend_attributes={kernel_metadata={\n  "kernel": "splash"\n}}\n}\n'
    )
    flops = measure(Program(text), MESH, causal_block=512).flops
    assert flops == 2 * rows * length * keys * head * products


@pytest.mark.parametrize(
    ("text", "first", "count"),
    [
        ("[6,4]<=[24]", [0, 1, 2, 3], 6),
        ("[12,2]<=[2,12]T(1,0)", [0, 12], 12),
        ("mesh['x'=2,'y'=3,'z'=4] {'y'}", [0, 4, 8], 8),
        ("mesh['x'=2,'y'=3,'z'=4] {'x','z'}", [0, 1, 2, 3, 12, 13, 14, 15], 3),
        ("{{0,2},{1,3}}", [0, 2], 2),
        ("mesh['x'=12,'y'=2], device_ids=([2,12]T(1,0)) {'x'}", list(range(12)), 2),
    ],
)
def test_groups_of_every_notation(text, first, count):
    program = Program(
        "ENTRY %m (a: f32[2]) -> f32[2] {\n  %a = f32[2] parameter(0)\n"
        f"  ROOT %s = f32[2] all-reduce(%a), channel_id=1, replica_groups={text}\n}}\n"
    )
    groups = exchange_groups(program.computations["m"]["s"], MESH)
    assert groups[0].tolist() == first
    assert len(groups) == count


# --- work that counts -----------------------------------------------------------------------------


def test_useful_work_of_a_full_step_is_that_of_the_published_sizes():
    """1.84 B tower weights see the 1,024 patches of a 448-pixel picture, 7.1 B a token."""
    config = tiny.train_config()
    data = dataclasses.replace(config.data, image_size=448, length=2048, max_images=1, rows=8)
    config = dataclasses.replace(
        config, model=presets.qwen_vl(), data=data, parameters=presets.stage_2()
    )
    attention = 32 * 2 * 2048 * 2048 * 4096
    row = 4.11e12 + 0.11e12 + 2 * 7.10e9 * 2048 + attention
    assert useful_flops(config) == pytest.approx(3 * 8 * row, rel=0.01)
    frozen = dataclasses.replace(config, parameters=presets.stage_3())
    assert useful_flops(config) - useful_flops(frozen) == pytest.approx(2 * 8 * 4.11e12, rel=0.01)


# --- pods and settings ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "chips"), [("v5e-256", 256), ("v6e-8", 8), ("v5p-256", 128), ("v4-256", 128)]
)
def test_names_count_what_the_vendor_counts(name, chips):
    pod = find_pod(name)
    assert pod.num_chips == chips
    assert f"counts {'cores' if chips == 128 else 'chips'}: {chips} chips" in pod.title
    if pod.chip.slow_bandwidth is not None:
        assert find_pod(name, 2).num_chips == 2 * chips


def test_unknown_pods_name_known_ones():
    with pytest.raises(ConfigError, match=r"got 'v5e-255', expected for example v5e-1, .* v5e-256"):
        find_pod("v5e-255")
    with pytest.raises(ConfigError, match="slices must be at least 1: got 0"):
        find_pod("v5e-8", 0)
    with pytest.raises(ConfigError, match="between slices of v4 was published: got 2 slices"):
        find_pod("v4-256", 2)
    assert find_gpus("v5e-8") is None
    with pytest.raises(ConfigError, match="got 'h100', expected h100-8"):
        find_gpus("h100")
    with pytest.raises(ConfigError, match="got 'a100-8', expected a100-40-8 or a100-80-8"):
        find_gpus("a100-8")
    assert find_gpus("a100-80-8").count == 8  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match=r"got 'rtx4090-1', .*: l4-8, a100-40-8, .*, h200-8$"):
        find_pod("rtx4090-1")


@pytest.mark.parametrize(
    ("generation", "shape", "extents", "links"),
    [
        ("v5e", (16, 16), (16, 8), 3),  # around one side, along a part of the other
        ("v6e", (8, 16), (8, 16), 3),  # a side of 8 has no links from end to end
        ("v5e", (4, 4, 1), (4, 2, 1), 2),
        ("v6e", (2, 4, 1), (1, 2, 1), 1),
        ("v5p", (4, 4, 8), (1, 4, 8), 4),
        ("v4", (4, 4, 8), (4, 4, 8), 6),
        ("v4", (4, 4, 8), (4, 1, 2), 3),
        ("v5p", (2, 4, 4), (2, 4, 4), 3),  # no whole cube: no ring at all
        ("v5p", (2, 2, 1), (1, 1, 1), 1),
    ],
)
def test_a_chip_has_two_links_in_a_ring_and_one_in_a_row(generation, shape, extents, links):
    chip = CHIPS[generation]
    assert num_links(chip, shape, extents) == links

    @dataclasses.dataclass(frozen=True)
    class Device:
        coords: tuple[int, ...]
        client: None = None  # of no process

    grid = np.empty(shape, dtype=object)
    for place in np.ndindex(*shape):
        grid[place] = Device(place)
    inside = [n for whole, n in zip(shape, extents, strict=True) for n in (whole // n, n)]
    order = [*range(0, 2 * len(shape), 2), *range(1, 2 * len(shape), 2)]
    grid = grid.reshape(inside).transpose(order).reshape(1, -1, np.prod(extents))
    mesh = Mesh(grid.transpose(0, 2, 1), MESH_AXES)
    assert axis_bandwidth("fsdp", chip, mesh) == links * chip.link_bandwidth


def test_names_of_topologies_may_be_written_in_capitals():
    assert find_gpus("H100-8") == find_gpus("h100-8") is not None
    assert find_pod("V5E-16") == find_pod("v5e-16")
    with pytest.raises(ConfigError, match="got 'H100', expected h100-8"):
        find_gpus("H100")


def test_every_mesh_of_every_pod_splits_every_large_tensor():
    """On up to 512 chips no tensor of the paper's model of a megabyte or more is copied."""
    _, state = abstract_state(presets.qwen_vl())
    seen = set()
    for pod in known_pods().values():
        for mesh in meshes_of(pod):
            sizes = mesh_sizes(mesh, pod.num_chips)
            if pod.num_chips > 512 or sizes in seen:
                continue
            seen.add(sizes)
            rows = placements(state, AbstractMesh(sizes, MESH_AXES))
            large = [row for row in rows if row.note and row.bytes_per_device >= 1e6]
            assert [row.path for row in large] == [], sizes
    assert (4, 32, 1) in seen, "of 4 x 4 x 8 whole rings, a dimension left"
    assert (4, 64, 1) in seen
    assert (2, 128, 1) in seen
    assert (2, 128, 2) in seen


def plan_that_fits_from(micro_batches: int):
    """Returns a planner for which a step fits once it has so many micro-batches."""

    def plan(config, pod) -> Plan:
        fits = config.micro_batches >= micro_batches
        return Plan(
            pod=pod.title,
            num_chips=pod.num_chips,
            mesh={},
            rows=config.data.rows,
            micro_batches=config.micro_batches,
            remat="",
            compiler_options={},
            hbm_bytes=1,
            refusal=None if fits else "too large",
            memory=Memory(by_class={}, largest=()) if fits else None,
            work=None,
            bound=None,
            useful_flops=1.0,
            peak_flops=1.0,
            replicated=(),
            compile_seconds=0.0,
            compile_cpu_seconds=None,
            host_bytes=0,
        )

    return plan


def test_the_nearest_setting_recomputes_before_it_splits_the_batch():
    config = tiny.train_config(mesh=MeshConfig(data=1, fsdp=-1, tensor=1))
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, rows=64))
    pod = find_pod("v5e-8")
    said = []
    found = nearest_fit(config, pod, plan=plan_that_fits_from(2), tries=9, say=said.append)
    assert found is not None
    setting, _ = found
    assert (setting.micro_batches, setting.remat, setting.vit_remat) == (2, "weights", "weights")
    assert [line.split()[1:3] for line in said[:5]] == [
        [f"--model.remat={remat}", f"--model.vit-remat={vit}"] for remat, vit in REMATS[1:]
    ], "more recomputation is tried first"
    assert setting.apply(config).micro_batches == 2
    assert nearest_fit(config, pod, plan=plan_that_fits_from(99), tries=3) is None


def test_what_is_suggested_never_keeps_more_than_what_was_refused():
    options = ["--model.remat=full", "--model.vit-remat=dots", "--mesh.fsdp=-1"]
    config = read_config(str(ROOT / "configs/stage3_chat.py"), [*options, "--micro-batches=8"])
    said = []
    pod = find_pod("v5e-16")
    assert nearest_fit(config, pod, plan=plan_that_fits_from(999), tries=9, say=said.append) is None
    assert said
    assert all("--model.remat=full --model.vit-remat=full" in line for line in said)


def test_at_full_size_half_a_micro_batch_is_nearer_than_computing_everything_again():
    config = read_config(str(ROOT / "configs/stage3_chat.py"), ["--micro-batches=8"])
    said = []
    found = nearest_fit(
        config, find_pod("v5e-16"), plan=plan_that_fits_from(16), tries=9, say=said.append
    )
    assert found is not None
    setting, _ = found
    assert (setting.micro_batches, setting.remat, setting.mesh.tensor) == (16, "dots", 2)
    assert not any("--model.remat=full" in line for line in said)


def test_a_search_asks_only_what_does_not_follow_from_other_answers():
    config = tiny.train_config()
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, rows=64))
    pod = find_pod("v5e-8")
    found = list(search(config, pod, plan=plan_that_fits_from(4), tries=3))
    fits = [setting for setting, plan in found if plan.fits]
    assert len(fits) == 3
    assert found[-1][1].fits
    refused = [setting for setting, plan in found if not plan.fits]
    for number, setting in enumerate(refused):
        assert not any(setting.keeps_as_much_as(before) for before in refused[:number])
    for number, setting in enumerate(fits):
        assert not any(before.keeps_as_much_as(setting) for before in fits[:number])
    asked = {setting for setting, _ in found}
    assert any(x not in asked and x.micro_batches < 4 for x in settings(config, pod))
    assert list(search(config, pod, plan=plan_that_fits_from(99), tries=3))[-1][1].fits is False


def test_a_search_begins_with_the_setting_of_the_config_where_the_pod_has_it():
    options = ["--mesh.data=2", "--mesh.fsdp=2", "--mesh.tensor=2", "--micro-batches=16"]
    config = read_config(str(ROOT / "configs/stage3_chat.py"), options)
    pod = find_pod("v6e-8")
    first, *others = settings(config, pod)
    assert first == setting_of(config, pod)
    assert first not in others
    assert MeshConfig(data=2, fsdp=2, tensor=2) in {x.mesh for x in settings(config, pod)}
    elsewhere = settings(config, find_pod("v6e-16"))
    assert all(x.mesh.data * x.mesh.fsdp * x.mesh.tensor == 16 for x in elsewhere)
    assert ("weights", "weights") in {(x.remat, x.vit_remat) for x in elsewhere}


def test_the_estimate_of_time_counts_what_is_gathered_and_summed_once_each():
    pod, mesh = find_pod("v5e-8"), ["--mesh.data=1", "--mesh.fsdp=8", "--mesh.tensor=1"]

    def seconds(name, *options):
        config = read_config(str(ROOT / "configs" / f"{name}.py"), [*mesh, *options])
        # Without products only what crosses the links is left.
        return estimated_seconds(config, pod, state_memory(config, 8), 0.0)

    adapter = seconds("finetune_adapter", "--frozen-dtype=float32")
    narrow = seconds("finetune_adapter", "--frozen-dtype=bfloat16")
    # They cross in bfloat16, whatever they are kept in; a fixed table of angles stays as it is.
    assert narrow == pytest.approx(adapter, rel=1e-3)
    # Gathered twice, the tower once; of a whole decoder gradients are summed, too.
    assert adapter == pytest.approx(seconds("finetune") * 1.8 / (1.8 + 0.8), rel=0.02)
    kept = seconds("stage2_multitask", "--model.remat=weights", "--model.vit-remat=weights")
    some = seconds("stage2_multitask", "--model.remat=weights", "--model.vit-remat=dots")
    twice = seconds("stage2_multitask", "--model.remat=dots", "--model.vit-remat=dots")
    assert kept < some < twice
    assert kept == pytest.approx(twice * 2 / 3, rel=0.01)


def test_settings_divide_the_rows():
    config = dataclasses.replace(
        tiny.train_config(), data=dataclasses.replace(tiny.train_config().data, rows=48)
    )
    found = settings(config, find_pod("v5e-8"))
    assert found
    for setting in found:
        mesh = setting.mesh
        assert 48 % (setting.micro_batches * mesh.data * mesh.fsdp) == 0
        assert mesh.data * mesh.fsdp * mesh.tensor == 8


def test_estimate_counts_state_exactly_and_shrinks_with_remat():
    config = tiny.train_config(mesh=MeshConfig(data=1, fsdp=8, tensor=1))
    by_class = estimate_memory(config, 8)
    plain = estimate_memory(dataclasses.replace(config, mesh=MeshConfig(data=8, fsdp=1)), 8)
    # Adam keeps two moments of every weight but the adapter's fixed table.
    assert by_class["optimizer"] == pytest.approx(2 * by_class["weights"], rel=0.01)
    assert plain["weights"] == pytest.approx(8 * by_class["weights"], rel=0.1)
    full = dataclasses.replace(config, model=dataclasses.replace(config.model, remat="full"))
    assert estimate_memory(full, 8)["activations"] < by_class["activations"] / 3
    with pytest.raises(ConfigError, match=r"multiple of micro_batches x data x fsdp: got 8, 8 and"):
        estimate_memory(dataclasses.replace(config, micro_batches=8), 8)
    with pytest.raises(ConfigError, match=r"got 8, 4 and 8; try --micro-batches=1"):
        estimate_memory(dataclasses.replace(config, micro_batches=4), 8)
    odd = dataclasses.replace(config, mesh=MeshConfig(data=1, fsdp=3))
    with pytest.raises(ConfigError, match=r"and 3; split the rows over fewer devices"):
        estimate_memory(odd, 3)


def test_what_tensor_does_not_divide_is_not_divided():
    """The tiny tower's MLP of 24 divides by three; its heads, and the decoder's sizes, do not."""
    config = tiny.train_config(mesh=MeshConfig(data=1, fsdp=1, tensor=1))

    def by_class(tensor, **sizes):
        decoder = dataclasses.replace(config.model.decoder, **sizes)
        model = dataclasses.replace(config.model, decoder=decoder)
        mesh = MeshConfig(data=1, fsdp=1, tensor=tensor)
        changed = dataclasses.replace(config, model=model, mesh=mesh)
        return estimate_memory(changed, tensor), useful_flops(changed, tensor)

    (whole, work), (third, work_of_three) = by_class(1), by_class(3)
    assert third["logits"] == whole["logits"]
    assert whole["activations"] * 0.8 < third["activations"] < whole["activations"]
    assert work * 0.8 < work_of_three < work
    (halves, _), (whole, work), (third, less) = (
        by_class(2),
        by_class(1, mlp_dim=42, vocab_size=57),
        by_class(3, mlp_dim=42, vocab_size=57),
    )
    assert halves["logits"] == by_class(1)[0]["logits"] // 2
    assert third["logits"] == whole["logits"] // 3
    assert less < work_of_three


def test_gpus_tell_what_is_replicated_and_what_can_still_help():
    config = read_config(str(ROOT / "configs/stage3_chat.py"), ["--mesh.fsdp=1", "--mesh.tensor=3"])
    gpus = find_gpus("h100-3")
    assert gpus is not None
    text, row, fits = gpu_text(config, gpus)
    assert not fits
    assert "DOES NOT FIT: weights, moments and gradients alone do not: more GPUs, LoRA (" in text
    assert re.search(
        r"parts or --frozen-dtype=bfloat16 .not enough alone: 2\d\d.\d\d GB. can", text
    )
    assert re.search(
        r"replicated on every chip.*\n  decoder\.\S+ [\d.]+ MB: replicated: does", text
    )
    assert row["compute_seconds"] > 2 * useful_flops(config) / 3 / gpus.peak_flops

    def said(*words):
        return gpu_text(tiny_on([*words]), dataclasses.replace(gpus, count=1, memory_bytes=room))[0]

    def tiny_on(words):
        remat, micro = words
        model = dataclasses.replace(tiny.model_config(), remat=remat)
        return dataclasses.replace(tiny.train_config(), model=model, micro_batches=micro)

    room = int(1.2 * sum(state_memory(tiny.train_config(), 1).values()))
    trained = "more GPUs, LoRA (configs/finetune_lora.py) or fewer trained parts\n"
    assert f"DOES NOT FIT: more remat, more micro-batches, {trained}" in said("none", 1)
    assert f"DOES NOT FIT: more micro-batches, {trained}" in said("full", 1)
    assert f"DOES NOT FIT: {trained}" in said("full", 8)
    assert "replicated: nothing of 1 MB or more" in said("full", 8)


def test_frozen_weights_in_half_the_memory_are_offered_with_what_they_bring():
    def said(config, gpus, *options):
        read = read_config(str(ROOT / "configs" / f"{config}.py"), options)
        return gpu_text(read, find_gpus(gpus))  # type: ignore[arg-type]

    text, _, fits = said("finetune_adapter", "a100-40-1", "--micro-batches=128")
    assert not fits
    # The adapter alone trains: no LoRA and no fewer parts would take less.
    assert "alone do not: --frozen-dtype=bfloat16 (then it fits) or more GPUs can help\n" in text
    narrow = ("--micro-batches=128", "--frozen-dtype=bfloat16")
    assert said("finetune_adapter", "a100-40-1", *narrow)[2], "as was said"
    text, _, _ = said("finetune", "h100-2", "--micro-batches=64")
    assert (
        "DOES NOT FIT: more GPUs, LoRA (configs/finetune_lora.py), fewer trained parts or " in text
    )
    assert "or --frozen-dtype=bfloat16 (not enough alone: 84." in text
    text, _, fits = said("finetune", "h100-2", "--micro-batches=64", "--frozen-dtype=bfloat16")
    assert not fits
    assert "--frozen-dtype" not in text, "it is so already"


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"rows": 0}, "--rows must be at least 1: got 0"),
        ({"prompt": 0}, "--prompt must be at least 1"),
        ({"answer": 0}, "--answer must be at least 1"),
        ({"images": -3}, "--images must be at least 0: got -3"),
        (
            {"images": 6},
            "the 6 tokens of each picture: got 30 for 6 pictures, expected at least 36",
        ),
        ({"answer": 40}, "must fit 64 positions: got 30 [+] 40"),
    ],
)
def test_a_load_that_cannot_be_is_refused_before_compiling(asked, told):
    load = Load(**{"rows": 2, "prompt": 30, "answer": 8, "images": 5} | asked)
    with pytest.raises(ConfigError, match=told):
        serving_plan(tiny.model_config(), load, MeshConfig(), find_pod("v5e-1"))


def test_a_refusal_is_read():
    message = """RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory
space hbm. Used 23.45G of 15.75G hbm. Exceeded hbm capacity by 7.70G.
  1. Size: 9.27G
     Operator: op_name="jit(train_step)/while/body/dot_general" source_file="x"
     Shape: f32[256,2048,4736]{2,1,0:T(8,128)}
  2. Size: 1.50G
     Operator: op_name="jit(train_step)/mul"
     Shape: bf16[48,1024,1664]{2,1,0}
"""
    refusal = read_refusal(message)
    assert refusal.needed == int(23.45 * 2**30)
    assert str(refusal) == (
        "needs 25.2 GB of 16.9 GB a chip; largest: 9.27G f32[256,2048,4736] (dot_general); "
        "1.50G bf16[48,1024,1664] (mul)"
    )


def test_a_refusal_of_a_small_memory_is_not_one_of_hbm():
    refusal = read_refusal(
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space "
        "vmem. Used 16.33M of 16.00M vmem. Exceeded vmem capacity by 342.0K."
    )
    assert refusal.space == "vmem"
    assert "needs 16.3 of 16.0 MiB of a core's vmem" in str(refusal)


def test_an_early_refusal_has_totals_only():
    refusal = read_refusal(
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (17.23G) exceeds available HBM (15.75G)."
    )
    assert (refusal.needed, refusal.largest) == (int(17.23 * 2**30), ())
    assert refusal.capacity == int(15.75 * 2**30)


def test_options_of_the_command_and_of_the_config_may_mix():
    words = "--mesh.fsdp=8 --topology v5e-8 --micro-batches 4 --search --steps=3".split()
    ours, rest = split_options(words)
    assert ours == ["--topology", "v5e-8", "--search"]
    assert rest == ["--mesh.fsdp=8", "--micro-batches", "4", "--steps=3"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--topology", "h100-8", "--page", "x.html"], "an estimate for GPUs and --page do not"),
        (["--topology", "v5e-8", "--serve", "--search"], "--serve and --search do not go together"),
        (["--topology", "v5e-8", "--search", "--executable", "x"], "--search and --executable do"),
        (["--topology", "h100-8", "--slices", "2"], "an estimate for GPUs and --slices do not"),
        (["--topology", "h100-8", "--tries=9", "--rows=4"], "for GPUs and --tries --rows do not"),
        (["--topology", "v5e-8", "--serve", "--cache", "x"], "--serve and --cache do not go"),
        (["--topology", "v5e-8", "--rows", "64"], "a plan without --serve and --rows do not go"),
        (["--topology", "v5e-8", "--search", "--images=9"], "--search and --images do not go"),
        (["--topolgy", "h100-8"], "did you mean --topology? For full helptext, run qwenvl plan"),
        (["--topology", "h100-8", "--foo", "3"], "run qwenvl plan --help"),
        (["--topology", "h100"], "got 'h100', expected h100-8"),
        (
            ["--topology", "v5e-8", "--executable", "nowhere/x.bin"],
            "--executable cannot be written: got 'nowhere/x.bin', expected a file in a folder that",
        ),
        (["--topology", "h100-8", "--json", "nowhere/x"], "--json cannot be written: got 'now"),
        (["--topology", "v5e-8", "--page", "/"], "--page cannot be written: got '/', expected"),
    ],
)
def test_options_without_effect_are_refused(words, expected, capsys):
    assert main([str(ROOT / "configs" / "stage3_chat.py"), *words]) == 2
    assert expected in capsys.readouterr().err


def test_help_beside_a_config_begins_with_the_usage_of_the_command(capsys):
    with pytest.raises(SystemExit) as end:
        main([str(ROOT / "configs" / "stage3_chat.py"), "--help"])
    assert not end.value.code
    said = capsys.readouterr().out
    assert said.startswith("usage: qwenvl plan CONFIG --topology NAME [options]")
    assert said.index("settings of the config:") < said.index("--micro-batches")


def test_a_plan_is_told_before_its_executable_is_written(tmp_path, capsys, monkeypatch):
    def compile_step(config, pod, cache, *, anew):
        assert cache is not None, "the program is kept, whatever becomes of its executable"
        assert anew
        return config

    def save_executable(compiled, path):
        raise OSError(28, "No space left on device", path)

    monkeypatch.setattr("qwenvl_jax.planning.compile.compile_step", compile_step)
    monkeypatch.setattr("qwenvl_jax.planning.compile.save_executable", save_executable)
    monkeypatch.setattr("qwenvl_jax.planning.plan.describe", plan_that_fits_from(1))
    monkeypatch.setattr("qwenvl_jax.planning.report.plan_text", lambda plan: f"of {plan.pod}")
    words = ["--executable", str(tmp_path / "x.bin"), "--json", str(tmp_path / "x.json")]
    config = str(ROOT / "configs" / "stage3_chat.py")
    assert main([config, "--topology", "v5e-8", *words]) == 2
    said = capsys.readouterr()
    assert said.out.startswith("of v5e-8")
    assert "No space left on device" in said.err
    assert json.loads((tmp_path / "x.json").read_text())["pod"].startswith("v5e-8")


def test_bound_takes_the_slowest_clock_or_all_links_after_it():
    clocks = Bound(compute=3.0, hbm=2.0, links={"fsdp": 4.0, "tensor": 1.0})
    assert clocks.best == 4.0
    assert clocks.apart == 8.0
    assert (clocks.scheduled, dataclasses.replace(clocks, waiting=2.5).scheduled) == (4.0, 5.5)
    assert json.dumps(dataclasses.asdict(clocks))
