"""The masks of a pruned model directory, from its file of masks or from its zeros."""

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

# The share of zeros from which on a matrix counts as pruned. One that nobody pruned has some where
# it was quantised: rounded to 4 bits symmetrically, 12 % of Gaussian weights.
PRUNED = 0.2
NOTED = 0.01  # the share from which on zeros that are no mask are spoken of


class Masks(Mapping[str, torch.Tensor]):
    """The masks [R, C] of a pruned model directory by weight name, one in memory at a time.

    They come from its file of masks, or from the zeros of the matrices where there is none: a
    matrix outside the blocks, or with fewer than a fifth of zeros, has no mask. A dense model has
    none at all. All ranks open them together, and each reads its share of the weights.
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
                    f"{file} holds a mask of {name}, which is no linear layer of the blocks of "
                    f"{folder}: it is another model's; remove the file"
                )
            self._names = [name for name in self._transposed if name in self._file]
        else:
            mine = {n: self._zeros(n) for n in self._share(list(self._transposed))}
            zeros = {name: n for part in world.gather(mine) for name, n in part.items()}
            self._names = [n for n in self._transposed if zeros[n] >= PRUNED * self._size(n)]
            self._found = {name: zeros[name] for name in self._names}
            self._passed = {n: z / self._size(n) for n, z in zeros.items() if n not in self._found}

    def _share(self, names: list[str]) -> list[str]:
        return names[self._world.rank :: self._world.size]

    def _zeros(self, name: str) -> int:
        return int((self._weight(name) == 0).sum())

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
        """Whether there is no file of masks: the model was pruned elsewhere, or not at all."""
        return self._file is None

    @property
    def told(self) -> str:
        """What a user is told where zeros are taken as masks, or are too few for it; else empty."""
        told = []
        if self:
            told.append(
                f"the zeros of {len(self)} matrices are taken as theirs, "
                f"{100 * self.sparsity:.1f} % of the weights in them"
            )
        passed = {n: share for n, share in self._passed.items() if share >= NOTED}
        if passed:
            most = max(passed, key=passed.__getitem__)
            told.append(
                f"{len(passed)} matrices have zeros that will not stay, fewer than {PRUNED:.0%}: "
                f"{most} has most ({100 * passed[most]:.1f} %)"
            )
        return f"{self.folder} has no file of masks: {'; '.join(told)}" if told else ""

    def check(self) -> None:
        """Holds the weights against the file of masks.

        Raises:
            UserError: a mask has another shape, or a masked weight is not zero.
        """
        mine = () if self.from_zeros else self._share(self._names)
        found = self._world.gather(next(filter(None, map(self._trouble, mine)), None))
        for trouble in filter(None, found):
            raise UserError(
                f"{trouble}; the weights were changed after pruning: prune again, or remove "
                f"{mask_files.path_of(self.folder)} to take the zeros as they are"
            )

    def _trouble(self, name: str) -> str | None:
        weight, mask = self._weight(name), self[name]
        if weight.shape != mask.shape:
            return (
                f"{name} in {self.folder} is {list(weight.shape)} and its mask {list(mask.shape)}"
            )
        count = int((weight[~mask] != 0).sum())
        stray = f"{count} weights that are not zero where its mask says so"
        return f"{name} in {self.folder} has {stray}" if count else None

    def in_parameter_shape(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Names and masks as their parameters lie: `Conv1D` stores the transpose."""
        return ((n, mask.T if self._transposed[n] else mask) for n, mask in self.items())

    @property
    def shares(self) -> dict[str, float]:
        """The share of each matrix that its mask removes."""
        return {name: n / self._size(name) for name, n in self._removed().items()}

    @property
    def sparsity(self) -> float:
        """The share of all weights with a mask that it removes."""
        return sum(self._removed().values()) / sum(map(self._size, self))

    def _removed(self) -> dict[str, int]:
        if self.from_zeros:
            return self._found
        return {name: int((~mask).sum()) for name, mask in self.items()}


def count_zeros(
    folder: Path, world: World
) -> tuple[dict[str, tuple[list[int], int]], tuple[int, int], bool]:
    """Counts zeros in the weights, whatever files lie beside them.

    Returns:
        Shape [R, C] and zeros of each matrix that counts as pruned, or else of each that has more
        zeros than chance gives; zeros and number of all parameters; whether the model is pruned.
    """
    checkpoint, model = Checkpoint(folder), skeleton(folder)
    keys, transposed = match_names(model, checkpoint), _matrices(model)
    names = [name for name, _ in model.named_parameters() if name in keys]  # tied ones once
    mine = {
        n: int((checkpoint.read([keys[n]], finite=False)[keys[n]] == 0).sum())
        for n in names[world.rank :: world.size]
    }
    zeros = {name: n for part in world.gather(mine) for name, n in part.items()}
    shapes = {name: checkpoint.shape(keys[name]) for name in names}
    shares = {n: zeros[n] / math.prod(shapes[n]) for n in transposed if n in zeros}
    # with a file of masks, few zeros are masks too
    least = NOTED if mask_files.path_of(folder).exists() else PRUNED
    pruned = max(shares.values(), default=0.0) >= least
    least = least if pruned else NOTED
    found = {
        n: (shapes[n][:: -1 if transposed[n] else 1], zeros[n])
        for n, share in shares.items()
        if share >= least
    }
    return found, (sum(zeros.values()), sum(map(math.prod, shapes.values()))), pruned


def _matrices(model: torch.nn.Module) -> dict[str, bool]:
    """The weights of the linears in the blocks, and whether they are stored transposed."""
    prefix, _ = find_blocks(model)
    return {
        f"{name}.weight": isinstance(module, Conv1D)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and name.startswith(prefix + ".")
    }
