"""Second moments are exact over any split of tokens and ranks; damping makes them factorisable."""

import threading

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cap_llm.runtime.errors import UserError
from cap_llm.runtime.world import World
from cap_llm.solvers.hessian import Moments, factorize

CPU = torch.device("cpu")


def moments(x: torch.Tensor, cuts: list[int], full: bool = True) -> Moments:
    result = Moments(x.shape[1], CPU, full)
    for part in torch.tensor_split(x, cuts):
        result.add(part)
    return result


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    scale = expected.abs().max().item()
    assert (actual.double() - expected).abs().max().item() <= tolerance * scale


@given(st.lists(st.integers(0, 90), max_size=6).map(sorted), st.booleans())
@settings(deadline=None, max_examples=40)
def test_any_split_of_tokens_gives_the_mean_outer_product(cuts, full):
    x = reference.correlated(90, 33)
    expected = reference.second_moment(x)
    result = moments(x, cuts, full).finish("w")
    assert result.tokens == 90
    assert_close(result.diagonal, expected.diagonal())
    if full:
        assert_close(result.hessian, expected)


@pytest.mark.parametrize("columns", [1, 255, 256, 257, 600])
def test_any_number_of_columns_is_computed_in_full(columns):
    x = reference.correlated(300, columns)
    h = moments(x, [100]).finish("w").hessian
    assert_close(h, reference.second_moment(x))
    assert_close(h, h.T.double(), 1e-6)


def test_leading_dimensions_are_tokens():
    x = reference.correlated(60, 9)
    three = Moments(9, CPU)
    three.add(x.reshape(3, 20, 9))
    assert three.tokens == 60
    assert_close(three.finish("w").hessian, reference.second_moment(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_summed_in_fp32(dtype):
    x = (100 * reference.correlated(4096, 16)).to(dtype)  # the sum lies far above 65504
    h = moments(x, [1000, 2000]).finish("w").hessian
    assert h.dtype == torch.float32
    assert_close(h, reference.second_moment(x))


def test_only_the_diagonal_is_there_where_only_it_was_asked_for():
    with pytest.raises(ValueError, match="diagonal"):
        _ = moments(reference.correlated(10, 4), [], full=False).hessian


class TwoRanks:
    """A world of two ranks that are threads of this process."""

    size = 2

    def __init__(self, rank: int, barrier: threading.Barrier, slots: list):
        self.rank, self.barrier, self.slots = rank, barrier, slots

    def gather(self, value) -> list:
        self.slots[self.rank] = value
        self.barrier.wait(30)
        values = list(self.slots)
        self.barrier.wait(30)
        return values

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.copy_(sum(self.gather(tensor.clone())))


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("cut", [0, 17, 50])
def test_the_shares_of_two_ranks_merge_to_the_whole(cut, full):
    x = reference.correlated(100, 20)
    barrier, slots = threading.Barrier(2), [None, None]
    ranks = [moments(part, [], full) for part in (x[:cut], x[cut:])]
    threads = [
        threading.Thread(target=m.merge, args=(TwoRanks(r, barrier, slots),))
        for r, m in enumerate(ranks)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for m in ranks:
        assert m.tokens == 100
        assert_close(m.finish("w").diagonal, reference.second_moment(x).diagonal())
        if full:
            assert_close(m.hessian, reference.second_moment(x))


def test_a_world_of_one_rank_changes_nothing():
    m = moments(reference.correlated(40, 6), [])
    m.merge(World("cpu"))
    assert m.tokens == 40
    assert_close(m.finish("w").hessian, reference.second_moment(reference.correlated(40, 6)))


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_an_activation_that_is_not_finite_is_told_by_name(bad, full):
    x = reference.correlated(50, 7)
    x[31, 4] = bad
    with pytest.raises(UserError, match=r"layers\.3\.fc2"):
        moments(x, [20], full).finish("layers.3.fc2")


@pytest.mark.parametrize("columns", [1, 2, 48, 300])
def test_the_factor_is_upper_triangular_and_gives_the_inverse(columns):
    h = reference.second_moment(reference.correlated(400, columns)).float()
    factor = factorize(h.clone(), 0.01, "w")
    expected = reference.damped(h)
    assert_close(factor.hessian, expected, 1e-6)
    assert torch.equal(factor.upper, factor.upper.triu())
    assert bool((factor.upper.diagonal() > 0).all())
    u = factor.upper.double()
    assert_close(u.T @ u @ expected, torch.eye(columns, dtype=torch.float64), 1e-3)
    for one in (factor, factorize(h.clone(), 0.01, "w")):  # with U at hand, and without
        assert_close(one.inverse.double() @ expected, torch.eye(columns, dtype=torch.float64), 1e-3)
    assert factor.damping == 0.01
    assert not factor.dead.any()


def test_dead_inputs_are_found_and_do_no_harm():
    x = reference.correlated(400, 30)
    dead = [0, 11, 29]
    x[:, dead] = 0
    factor = factorize(moments(x, []).finish("w").hessian, 0.01, "w")
    assert factor.dead.nonzero().flatten().tolist() == dead
    alive = ~factor.dead
    u = factor.upper.double()
    h = reference.damped(reference.second_moment(x))
    assert_close((u.T @ u)[alive][:, alive], torch.linalg.inv(h[alive][:, alive]), 1e-3)
    assert not (u.T @ u)[alive][:, dead].any()


def test_inputs_that_are_all_dead_are_factorised():
    factor = factorize(torch.zeros(5, 5), 0.01, "w")
    assert factor.dead.all()
    assert torch.equal(factor.upper, torch.eye(5))


def with_lowest_eigenvalue(low: float) -> torch.Tensor:
    """A symmetric matrix [8, 8] of mean diagonal 1 whose lowest eigenvalue is `low`."""
    values = torch.full((8,), (8 - low) / 7, dtype=torch.float64)
    values[0] = low
    q = torch.linalg.qr(reference.gaussian(8, 8).double()).Q
    return ((q * values) @ q.T).float()


@pytest.mark.parametrize(("low", "damping"), [(0.5, 0.01), (-0.05, 0.1), (-0.5, 1.0), (-5.0, 10.0)])
def test_damping_is_raised_tenfold_until_it_suffices(low, damping):
    h = with_lowest_eigenvalue(low)
    factor = factorize(h.clone(), 0.01, "w")
    assert factor.damping == pytest.approx(damping)
    expected = h.double() + damping * torch.eye(8, dtype=torch.float64)
    assert_close(factor.hessian, expected, 1e-5)
    u = factor.upper.double()
    assert_close(u.T @ u, torch.linalg.inv(expected), 1e-3)


def test_a_hessian_that_three_raises_do_not_mend_is_refused_by_name():
    with pytest.raises(UserError, match=r"layers\.7\.q_proj.* 10\b"):
        factorize(with_lowest_eigenvalue(-50.0), 0.01, "layers.7.q_proj")


def test_fewer_tokens_than_columns_are_factorised_with_damping():
    x = reference.correlated(10, 64)
    x[:, 32:] = x[:, :32]  # and every feature twice
    h = reference.second_moment(x)
    factor = factorize(h.float(), 0.01, "w")
    u = factor.upper.double()
    assert_close(u.T @ u @ reference.damped(h), torch.eye(64, dtype=torch.float64), 1e-3)
