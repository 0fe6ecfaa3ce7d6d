"""The choice of a mask by scores.

A mask is boolean, [R, C] like its weight (R output features, C input features), true where the
weight stays. It is always chosen by count, never by comparing with a threshold alone: equal scores
are common (quantised weights, zeros) and would miss the asked sparsity. Among equals the first in
memory order goes first.
"""

from __future__ import annotations

import numpy as np
import torch

from cap_llm.sparsity.pattern import Pattern, zeros_of

_LAST = torch.iinfo(torch.int32).max  # above the bits of every score, infinity included


def choose(
    score: torch.Tensor,
    pattern: Pattern,
    sparsity: float,
    allowed: torch.Tensor | None = None,
) -> torch.Tensor:
    """The mask that keeps the highest scores.

    Args:
        score: [R, C], at least 0.
        pattern: where zeros may be.
        sparsity: share of zeros in the whole matrix (in each row for `row`); not used by N:M.
        allowed: mask [R, C] inside which the new one must lie.

    Returns:
        The mask [R, C]. It has exactly round(sparsity * R * C) zeros (round(sparsity * C) a row,
        M - N a group), more only where `allowed` already has more.

    Raises:
        UserError: `sparsity` is not a share.
    """
    if pattern.m:
        return _keep_n_of_m(score, pattern, allowed)
    scores = score.reshape(1, -1) if pattern.kind == "unstructured" else score
    zeros = zeros_of(sparsity, scores.shape[1])
    if allowed is None:
        return drop_lowest(scores, torch.tensor([zeros])).reshape(score.shape)
    inside = allowed.reshape(scores.shape)
    n_drop = (zeros - (~inside).sum(1)).clamp(min=0)
    return drop_lowest(scores, n_drop, inside).reshape(score.shape)


def obeys(mask: torch.Tensor, pattern: Pattern) -> bool:
    """Whether no group of a mask [R, C] keeps more than N:M allows; true for other patterns."""
    if not pattern.m:
        return True
    groups = mask.shape[1] % pattern.m == 0
    return groups and bool((mask.reshape(-1, pattern.m).sum(1) <= pattern.n).all())


def drop_lowest(
    score: torch.Tensor, n_drop: torch.Tensor, inside: torch.Tensor | None = None
) -> torch.Tensor:
    """Removes the `n_drop` lowest scores of each row.

    Args:
        score: [R, C], at least 0, fp32.
        n_drop: [R], how many to remove, or [1], the same number in each row; at most the row's
            count in `inside`.
        inside: mask [R, C] of what can be removed, and of what may stay; None: everything.

    Returns:
        A mask [R, C] with exactly `n_drop` fewer trues a row.

    Floats of one sign are ordered like their bit patterns. The highest of the scores that go is
    selected directly where there is one count; for rows with counts of their own, and on a GPU for
    a single row, which one block of threads would select, it is found by bisection over the bits:
    that takes 31 counts and no index tensors.
    """
    bits = score.contiguous().view(torch.int32)
    if inside is not None:
        bits = bits.masked_fill(~inside, _LAST)
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
    surplus = bits.shape[1] - keep.sum(1) - n_drop  # that went, being equal to the highest
    if bool(surplus.any()):
        # of the equals, the first ones go, as many as are needed
        equal = bits == high
        keep |= equal & (equal.cumsum(1, dtype=torch.int32) > (equal.sum(1) - surplus)[:, None])
    return keep if inside is None else keep & inside


def _kth(bits: torch.Tensor, k: int) -> torch.Tensor:
    """The k-th smallest of each row of bits [R, C], [R]; -1 for k = 0."""
    if not k:
        return bits.new_full((len(bits),), -1)
    if bits.device.type == "cpu":  # numpy's selection has vector instructions: twice as fast
        return torch.from_numpy(np.partition(bits.numpy(), k - 1, axis=1)[:, k - 1])
    return bits.kthvalue(k, dim=1).values


def _keep_n_of_m(score, pattern: Pattern, allowed) -> torch.Tensor:
    if allowed is not None:
        score = score.masked_fill(~allowed, -1.0)
    # A weight stays if fewer than N of its group beat it. M (M - 1) / 2 comparisons of long vectors
    # are several times faster than a sort of many short ones.
    places = score.reshape(-1, pattern.m).T.contiguous()  # [M, groups]
    beaten = torch.zeros(places.shape, dtype=torch.int16, device=score.device)
    for i in range(pattern.m):
        for j in range(i + 1, pattern.m):
            later = places[j] >= places[i]  # among equals the last one stays
            beaten[i] += later
            beaten[j] += ~later
    mask = (beaten < pattern.n).T.reshape(score.shape)
    return mask if allowed is None else mask & allowed
