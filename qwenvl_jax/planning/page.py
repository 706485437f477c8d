"""A plan as one HTML page that needs nothing else: charts of memory, work and time, and tables."""

import html
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from qwenvl_jax.planning.memory import CLASSES, Buffer, Memory
from qwenvl_jax.planning.plan import Plan
from qwenvl_jax.planning.pods import GB
from qwenvl_jax.planning.report import ASSUMPTIONS, headline, short
from qwenvl_jax.planning.work import Collective

_STYLE = Path(__file__).parents[1] / "assets" / "plan_page.css"
_WIDTH, _BAR, _GAP, _LABEL, _VALUE = 860, 26, 10, 130, 150  # of a chart, in pixels
_LARGEST = 12  # arrays and exchanges listed


def plan_page(plan: Plan) -> str:
    """Returns the page's HTML."""
    style = _STYLE.read_text(encoding="utf-8")
    parts = [
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{_text(plan.pod)}</title>\n<style>\n{style}</style>\n</head>\n<body>",
        f"<header><h1>{_text(plan.pod)}</h1>",
        *(f"<p>{_text(line)}</p>" for line in headline(plan)),
        f'<p class="verdict {"fits" if plan.fits else "refused"}">{_text(_verdict(plan))}</p>',
        "</header>\n<main>",
        *_sections(plan),
        _list("Parameters that no axis splits", plan.replicated or ("nothing of 1 MB or more",)),
        _list("Assumed", ASSUMPTIONS),
        "</main>\n</body>\n</html>\n",
    ]
    return "\n".join(parts)


def _verdict(plan: Plan) -> str:
    if plan.memory is None or plan.bound is None:
        return f"Does not fit: {plan.refusal}"
    best, apart = plan.bound.best, plan.bound.apart
    used = f"{short(plan.memory.total / GB)} of {plan.hbm_bytes / GB:.1f} GB a chip"
    return (
        f"Fits: {used}. A step takes at least {short(best)} s (MFU {plan.mfu(best):.0%}), "
        f"{short(apart)} s with nothing overlapped (MFU {plan.mfu(apart):.0%})."
    )


def _sections(plan: Plan) -> Iterator[str]:
    if plan.memory is None or plan.work is None or plan.bound is None:
        return
    yield f"<section><h2>Memory of a chip</h2>{_memory_chart(plan.memory, plan.hbm_bytes)}"
    yield f"{_arrays(plan.memory.largest)}</section>"
    work = {"useful": plan.useful_flops / 1e12, "executed": plan.work.flops / 1e12}
    yield (
        f"<section><h2>Work of a chip in a step</h2>{_bars(work, 'TFLOP')}"
        f"<p>Executed is {plan.recompute:.2f} times useful.</p></section>"
    )
    clocks = {"compute": plan.bound.compute, "memory": plan.bound.hbm}
    clocks |= {f"links {axes}": seconds for axes, seconds in plan.bound.links.items()}
    ends = {"at best": plan.bound.best, "nothing overlapped": plan.bound.apart}
    yield f"<section><h2>Clocks of a step</h2>{_bars(clocks, 's', ends)}"
    yield (
        f"<p>Of what crosses links, {plan.work.overlapped_share:.0%} does so beside compute in the "
        f"compiled schedule.</p>{_exchanges(plan.work.collectives)}</section>"
    )


def _memory_chart(memory: Memory, capacity: int) -> str:
    """Returns one bar as long as the chip's memory, cut by class, and its legend."""
    sizes = {kind: max(0, memory.by_class[kind]) for kind in CLASSES}
    scale = (_WIDTH - 2) / max(capacity, sum(sizes.values()))
    x, pieces = 1.0, []
    for number, (kind, size) in enumerate(sizes.items()):
        title = f"{kind}: {short(memory.by_class[kind] / GB)} GB"
        pieces.append(
            f'<rect x="{x:.1f}" y="1" width="{size * scale:.1f}" height="{2 * _BAR}" '
            f'class="k{number}"><title>{_text(title)}</title></rect>'
        )
        x += size * scale
    pieces.append(
        f'<rect x="1" y="1" width="{capacity * scale:.1f}" height="{2 * _BAR}" class="room"/>'
    )
    legend = "".join(
        f'<li><i class="k{number}"></i>{kind} <b>{short(memory.by_class[kind] / GB)} GB</b></li>'
        for number, kind in enumerate(CLASSES)
        if memory.by_class[kind]
    )
    free = f'<li><i class="free"></i>free <b>{short((capacity - memory.total) / GB)} GB</b></li>'
    return f'{_svg(pieces, 2 * _BAR + 2)}<ul class="legend">{legend}{free}</ul>'


def _bars(
    values: Mapping[str, float],
    unit: str,
    marks: Mapping[str, float] | None = None,
) -> str:
    """Returns one bar a value, and lines across all of them at the marks."""
    longest = max(*values.values(), *(marks or {}).values(), 1e-9)
    scale = (_WIDTH - _LABEL - _VALUE) / longest
    top = 18 if marks else 0
    height = top + len(values) * (_BAR + _GAP)
    pieces = []
    for number, (name, value) in enumerate(values.items()):
        y = top + number * (_BAR + _GAP)
        middle = y + _BAR * 0.7
        pieces.append(
            f'<text x="{_LABEL - 8}" y="{middle:.1f}" class="label">{_text(name)}</text>'
            f'<rect x="{_LABEL}" y="{y}" width="{max(1.0, value * scale):.1f}" height="{_BAR}" '
            f'class="bar"/><text x="{_LABEL + value * scale + 6:.1f}" y="{middle:.1f}">'
            f"{short(value)} {unit}</text>"
        )
    for name, value in (marks or {}).items():
        x = _LABEL + value * scale
        pieces.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top - 2}" y2="{height}" class="mark"/>'
            f'<text x="{x:.1f}" y="12" class="mark">{_text(name)}</text>'
        )
    return _svg(pieces, height)


def _svg(pieces: Sequence[str], height: int) -> str:
    inside = "".join(pieces)
    return f'<svg viewBox="0 0 {_WIDTH} {height}" role="img">{inside}</svg>'


def _arrays(buffers: Sequence[Buffer]) -> str:
    rows = [
        (f"{short(x.num_bytes / GB)} GB", x.kind, x.shape, x.op_name.split("/")[-1])
        for x in buffers[:_LARGEST]
    ]
    return _table("Largest temporary arrays", ("size", "class", "array", "made by"), rows)


def _exchanges(collectives: Sequence[Collective]) -> str:
    largest = sorted(collectives, key=lambda x: -x.num_bytes)[:_LARGEST]
    rows = [
        (
            f"{short(x.num_bytes / GB)} GB",
            f"{x.times} x {x.kind}",
            x.shape,
            "+".join(x.axes) or "one chip",
            "beside compute" if x.is_overlapped else "compute waits",
        )
        for x in largest
    ]
    return _table("Largest exchanges", ("over links", "what", "array", "axes", "schedule"), rows)


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    names = "".join(f"<th>{_text(name)}</th>" for name in head)
    lines = "".join(
        "<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<h3>{_text(title)}</h3><table><tr>{names}</tr>{lines}</table>"


def _list(title: str, items: Sequence[str]) -> str:
    lines = "".join(f"<li>{_text(item)}</li>" for item in items)
    return f"<section><h2>{_text(title)}</h2><ul>{lines}</ul></section>"


def _text(value: object) -> str:
    return html.escape(str(value), quote=True)
