"""The masks of a pruned model directory, read from its mask file or inferred from its zeros."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from transformers.pytorch_utils import Conv1D

from cap_llm.models import mask_file as mask_files
from cap_llm.models.checkpoint import Checkpoint
from cap_llm.models.skeleton import find_blocks, match_names, skeleton
from cap_llm.runtime.errors import UserError
from cap_llm.runtime.world import World

# A matrix with this share of zeros counts as pruned. Quantization alone leaves fewer: symmetric
# rounding to 4 bits makes 12% of Gaussian weights zero.
PRUNED = 0.2
NOTED = 0.01  # zeros that are not a mask are reported from this share on


class Masks(Mapping[str, torch.Tensor]):
    """The masks [R, C] of a pruned model directory by weight name, one in memory at a time.

    They come from its mask file or, without one, from the zeros of its matrices. A matrix outside
    the blocks, or with fewer than 20% zeros, then has no mask. All ranks open the masks together,
    and each reads its share of the weights.
    """

    def __init__(self, folder: Path, world: World):
        self.folder, self._world, self._checkpoint = folder, world, Checkpoint(folder)
        model = skeleton(folder)
        self._keys = match_names(model, self._checkpoint)
        self._transposed = _matrices(model)
        file = mask_files.path_of(folder)
        self._file = mask_files.MaskFile(file) if file.exists() else None
        if self._file:
            for name in self._file.columns.keys() - self._transposed.keys():
                raise UserError(
                    f"{file} contains a mask for {name}, which is not a linear layer in the blocks "
                    f"of {folder}. It belongs to another model: remove the file."
                )
            self._names = [name for name in self._transposed if name in self._file]
        else:
            names = self._shard(list(self._transposed))
            shard = {name: int((self._weight(name) == 0).sum()) for name in names}
            zeros = {name: n for part in world.gather(shard) for name, n in part.items()}
            self._names = [n for n in self._transposed if zeros[n] >= PRUNED * self._size(n)]
            self._n_zeros = {name: zeros[name] for name in self._names}
            self._unpruned = {n: zeros[n] / self._size(n) for n in zeros if n not in self._n_zeros}

    def _shard(self, names: list[str]) -> list[str]:
        return names[self._world.rank :: self._world.size]

    def _size(self, name: str) -> int:
        return math.prod(self._checkpoint.shape(self._keys[name]))

    def _weight(self, name: str) -> torch.Tensor:
        (weight,) = self._checkpoint.read([self._keys[name]]).values()
        return weight.T if self._transposed[name] else weight

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._file.read(name) if self._file else self._weight(name) != 0

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __len__(self) -> int:
        return len(self._names)

    @property
    def from_zeros(self) -> bool:
        """Whether there is no mask file: the model was pruned by another tool, or not at all."""
        return self._file is None

    @property
    def description(self) -> str:
        """A sentence about masks inferred from zeros, and about zeros too few for a mask."""
        parts = []
        if self:
            parts.append(
                f"using the zeros of {len(self)} matrices as masks ({self.sparsity:.1%} of their "
                "weights)"
            )
        shares = {name: share for name, share in self._unpruned.items() if share >= NOTED}
        if shares:
            highest = max(shares, key=shares.__getitem__)
            parts.append(
                f"ignoring the zeros of {len(shares)} matrices, fewer than {PRUNED:.0%} (at most "
                f"{highest}, {shares[highest]:.1%})"
            )
        return f"{self.folder} has no mask file: {'; '.join(parts)}" if parts else ""

    def check(self) -> None:
        """Checks the weights against the mask file.

        Raises:
            UserError: a mask has the wrong shape, or a masked weight is not zero.
        """
        names = () if self.from_zeros else self._shard(self._names)
        first_problem = next(filter(None, map(self._problem, names)), None)
        for problem in filter(None, self._world.gather(first_problem)):
            raise UserError(
                f"{problem}. The weights were changed after pruning: prune again, or remove "
                f"{mask_files.path_of(self.folder)} to use the zeros as masks."
            )

    def _problem(self, name: str) -> str | None:
        weight, mask = self._weight(name), self[name]
        where = f"{name} in {self.folder}"
        if weight.shape != mask.shape:
            return f"{where} has shape {list(weight.shape)}, but its mask has {list(mask.shape)}"
        count = int((weight[~mask] != 0).sum())
        return f"{where} has {count} nonzero weights that its mask removes" if count else None

    def in_parameter_shape(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Names and masks in their parameters' layout: `Conv1D` stores the transpose."""
        return ((n, mask.T if self._transposed[n] else mask) for n, mask in self.items())

    @property
    def shares(self) -> dict[str, float]:
        """The share of each matrix that its mask removes."""
        return {name: n / self._size(name) for name, n in self._removed().items()}

    @property
    def sparsity(self) -> float:
        """The share of weights that the masks remove, of all matrices with a mask."""
        return sum(self._removed().values()) / sum(map(self._size, self))

    def _removed(self) -> dict[str, int]:
        if self.from_zeros:
            return self._n_zeros
        return {name: int((~mask).sum()) for name, mask in self.items()}


def count_zeros(
    folder: Path, world: World
) -> tuple[dict[str, tuple[list[int], int]], tuple[int, int], bool]:
    """Counts the zeros of a model directory's weights.

    Returns:
        Shape [R, C] and number of zeros of each pruned matrix (if none is, of each with a share of
        `NOTED`); zeros and number of all parameters; whether the model is pruned.
    """
    checkpoint, model = Checkpoint(folder), skeleton(folder)
    keys, transposed = match_names(model, checkpoint), _matrices(model)
    names = [name for name, _ in model.named_parameters() if name in keys]  # tied ones once
    shard = {
        n: int((checkpoint.read([keys[n]], finite=False)[keys[n]] == 0).sum())
        for n in names[world.rank :: world.size]
    }
    zeros = {name: n for part in world.gather(shard) for name, n in part.items()}
    shapes = {name: checkpoint.shape(keys[name]) for name in names}
    shares = {n: zeros[n] / math.prod(shapes[n]) for n in transposed if n in zeros}
    # a mask file makes even few zeros a mask
    threshold = NOTED if mask_files.path_of(folder).exists() else PRUNED
    pruned = max(shares.values(), default=0.0) >= threshold
    threshold = threshold if pruned else NOTED
    counts = {
        n: (shapes[n][:: -1 if transposed[n] else 1], zeros[n])
        for n, share in shares.items()
        if share >= threshold
    }
    return counts, (sum(zeros.values()), sum(map(math.prod, shapes.values()))), pruned


def _matrices(model: torch.nn.Module) -> dict[str, bool]:
    """The weights of the linears in the blocks, and whether each is stored transposed."""
    prefix, _ = find_blocks(model)
    return {
        f"{name}.weight": isinstance(module, Conv1D)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and name.startswith(prefix + ".")
    }
