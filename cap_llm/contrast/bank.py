"""A bank stores the units of a frozen model for every training example, on disk.

    bank.json   the data and model that the rows come from, verified on reuse
    rows.bin    [N, U, d] bfloat16, memory-mapped; row = example id
    valid.bin   [N] bytes: 1 where a row is written

One rank writes a row, every rank reads it; the index is the example's id, never the sampler's
order. After a machine crash a valid byte may be on disk without its row, which is then zero. So a
row counts as written if its byte is 1 and no unit is all zero (units have length 1).
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch

from cap_llm.runtime.errors import UserError
from cap_llm.runtime.files import disk_error, holding, read_json, write_json
from cap_llm.runtime.world import World


class Bank:
    """An open bank. All ranks open it together.

    Args:
        folder: of the bank; created, or completed if files are missing.
        facts: that identify the rows: text, model, sizes.
        shape: (N, U, d).
        world: the ranks.

    Raises:
        UserError: the folder has a bank with other facts, or the disk is full.
    """

    def __init__(self, folder: Path, facts: dict, shape: tuple[int, int, int], world: World):
        self.folder, self.shape, self.world = folder, shape, world
        facts = facts | {"shape": list(shape)}
        path = folder / "bank.json"
        problem = self._create(path, facts) if world.is_main else None
        problem = world.gather(problem)[0]
        if problem:
            raise problem
        self._rows = np.memmap(folder / "rows.bin", np.uint16, "r+", shape=shape)
        self._valid = np.memmap(folder / "valid.bin", np.uint8, "r+", shape=shape[:1])
        self._describe(read_json(path))

    def _create(self, path: Path, facts: dict) -> UserError | None:
        """Creates the files or verifies the existing ones. Runs on one rank; returns the error."""
        try:
            content = read_json(path, holding(facts=dict)) if path.exists() else None
        except UserError as error:
            return UserError(f"Delete {self.folder} to rebuild the bank: {error}")
        stored = content["facts"] if content else facts
        if key := next((k for k in facts if stored.get(k) != facts[k]), None):
            return UserError(
                f"Bank {self.folder} was built from other data ({key}: {stored.get(key)!r}, now "
                f"{facts[key]!r}). Delete the folder to rebuild it."
            )
        n, units, dim = self.shape
        sizes = {self.folder / "valid.bin": n, self.folder / "rows.bin": 2 * n * units * dim}
        if not content or any(not f.exists() or f.stat().st_size != sizes[f] for f in sizes):
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                for file_path, size in sizes.items():
                    with open(file_path, "wb") as file:
                        # allocates the whole file: on a full disk, writing to the map would crash
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
        """Stores the center [d] of the rows and the anisotropy of a sample around it."""
        path = self.folder / "bank.json"
        measures = {"mean_cosine": mean_cosine, "effective_rank": effective_rank}
        content = read_json(path) | measures | {"center": center.tolist()}
        if self.world.is_main:
            write_json(path, content)
        self.world.barrier()
        self._describe(content)

    def write(self, ids: torch.Tensor, rows: torch.Tensor) -> None:
        """Writes rows [B, U, d] of unit-length vectors for examples [B]."""
        self._rows[ids.numpy()] = rows.to(torch.bfloat16).cpu().view(torch.uint16).numpy()
        self._valid[ids.numpy()] = 1

    def read(self, ids: torch.Tensor) -> torch.Tensor:
        """Returns the rows [B, U, d] of examples [B], fp32."""
        return torch.from_numpy(self._rows[ids.numpy()]).view(torch.bfloat16).float()

    def has(self, ids: torch.Tensor) -> torch.Tensor:
        """Returns which examples [B] have a row, boolean."""
        indices = ids.numpy()
        valid = self._valid[indices].astype(bool)
        for i in np.flatnonzero(valid):  # one at a time: all rows together may exceed memory
            valid[i] = self._rows[indices[i]].any(-1).all()
        return torch.from_numpy(valid)

    def require(self, ids: torch.Tensor) -> None:
        """Verifies that the rows of examples [B], written by any rank, are visible to this one.

        Raises:
            UserError: a row is not visible.
        """
        if not self.has(ids).all():
            raise UserError(
                f"Bank {self.folder}: rows written by other ranks are not visible on this node. "
                "Memory-mapped files are not coherent on NFS. Use Lustre or GPFS for output_dir, "
                "or a single node."
            )

    def flush(self) -> None:
        """Flushes this rank's rows to disk, before a checkpoint depends on them."""
        self._rows.flush()
        self._valid.flush()
