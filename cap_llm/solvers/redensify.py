"""Re-densification of one matrix, as in Sparse-Dense-Sparse (Li et al. 2025), from second moments.

All weights become trainable again and move from the pruned W_s towards the dense W_d. Without
regularization the least-squares solution is W_d itself. The paper gives the starting point (W_s)
and the number of steps but not the optimizer. `redensify` states the pull towards W_s explicitly,
as (mu / 2) ||W - W_s||^2; `redensify_by_sgd` takes the paper's steps.

Columns are scaled so that H has a unit diagonal (see `admm`); mu, l1 and l2 then have the same
meaning for every layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from cap_llm.solvers.admm import regularized_inverse, unit_diagonal

STEPS = 200  # SGD passes, and maximum ADMM iterations for the L1 term
TOLERANCE = 1e-3  # relative change of the weights at which ADMM stops


def redensify(
    sparse: torch.Tensor,
    dense: torch.Tensor,
    hessian: torch.Tensor,
    mu: float,
    l1: float,
    l2: float,
) -> torch.Tensor:
    """Minimizes 1/2 tr((W - W_d) H (W - W_d)^T) + mu/2 |W - W_s|^2 + l1 c |W|_1 + l2/2 |W|^2.

    In scaled coordinates, where c is the mean absolute dense weight. The solution has a closed
    form without the L1 term, and comes from ADMM with it.

    Args:
        sparse: W_s [R, C], fp32.
        dense: W_d [R, C], fp32.
        hessian: damped H [C, C], positive definite.
        mu: pull towards the pruned weights.
        l1: weight of the L1 norm.
        l2: weight of the squared L2 norm.

    Returns:
        W [R, C]; equals W_d for mu = l1 = l2 = 0.
    """
    scale, h = unit_diagonal(hessian)
    sparse, dense = sparse * scale, dense * scale
    pull = dense @ h + mu * sparse
    if not l1:
        return pull @ regularized_inverse(h, mu + l2) / scale
    # geometric mean of the smallest and largest eigenvalue; the Frobenius norm bounds the latter
    rho = float(torch.sqrt(((mu + l2) or 1e-3) * torch.linalg.matrix_norm(h)))
    inverse = regularized_inverse(h, mu + l2 + rho)
    threshold = l1 * dense.abs().mean() / rho
    w, u = sparse, torch.zeros_like(sparse)
    for _ in range(STEPS):
        free = (w - u).mul_(rho).add_(pull) @ inverse
        u += free
        new = torch.nn.functional.softshrink(u, float(threshold))
        u -= new
        change, w = (new - w).norm(), new
        if change <= TOLERANCE * new.norm():
            break
    return w / scale


def redensify_by_sgd(
    sparse: torch.Tensor,
    dense: torch.Tensor,
    batches: Sequence[torch.Tensor],
    lr: float = 0.1,
    l1: float = 0.1,
    l2: float = 0.1,
    after_pass: Callable[[torch.Tensor], torch.Tensor] = lambda w: w,
) -> torch.Tensor:
    """Runs 200 passes of plain SGD from W_s on the paper's loss, one step per batch of sequences.

    The loss is the output mean squared error over tokens and features plus
    l1 mean|W| + l2 mean W^2. A batch enters through its second moment, which yields the same
    gradient as its activations. A learning rate that would diverge (a few huge activations) is
    replaced by half of the largest stable one. The paper specifies 200 iterations, a rate of 0.1
    and weights of 0.1; optimizer, batches and normalization are our choice.

    Args:
        sparse: W_s [R, C], fp32.
        dense: W_d [R, C], fp32.
        batches: mean x x^T [C, C] per batch.
        lr: learning rate.
        l1: weight of the mean absolute value.
        l2: weight of the mean square.
        after_pass: maps the weights after each pass, such as a projection.

    Returns:
        W [R, C].
    """
    w = sparse.clone()
    curvature = max(float(largest_eigenvalue(h)) for h in batches)
    if lr * curvature > len(w):
        lr = len(w) / curvature / 2
    for _ in range(STEPS):
        for h in batches:
            w.addmm_(w - dense, h, alpha=-2 * lr / w.shape[0])
            if l1 or l2:
                w -= (lr / w.numel()) * (l1 * w.sign() + 2 * l2 * w)
        w = after_pass(w)
    return w


def largest_eigenvalue(hessian: torch.Tensor) -> torch.Tensor:
    """Returns 1.01 lambda_max of a positive definite H [C, C], by 50 power iterations.

    Close leading eigenvalues may make the estimate slightly low, which the SGD margin absorbs.
    """
    x = hessian.sum(1)
    for _ in range(50):
        x = hessian @ (x / x.norm())
    return 1.01 * x.norm()
