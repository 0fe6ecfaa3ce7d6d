"""Pruning by alternating directions: ALPS (Meng et al. 2024) and ADMM-grad (Boza 2024).

Both split the weights in two copies: B minimises the layer's error, D obeys the pattern, and the
scaled dual U pulls them together. B's step solves a linear system with H + rho I for all rows at
once; D's is a projection, which keeps the largest entries of B + U. What D gives away is what U
remembers: U = C - D for C = B + U. Unlike SparseGPT, which walks the columns once, a weight that
went may come back.

Everything happens in coordinates in which every input has unit energy (H scaled to a unit
diagonal), so that the largest entries are those that matter. (H + rho I)^-1 is taken from a
Cholesky factorisation for each new rho: on a 135M LLaMA's inputs that costs as much as putting it
together from an eigendecomposition, which is then not needed at all.
"""

from __future__ import annotations

import torch

from cap_llm.sparsity.choose import choose
from cap_llm.sparsity.pattern import Pattern

MOST = 300  # iterations of ALPS
FAST, RAMP = 20, 15  # iterations of ADMM-grad, and of those the ones in which sparsity grows
RIDGE = 0.1  # ADMM-grad's, on the unit diagonal
SOFTEST = 1e-3  # penalty below which ALPS starts no more: `allowed` leaves no choice


def alps(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    pattern: Pattern,
    sparsity: float,
    allowed: torch.Tensor | None = None,
    start: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prunes W [R, C] by ADMM with a growing penalty (ALPS, algorithm 1).

    Its second part, the least squares on the mask that was found, is `refit`.

    Args:
        weight: W, fp32; not changed.
        hessian: damped H [C, C]; must be positive definite.
        pattern: where zeros may be.
        sparsity: share of zeros; not used by N:M.
        allowed: mask [R, C] inside which the result must lie.
        start: weights [R, C] to begin from, pruned as asked for; by default the largest of W.

    Returns:
        The weight and its mask, both [R, C].
    """
    scale, h = unit_diagonal(hessian)
    dense = weight * scale
    pull = dense @ h
    rho, grown = 0.1, False
    inverse = regularised_inverse(h, rho)
    first = dense if start is None else start * scale
    mask = earlier = choose(first.abs(), pattern, sparsity, allowed)
    first = first * mask
    kept = max(1, int(mask.sum()))
    b, d, u = dense, first, torch.zeros_like(dense)
    for iteration in range(1, MOST + 1):
        b = (d - u).mul_(rho).add_(pull) @ inverse
        u += b
        mask = choose(u.abs(), pattern, sparsity, allowed)
        d = u * mask
        u -= d
        if iteration % 3:
            continue
        moved = int((mask ^ earlier).sum()) / kept
        earlier = mask
        if moved == 0 and not grown and rho > SOFTEST:
            # so stiff that nothing ever moved: start again, softer
            rho /= 5
            d, u = first, torch.zeros_like(dense)
        elif moved == 0 or (iteration >= 30 and moved < 3e-4):
            break
        else:
            growth = 1.3 if moved >= 0.1 else 1.2 if moved >= 0.005 else 1.1
            rho, grown = rho * growth, True
            u /= growth
        inverse = None  # the old one goes before the new one is made
        inverse = regularised_inverse(h, rho)
    return b * mask / scale, mask


def admm_grad(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    pattern: Pattern,
    sparsity: float,
    allowed: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prunes W [R, C] by 20 iterations of ADMM with a fixed penalty (ADMM-grad).

    Sparsity grows over the first 15 by a cubic; then the mask is fixed and the weights settle on
    it. N:M grows by whole weights of a group.

    Arguments and returns: as `alps`.
    """
    scale, h = unit_diagonal(hessian)
    h.diagonal().add_(RIDGE)
    dense = weight * scale
    inverse = regularised_inverse(h, 1.0)
    pull = dense @ h @ inverse
    u = dense.clone()  # first B + U
    for iteration in range(1, FAST + 1):
        if iteration <= RAMP:
            share = 1 - (1 - iteration / RAMP) ** 3
            step = pattern
            if pattern.m:
                step = Pattern("n:m", pattern.m - round(share * (pattern.m - pattern.n)), pattern.m)
            mask = choose(u.abs(), step, share * sparsity, allowed)
        d = u * mask
        u -= d
        u += torch.addmm(pull, d - u, inverse)
    return u * mask / scale, mask


def unit_diagonal(hessian: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The scale e [C] of inputs and H / (e e^T) [C, C], a copy whose diagonal is one."""
    scale = hessian.diagonal().sqrt()
    return scale, hessian / scale / scale[:, None]


def regularised_inverse(hessian: torch.Tensor, rho: float) -> torch.Tensor:
    """(H + rho I)^-1 for a positive definite H [C, C]."""
    shifted = hessian.clone()
    shifted.diagonal().add_(rho)
    shifted = torch.linalg.cholesky(shifted)  # lets go of what it was
    return torch.cholesky_inverse(shifted)
