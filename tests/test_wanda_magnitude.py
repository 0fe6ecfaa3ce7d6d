"""Wanda and magnitude choose what their papers say, with exact budgets."""

import pytest
import reference
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from cap_llm.blockwise.prune import (
    MEASURED,
    _measured_tokens,
    prune,
    prune_block,
    uniform,
)
from cap_llm.blockwise.walk import Walk
from cap_llm.config import OneshotConfig
from cap_llm.models.blocks import BlockModel
from cap_llm.runtime.memory import Memory
from cap_llm.runtime.world import World
from cap_llm.solvers.scores import magnitude, wanda
from cap_llm.sparsity.choose import choose
from cap_llm.sparsity.pattern import Pattern

CPU = torch.device("cpu")
PATTERNS = ["unstructured", "row", "1:4", "2:4", "4:8", "3:5"]


@pytest.fixture
def layer():
    """W [30, 80] and its inputs [500, 80]."""
    return reference.gaussian(30, 80), reference.correlated(500, 80)


@pytest.mark.parametrize("text", PATTERNS)
@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.9])
def test_magnitude_keeps_the_largest_weights(layer, text, sparsity):
    weight, pattern = layer[0], Pattern.parse(text)
    mask = choose(magnitude(weight), pattern, sparsity)
    assert torch.equal(mask, reference.choose(weight.double().abs(), pattern, sparsity))


@pytest.mark.parametrize("text", PATTERNS)
@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.9])
def test_wanda_keeps_the_largest_products_of_weight_and_input_norm(layer, text, sparsity):
    weight, x = layer
    pattern = Pattern.parse(text)
    mask = choose(wanda(weight, x.square().mean(0)), pattern, sparsity)
    expected = reference.choose(reference.wanda_score(weight, x), pattern, sparsity)
    assert torch.equal(mask, expected)


def test_with_equal_inputs_wanda_is_magnitude(layer):
    weight, pattern = layer[0], Pattern("row")
    mask = choose(wanda(weight, torch.full((80,), 4.0)), pattern, 0.5)
    assert torch.equal(mask, choose(magnitude(weight), pattern, 0.5))


def test_wanda_removes_dead_inputs_first(layer):
    weight, x = layer
    x[:, ::4] = 0
    mask = choose(wanda(weight, x.square().mean(0)), Pattern("row"), 0.25)
    assert not mask[:, ::4].any()
    assert int(mask.sum()) == 30 * 60


def test_the_sign_of_a_weight_does_not_matter(layer):
    weight, x = layer
    assert torch.equal(magnitude(weight), magnitude(-weight))
    assert torch.equal(wanda(weight, x.square().mean(0)), wanda(-weight, x.square().mean(0)))


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).eval()


def tiny_gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4)).eval()


def ids() -> torch.Tensor:
    return torch.randint(0, 64, (4, 24), generator=torch.Generator().manual_seed(0))


def test_unstructured_wanda_gives_every_output_row_the_same_zeros():
    config = OneshotConfig(method="wanda", sparsity=0.6)
    for name, mask in prune(tiny_llama(), ids(), config).items():
        assert set((~mask).sum(1).tolist()) == {round(0.6 * mask.shape[1])}, name


def test_unstructured_magnitude_has_one_threshold_a_matrix():
    model = tiny_llama()
    dense = {n: p.detach().clone() for n, p in model.named_parameters()}
    masks = prune(model, None, OneshotConfig(method="magnitude", sparsity=0.6))
    assert len(masks) == 14
    for name, mask in masks.items():
        weight = dense[name].abs()
        assert int((~mask).sum()) == round(0.6 * mask.numel())
        assert weight[~mask].max() <= weight[mask].min()
        assert torch.equal(model.get_parameter(name), dense[name] * mask)


