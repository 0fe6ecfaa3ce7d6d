"""ALPS and ADMM-grad: exact patterns, kept masks, and errors below SparseGPT's on real layers."""

import pytest
import reference
import torch

from cap_llm.solvers import admm
from cap_llm.solvers.admm import admm_grad, alps, regularized_inverse
from cap_llm.solvers.hessian import factorize
from cap_llm.solvers.refit import refit
from cap_llm.solvers.sparsegpt import sparsegpt
from cap_llm.sparsity.choose import choose
from cap_llm.sparsity.pattern import Pattern

PATTERNS = {"unstructured": 0.6, "row": 0.5, "2:4": 0.5, "3:8": 0.625}


@pytest.mark.parametrize("solve", [alps, admm_grad])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_pattern_is_exact(solve, pattern):
    weight, h = reference.problem()
    new, mask = solve(weight, h, Pattern.parse(pattern), PATTERNS[pattern])
    assert not new[~mask].any()
    reference.assert_exact(mask, Pattern.parse(pattern), PATTERNS[pattern])


@pytest.mark.parametrize("solve", [alps, admm_grad])
@pytest.mark.parametrize("pattern", ["unstructured", "row", "2:4"])
def test_an_earlier_mask_is_kept(solve, pattern):
    weight, h = reference.problem()
    start = "3:4" if ":" in pattern else pattern
    earlier = choose(weight.abs(), Pattern.parse(start), 0.25)
    new, mask = solve(weight * earlier, h, Pattern.parse(pattern), 0.5, earlier)
    assert not (mask & ~earlier).any()
    assert not new[~mask].any()
    reference.assert_exact(mask, Pattern.parse(pattern), 0.5)


@pytest.mark.parametrize("pattern", ["unstructured", "row", "2:4"])
def test_a_start_leads_to_less_error_inside_an_earlier_mask(pattern):
    weight, h = reference.problem()
    earlier = choose(weight.abs(), Pattern.parse("3:4" if ":" in pattern else pattern), 0.25)
    pattern = Pattern.parse(pattern)
    start = weight * choose(torch.rand_like(weight), pattern, 0.5, earlier)
    new, mask = alps(weight, h, pattern, 0.5, earlier, start)
    assert not (mask & ~earlier).any() and not new[~mask].any()
    reference.assert_exact(mask, pattern, 0.5)
    first = refit(start, start != 0, weight, h)
    assert reference.error(new, weight, h) < reference.error(first, weight, h)


@pytest.mark.parametrize("solve", [alps, admm_grad])
@pytest.mark.parametrize("pattern", ["unstructured", "row", "2:4"])
def test_without_correlation_both_come_close_to_the_known_best_mask(solve, pattern):
    """Then the best mask keeps the largest |W| |x|, and the weights on it stay as they are."""
    weight, _ = reference.problem()
    h = torch.diag(torch.linspace(0.1, 3, weight.shape[1]))
    pattern = Pattern.parse(pattern)
    best = choose(weight.abs() * h.diagonal().sqrt(), pattern, 0.5)
    _, mask = solve(weight, h, pattern, 0.5)
    least = reference.error(weight * best, weight, h)
    assert reference.error(weight * mask, weight, h) <= 1.03 * least


@pytest.mark.parametrize("solve", [alps, admm_grad])
def test_inputs_that_never_fire_lose_their_weights_first(solve):
    x = 0.1 * reference.correlated(400, 64)
    x[:, :16] = 0
    h = factorize(reference.second_moment(x).float(), 0.01, "w").hessian
    _, mask = solve(reference.gaussian(32, 64), h, Pattern("unstructured"), 0.5)
    assert not mask[:, :16].any()


def test_a_mask_that_is_given_whole_is_found_at_once(monkeypatch):
    weight, h = reference.problem()
    allowed = choose(weight.abs(), Pattern("row"), 0.5)
    rounds = []
    solved = admm.regularized_inverse
    monkeypatch.setattr(
        admm, "regularized_inverse", lambda *args: rounds.append(0) or solved(*args)
    )
    _, mask = alps(weight * allowed, h, Pattern("row"), 0.5, allowed)
    assert torch.equal(mask, allowed)
    assert len(rounds) < 10


def test_an_iterate_of_b_solves_its_linear_system():
    _, h = reference.problem()
    inverse = regularized_inverse(h, 0.3)
    eye = torch.eye(len(h))
    assert torch.allclose(inverse @ (h + 0.3 * eye), eye, atol=1e-3)


@pytest.fixture(scope="module")
def layers(smollm2, calibration_ids):
    return reference.real_layers(smollm2, calibration_ids)


@pytest.mark.parametrize("name", reference.REAL_LAYERS)
def test_alps_is_better_than_sparsegpt_with_refit_on_real_layers(layers, name):
    """Whole o_proj; of the MLP's matrices some rows, each of which is a problem of its own."""
    weight = layers[name].weight
    weight = weight if "o_proj" in name else weight[:: len(weight) // 64]  # a matrix of their own
    h = reference.damped(layers[name].hessian).float()
    factor = factorize(layers[name].hessian.float(), 0.01, name)
    for text in ("unstructured", "row", "2:4"):
        pattern = Pattern.parse(text)
        errors = {}
        for solve, solver in {
            "sparsegpt": lambda p=pattern: sparsegpt(weight, factor, p, 0.5),
            "alps": lambda p=pattern: alps(weight, h, p, 0.5),
            "from sparsegpt": lambda p=pattern: alps(
                weight, h, p, 0.5, start=sparsegpt(weight, factor, p, 0.5)[0]
            ),
            "admm_grad": lambda p=pattern: admm_grad(weight, h, p, 0.5),
        }.items():
            new, mask = solver()
            errors[f"{solve} alone"] = reference.error(new, weight, h)
            errors[solve] = reference.error(refit(new, mask, weight, h), weight, h)
        assert errors["alps"] < errors["sparsegpt"]
        assert errors["from sparsegpt"] < errors["sparsegpt"]
        assert errors["alps"] <= errors["admm_grad"]
        assert errors["alps"] <= 1.001 * errors["alps alone"]
