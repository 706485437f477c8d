"""The page of a plan: what it shows, and that what the compiler says stays text."""

import dataclasses
import re
from html.parser import HTMLParser

import pytest

from qwenvl_jax.planning.bound import Bound
from qwenvl_jax.planning.memory import CLASSES, Buffer, Memory
from qwenvl_jax.planning.page import plan_page
from qwenvl_jax.planning.plan import Plan
from qwenvl_jax.planning.work import Collective, Work


@pytest.fixture
def plan() -> Plan:
    sizes = dict(zip(CLASSES, (3, 5, 1, 2, 4, 1, 1, 1, 1, -1), strict=True))
    buffer = Buffer(kind="activations", shape="bf16[7]", num_bytes=4 * 10**9, op_name="a/<dot>")
    exchange = Collective(
        kind="all-gather",
        axes=("fsdp",),
        shape="bf16[11]",
        times=3,
        bytes_each=1e9,
        op_name="",
        is_overlapped=True,
    )
    return Plan(
        pod="v5e-8",
        num_chips=8,
        mesh={"data": 1, "fsdp": 8, "tensor": 1},
        rows=16,
        micro_batches=2,
        remat="dots, full",
        compiler_options={"xla_some": "1"},
        hbm_bytes=20 * 10**9,
        refusal=None,
        memory=Memory(by_class={k: v * 10**9 for k, v in sizes.items()}, largest=(buffer,)),
        work=Work(flops=110e12, hbm_bytes=7e9, collectives=(exchange,)),
        bound=Bound(compute=2.0, hbm=1.0, links={"fsdp": 0.5}),
        useful_flops=100e12,
        peak_flops=100e12,
        replicated=(),
        compile_seconds=9.0,
        compile_cpu_seconds=None,
        host_bytes=10**9,
    )


class Widths(HTMLParser):
    """Collects the widths of rectangles by class, and complains of tags that do not nest."""

    def __init__(self):
        super().__init__()
        self.open: list[str] = []
        self.widths: dict[str, list[float]] = {}

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        if tag == "rect":
            self.widths.setdefault(values["class"] or "", []).append(float(values["width"] or 0))
        if tag not in ("meta",):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_bar_of_memory_is_cut_as_the_classes_are(plan):
    page = Widths()
    page.feed(plan_page(plan))
    assert page.open == []
    widths = [page.widths[f"k{i}"][0] for i in range(len(CLASSES))]
    room = page.widths["room"][0]
    # 20 GB long; a class that was counted too high is written, not drawn backwards.
    for width, size in zip(widths, (3, 5, 1, 2, 4, 1, 1, 1, 1, 0), strict=True):
        assert width == pytest.approx(room * size / 20, abs=0.1)


def test_the_page_says_what_the_plan_says(plan):
    page = plan_page(plan)
    assert "Fits: 18.00 of 20.0 GB" in page
    assert "other <b>-1.00 GB</b>" in page
    assert "1.10 times useful" in page
    assert "xla_some=1" in page
    assert "a/&lt;dot&gt;" not in page
    assert "&lt;dot&gt;" in page
    assert "<dot>" not in page
    assert re.search(r"3\.00 GB</td><td>3 x all-gather</td><td>bf16\[11\]</td><td>fsdp", page)
    assert "100% does so beside compute" in page


def test_a_refusal_has_no_charts(plan):
    refused = dataclasses.replace(
        plan, memory=None, work=None, bound=None, refusal="needs 25 GB; largest: <x>"
    )
    page = plan_page(refused)
    assert "Does not fit: needs 25 GB; largest: &lt;x&gt;" in page
    assert "<svg" not in page
