"""Hidden states of all micro-batches, within a memory budget; what does not fit goes to disk."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil
import torch

from cap_llm.runtime.errors import UserError
from cap_llm.runtime.world import ranks_on_node

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


class ActivationCache:
    """A list of tensors, each kept on the device, in main memory or on disk.

    Args:
        device: where tensors come from and go to.
        memory: what it may take.
        folder: where to spill; the file has no name and vanishes with the process.
    """

    def __init__(self, device: torch.device, memory: Memory, folder: Path):
        self.device, self.folder = device, folder
        self._left = memory._asdict()
        self._place: dict[int, str] = {}
        self._memory: dict[int, torch.Tensor] = {}
        self._on_disk: dict[int, tuple[int, torch.Size, torch.dtype]] = {}
        self._file = None
        self._end = 0

    @property
    def left(self) -> int:
        """Bytes of the device's budget that are not taken yet."""
        return self._left["device"]

    @property
    def spilled(self) -> int:
        """Bytes on disk."""
        return self._end

    def __setitem__(self, i: int, tensor: torch.Tensor) -> None:
        if i not in self._place:
            self._place[i] = self._assign(tensor.nbytes)
        place = self._place[i]
        if place == "device":
            self._memory[i] = tensor
        elif place == "host":
            if i not in self._memory:
                self._memory[i] = torch.empty_like(tensor, device="cpu", pin_memory=True)
            self._memory[i].copy_(tensor)
        else:
            self._write(i, tensor)

    def __getitem__(self, i: int) -> torch.Tensor:
        if self._place[i] == "disk":
            return self._read(i).to(self.device)
        return self._memory[i].to(self.device, non_blocking=True)

    def _assign(self, n_bytes: int) -> str:
        for place, left in self._left.items():
            # of pinned memory torch takes a power of two
            taken = 1 << (n_bytes - 1).bit_length() if place == "host" else n_bytes
            if taken <= left:
                self._left[place] -= taken
                return place
        return "disk"

    def _write(self, i: int, tensor: torch.Tensor) -> None:
        if self._file is None:
            self._file = tempfile.TemporaryFile(dir=self.folder)  # noqa: SIM115 (lives as long as this)
        if i not in self._on_disk:
            self._on_disk[i] = (self._end, tensor.shape, tensor.dtype)
            self._end += tensor.nbytes
        data = tensor.cpu().contiguous().view(torch.uint8).numpy()
        try:
            _write_all(self._file.fileno(), data.reshape(-1).data, self._on_disk[i][0])
        except OSError as error:
            raise UserError(
                f"activations cannot be spilled to {self.folder}: {error.strerror}; free some disk "
                "or raise --runtime.activation_gib"
            ) from None

    def _read(self, i: int) -> torch.Tensor:
        start, shape, dtype = self._on_disk[i]
        n_bytes = shape.numel() * dtype.itemsize
        data = bytearray(n_bytes)
        view, done = memoryview(data), 0
        while done < n_bytes:
            done += os.preadv(self._file.fileno(), [view[done:]], start + done)
        return torch.frombuffer(data, dtype=dtype).reshape(shape)


def _write_all(file: int, data: memoryview, start: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(file, data[done:], start + done)
