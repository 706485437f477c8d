"""What the C library does with memory that is freed, where it is glibc.

By default it keeps small blocks and gives large ones back at once; neither suits a process that
does one thing only. Elsewhere these functions do nothing.
"""

import ctypes
import mmap
import os
import sys
from collections.abc import Mapping
from pathlib import Path

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -3, -4, -8  # glibc's malloc.h
_NEVER = -1
_ACCELERATORS = ("accel*", "vfio/[0-9]*", "nvidia[0-9]*", "kfd")  # device files: TPU, GPU


def share_one_pool() -> None:
    """Has all threads take memory from one pool, so that it can be kept later.

    Call it before JAX starts its threads: those that run already have pools of their own.
    """
    _set({_ARENA_MAX: 1})


def keep_freed_memory() -> None:
    """Has freed memory kept for the next step, in a process that trains on a CPU.

    XLA asks for a step's working memory in one piece and frees it afterwards. Mapped anew, every
    page of it costs an interrupt in every step. Call it once the weights are loaded: the copies
    that loading makes are as large as the largest array, and would be kept too. What is asked for
    from then on lies on huge pages, where the system gives them to those who ask.
    """
    _set({_ARENA_MAX: 1, _MMAP_MAX: 0, _TRIM_THRESHOLD: _NEVER})
    _ask_for_huge_pages()


def give_freed_memory_back() -> None:
    """Has what a compilation frees returned to the system.

    Left alone glibc keeps freed blocks for later, scattered over the pools of the compiler's
    threads: half a gigabyte of the largest programs. For a process that only compiles: for others
    it is slow, every large array being mapped anew.
    """
    _set({_ARENA_MAX: 2, _MMAP_THRESHOLD: 128 * 1024, _TRIM_THRESHOLD: 128 * 1024})


def computes_on_cpu() -> bool:
    """Returns whether JAX will compute on the CPU, without starting it."""
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if platforms:
        return platforms.split(",")[0] == "cpu"
    return not any(file for pattern in _ACCELERATORS for file in Path("/dev").glob(pattern))


def _ask_for_huge_pages() -> None:
    """Asks for huge pages in what the heap will grow into. Takes addresses, but no memory.

    glibc would ask for them itself, but only if told so before the process starts.
    """
    if sys.platform != "linux" or _addresses_are_counted():
        return
    libc = ctypes.CDLL(None)
    libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    page = os.sysconf("SC_PAGE_SIZE")
    size = os.sysconf("SC_PHYS_PAGES") * page // 2
    block = libc.malloc(size)
    if block:  # once freed it is the end of the heap, and stays there
        start = -(-block // page) * page
        libc.madvise(start, (block + size - start) // page * page, mmap.MADV_HUGEPAGE)
        libc.free(block)


def _addresses_are_counted() -> bool:
    """Returns whether the system, or a limit of this process, takes addresses for memory."""
    import resource  # not on every system

    limits = (resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA))
    overcommit = Path("/proc/sys/vm/overcommit_memory")
    is_strict = overcommit.exists() and overcommit.read_text().strip() == "2"
    return is_strict or any(limit != resource.RLIM_INFINITY for limit in limits)


def _set(parameters: Mapping[int, int]) -> None:
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for parameter, value in parameters.items():
            mallopt(parameter, value)
