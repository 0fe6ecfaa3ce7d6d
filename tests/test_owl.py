"""OWL spreads the sparsity over the blocks by their outliers and keeps its mean exactly."""

import pytest
import reference
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from cap_llm.blockwise.owl import allocate, outlier_shares
from cap_llm.blockwise.walk import Walk
from cap_llm.config import OwlConfig
from cap_llm.models.blocks import BlockModel
from cap_llm.runtime.memory import Memory
from cap_llm.runtime.world import World


def mean(sparsities: list[float], sizes: list[int]) -> float:
    return sum(s * n for s, n in zip(sparsities, sizes, strict=True)) / sum(sizes)


blocks = st.lists(
    st.tuples(st.floats(0, 100), st.integers(1, 10**9)), min_size=1, max_size=100
).map(lambda pairs: tuple(map(list, zip(*pairs, strict=True))))


@given(blocks, st.floats(0.01, 0.99), st.floats(0.001, 0.49))
@settings(deadline=None, max_examples=500)
def test_the_mean_is_exact_and_every_block_is_bounded(shares_and_sizes, sparsity, strength):
    shares, sizes = shares_and_sizes
    result = allocate(shares, sizes, sparsity, OwlConfig(strength=strength))
    assert len(result) == len(shares)
    assert mean(result, sizes) == pytest.approx(sparsity, abs=1e-9)
    assert all(0.01 - 1e-12 <= s <= 0.99 + 1e-12 for s in result)


@given(blocks, st.floats(0.01, 0.99), st.floats(0.001, 0.49))
@settings(deadline=None, max_examples=300)
def test_more_outliers_never_mean_more_zeros(shares_and_sizes, sparsity, strength):
    shares, sizes = shares_and_sizes
    result = allocate(shares, sizes, sparsity, OwlConfig(strength=strength))
    for d, s in zip(shares, result, strict=True):
        for other_d, other_s in zip(shares, result, strict=True):
            assert d <= other_d or s <= other_s + 1e-12


@given(blocks, st.floats(0.3, 0.7), st.floats(0.001, 0.14))
@settings(deadline=None, max_examples=300)
def test_away_from_the_bounds_it_is_the_papers_equation(shares_and_sizes, sparsity, strength):
    shares, sizes = shares_and_sizes
    assume(max(shares) - min(shares) > 1e-6)
    result = allocate(shares, sizes, sparsity, OwlConfig(strength=strength))
    assert result == pytest.approx(reference.owl(shares, sizes, sparsity, strength), abs=1e-9)
    assert max(result) - min(result) == pytest.approx(2 * strength, abs=1e-9)


def test_the_block_with_most_outliers_keeps_most():
    result = allocate([1.0, 5.0, 3.0], [10, 10, 10], 0.7, OwlConfig(strength=0.08))
    assert result == pytest.approx([0.78, 0.62, 0.70])


def test_large_blocks_weigh_more():
    result = allocate([1.0, 5.0], [30, 10], 0.7, OwlConfig(strength=0.08))
    assert result == pytest.approx([0.74, 0.58])


@pytest.mark.parametrize("n_blocks", [1, 2, 12])
def test_equal_blocks_are_pruned_equally(n_blocks):
    result = allocate([2.5] * n_blocks, list(range(1, n_blocks + 1)), 0.7, OwlConfig())
    assert result == pytest.approx([0.7] * n_blocks, abs=1e-12)


@given(blocks, st.data(), st.floats(0.001, 0.49))
@settings(deadline=None, max_examples=300)
def test_what_is_gone_does_not_come_back_and_the_mean_is_kept(shares_and_sizes, data, strength):
    shares, sizes = shares_and_sizes
    n = len(shares)
    gone = data.draw(st.lists(st.floats(0, 0.9), min_size=n, max_size=n))
    sparsity = data.draw(st.floats(max(0.01, mean(gone, sizes)), 0.95))
    result = allocate(shares, sizes, sparsity, OwlConfig(strength=strength), gone)
    assert mean(result, sizes) == pytest.approx(max(sparsity, mean(gone, sizes)), abs=1e-2)
    assert all(s >= g - 1e-12 for s, g in zip(result, gone, strict=True))


def test_where_a_bound_cuts_the_others_take_over():
    shares, sizes = [0.0, 1.0, 2.0, 10.0], [1, 1, 1, 1]
    result = allocate(shares, sizes, 0.95, OwlConfig(strength=0.2))
    assert max(result) == 0.99
    assert mean(result, sizes) == pytest.approx(0.95)
    assert result[3] < min(result[:3])


def test_the_mean_is_kept_where_both_bounds_cut():
    result = allocate([0.0, 1.0], [1, 1], 0.496, OwlConfig(strength=0.495))
    assert mean(result, [1, 1]) == pytest.approx(0.496, abs=1e-9)


def outlier_share(model: LlamaForCausalLM, ids: torch.Tensor, i: int, threshold: float) -> float:
    """The released code's measure, by plain hooks on the dense model."""
    scores = []
    handles = [
        module.register_forward_pre_hook(
            lambda module, args: scores.append(
                reference.wanda_score(module.weight, args[0].flatten(0, -2)).flatten()
                / args[0].flatten(0, -2).shape[0] ** 0.5
            )
        )
        for module in model.model.layers[i].modules()
        if isinstance(module, torch.nn.Linear)
    ]
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    score = torch.cat(scores)
    return 100 * (score > threshold * score.mean()).double().mean().item()


def test_outlier_shares_are_those_of_the_dense_model(tmp_path):
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=80,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    ).eval()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[:, :4] *= 20
    before = {n: p.clone() for n, p in model.state_dict().items()}
    ids = torch.randint(0, 64, (3, 16))
    expected = [outlier_share(model, ids, i, 3.0) for i in range(3)]
    blocks = BlockModel(model, torch.device("cpu"))
    advanced = []
    walk = Walk(blocks, ids, Memory.plan(blocks.device), tmp_path)
    shares = outlier_shares(blocks, walk, 3.0, World("cpu"), lambda: advanced.append(1))
    assert shares == pytest.approx(expected, abs=0.02)
    assert len(set(shares)) == 3
    assert len(advanced) == 3
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())
