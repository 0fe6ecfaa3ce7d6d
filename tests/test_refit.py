"""Refit solves each row's least squares on its mask, and never makes a mask worse."""

from dataclasses import dataclass

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cap_llm.solvers.hessian import Factor, factorize
from cap_llm.solvers.refit import refit
from cap_llm.solvers.scores import magnitude, wanda
from cap_llm.solvers.sparsegpt import sparsegpt
from cap_llm.sparsity.choose import choose
from cap_llm.sparsity.pattern import Pattern

PATTERNS = {"unstructured": 0.5, "row": 0.8, "2:4": 0.5, "1:4": 0.75}


def assert_solves(new, mask, target, hessian, tolerance: float) -> None:
    """The objective of `new` lies at most `tolerance` above the exact one, never below it."""
    assert not new[~mask].any()
    exact = reference.error(reference.refit(mask, target, hessian), target, hessian)
    got = reference.error(new, target, hessian)
    assert exact * (1 - 1e-6) <= got <= exact * (1 + tolerance)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("seed", range(3))
def test_it_equals_the_normal_equations(pattern, seed):
    target, h = reference.problem(seed=seed)
    mask = choose(magnitude(target), Pattern.parse(pattern), PATTERNS[pattern])
    assert_solves(refit(target * mask, mask, target, h), mask, target, h, 1e-3)
    new = refit(target * mask, mask, target, h, tolerance=1e-6)
    assert_solves(new, mask, target, h, 1e-6)
    exact = reference.refit(mask, target, h)
    assert ((new - exact).norm() / exact.norm()).item() < 1e-3


def test_the_start_does_not_matter():
    target, h = reference.problem()
    mask = choose(magnitude(target), Pattern("row"), 0.6)
    for start in (torch.zeros_like(target), target, 3 * torch.randn_like(target)):
        assert_solves(refit(start, mask, target, h), mask, target, h, 1e-3)


def test_an_inverse_that_is_known_changes_nothing():
    target, h = reference.problem()
    mask = choose(magnitude(target), Pattern("row"), 0.6)
    inverse = torch.linalg.inv(h.double()).float()
    new = refit(target * mask, mask, target, h, inverse)
    assert_solves(new, mask, target, h, 1e-3)
    other = refit(target * mask, mask, target, h)
    assert ((new - other).norm() / other.norm()).item() < 1e-2


def test_the_inputs_are_not_changed():
    target, h = reference.problem()
    mask = choose(magnitude(target), Pattern("row"), 0.6)
    start = target + 1
    given_ = [t.clone() for t in (start, mask, target, h)]
    refit(start, mask, target, h)
    for before, after in zip(given_, (start, mask, target, h), strict=True):
        assert torch.equal(before, after)


def test_a_full_mask_returns_the_dense_weights():
    target, h = reference.problem()
    full = torch.ones_like(target, dtype=torch.bool)
    assert torch.equal(refit(target, full, target, h), target)
    new = refit(target * (target > 0), full, target, h)
    assert ((new - target).norm() / target.norm()).item() < 1e-2


def test_an_empty_mask_returns_zeros():
    target, h = reference.problem()
    assert not refit(target, torch.zeros_like(target, dtype=torch.bool), target, h).any()


def test_rows_do_not_depend_on_each_other():
    target, h = reference.problem()
    mask = choose(magnitude(target), Pattern("unstructured"), 0.5)
    mask[3], mask[7] = False, True
    together = refit(target * mask, mask, target, h)
    for r in (0, 3, 7, 23):
        one = slice(r, r + 1)
        alone = refit((target * mask)[one], mask[one], target[one], h)
        distance = (together[one] - alone).norm() / alone.norm().clamp(min=1e-6)
        assert distance.item() < 1e-2


def test_without_correlations_nothing_moves():
    target, _ = reference.problem()
    mask = choose(magnitude(target), Pattern.parse("2:4"), 0.5)
    h = torch.diag(torch.rand(96) + 0.1)
    assert torch.allclose(refit(target * mask, mask, target, h), target * mask, atol=1e-6)


