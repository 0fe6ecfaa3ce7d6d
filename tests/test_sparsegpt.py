"""SparseGPT agrees with its slow reference, keeps exact counts and stays inside earlier masks."""

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cap_llm.solvers.hessian import Factor, factorize
from cap_llm.solvers.scores import magnitude
from cap_llm.solvers.sparsegpt import sparsegpt
from cap_llm.sparsity.choose import choose
from cap_llm.sparsity.pattern import Pattern

UNSTRUCTURED, ROW = Pattern("unstructured"), Pattern("row")


def factor_of(x: torch.Tensor) -> Factor:
    return factorize(reference.second_moment(x).float(), 0.01, "w")


@pytest.fixture(scope="module")
def problem():
    """W [40, 240], inputs [700, 240] with correlations, and their factor."""
    x = reference.correlated(700, 240)
    return reference.gaussian(40, 240), factor_of(x)


@pytest.mark.parametrize("block_size", [1, 32, 100, 128, 1000])
@pytest.mark.parametrize("sparsity", [0.5, 0.77])
@pytest.mark.parametrize("pattern", [UNSTRUCTURED, ROW], ids=str)
def test_it_equals_the_reference(problem, pattern, sparsity, block_size):
    weight, factor = problem
    new, mask = sparsegpt(weight, factor, pattern, sparsity, block_size=block_size)
    reference.assert_exact(mask, pattern, sparsity)
    assert not new[~mask].any()
    expected = reference.sparsegpt(weight, factor.hessian, pattern, sparsity, block_size=block_size)
    reference.assert_same_pruning(new, mask, *expected)


@pytest.mark.parametrize(
    ("text", "block_size"),
    [
        ("1:2", 128),
        ("1:4", 32),
        ("2:4", 4),
        ("2:4", 32),
        ("2:4", 128),
        ("2:4", 1000),
        ("3:4", 128),
        ("2:8", 128),
        ("4:8", 40),
        ("3:5", 30),
        ("3:5", 500),
        ("7:24", 48),
        ("1:48", 96),
    ],
)
def test_n_of_m_equals_the_reference(problem, text, block_size):
    weight, factor = problem
    pattern = Pattern.parse(text)
    new, mask = sparsegpt(weight, factor, pattern, 0, block_size=block_size)
    reference.assert_exact(mask, pattern, 0)
    assert not new[~mask].any()
    expected = reference.sparsegpt(weight, factor.hessian, pattern, 0, block_size=block_size)
    reference.assert_same_pruning(new, mask, *expected)


@pytest.mark.parametrize("columns", [1, 3, 15, 17, 129])
def test_columns_that_no_block_divides_equal_the_reference(columns):
    weight = reference.gaussian(64, columns)
    factor = factor_of(reference.correlated(300, columns))
    for pattern in (UNSTRUCTURED, ROW):
        new, mask = sparsegpt(weight, factor, pattern, 0.6, block_size=32)
        reference.assert_exact(mask, pattern, 0.6)
        expected = reference.sparsegpt(weight, factor.hessian, pattern, 0.6, block_size=32)
        reference.assert_same_pruning(new, mask, *expected)


def test_with_white_inputs_it_is_magnitude_pruning():
    weight = reference.gaussian(24, 60)
    factor = factorize(torch.eye(60), 0.01, "w")
    for pattern in (UNSTRUCTURED, ROW, Pattern.parse("2:4")):
        new, mask = sparsegpt(weight, factor, pattern, 0.5)
        assert torch.equal(mask, choose(magnitude(weight), pattern, 0.5))
        assert torch.equal(new, weight * mask)


def test_what_it_moves_lowers_the_error_of_its_mask(problem):
    weight, factor = problem
    for pattern in (UNSTRUCTURED, ROW, Pattern.parse("2:4")):
        new, mask = sparsegpt(weight, factor, pattern, 0.5)
        moved = reference.error(new, weight, factor.hessian)
        assert moved < 0.7 * reference.error(weight * mask, weight, factor.hessian)


@pytest.mark.parametrize("pattern", [UNSTRUCTURED, ROW, Pattern.parse("2:4")], ids=str)
@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_the_scale_of_inputs_and_weights_is_irrelevant(pattern, scale):
    x = reference.correlated(300, 64)
    x[:, 5] = 0
    weight = reference.gaussian(32, 64)
    new, mask = sparsegpt(weight, factor_of(x), pattern, 0.5)
    scaled, scaled_mask = sparsegpt(weight * scale, factor_of(x * scale), pattern, 0.5)
    reference.assert_same_pruning(scaled / scale, scaled_mask, new.double(), mask)


@pytest.mark.parametrize("layout", ["rows", "columns", "one row", "one column"])
def test_the_given_weight_is_not_changed(layout):
    """GPT-2 stores the transpose, so that the weight given is a view with columns first."""
    weight = reference.gaussian(20, 32)
    if layout == "columns":
        weight = weight.T.contiguous().T
    elif layout == "one row":
        weight = weight[:1]
    elif layout == "one column":
        weight = weight[:, :1].contiguous()
    before = weight.clone()
    factor = factor_of(reference.correlated(99, weight.shape[1]))
    new, mask = sparsegpt(weight, factor, UNSTRUCTURED, 0.5)
    assert torch.equal(weight, before)
    again, again_mask = sparsegpt(before.contiguous(), factor, UNSTRUCTURED, 0.5)
    assert torch.equal(mask, again_mask)
    assert torch.allclose(new, again, atol=1e-6)


