"""Masks as bits, in files and in memory: eight weights per byte, as in `numpy.packbits`."""

from __future__ import annotations

import numpy as np
import torch


def pack(mask: torch.Tensor) -> torch.Tensor:
    """Bytes [..., ceil(C / 8)] of a mask [..., C], on the CPU."""
    rows = np.ascontiguousarray(mask.cpu().numpy())  # a transposed mask packs transposed
    return torch.from_numpy(np.packbits(rows, axis=-1))


def unpack(packed: torch.Tensor, columns: int, dtype=torch.bool) -> torch.Tensor:
    """Mask [..., C] of bytes [..., ceil(C / 8)], on their device, as ones and zeros of `dtype`."""
    values = torch.arange(256, device=packed.device)
    bits = ((values[:, None] >> torch.arange(7, -1, -1, device=packed.device)) & 1).to(dtype)
    # a lookup table is many times faster than shifting each byte
    rows = bits.index_select(0, packed.flatten().int()).view(*packed.shape[:-1], -1)
    return rows[..., :columns].contiguous()
