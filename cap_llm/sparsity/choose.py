"""Choosing a mask by scores.

A mask is boolean, [R, C] like its weight (R output features, C input features), and true where the
weight is kept. It is chosen by count: a threshold alone would miss the target sparsity where scores
are equal, which is common (quantized weights, zeros). Of equal scores, the first in memory order is
removed first.
"""

from __future__ import annotations

import numpy as np
import torch

from cap_llm.sparsity.pattern import Pattern, zeros_of

_LAST = torch.iinfo(torch.int32).max  # above the bits of every score, including infinity


def choose(
    score: torch.Tensor,
    pattern: Pattern,
    sparsity: float,
    allowed: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns the mask that keeps the highest scores.

    Args:
        score: [R, C], nonnegative.
        pattern: sparsity pattern.
        sparsity: fraction of zeros in the matrix (per row for `row`); ignored for N:M.
        allowed: mask [R, C] that the new mask must be a subset of.

    Returns:
        The mask [R, C]. It has exactly round(sparsity * R * C) zeros (`row`: round(sparsity * C)
        per row, N:M: M - N per group), or more where `allowed` already has more.

    Raises:
        UserError: `sparsity` is not in [0, 1].
    """
    if pattern.m:
        return _keep_n_of_m(score, pattern, allowed)
    scores = score.reshape(1, -1) if pattern.kind == "unstructured" else score
    zeros = zeros_of(sparsity, scores.shape[1])
    if allowed is None:
        return drop_lowest(scores, torch.tensor([zeros])).reshape(score.shape)
    allowed = allowed.reshape(scores.shape)
    n_drop = (zeros - (~allowed).sum(1)).clamp(min=0)
    return drop_lowest(scores, n_drop, allowed).reshape(score.shape)


def obeys(mask: torch.Tensor, pattern: Pattern) -> bool:
    """Returns whether a mask [R, C] satisfies N:M; true for other patterns."""
    if not pattern.m:
        return True
    divides = mask.shape[1] % pattern.m == 0
    return divides and bool((mask.reshape(-1, pattern.m).sum(1) <= pattern.n).all())


def drop_lowest(
    score: torch.Tensor, n_drop: torch.Tensor, allowed: torch.Tensor | None = None
) -> torch.Tensor:
    """Removes the `n_drop` lowest scores of each row.

    Nonnegative floats have the order of their bit patterns. The threshold, the highest score to
    remove, is selected directly for a common count. Counts that differ per row use bisection over
    the bits, as does a single row on a GPU (one thread block would select it): 31 reductions
    without index tensors.

    Args:
        score: [R, C], nonnegative, fp32.
        n_drop: weights to remove per row, [R], or [1] for all rows; at most the row's count in
            `allowed`.
        allowed: mask [R, C] to remove from; None: all true.

    Returns:
        A mask [R, C] with exactly `n_drop` fewer true entries per row than `allowed`.
    """
    bits = score.contiguous().view(torch.int32)
    if allowed is not None:
        bits = bits.masked_fill(~allowed, _LAST)
    if len(n_drop) == 1 and (len(bits) > 1 or bits.device.type == "cpu"):
        high, n_drop = _kth(bits, int(n_drop)), n_drop.to(bits.device)
    else:
        n_drop = n_drop.to(bits.device)
        low = torch.full_like(n_drop, -1)  # count(bits <= low) < n_drop, or low == -1
        high = torch.full_like(n_drop, _LAST - 1)
        for _ in range(31):
            middle = (low + high) // 2
            enough = (bits <= middle[:, None].int()).sum(1) >= n_drop
            high = torch.where(enough, middle, high)
            low = torch.where(enough, low, middle)
        high = torch.where(n_drop > 0, high, -1).int()
    high = high[:, None]
    keep = bits > high
    surplus = bits.shape[1] - keep.sum(1) - n_drop  # too many removed: equal to the threshold
    if bool(surplus.any()):  # keep the last ones of the equals
        equal = bits == high
        keep |= equal & (equal.cumsum(1, dtype=torch.int32) > (equal.sum(1) - surplus)[:, None])
    return keep if allowed is None else keep & allowed


def _kth(bits: torch.Tensor, k: int) -> torch.Tensor:
    """Returns the k-th smallest value [R] per row of bits [R, C]; -1 for k = 0."""
    if not k:
        return bits.new_full((len(bits),), -1)
    if bits.device.type == "cpu":  # numpy's selection is vectorized: twice as fast
        return torch.from_numpy(np.partition(bits.numpy(), k - 1, axis=1)[:, k - 1])
    return bits.kthvalue(k, dim=1).values


def _keep_n_of_m(score, pattern: Pattern, allowed) -> torch.Tensor:
    if allowed is not None:
        score = score.masked_fill(~allowed, -1.0)
    # A weight is kept if fewer than N in its group beat it. M (M - 1) / 2 comparisons of long
    # vectors are several times faster than sorting many short ones.
    columns = score.reshape(-1, pattern.m).T.contiguous()  # [M, groups]
    rank = torch.zeros(columns.shape, dtype=torch.int16, device=score.device)
    for i in range(pattern.m):
        for j in range(i + 1, pattern.m):
            wins = columns[j] >= columns[i]  # of equals, the last is kept
            rank[i] += wins
            rank[j] += ~wins
    mask = (rank < pattern.n).T.reshape(score.shape)
    return mask if allowed is None else mask & allowed
