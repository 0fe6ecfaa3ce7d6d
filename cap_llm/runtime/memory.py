"""Memory of this process: peaks, free memory, limits; and the attainable FLOP rate."""

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
    """Resets the peaks, so that a stage does not count the memory of the stage before it."""
    with contextlib.suppress(OSError):  # some kernels do not support it
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()


def peaks() -> dict[str, int]:
    """Peak bytes since `reset_peak_memory`: of main memory and, if one is used, of the GPU."""
    result = {"peak_memory_bytes": peak_memory()}
    if torch.cuda.is_initialized():
        result["peak_cuda_bytes"] = torch.cuda.max_memory_allocated()
    return result


def max_peaks(records: Iterable[dict]) -> dict[str, int]:
    """The maximum of each peak over several ranks or jobs; other entries are dropped."""
    result: dict[str, int] = {}
    for record in records:
        for name in ("peak_memory_bytes", "peak_cuda_bytes"):
            if name in record:
                result[name] = max(result.get(name, 0), record[name])
    return result


def peak_memory() -> int:
    """Peak bytes of main memory of this process.

    Read from the kernel's high-water mark if there is one: `getrusage` also counts the memory of
    the launcher that this program replaced.
    """
    try:
        with open("/proc/self/status", encoding="utf-8") as lines:
            return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


_CGROUPS = Path("/sys/fs/cgroup")
# limit, usage, and the reclaimable cache within the usage: version 2, version 1
_CGROUP_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def free_memory(device: torch.device) -> int:
    """Free bytes for this rank on a device; on the CPU, its share of the free main memory.

    Respects the limits of control groups (SLURM jobs, containers).
    """
    if device.type == "cuda":  # including memory that torch has reserved but does not use
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reserved
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
    """Returns torch's unused pinned main memory to the system."""
    if device.type == "cuda":
        torch._C._host_emptyCache()


def _control_groups(file: Path, root: Path = _CGROUPS) -> Iterator[Path]:
    """The folders of a process's memory control groups, from its own group upwards.

    A container may use other names inside than outside, but the outermost group always exists.
    """
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers or "memory" in controllers.split(","):
            top = root / "memory" if controllers else root
            folder = top / path.lstrip("/")
            yield from (f for f in (folder, *folder.parents) if f.is_relative_to(top))


class Memory(NamedTuple):
    """Limits in bytes of an activation store, above which it spills to disk.

    Attributes:
        device: memory of its device.
        host: pinned main memory, if the device is a GPU.
    """

    device: int
    host: int = 0

    @classmethod
    def plan(cls, device: torch.device, gib: float | None = None, parts: int = 1) -> Memory:
        """The limits of each of `parts` stores: its part of `gib` or of half the free memory."""
        drop_pinned(device)
        total = free_memory(device) // 2 if gib is None else int(gib * 2**30)
        host = free_memory(torch.device("cpu")) // 2 if device.type == "cuda" else 0
        return cls(total // parts, host // parts)


EFFICIENCY = 0.6  # relative to plain matrix products; SparseGPT on SmolLM2-135M attains 0.65


def attained_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Measures the FLOP/s that work in `dtype` attains: `EFFICIENCY` x plain matrix products."""
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
