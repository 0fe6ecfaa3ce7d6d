"""SparseGPT (Frantar and Alistarh 2023, algorithm 1), for any pattern and inside any mask.

Columns are walked in their natural order. A block of `block_size` columns chooses its mask from
scores w^2 / U_jj^2, then each column's error is spread over the columns to its right. Work happens
on W^T, so that a column is contiguous; within a block, sub-blocks of `TILE` columns are updated one
column at a time and the rest of the block by one matrix product, as the block does for the rest of
the matrix. That changes the order of summation and nothing else.
"""

from __future__ import annotations

import torch

from cap_llm.solvers.hessian import Factor
from cap_llm.sparsity.choose import choose, drop_lowest
from cap_llm.sparsity.pattern import Pattern, zeros_of

TILE = 16  # columns updated one at a time, or the next multiple of M below it


def sparsegpt(
    weight: torch.Tensor,
    factor: Factor,
    pattern: Pattern,
    sparsity: float,
    allowed: torch.Tensor | None = None,
    block_size: int = 128,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prunes W [R, C] and moves the weights that stay.

    Args:
        weight: W, fp32; not changed.
        factor: of the damped Hessian.
        pattern: where zeros may be. `unstructured` shares the quota of a block of columns over all
            rows, `row` gives each row its own.
        sparsity: share of zeros; not used by N:M.
        allowed: mask [R, C] inside which the result must lie.
        block_size: columns between two choices of the mask; N:M rounds it to a multiple of M.

    Returns:
        The weight and its mask, both [R, C].
    """
    n_rows, n_columns = weight.shape
    upper = factor.upper
    quota = _Quota(pattern, sparsity, weight.shape, allowed)
    tile = TILE
    if pattern.m:
        tile, block_size = (pattern.m * max(1, n // pattern.m) for n in (TILE, block_size))
    w = weight.T.clone(memory_format=torch.contiguous_format)
    w[factor.dead] = 0
    mask = torch.empty_like(weight, dtype=torch.bool)
    for start in range(0, n_columns, block_size):
        end = min(start + block_size, n_columns)
        block, u = w[start:end], upper[start:end, start:end]
        diagonal = u.diagonal()
        if not pattern.m:
            score = (block.T / diagonal).square()
            mask[:, start:end] = quota.choose(score, _columns(allowed, start, end))
            # 1 / U_jj where a weight goes, 0 where it stays
            errors = (~mask[:, start:end]).T / diagonal[:, None]
        else:
            errors = torch.empty_like(block)
        for low in range(0, end - start, tile):
            high = min(low + tile, end - start)
            for j in range(low, high):
                if pattern.m and j % pattern.m == 0:
                    # chosen from weights that all columns to the left have already moved
                    group = slice(j, j + pattern.m)
                    first, last = start + j, start + j + pattern.m
                    score = (block[group].T / diagonal[group]).square()
                    inside = _columns(allowed, first, last)
                    mask[:, first:last] = choose(score, pattern, 0, inside)
                    errors[group] = (~mask[:, first:last]).T / diagonal[group, None]
                errors[j] *= block[j]  # (w - q) / U_jj: q is 0 or w
                block[j + 1 : high].addr_(u[j, j + 1 : high], errors[j], alpha=-1)
            block[high:].addmm_(u[low:high, high:].T, errors[low:high], alpha=-1)
        w[end:].addmm_(upper[start:end, end:].T, errors, alpha=-1)
    return w.T.contiguous() * mask, mask


def _columns(mask: torch.Tensor | None, start: int, end: int) -> torch.Tensor | None:
    return None if mask is None else mask[:, start:end]


class _Quota:
    """How many weights each block of columns removes, so that the total is exact.

    Each block takes the same share of its allowed weights; what rounding leaves over is carried on.
    Counts are [1], but [R] where each row has a number of its own.
    """

    def __init__(
        self, pattern: Pattern, sparsity: float, shape: torch.Size, allowed: torch.Tensor | None
    ):
        self.by_row = pattern.kind == "row"
        size = shape[1] if self.by_row else shape.numel()
        self.allowed = self._count(shape, allowed)
        self.total = (zeros_of(sparsity, size) - (size - self.allowed)).clamp(min=0)
        self.seen = torch.zeros_like(self.allowed)
        self.removed = torch.zeros_like(self.allowed)

    def choose(self, score: torch.Tensor, inside: torch.Tensor | None) -> torch.Tensor:
        self.seen += self._count(score.shape, inside)
        due = (self.total.double() * self.seen / self.allowed.clamp(min=1)).round().long()
        rows = score if self.by_row else score.reshape(1, -1)
        inside = None if inside is None else inside.reshape(rows.shape)
        mask = drop_lowest(rows, due - self.removed, inside)
        self.removed = due
        return mask.reshape(score.shape)

    def _count(self, shape: torch.Size, inside: torch.Tensor | None) -> torch.Tensor:
        if inside is None:
            return torch.tensor([shape[1] if self.by_row else shape.numel()])
        return inside.sum(1) if self.by_row else inside.sum().reshape(1)
