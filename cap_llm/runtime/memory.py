"""The most memory that a piece of work has held at once, of this process."""

from __future__ import annotations

import contextlib
import resource
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import psutil
import torch

from cap_llm.runtime.world import ranks_on_node


def reset_peak_memory() -> None:
    """Lets the peaks start anew: what this process held before is not the next stage's."""
    with contextlib.suppress(OSError):  # a kernel without it goes on counting
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()


def peaks() -> dict[str, int]:
    """Peak bytes since `reset_peak_memory`: of main memory and, if one is used, of the GPU."""
    found = {"peak_memory_bytes": peak_memory()}
    if torch.cuda.is_initialized():
        found["peak_cuda_bytes"] = torch.cuda.max_memory_allocated()
    return found


def max_peaks(several: Iterable[dict]) -> dict[str, int]:
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


_CGROUPS = Path("/sys/fs/cgroup")


# limit, what is taken, and of that the cache that the kernel gives back: version 2, version 1
_CGROUP_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def free_memory(device: torch.device) -> int:
    """Bytes that this rank can still take on a device (for the CPU: its share of main memory).

    Heeds the limit of a control group (a SLURM job's, a container's) where there is one.
    """
    if device.type == "cuda":  # and what torch keeps for itself without using it
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    free = psutil.virtual_memory().available
    for group in _control_groups(Path("/proc/self/cgroup")):
        for limit, used, cache in _CGROUP_FILES:
            with contextlib.suppress(OSError, ValueError):
                left = int((group / limit).read_bytes()) - int((group / used).read_bytes())
                for line in (group / "memory.stat").read_text(encoding="utf-8").splitlines():
                    name, _, n_bytes = line.partition(" ")
                    left += int(n_bytes) if name == cache else 0
                free = min(free, left)
    return max(0, free) // ranks_on_node()


def drop_pinned(device: torch.device) -> None:
    """Gives the system back what torch keeps of pinned main memory that is in use no more."""
    if device.type == "cuda":
        torch._C._host_emptyCache()


def _control_groups(file: Path, root: Path = _CGROUPS) -> Iterator[Path]:
    """The folders of the control groups for memory that a process is in, from its own upwards.

    In a container they may be called otherwise inside than outside; the outermost one is there.
    """
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers or "memory" in controllers.split(","):
            top = root / "memory" if controllers else root
            folder = top / path.lstrip("/")
            yield from (f for f in (folder, *folder.parents) if f.is_relative_to(top))


class Memory(NamedTuple):
    """Bytes that a store of activations may take: on its device and, on a GPU, of pinned main
    memory, before the rest goes to disk."""

    device: int
    host: int = 0

    @classmethod
    def plan(cls, device: torch.device, gib: float | None = None, parts: int = 1) -> Memory:
        """For each of `parts` stores: a part of `gib`, or of half of what is free now."""
        drop_pinned(device)
        own = free_memory(device) // 2 if gib is None else int(gib * 2**30)
        host = free_memory(torch.device("cpu")) // 2 if device.type == "cuda" else 0
        return cls(own // parts, host // parts)


EFFICIENCY = 0.6  # of the rate of bare matrix products; SparseGPT of SmolLM2-135M reached 0.65


def attained_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second that work in a type attains here: its share of bare matrix products'."""
    side = 8192 if device.type == "cuda" else 1024
    a = torch.randn(side, side, device=device).to(dtype)
    product = a @ a
    start, n = time.perf_counter(), 0
    while time.perf_counter() - start < 0.5:
        product = a @ product.clamp(-1, 1)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        n += 1
    return EFFICIENCY * 2 * side**3 * n / (time.perf_counter() - start)
