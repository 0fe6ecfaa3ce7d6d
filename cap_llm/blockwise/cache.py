"""Hidden states of all micro-batches within a memory budget; the rest spills to disk."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch

from cap_llm.runtime.errors import UserError
from cap_llm.runtime.memory import Memory


class ActivationCache:
    """Tensors by index, each stored on the device, in pinned host memory or on disk.

    Args:
        device: of the tensors.
        memory: budgets of device and host.
        folder: to spill to; the file is unnamed and disappears with the process.
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
        """Remaining bytes of the device's budget."""
        return self._left["device"]

    @property
    def spilled(self) -> int:
        """Bytes spilled to disk."""
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
            # torch rounds pinned memory up to a power of two
            needed = 1 << (n_bytes - 1).bit_length() if place == "host" else n_bytes
            if needed <= left:
                self._left[place] -= needed
                return place
        return "disk"

    def _write(self, i: int, tensor: torch.Tensor) -> None:
        if self._file is None:
            self._file = tempfile.TemporaryFile(dir=self.folder)  # noqa: SIM115
        if i not in self._on_disk:
            self._on_disk[i] = (self._end, tensor.shape, tensor.dtype)
            self._end += tensor.nbytes
        data = tensor.cpu().contiguous().view(torch.uint8).numpy()
        try:
            _write_all(self._file.fileno(), data.reshape(-1).data, self._on_disk[i][0])
        except OSError as error:
            raise UserError(
                f"Activations cannot be spilled to {self.folder}: {error.strerror}. Free disk "
                "space, or raise --runtime.activation_gib."
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
