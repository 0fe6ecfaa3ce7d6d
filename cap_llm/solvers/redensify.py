"""Re-densification, Sparse-Dense-Sparse (Li et al. 2025), of one matrix on second moments alone.

All weights are free again and go from the pruned W_s towards the dense W_d, as far as regularizers
let them. Without any, the least-squares problem has W_d as its only solution; what SDS is lies in
what keeps W from it. The paper says where its optimiser starts (W_s) and how many steps it takes,
not which one it is. `redensify` makes that pull explicit, as (mu / 2) ||W - W_s||^2;
`redensify_by_sgd` takes the paper's steps as far as they are known.

Inputs are scaled to unit energy (see `admm`), so that one mu, l1 and l2 mean the same everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from cap_llm.solvers.admm import regularised_inverse, unit_diagonal

STEPS = 200  # of the L1 term's iterations at most, and of SGD
TOLERANCE = 1e-3  # relative change of the weights at which the iterations of the L1 term end


def redensify(
    sparse: torch.Tensor,
    dense: torch.Tensor,
    hessian: torch.Tensor,
    mu: float,
    l1: float,
    l2: float,
) -> torch.Tensor:
    """Minimises 1/2 tr((W - W_d) H (W - W_d)^T) + mu/2 |W - W_s|^2 + l1 c |W|_1 + l2/2 |W|^2.

    In scaled coordinates, with c the mean size of a dense weight. Without the L1 term the solution
    has a closed form; with it, ADMM on the same factorised matrix finds it.

    Args:
        sparse: W_s [R, C], fp32.
        dense: W_d [R, C], fp32.
        hessian: damped H [C, C]; must be positive definite.
        mu: pull towards the pruned weights.
        l1: weight of the L1 norm.
        l2: weight of the squared L2 norm.

    Returns:
        W [R, C]; with mu = l1 = l2 = 0 the dense weights.
    """
    scale, h = unit_diagonal(hessian)
    sparse, dense = sparse * scale, dense * scale
    pull = dense @ h + mu * sparse
    if not l1:
        return pull @ regularised_inverse(h, mu + l2) / scale
    # The penalty that balances the slowest and the fastest direction of this problem; the
    # Frobenius norm bounds the fastest.
    rho = float(torch.sqrt(((mu + l2) or 1e-3) * torch.linalg.matrix_norm(h)))
    inverse = regularised_inverse(h, mu + l2 + rho)
    threshold = l1 * dense.abs().mean() / rho
    w, u = sparse, torch.zeros_like(sparse)
    for _ in range(STEPS):
        free = (w - u).mul_(rho).add_(pull) @ inverse
        u += free
        new = torch.nn.functional.softshrink(u, float(threshold))
        u -= new
        moved, w = (new - w).norm(), new
        if moved <= TOLERANCE * new.norm():
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
    """200 passes of plain SGD from W_s on the paper's loss, each batch of sequences a step.

    The loss is the mean squared error of the outputs over tokens and features, plus
    l1 mean|W| + l2 mean W^2. Where the rate would diverge, as on inputs with a few huge
    activations, it is half of the largest that does not. Optimiser, batches and normalisation are
    our reading: the paper names 200 iterations, a rate of 0.1 and weights of 0.1. A batch enters by
    its second moment alone, which gives the same gradients as its activations.

    Args:
        sparse: W_s [R, C], fp32.
        dense: W_d [R, C], fp32.
        batches: mean x x^T [C, C] of each batch.
        lr: the rate.
        l1: weight of the mean absolute value.
        l2: weight of the mean square.
        after_pass: what becomes of the weights after each pass.

    Returns:
        W [R, C].
    """
    w = sparse.clone()
    steepest = max(float(largest_eigenvalue(h)) for h in batches)
    if lr * steepest > len(w):
        lr = len(w) / steepest / 2
    for _ in range(STEPS):
        for h in batches:
            w.addmm_(w - dense, h, alpha=-2 * lr / w.shape[0])
            if l1 or l2:
                w -= (lr / w.numel()) * (l1 * w.sign() + 2 * l2 * w)
        w = after_pass(w)
    return w


def largest_eigenvalue(hessian: torch.Tensor) -> torch.Tensor:
    """lambda_max of a positive definite H [C, C] by 50 steps of the power method, and 1 % more.

    Where the largest eigenvalues lie close it may come out a little low, for which SGD has room.
    """
    x = hessian.sum(1)
    for _ in range(50):
        x = hessian @ (x / x.norm())
    return 1.01 * x.norm()
