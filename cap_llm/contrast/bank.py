"""The bank: units of a frozen model for every sequence of the recovery text, on disk.

    bank.json   what the rows were made of and from: checked before they are used again
    rows.bin    [N, U, d] bfloat16, memory-mapped, row = id of the sequence
    valid.bin   [N] bytes: 1 where a row is written

A mark may reach the disk before its row does, so that a machine that crashes leaves marked rows of
zeros: a row counts if it is marked and none of its units, which have length 1, is zero.

A row is written by one rank and read by any, in whatever order: it is found by its sequence's id,
never by the order of a sampler.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch

from cap_llm.runtime.errors import UserError
from cap_llm.runtime.files import (
    disk_error,
    holding,
    read_json,
    write_json,
)
from cap_llm.runtime.world import World


class Bank:
    """An open bank.

    Args:
        folder: where it lies; made if it is not there, or lacks a part of its files.
        facts: of what the rows are made (text, model, sizes); a bank of other facts is refused.
        shape: (N, U, d).
        world: the ranks; all open the bank together.

    Raises:
        UserError: the folder holds a bank of something else, or the disk is full.
    """

    def __init__(self, folder: Path, facts: dict, shape: tuple[int, int, int], world: World):
        self.folder, self.shape, self.world = folder, shape, world
        facts = facts | {"shape": list(shape)}
        path = folder / "bank.json"
        problem = self._make(path, facts) if world.is_main else None
        problem = world.gather(problem)[0]
        if problem:
            raise problem
        self._rows = np.memmap(folder / "rows.bin", np.uint16, "r+", shape=shape)
        self._valid = np.memmap(folder / "valid.bin", np.uint8, "r+", shape=shape[:1])
        self._describe(read_json(path))

    def _make(self, path: Path, facts: dict) -> UserError | None:
        """Makes the files, or looks whether they fit; the first rank's part."""
        try:
            known = read_json(path, holding(facts=dict)) if path.exists() else None
        except UserError as error:
            return UserError(f"{error}; remove {self.folder} to build the bank anew")
        if known and (other := [k for k in facts if known["facts"].get(k) != facts[k]]):
            return UserError(
                f"the bank {self.folder} was made from other data: its {other[0]} was "
                f"{known['facts'].get(other[0])!r} and is {facts[other[0]]!r} now; remove that "
                "folder to build it anew"
            )
        n, units, dim = self.shape
        sizes = {self.folder / "valid.bin": n, self.folder / "rows.bin": 2 * n * units * dim}
        if not known or any(not f.exists() or f.stat().st_size != sizes[f] for f in sizes):
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                for place, size in sizes.items():
                    with open(place, "wb") as file:
                        # all of it now: a disk that fills up later ends a writer without a word
                        os.posix_fallocate(file.fileno(), 0, size)
                write_json(path, {"facts": facts})
            except OSError as error:
                return disk_error(self.folder, "rows.bin", error)
        return None

    def _describe(self, content: dict) -> None:
        center = content.get("center")
        self.center = torch.tensor(center) if center else None
        self.mean_cosine = content.get("mean_cosine")
        self.effective_rank = content.get("effective_rank")

    def set_center(self, center: torch.Tensor, mean_cosine: float, effective_rank: float) -> None:
        """Fixes the center [d] of the rows, once, with the spread of a sample around it."""
        path = self.folder / "bank.json"
        measures = {"mean_cosine": mean_cosine, "effective_rank": effective_rank}
        content = read_json(path) | measures | {"center": center.tolist()}
        if self.world.is_main:
            write_json(path, content)
        self.world.barrier()
        self._describe(content)

    def write(self, ids: torch.Tensor, rows: torch.Tensor) -> None:
        """Keeps rows [B, U, d] of length-1 vectors for sequences [B]."""
        self._rows[ids.numpy()] = rows.to(torch.bfloat16).cpu().view(torch.uint16).numpy()
        self._valid[ids.numpy()] = 1

    def read(self, ids: torch.Tensor) -> torch.Tensor:
        """The rows [B, U, d] of sequences [B], fp32."""
        return torch.from_numpy(self._rows[ids.numpy()]).view(torch.bfloat16).float()

    def has(self, ids: torch.Tensor) -> torch.Tensor:
        """Which sequences [B] have a row, boolean."""
        rows = ids.numpy()
        found = self._valid[rows].astype(bool)
        for i in np.flatnonzero(found):  # one at a time: all rows may be more than memory
            found[i] = self._rows[rows[i]].any(-1).all()
        return torch.from_numpy(found)

    def require(self, ids: torch.Tensor) -> None:
        """Verifies that the rows of examples [B], which some rank has written, are visible here.

        Raises:
            UserError: one is missing.
        """
        if not self.has(ids).all():
            raise UserError(
                f"Bank {self.folder}: rows written by other ranks are not visible on this node. "
                "Memory-mapped files are not coherent on NFS: use Lustre or GPFS for output_dir, "
                "or one node."
            )

    def flush(self) -> None:
        """Brings this rank's rows to the disk, before a checkpoint relies on them."""
        self._rows.flush()
        self._valid.flush()
