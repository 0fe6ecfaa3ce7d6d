"""Refit: the exact least-squares weights on a given mask, for all rows at once.

Preconditioned conjugate gradients on min tr((W - W_d) H (W - W_d)^T) with W zero outside the mask
(ALPS, Meng et al. 2024, algorithm 2), each row with step lengths of its own. Rows that have
converged leave the batch, so that the slow ones do not hold up the rest.
"""

from __future__ import annotations

import torch

TOLERANCE = 1e-4  # of a row's first residual
MOST = 100  # iterations
CHECK = 5  # iterations between two looks at which rows have converged


def refit(
    weight: torch.Tensor, mask: torch.Tensor, target: torch.Tensor, hessian: torch.Tensor
) -> torch.Tensor:
    """The weights [R, C] on `mask` whose outputs are closest to those of `target`.

    Args:
        weight: where to start, [R, C] fp32; a good start saves iterations, not quality.
        mask: [R, C], true where a weight may be non-zero.
        target: W_d [R, C], whose outputs are to be matched.
        hessian: damped H [C, C]; must be positive definite.

    Returns:
        The weights [R, C]; never a larger error than `weight` on its mask.
    """
    result = weight * mask
    diagonal = hessian.diagonal()
    rows = torch.arange(len(weight), device=weight.device)
    x, m = result.clone(), mask.float()
    r = ((target - x) @ hessian) * m
    z = r / diagonal
    p = z.clone()
    rz = (r * z).sum(1)
    goal = TOLERANCE**2 * rz
    for iteration in range(MOST):
        hp = (p @ hessian).mul_(m)
        curvature = (p * hp).sum(1)
        step = torch.where(curvature > 0, rz / curvature, 0)[:, None]
        x.addcmul_(step, p)
        r.addcmul_(step, hp, value=-1)
        torch.div(r, diagonal, out=z)
        rz_next = (r * z).sum(1)
        p.mul_(torch.where(rz > 0, rz_next / rz, 0)[:, None]).add_(z)
        rz = rz_next
        if iteration % CHECK == CHECK - 1:
            busy = rz > goal
            if not bool(busy.all()):
                done = ~busy
                result[rows[done]] = x[done]
                rows, x, m, r, p, z = (t[busy] for t in (rows, x, m, r, p, z))
                rz, goal = rz[busy], goal[busy]
                if not len(rows):
                    break
    result[rows] = x
    return result