def first_input(model: torch.nn.Module, name: str) -> torch.Tensor:
    """What the linear `name` reads [tokens, C], seen by a plain hook."""
    seen = []
    handle = model.get_submodule(name).register_forward_pre_hook(
        lambda module, args: seen.append(args[0].flatten(0, -2))
    )
    with torch.no_grad():
        model(ids())
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize(
    ("make", "linear"),
    [(tiny_llama, "model.layers.0.self_attn.q_proj"), (tiny_gpt2, "transformer.h.0.attn.c_attn")],
    ids=["llama", "gpt2"],
)
def test_a_model_is_pruned_as_its_matrices_are(make, linear, method):
    """The first linear reads what the dense model gives it, whichever way it is stored."""
    model = make()
    x = first_input(model, linear)
    module = model.get_submodule(linear)
    transposed = not isinstance(module, torch.nn.Linear)
    dense = module.weight.detach().clone()
    dense = dense.T.contiguous() if transposed else dense
    config = OneshotConfig(method=method, sparsity=0.5, refit=True)
    mask = prune(model, ids(), config)[linear + ".weight"]
    new = module.weight.T if transposed else module.weight
    hessian = reference.damped(reference.second_moment(x))
    if method == "sparsegpt":
        expected = reference.sparsegpt(dense, hessian, Pattern("unstructured"), 0.5)[1]
    elif method == "wanda":
        expected = reference.choose(reference.wanda_score(dense, x), Pattern("row"), 0.5)
    else:
        expected = reference.choose(magnitude(dense), Pattern("unstructured"), 0.5)
    assert (mask != expected).float().mean().item() < 5e-3
    assert not new[~mask].any()
    exact = reference.error(reference.refit(mask, dense, hessian), dense, hessian)
    assert reference.error(new, dense, hessian) == pytest.approx(exact, rel=1e-3)


@pytest.mark.parametrize("name", reference.REAL_LAYERS)
@pytest.mark.parametrize("text", ["row", "2:4"])
def test_wanda_on_a_real_layer_equals_the_reference(smollm2, calibration_ids, name, text):
    layer = reference.real_layers(smollm2, calibration_ids)[name]
    some = slice(0, 64)
    weight, pattern = layer.weight[some], Pattern.parse(text)
    mask = choose(wanda(weight, layer.hessian.diagonal().float()), pattern, 0.5)
    expected = reference.choose(reference.wanda_score(weight, layer.x), pattern, 0.5)
    # de-quantised weights make exact ties, which fp32 and float64 round apart
    assert (mask != expected).float().mean().item() <= 1e-3
    assert torch.equal((~mask).sum(1), (~expected).sum(1))


@pytest.mark.parametrize("name", reference.REAL_LAYERS)
def test_magnitude_on_a_real_layer_equals_the_reference(smollm2, calibration_ids, name):
    weight = reference.real_layers(smollm2, calibration_ids)[name].weight
    pattern = Pattern("unstructured")
    mask = choose(magnitude(weight), pattern, 0.5)
    order = weight.abs().flatten().argsort(stable=True)
    expected = torch.ones(weight.numel(), dtype=torch.bool)
    expected[order[: round(0.5 * weight.numel())]] = False
    assert torch.equal(mask, expected.reshape(weight.shape))


def test_wandas_error_is_that_of_the_first_sequences(tmp_path):
    model = tiny_llama()
    windows = torch.randint(0, 64, (MEASURED + 5, 24))
    linear = model.model.layers[0].self_attn.q_proj
    dense, seen = linear.weight.detach().clone(), []
    handle = linear.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    model(input_ids=windows[:MEASURED])
    handle.remove()
    blocks, wanda = BlockModel(model, CPU), OneshotConfig(method="wanda")
    walk = Walk(blocks, windows, Memory.plan(blocks.device), tmp_path)
    plan = uniform(blocks, wanda)
    rows = prune_block(blocks, 0, blocks.blocks[0], walk, wanda, plan, World.alone(CPU)).rows
    error = next(row.error for row in rows if "q_proj" in row.name)
    wrong = seen[0] @ (linear.weight - dense).T
    expected = wrong.square().sum() / (seen[0] @ dense.T).square().sum()
    assert error == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize(
    "counts, expected", [((21,), [16]), ((7, 6, 8), [7, 6, 3]), ((20, 20), [16, 0])]
)
def test_any_number_of_ranks_measures_by_the_same_sequences(counts, expected):
    class Walked:
        ids = (torch.zeros(2, 10), torch.zeros(1, 10))

    for rank, sequences in enumerate(expected):

        class Ranks:
            gather = staticmethod(lambda _: list(counts))

        Ranks.rank = rank
        assert _measured_tokens(Walked, Ranks) == 10 * sequences
