"""Re-densification of one matrix: the limits that the analysis of it states."""

import pytest
import reference
import torch

from cap_llm.solvers.hessian import Moments
from cap_llm.solvers.redensify import largest_eigenvalue, redensify, redensify_by_sgd
from cap_llm.sparsity.choose import choose
from cap_llm.sparsity.pattern import Pattern


def pruned(weight: torch.Tensor) -> torch.Tensor:
    return weight * choose(weight.abs(), Pattern("row"), 0.5)


def test_without_regularisers_the_dense_weights_come_back():
    dense, h = reference.problem()
    free = redensify(pruned(dense), dense, h, 0.0, 0.0, 0.0)
    assert (free - dense).norm() < 1e-3 * dense.norm()


def test_a_strong_pull_leaves_the_pruned_weights():
    dense, h = reference.problem()
    free = redensify(pruned(dense), dense, h, 1e6, 0.0, 0.0)
    assert (free - pruned(dense)).norm() < 1e-3 * dense.norm()


@pytest.mark.parametrize("l1", [0.0, 0.05])
def test_the_objective_has_no_lower_point_nearby(l1):
    """Against a slow descent on the same objective from the solution and from elsewhere."""
    dense, h = reference.problem(8, 32)
    sparse, mu, l2 = pruned(dense), 0.1, 0.01
    scale = h.diagonal().sqrt()
    unit = (h / scale / scale[:, None]).double()

    def objective(w):
        x, d, s = (v.double() * scale for v in (w, dense, sparse))
        smooth = ((x - d) @ unit * (x - d)).sum() + mu * (x - s).square().sum()
        return 0.5 * (smooth + l2 * x.square().sum()) + l1 * d.abs().mean() * x.abs().sum()

    found = redensify(sparse, dense, h, mu, l1, l2)
    w = torch.zeros_like(dense).double().requires_grad_(True)
    optimizer = torch.optim.Adam([w], lr=0.02)
    for _ in range(1500):
        optimizer.zero_grad()
        objective(w).backward()
        optimizer.step()
    assert objective(found) <= objective(w.detach()) * (1 + 1e-3)


def test_l1_makes_zeros():
    dense, h = reference.problem()
    few = (redensify(pruned(dense), dense, h, 0.1, 0.02, 0.01) == 0).sum()
    many = (redensify(pruned(dense), dense, h, 0.1, 0.2, 0.01) == 0).sum()
    assert few < many


def test_sgd_on_second_moments_takes_the_steps_of_sgd_on_activations():
    dense, _ = reference.problem(8, 32)
    x = 0.1 * reference.correlated(40, 32).reshape(2, 20, 32)
    grams = torch.stack([b.T @ b / len(b) for b in x])
    ours = redensify_by_sgd(pruned(dense), dense, grams, lr=0.05)
    w = pruned(dense).clone().requires_grad_(True)
    for _ in range(200):
        for batch in x:
            loss = (batch @ (w - dense).T).square().mean()
            loss = loss + 0.1 * w.abs().mean() + 0.1 * w.square().mean()
            (gradient,) = torch.autograd.grad(loss, w)
            w = (w - 0.05 * gradient).detach().requires_grad_(True)
    assert torch.allclose(ours, w, atol=1e-4)


def test_sgd_does_not_diverge_on_huge_activations():
    dense, _ = reference.problem(8, 32)
    x = reference.correlated(40, 32)
    x[:, 3] *= 100
    gram = x.T @ x / len(x)
    free = redensify_by_sgd(pruned(dense), dense, gram[None])
    assert reference.error(free, dense, gram) < reference.error(pruned(dense), dense, gram)


def test_the_largest_eigenvalue_is_bounded_from_above():
    for seed in range(5):
        _, h = reference.problem(seed=seed)
        exact = torch.linalg.eigvalsh(h.double())[-1]
        assert exact <= largest_eigenvalue(h) <= 1.05 * exact


def test_moments_of_parts_add_up():
    x = reference.correlated(50, 16)
    parts = []
    for piece in x.split(20):
        part = Moments(16, x.device)
        part.add(piece)
        parts.append(part.finish("x"))
    whole = Moments(16, x.device)
    whole.add(x)
    whole.finish("x")
    total = Moments.total(parts)
    assert total.tokens == 50
    assert torch.allclose(total.hessian, whole.hessian, rtol=1e-5)
