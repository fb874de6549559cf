"""What a run took of the memory, and `freed_blocks_kept`, which keeps the allocator from handing every activation back
to the kernel after each step.

glibc maps each large block anew and unmaps it when freed, so a training step on the CPU spends a third of its time on
page faults. Measured on EfficientNet-Lite0 at 224 px, batch 64: a step took 19 s of CPU time, 6 of them in the kernel;
like this 11 s."""

import ctypes
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h
_DEFAULT_TRIM_THRESHOLD, _DEFAULT_MMAP_MAX = 128 * 1024, 65536  # mallopt(3)


@contextmanager
def freed_blocks_kept() -> Iterator[None]:
    """Freed memory stays with the process inside, and goes back to the system at the end. Elsewhere than on glibc
    nothing happens."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if libc is None or not hasattr(libc, "mallopt") or not hasattr(libc, "malloc_trim"):
        yield
        return
    libc.mallopt(_M_MMAP_MAX, 0)
    libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    try:
        yield
    finally:
        libc.mallopt(_M_MMAP_MAX, _DEFAULT_MMAP_MAX)
        libc.mallopt(_M_TRIM_THRESHOLD, _DEFAULT_TRIM_THRESHOLD)
        libc.malloc_trim(0)


def peak_memory(device: torch.device) -> int:
    """Bytes since `forget_peak`: of tensors on the GPU, of the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def forget_peak(device: torch.device) -> None:
    """A worker's process does many runs: without this each would show the largest one's. Where Linux doesn't let the
    process reset its own peak (proc(5), clear_refs), it stays that of the process's life."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
