"""Whether freed memory stays or goes, seen in a process of its own."""

import subprocess
import sys
from pathlib import Path

import pytest

from qwenvl_jax.cli.host_memory import _addresses_are_counted, computes_on_cpu

_PROGRAM = """
import ctypes, threading
from qwenvl_jax.cli import host_memory
c = ctypes.CDLL(None)
c.malloc.restype = ctypes.c_void_p
host_memory.{function}()
def work():  # in a thread, as XLA does
    piece = ctypes.c_void_p(c.malloc(ctypes.c_size_t(100 << 20)))
    ctypes.memset(piece, 1, 100 << 20)
    c.free(piece)
thread = threading.Thread(target=work)
thread.start(); thread.join()
with open("/proc/self/statm") as file:
    print(int(file.read().split()[1]) * 4096 >> 20)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_freed_memory_is_kept_or_given_back():
    left = {
        function: int(
            subprocess.run(
                [sys.executable, "-c", _PROGRAM.format(function=function)],
                capture_output=True, text=True, check=True,
            ).stdout
        )
        for function in ("keep_freed_memory", "give_freed_memory_back")
    }  # fmt: skip
    assert left["keep_freed_memory"] > 100 > left["give_freed_memory_back"], left


def _huge_pages() -> str:
    file = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return file.read_text() if file.exists() else ""


_counts_addresses = sys.platform != "linux" or _addresses_are_counted()
takes_addresses = pytest.mark.skipif(_counts_addresses, reason="addresses are limited here")


@pytest.mark.skipif("[madvise]" not in _huge_pages(), reason="needs huge pages for those who ask")
@takes_addresses
def test_the_heap_asks_for_huge_pages_where_it_will_grow():
    # Whether the system has any to give is another matter, so the flag is looked at, not the pages.
    program = _PROGRAM.format(function="keep_freed_memory") + (
        "of_heap = open('/proc/self/smaps').read().split('[heap]')[1:]\n"
        "print([next(x for x in part.splitlines() if x.startswith('VmFlags')) for part in of_heap])"
    )
    command = [sys.executable, "-c", program]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert " hg" in run.stdout, run.stdout


@takes_addresses
def test_no_addresses_are_taken_where_they_are_limited():
    sizes = {}
    for limit in ("", "resource.setrlimit(resource.RLIMIT_AS, (1 << 36, resource.RLIM_INFINITY))"):
        program = (
            f"import resource; {limit}\n"
            "from qwenvl_jax.cli.host_memory import keep_freed_memory; keep_freed_memory()\n"
            "print(int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize())"
        )
        command = [sys.executable, "-c", program]
        sizes[limit] = int(subprocess.run(command, capture_output=True, check=True).stdout)
    free, limited = sizes.values()
    assert limited < 1 << 30 < free


@pytest.mark.parametrize(("platforms", "expected"), [("cpu", True), ("cuda,cpu", False)])
def test_what_computes_is_read_from_the_environment(monkeypatch, platforms, expected):
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    assert computes_on_cpu() is expected


def test_without_a_word_it_is_the_cpu_where_there_is_no_accelerator(monkeypatch, tmp_path):
    from qwenvl_jax.cli import host_memory

    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.setattr(host_memory, "Path", lambda _: tmp_path)
    assert computes_on_cpu()
    (tmp_path / "nvidia0").touch()
    assert not computes_on_cpu()
