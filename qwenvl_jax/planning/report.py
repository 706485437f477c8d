"""A plan as text for a terminal, and as rows of a table."""

from collections.abc import Sequence

from qwenvl_jax.planning.memory import CLASSES
from qwenvl_jax.planning.plan import Plan
from qwenvl_jax.planning.pods import GB
from qwenvl_jax.sharding import replicated_lines
from qwenvl_jax.words import counted

ASSUMPTIONS = (
    "every token and picture slot is counted as filled, every token as scored",
    "peak rates are the vendor's, and nothing but matrix products and attention takes compute time",
    "best: compute, memory and each mesh axis run side by side; apart: links wait for compute; "
    "as scheduled: of the links, those exchanges wait that stand beside no product",
    "a mesh axis has both links of each torus dimension that it goes all around, where links join "
    "the ends (v5e, v6e: 16 chips; v4, v5p: whole cubes of 4x4x4), one of each other that it takes",
)


def short(number: float) -> str:
    """Returns a number with two digits after the point, or two that count where it is small.

    >>> short(13.418), short(0.00072)
    ('13.42', '0.00072')
    """
    return f"{number:.2f}" if abs(number) >= 0.1 or number == 0 else f"{number:.2g}"


def plan_text(plan: Plan) -> str:
    """Returns the whole plan, about thirty lines."""
    lines = [plan.pod, *headline(plan), ""]
    if plan.memory is None or plan.work is None or plan.bound is None:
        return "\n".join(
            [*lines, f"DOES NOT FIT: {plan.refusal}", *replicated_lines(plan.replicated)]
        )
    work, clocks = plan.work, plan.bound
    lines += [f"memory of a chip, of {plan.hbm_bytes / GB:.1f} GB:"]
    lines += [f"  {kind:<12}{short(plan.memory.by_class[kind] / GB):>9} GB" for kind in CLASSES]
    lines += [f"  {'total':<12}{short(plan.memory.total / GB):>9} GB", "largest temporary arrays:"]
    lines += [
        f"  {short(x.num_bytes / GB):>7} GB  {x.kind:<12}{x.shape}  {x.op_name.split('/')[-1]}"
        for x in plan.memory.largest[:5]
    ]
    lines += [
        "",
        f"work of a chip in a step: useful {short(plan.useful_flops / 1e12)} TFLOP, "
        f"executed {short(work.flops / 1e12)} (x {plan.recompute:.2f}), "
        f"HBM {short(work.hbm_bytes / GB)} GB",
        *_links(plan),
        f"beside compute in the schedule: {work.overlapped_share:.0%} of what crosses links",
        f"compute {short(clocks.compute)} s, memory {short(clocks.hbm)} s",
        f"a step takes at least {short(clocks.best)} s (MFU {plan.mfu(clocks.best):.0%}), "
        f"{short(clocks.scheduled)} s as scheduled, "
        f"{short(clocks.apart)} s with nothing overlapped (MFU {plan.mfu(clocks.apart):.0%})",
        *replicated_lines(plan.replicated),
        "assumed: " + "; ".join(ASSUMPTIONS),
    ]
    return "\n".join(lines)


def headline(plan: Plan) -> list[str]:
    """Returns what was compiled, and at what cost, as lines."""
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
    options = " ".join(f"{name}={value}" for name, value in plan.compiler_options.items())
    return [
        f"mesh {mesh}; {counted(plan.rows, 'row')} in "
        f"{counted(plan.micro_batches, 'micro-batch')}; remat {plan.remat} (decoder, tower)",
        f"compiled in {_seconds(plan)} with {plan.host_bytes / GB:.1f} GB of memory",
        f"compiler options: {options or 'none'}",
    ]


def _seconds(plan: Plan) -> str:
    known = plan.compile_cpu_seconds
    busy = "" if known is None else f" ({known:.0f} s of processor time)"
    return f"{plan.compile_seconds:.0f} s{busy}"


def _links(plan: Plan) -> list[str]:
    if plan.work is None or plan.bound is None:
        return []
    sizes = plan.work.link_bytes()
    lines = [
        f"links along {axes}: {short(sizes[axes] / GB)} GB, {short(seconds)} s"
        for axes, seconds in plan.bound.links.items()
    ]
    largest = sorted(plan.work.collectives, key=lambda x: -x.num_bytes)[:4]
    return lines + [
        f"  {short(x.num_bytes / GB):>8} GB  {x.times:>5} x {x.kind} of {x.shape} over "
        f"{'+'.join(x.axes) or 'one chip'}"
        for x in largest
    ]


TABLE_HEAD = (
    "| run | pod | mesh (data, fsdp, tensor) | micro-batches | remat (decoder, tower) | "
    "HBM, GB of a chip | executed / useful | compute s | links s | step s, best .. apart | "
    "MFU, best .. apart | overlapped | compile: clock s, processor s, host GB |\n"
    "| --- | --- | --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
)


def table_row(run: str, plan: Plan) -> str:
    """Returns one row of the table in docs/pods.md."""
    cells: Sequence[str]
    place = [run, plan.pod, ", ".join(map(str, plan.mesh.values()))]
    place += [str(plan.micro_batches), plan.remat]
    busy = "-" if plan.compile_cpu_seconds is None else f"{plan.compile_cpu_seconds:.0f}"
    cost = f"{plan.compile_seconds:.0f}, {busy}, {plan.host_bytes / GB:.1f}"
    if plan.memory is None or plan.work is None or plan.bound is None:
        cells = [*place, f"does not fit: {plan.refusal}", "", "", "", "", "", "", cost]
        return "| " + " | ".join(cells) + " |"
    best, apart = plan.bound.best, plan.bound.apart
    cells = [
        *place,
        f"{short(plan.memory.total / GB)} of {plan.hbm_bytes / GB:.1f}",
        f"{plan.recompute:.2f}",
        short(plan.bound.compute),
        ", ".join(f"{axis} {short(seconds)}" for axis, seconds in plan.bound.links.items()),
        f"{short(best)} .. {short(apart)}",
        f"{plan.mfu(best):.0%} .. {plan.mfu(apart):.0%}",
        f"{plan.work.overlapped_share:.0%}",
        cost,
    ]
    return "| " + " | ".join(cells) + " |"