@pytest.mark.parametrize("pattern", [UNSTRUCTURED, ROW, Pattern.parse("2:4")], ids=str)
def test_dead_inputs_lose_their_weights_and_move_no_other(pattern):
    x = reference.correlated(300, 64)
    dead = torch.zeros(64, dtype=torch.bool)
    dead[[0, 9, 10, 40, 63]] = True
    x[:, dead] = 0
    weight = reference.gaussian(32, 64)
    factor = factor_of(x)
    new, mask = sparsegpt(weight, factor, pattern, 0.5)
    reference.assert_exact(mask, pattern, 0.5)
    assert not new[:, dead].any()
    assert bool((new != 0).any())
    weight[:, dead] *= 100  # whatever they were
    other, other_mask = sparsegpt(weight, factor, pattern, 0.5)
    assert torch.equal(other, new) and torch.equal(other_mask, mask)


def test_more_dead_inputs_than_zeros_still_give_the_exact_count():
    x = reference.correlated(300, 64)
    x[:, 8:] = 0
    for pattern in (UNSTRUCTURED, ROW, Pattern.parse("2:4")):
        new, mask = sparsegpt(reference.gaussian(16, 64), factor_of(x), pattern, 0.5)
        reference.assert_exact(mask, pattern, 0.5)
        assert not new[:, 8:].any() and bool(new[:, :8].any())


@pytest.mark.parametrize("block_size", [32, 128, 1000])
@pytest.mark.parametrize("pattern", [UNSTRUCTURED, ROW], ids=str)
def test_inside_an_earlier_mask_old_zeros_stay_and_the_count_is_exact(problem, pattern, block_size):
    weight, factor = problem
    allowed = choose(torch.rand(40, 240), UNSTRUCTURED, 0.4)
    new, mask = sparsegpt(weight, factor, pattern, 0.75, allowed, block_size)
    assert not bool((mask & ~allowed).any())
    assert not new[~allowed].any()
    assert not new[~mask].any()
    reference.assert_exact(mask, pattern, 0.75)
    expected = reference.sparsegpt(weight, factor.hessian, pattern, 0.75, allowed, block_size)
    reference.assert_same_pruning(new, mask, *expected)


@pytest.mark.parametrize("text", ["2:4", "1:4", "3:5"])
def test_n_of_m_inside_an_earlier_mask_takes_from_what_is_left(problem, text):
    weight, factor = problem
    pattern = Pattern.parse(text)
    allowed = choose(torch.rand(40, 240), UNSTRUCTURED, 0.4)
    new, mask = sparsegpt(weight, factor, pattern, 0, allowed, 120)
    assert not bool((mask & ~allowed).any())
    assert not new[~mask].any()
    inside = allowed.reshape(-1, pattern.m).sum(1)
    assert torch.equal(mask.reshape(-1, pattern.m).sum(1), inside.clamp(max=pattern.n))
    expected = reference.sparsegpt(weight, factor.hessian, pattern, 0, allowed, 120)
    reference.assert_same_pruning(new, mask, *expected)


def test_an_earlier_mask_that_is_full_changes_nothing(problem):
    weight, factor = problem
    for pattern in (UNSTRUCTURED, ROW, Pattern.parse("2:4")):
        new, mask = sparsegpt(weight, factor, pattern, 0.5)
        same, same_mask = sparsegpt(
            weight, factor, pattern, 0.5, torch.ones_like(weight, dtype=torch.bool)
        )
        assert torch.equal(new, same) and torch.equal(mask, same_mask)


@given(
    st.sampled_from([UNSTRUCTURED, ROW]),
    st.integers(1, 12),
    st.integers(1, 40),
    st.floats(0.001, 0.999),
    st.sampled_from([1, 4, 7, 16, 128]),
    st.floats(0, 1),
    st.integers(0, 99),
)
@settings(deadline=None, max_examples=150)
def test_the_count_is_exact_for_any_shape_and_earlier_mask(
    pattern, rows, columns, sparsity, block_size, density, seed
):
    weight = reference.gaussian(rows, columns, seed)
    weight = (weight * 4).round() / 4  # ties and zeros
    factor = factor_of(reference.correlated(50, columns, seed))
    chance = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed))
    allowed = chance < density
    new, mask = sparsegpt(weight, factor, pattern, sparsity, allowed, block_size)
    assert not bool((mask & ~allowed).any())
    assert not new[~mask].any()
    zeros, old = ~mask, ~allowed
    if pattern.kind == "row":
        expected = old.sum(1).clamp(min=round(sparsity * columns))
        assert torch.equal(zeros.sum(1), expected)
    else:
        assert int(zeros.sum()) == max(int(old.sum()), round(sparsity * rows * columns))


@pytest.fixture(scope="module")
def layers(smollm2, calibration_ids):
    return reference.real_layers(smollm2, calibration_ids)


@pytest.mark.parametrize("name", reference.REAL_LAYERS)
def test_rows_of_a_real_layer_equal_the_reference(layers, name):
    layer = layers[name]
    weight = layer.weight[:: len(layer.weight) // 64]
    hessian = reference.damped(layer.hessian)
    factor = factorize(layer.hessian.float(), 0.01, name)
    texts = ["unstructured"] if "down_proj" in name else ["unstructured", "row", "2:4"]
    for pattern in map(Pattern.parse, texts):
        new, mask = sparsegpt(weight, factor, pattern, 0.5)
        reference.assert_exact(mask, pattern, 0.5)
        expected, expected_mask = reference.sparsegpt(weight, hessian, pattern, 0.5)
        reference.assert_same_pruning(new, mask, expected, expected_mask)
        ours = reference.error(new, weight, hessian)
        assert ours == pytest.approx(reference.error(expected, weight, hessian), rel=5e-3)