def test_a_better_solver_never_has_a_larger_error_on_the_mask_of_sparsegpt():
    target, h = reference.problem()
    factor = factorize(h.clone(), 0.01, "w")
    for text, sparsity in PATTERNS.items():
        start, mask = sparsegpt(target, factor, Pattern.parse(text), sparsity)
        new = refit(start, mask, target, factor.hessian)
        assert_solves(new, mask, target, factor.hessian, 1e-3)
        before = reference.error(start, target, factor.hessian)
        assert reference.error(new, target, factor.hessian) < before


@given(
    st.integers(1, 8),
    st.integers(1, 40),
    st.integers(0, 999),
    st.lists(st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]), min_size=8, max_size=8),
    st.sampled_from([0.0, 1.0, 3.0]),
    st.sampled_from([1e-4, 1.0, 1e4]),
)
@settings(deadline=None, max_examples=200)
def test_it_never_raises_the_error_of_its_mask(rows, columns, seed, density, noise, scale):
    """Also where rows are empty or full, and where the start is far off or already the solution."""
    target, h = reference.problem(rows, columns, seed)
    h *= scale
    chance = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed))
    mask = chance < torch.tensor(density[:rows])[:, None]
    start = (target + noise * reference.gaussian(rows, columns, seed + 7)) * mask
    if noise == 3.0:
        start = reference.refit(mask, target, h).float()
    new = refit(start, mask, target, h)
    assert new.isfinite().all()
    assert not new[~mask].any()
    norm = reference.error(torch.zeros_like(target), target, h)
    for r in range(rows):
        one = slice(r, r + 1)
        before = reference.error(start[one], target[one], h)
        assert reference.error(new[one], target[one], h) <= before * (1 + 1e-4) + 1e-11 * norm


@dataclass
class Real:
    """A real layer, its factor, and what SparseGPT makes of it at 50 %."""

    layer: reference.Layer
    factor: Factor
    pruned: torch.Tensor
    mask: torch.Tensor

    def refit(self, start: torch.Tensor, mask: torch.Tensor, rows: slice) -> torch.Tensor:
        hessian, inverse = self.factor.hessian, self.factor.inverse
        return refit(start[rows], mask[rows], self.layer.weight[rows], hessian, inverse)


@pytest.fixture(scope="module", params=reference.REAL_LAYERS)
def real(request, smollm2, calibration_ids) -> Real:
    layer = reference.real_layers(smollm2, calibration_ids)[request.param]
    factor = factorize(layer.hessian.float(), 0.01, request.param)
    return Real(layer, factor, *sparsegpt(layer.weight, factor, Pattern("unstructured"), 0.5))


def masks_of(real: Real) -> dict[str, torch.Tensor]:
    weight = real.layer.weight
    score = wanda(weight, real.layer.hessian.diagonal().float())
    return {
        "magnitude": choose(magnitude(weight), Pattern("unstructured"), 0.5),
        "wanda": choose(score, Pattern("row"), 0.5),
        "wanda 2:4": choose(score, Pattern.parse("2:4"), 0.5),
    }


def test_the_better_the_method_the_smaller_the_error_of_a_real_layer(real):
    """Masks are those of the whole matrix; the error is taken over every fourth output."""
    weight, masks, some = real.layer.weight, masks_of(real), slice(None, None, 4)
    pruned = [
        (weight * masks["magnitude"])[some],
        (weight * masks["wanda"])[some],
        real.pruned[some],
        real.refit(real.pruned, real.mask, some),
    ]
    errors = [reference.error(w, weight[some], real.layer.hessian) for w in pruned]
    assert errors == sorted(errors, reverse=True), errors


def test_rows_of_a_real_layer_equal_the_normal_equations(real):
    """From every method's mask and weights, however far they start from the optimum."""
    weight, hessian = real.layer.weight, reference.damped(real.layer.hessian)
    starts = {name: (weight * mask, mask) for name, mask in masks_of(real).items()}
    starts["sparsegpt"] = (real.pruned, real.mask)
    some = slice(0, 576, 96)
    for start, mask in starts.values():
        new = real.refit(start, mask, some)
        assert_solves(new, mask[some], weight[some], hessian, 1e-3)
