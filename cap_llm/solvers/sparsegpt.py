"""SparseGPT (Frantar and Alistarh 2023, algorithm 1) for any pattern and any `allowed` mask.

Columns are processed in their natural order. Each block of `block_size` columns chooses its mask by
the scores w^2 / U_jj^2; the error of each column then updates the columns to its right. The work is
done on W^T, where a column is contiguous. Within a block, tiles of `TILE` columns are updated one
column at a time, then the rest of the block by one matrix product; likewise a block and the rest of
the matrix. This changes only the order of summation.
"""

from __future__ import annotations

import torch

from cap_llm.solvers.hessian import Factor
from cap_llm.sparsity.choose import choose, drop_lowest
from cap_llm.sparsity.pattern import Pattern, zeros_of

TILE = 16  # columns per tile; N:M rounds it down to a multiple of M


def sparsegpt(
    weight: torch.Tensor,
    factor: Factor,
    pattern: Pattern,
    sparsity: float,
    allowed: torch.Tensor | None = None,
    block_size: int = 128,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prunes W [R, C] and updates the remaining weights.

    Args:
        weight: W, fp32; not modified.
        factor: of the damped Hessian.
        pattern: sparsity pattern. The zeros of a block of columns are counted over all rows for
            `unstructured`, per row for `row`.
        sparsity: fraction of zeros; ignored for N:M.
        allowed: mask [R, C] that the new mask must be a subset of.
        block_size: columns per mask choice; N:M rounds it down to a multiple of M.

    Returns:
        The pruned weight and its mask, both [R, C].
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
            # 1 / U_jj where a weight is pruned, 0 elsewhere
            errors = (~mask[:, start:end]).T / diagonal[:, None]
        else:
            errors = torch.empty_like(block)
        for low in range(0, end - start, tile):
            high = min(low + tile, end - start)
            for j in range(low, high):
                if pattern.m and j % pattern.m == 0:
                    # chosen after all columns to the left have updated these weights
                    group = slice(j, j + pattern.m)
                    first, last = start + j, start + j + pattern.m
                    score = (block[group].T / diagonal[group]).square()
                    mask[:, first:last] = choose(score, pattern, 0, _columns(allowed, first, last))
                    errors[group] = (~mask[:, first:last]).T / diagonal[group, None]
                errors[j] *= block[j]  # (w - q) / U_jj: q is 0 or w
                block[j + 1 : high].addr_(u[j, j + 1 : high], errors[j], alpha=-1)
            block[high:].addmm_(u[low:high, high:].T, errors[low:high], alpha=-1)
        w[end:].addmm_(upper[start:end, end:].T, errors, alpha=-1)
    return w.T.contiguous() * mask, mask


def _columns(mask: torch.Tensor | None, start: int, end: int) -> torch.Tensor | None:
    return None if mask is None else mask[:, start:end]


class _Quota:
    """The number of weights that each block of columns removes, with an exact total.

    Each block removes the same fraction of its allowed weights; rounding carries over to the next.
    Counts are [R] for the pattern `row`, [1] otherwise.
    """

    def __init__(
        self, pattern: Pattern, sparsity: float, shape: torch.Size, allowed: torch.Tensor | None
    ):
        self.per_row = pattern.kind == "row"
        size = shape[1] if self.per_row else shape.numel()
        self.n_allowed = self._count(shape, allowed)
        self.total = (zeros_of(sparsity, size) - (size - self.n_allowed)).clamp(min=0)
        self.visited = torch.zeros_like(self.n_allowed)
        self.removed = torch.zeros_like(self.n_allowed)

    def choose(self, score: torch.Tensor, allowed: torch.Tensor | None) -> torch.Tensor:
        """Returns the mask of the next block of columns."""
        self.visited += self._count(score.shape, allowed)
        target = (self.total.double() * self.visited / self.n_allowed.clamp(min=1)).round().long()
        rows = score if self.per_row else score.reshape(1, -1)
        allowed = None if allowed is None else allowed.reshape(rows.shape)
        mask = drop_lowest(rows, target - self.removed, allowed)
        self.removed = target
        return mask.reshape(score.shape)

    def _count(self, shape: torch.Size, allowed: torch.Tensor | None) -> torch.Tensor:
        if allowed is None:
            return torch.tensor([shape[1] if self.per_row else shape.numel()])
        return allowed.sum(1) if self.per_row else allowed.sum().reshape(1)
