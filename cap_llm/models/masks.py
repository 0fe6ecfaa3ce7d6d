"""The masks of a pruned model directory, read from its mask file or inferred from its zeros."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch

from cap_llm.models.skeleton import as_matrix, matrix
from cap_llm.runtime.errors import UserError
from cap_llm.runtime.world import World

if TYPE_CHECKING:
    from cap_llm.models.directory import ModelDirectory

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

    def __init__(self, directory: ModelDirectory, world: World):
        self.directory, self._world, self._file = directory, world, directory.mask_file
        linears = directory.linears
        if self._file:
            for name in self._file.columns.keys() - linears.keys():
                raise UserError(
                    f"{self._file.path} contains a mask for {name}, which is not a linear layer in "
                    f"the blocks of {directory}. It belongs to another model: remove the file."
                )
            self._names = [name for name in linears if name in self._file]
        else:
            names = self._shard(list(linears))
            shard = {name: int((directory.matrix(name) == 0).sum()) for name in names}
            zeros = {name: n for part in world.gather(shard) for name, n in part.items()}
            self._names = [n for n in linears if zeros[n] >= PRUNED * self._size(n)]
            self._n_zeros = {name: zeros[name] for name in self._names}
            self._unpruned = {n: zeros[n] / self._size(n) for n in zeros if n not in self._n_zeros}

    def _shard(self, names: list[str]) -> list[str]:
        return names[self._world.rank :: self._world.size]

    def _size(self, name: str) -> int:
        return self.directory.linears[name].weight.numel()

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._file.read(name) if self._file else self.directory.matrix(name) != 0

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
        return f"{self.directory} has no mask file: {'; '.join(parts)}" if parts else ""

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
                f"{self._file.path} to use the zeros as masks."
            )

    def _problem(self, name: str) -> str | None:
        weight, mask = self.directory.matrix(name), self[name]
        where = f"{name} in {self.directory}"
        if weight.shape != mask.shape:
            return f"{where} has shape {list(weight.shape)}, but its mask has {list(mask.shape)}"
        count = int((weight[~mask] != 0).sum())
        return f"{where} has {count} nonzero weights that its mask removes" if count else None

    def in_parameter_shape(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Names and masks in the shapes of their parameters."""
        return ((n, as_matrix(self.directory.linears[n], mask)) for n, mask in self.items())

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
    directory: ModelDirectory, world: World
) -> tuple[dict[str, tuple[list[int], int]], tuple[int, int], bool]:
    """Counts the zeros of a model directory's weights.

    Returns:
        Shape [R, C] and number of zeros of each pruned matrix (if none is, of each with a share of
        `NOTED`); zeros and number of all parameters; whether the model is pruned.
    """
    checkpoint, keys, linears = directory.checkpoint, directory.keys, directory.linears
    # tied parameters once
    sizes = {n: p.numel() for n, p in directory.skeleton.named_parameters() if n in keys}
    shard = {
        n: int((checkpoint.read([keys[n]], finite=False)[keys[n]] == 0).sum())
        for n in list(sizes)[world.rank :: world.size]
    }
    zeros = {name: n for part in world.gather(shard) for name, n in part.items()}
    shares = {n: zeros[n] / sizes[n] for n in linears if n in zeros}
    # a mask file makes even few zeros a mask
    threshold = NOTED if directory.mask_path else PRUNED
    pruned = max(shares.values(), default=0.0) >= threshold
    threshold = threshold if pruned else NOTED
    counts = {
        n: (list(matrix(linears[n]).shape), zeros[n])
        for n, share in shares.items()
        if share >= threshold
    }
    return counts, (sum(zeros.values()), sum(sizes.values())), pruned
