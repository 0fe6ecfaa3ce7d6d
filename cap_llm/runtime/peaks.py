"""The most memory that a piece of work has held at once, of this process."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterable
from pathlib import Path

import torch


def forget() -> None:
    """Lets the peaks start anew: what this process held before is not the next stage's."""
    with contextlib.suppress(OSError):  # a kernel without it goes on counting
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()


def peaks() -> dict[str, int]:
    """Most bytes held since `forget`: of main memory and, where one is used, of the GPU."""
    found = {"peak_memory_bytes": peak_memory()}
    if torch.cuda.is_initialized():
        found["peak_cuda_bytes"] = torch.cuda.max_memory_allocated()
    return found


def highest(several: Iterable[dict]) -> dict[str, int]:
    """Of several ranks' or jobs' peaks the highest of each; other entries are left out."""
    found: dict[str, int] = {}
    for one in several:
        for name in ("peak_memory_bytes", "peak_cuda_bytes"):
            if name in one:
                found[name] = max(found.get(name, 0), one[name])
    return found


def peak_memory() -> int:
    """Most bytes of main memory that this process has held at once.

    From the kernel's own mark, where there is one: `getrusage` also counts what the launcher held
    before this program was started in its place.
    """
    try:
        with open("/proc/self/status", encoding="utf-8") as lines:
            return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
