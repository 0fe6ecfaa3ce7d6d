"""Pruning by ADMM: ALPS (Meng et al. 2024) and ADMM-grad (Boza 2024).

Both split the weights into two copies that a scaled dual variable U pulls together. B minimizes
the layer error: one linear system with H + rho I, for all rows at once. D satisfies the sparsity
pattern: it keeps the largest entries of C = B + U, and U becomes the remainder C - D. Unlike
SparseGPT, which visits each column once, ADMM can restore a weight that it removed.

Columns are scaled so that H has a unit diagonal; magnitudes are then comparable across inputs.
(H + rho I)^-1 comes from one Cholesky factorization per rho. On a 135M LLaMA this costs as much as
assembling it from an eigendecomposition, which is then not needed.
"""

from __future__ import annotations

import torch

from cap_llm.sparsity.choose import choose
from cap_llm.sparsity.pattern import Pattern

ALPS_MAX_ITER = 300
ADMM_GRAD_ITERS = 20
RAMP_ITERS = 15  # of the ADMM-grad iterations: sparsity increases
RIDGE = 0.1  # of ADMM-grad, added to the unit diagonal
MIN_PENALTY = 1e-3  # no restart of ALPS below: `allowed` determines the mask


def alps(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    pattern: Pattern,
    sparsity: float,
    allowed: torch.Tensor | None = None,
    start: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prunes W [R, C] by ADMM with an increasing penalty (ALPS, algorithm 1).

    `refit` is the second half of ALPS, least squares on the final mask.

    Args:
        weight: W, fp32; not modified.
        hessian: damped H [C, C], positive definite.
        pattern: sparsity pattern.
        sparsity: fraction of zeros; ignored for N:M.
        allowed: mask [R, C] that the new mask must be a subset of.
        start: initial weights [R, C] that satisfy pattern and sparsity; default: W pruned by
            scaled magnitude.

    Returns:
        The pruned weight and its mask, both [R, C].
    """
    scale, h = unit_diagonal(hessian)
    dense = weight * scale
    pull = dense @ h
    rho, increased = 0.1, False
    inverse = regularized_inverse(h, rho)
    first = dense if start is None else start * scale
    mask = previous = choose(first.abs(), pattern, sparsity, allowed)
    first = first * mask
    n_nonzero = max(1, int(mask.sum()))
    b, d, u = dense, first, torch.zeros_like(dense)
    for iteration in range(1, ALPS_MAX_ITER + 1):
        b = (d - u).mul_(rho).add_(pull) @ inverse
        u += b
        mask = choose(u.abs(), pattern, sparsity, allowed)
        d = u * mask
        u -= d
        if iteration % 3:
            continue
        change = int((mask ^ previous).sum()) / n_nonzero
        previous = mask
        if change == 0 and not increased and rho > MIN_PENALTY:
            # the mask never changed, so the penalty is too large: restart with a smaller one
            rho /= 5
            d, u = first, torch.zeros_like(dense)
        elif change == 0 or (iteration >= 30 and change < 3e-4):
            break
        else:
            growth = 1.3 if change >= 0.1 else 1.2 if change >= 0.005 else 1.1
            rho, increased = rho * growth, True
            u /= growth
        inverse = None  # frees its memory before the next one is allocated
        inverse = regularized_inverse(h, rho)
    return b * mask / scale, mask


def admm_grad(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    pattern: Pattern,
    sparsity: float,
    allowed: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prunes W [R, C] by 20 ADMM iterations with a fixed penalty (ADMM-grad).

    Sparsity follows a cubic schedule for 15 iterations (N:M: whole weights per group); then the
    mask is fixed and the weights converge on it.

    Arguments and return values are those of `alps`.
    """
    scale, h = unit_diagonal(hessian)
    h.diagonal().add_(RIDGE)
    dense = weight * scale
    inverse = regularized_inverse(h, 1.0)
    pull = dense @ h @ inverse
    u = dense.clone()  # holds B + U
    for iteration in range(1, ADMM_GRAD_ITERS + 1):
        if iteration <= RAMP_ITERS:
            progress = 1 - (1 - iteration / RAMP_ITERS) ** 3
            current = pattern
            if pattern.m:
                n_keep = pattern.m - round(progress * (pattern.m - pattern.n))
                current = Pattern("n:m", n_keep, pattern.m)
            mask = choose(u.abs(), current, progress * sparsity, allowed)
        d = u * mask
        u -= d
        u += torch.addmm(pull, d - u, inverse)
    return u * mask / scale, mask


def unit_diagonal(hessian: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the input scale e = sqrt(diag H) [C] and a copy H / (e e^T) [C, C]."""
    scale = hessian.diagonal().sqrt()
    return scale, hessian / scale / scale[:, None]


def regularized_inverse(hessian: torch.Tensor, rho: float) -> torch.Tensor:
    """Returns (H + rho I)^-1 for a positive definite H [C, C]."""
    shifted = hessian.clone()
    shifted.diagonal().add_(rho)
    shifted = torch.linalg.cholesky(shifted)  # frees the previous matrix
    return torch.cholesky_inverse(shifted)
