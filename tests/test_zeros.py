"""Zeros stay exactly zero while a plain module trains, and nothing else is held back."""

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from cap_llm.runtime.errors import UserError
from cap_llm.sparsity.keeper import (
    _MaskedParameter,
    checksum,
    keep_zeros,
    masks_of_zeros,
)

OPTIMIZERS = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "Adam, amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
}


def network(seed: int = 0) -> nn.Sequential:
    """Two matrices of odd shapes, half of their weights pruned, with a dense one between them."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 5), nn.Tanh(), nn.Linear(5, 3)
        )
        with torch.no_grad():
            for i in (0, 4):
                model[i].weight.view(-1)[::2] = 0
    return model


def backward(model, step: int) -> None:
    g = torch.Generator().manual_seed(step)
    x, y = torch.randn(16, 7, generator=g), torch.randn(16, 3, generator=g)
    (model(x) - y).square().mean().backward()


def train(model, optimizer, steps: int = 6, clip: float = 0.0) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        for part in range(2):  # gradients are accumulated
            backward(model, 2 * step + part)
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()


def masked(model, masks) -> list[torch.Tensor]:
    """The weights that should be zero."""
    return [model.get_parameter(name)[~mask] for name, mask in masks.items()]


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_zeros_stay_exact_and_would_regrow_without_the_keeper(kind):
    for kept in (True, False):
        model = network()
        before = copy.deepcopy(model.state_dict())
        masks = masks_of_zeros(model)
        optimizer = OPTIMIZERS[kind](model.parameters())
        if kept:
            keeper = keep_zeros(model, masks, optimizer)
        train(model, optimizer)
        for name, p in model.named_parameters():
            mask = masks.get(name, torch.ones_like(p, dtype=torch.bool))
            assert (p != before[name])[mask].all()  # all others have moved
        if kept:
            assert not any(w.any() for w in masked(model, masks))
            assert keeper.regrown() == {}
            keeper.check()
        else:
            assert all((w != 0).all() for w in masked(model, masks))


def test_shards_have_no_zeros_to_see():
    model = nn.Linear(4, 4)
    model.weight.ds_id = 7  # as ZeRO-3 marks what it shards
    with pytest.raises(UserError, match="sharded by ZeRO-3.*before deepspeed.initialize"):
        masks_of_zeros(model)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_optimizers_moments_never_see_a_pruned_weight(kind):
    model = network()
    masks = masks_of_zeros(model)
    optimizer = OPTIMIZERS[kind](model.parameters())
    keep_zeros(model, masks, optimizer)
    train(model, optimizer)
    for name, mask in masks.items():
        moments = [v for v in optimizer.state[model.get_parameter(name)].values() if v.dim()]
        assert moments
        assert all(not v[~mask].any() and v[mask].all() for v in moments)


def test_the_others_train_as_in_a_layer_that_masks_its_own_weight():
    """The slow way: the mask is a factor of the forward pass."""

    class Masked(nn.Linear):
        def forward(self, x):
            mask = masks.get(f"{self.place}.weight", torch.tensor(1.0))
            return nn.functional.linear(x, self.weight * mask, self.bias)

    model, slow = network(), network()
    masks = masks_of_zeros(model)
    for i in (0, 2, 4):
        slow[i].__class__, slow[i].place = Masked, i
    optimizer = OPTIMIZERS["AdamW"](model.parameters())
    keep_zeros(model, masks, optimizer)
    train(model, optimizer, clip=0.05)
    train(slow, OPTIMIZERS["AdamW"](slow.parameters()), clip=0.05)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p, slow.get_parameter(name))


def test_a_zero_inside_the_mask_may_train():
    model = network()
    masks = masks_of_zeros(model)
    r, c = masks["0.weight"].nonzero()[0]
    with torch.no_grad():
        model[0].weight[r, c] = 0
    optimizer = OPTIMIZERS["AdamW"](model.parameters())
    keep_zeros(model, masks, optimizer).check()
    train(model, optimizer)
    assert model[0].weight[r, c] != 0


def test_a_shard_begins_where_its_rank_among_those_that_share_it_says():
    p = nn.Parameter(torch.ones(2, 4))
    kept = _MaskedParameter("w", p, torch.tensor([[1, 0, 1, 1], [0, 0, 1, 1]]).bool())
    p.ds_tensor, p.ds_zero_partition_rank = torch.ones(4), 1  # this process is rank 0 of all
    ((shard, start),) = kept.model_weights()
    assert kept.mask_of(shard, start).tolist() == [False, False, True, True]


def test_weights_that_the_mask_drops_are_zero_from_the_start():
    model = network()
    mask = torch.rand(5, 9) < 0.5
    keep_zeros(model, {"2.weight": mask}, OPTIMIZERS["SGD"](model.parameters()))
    assert torch.equal(model[2].weight != 0, mask)


def test_gradients_are_masked_before_they_are_clipped():
    model, plain = network(), network()
    masks = masks_of_zeros(model)
    keep_zeros(model, masks, OPTIMIZERS["SGD"](model.parameters()))
    for m in (model, plain):
        backward(m, 0)
    total = 0.0
    for name, p in plain.named_parameters():
        gradient = p.grad * masks.get(name, 1)
        total += gradient.double().square().sum().item()
        assert torch.equal(model.get_parameter(name).grad, gradient)
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1e9).item()
    assert norm == pytest.approx(total**0.5, rel=1e-5)
    assert norm < nn.utils.clip_grad_norm_(plain.parameters(), 1e9).item()


def test_a_gradient_that_is_no_number_is_not_hidden():
    model = network()
    keep_zeros(model, masks_of_zeros(model), OPTIMIZERS["SGD"](model.parameters()))
    (model(torch.full((2, 7), torch.nan)).sum()).backward()
    assert model[0].weight.grad.isnan().all()


@pytest.mark.parametrize("value", [1.0, -1e-30, torch.nan])
def test_a_weight_written_by_hand_is_found_and_named(value):
    model = network()
    masks = masks_of_zeros(model)
    keeper = keep_zeros(model, masks, OPTIMIZERS["AdamW"](model.parameters()))
    keeper.check()
    r, c = (~masks["4.weight"]).nonzero()[1]
    with torch.no_grad():
        model[4].weight[r, c] = value
    with pytest.raises(UserError, match="pruned weights have regrown.*4.weight"):
        keeper.check()
    with torch.no_grad():
        model[4].weight[r, c] = 1
    keeper.apply()
    keeper.check()


@pytest.mark.parametrize("place", ["2.weight", "0.weight", "1.weight"])
def test_weights_that_become_zero_outside_the_masks_are_found_and_named(place):
    model = network()
    model[1] = nn.LayerNorm(9)  # without a mask, as 2.weight
    masks = masks_of_zeros(model, ["0.weight", "4.weight"])
    keeper = keep_zeros(model, masks, OPTIMIZERS["AdamW"](model.parameters()))
    keeper.check()
    with torch.no_grad():
        weight = model.get_parameter(place)
        weight.view(-1)[weight.view(-1).nonzero()[0]] = 0
    with pytest.raises(UserError, match=f"1 of them in {place}"):
        keeper.check()


def test_zeros_from_the_start_and_a_few_by_chance_are_no_damage():
    model = nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 10))
    with torch.no_grad():
        model[0].bias.zero_()
        model[1].weight[:, :15] = 0
    keeper = keep_zeros(model, {}, OPTIMIZERS["SGD"](model.parameters()))
    keeper.check()
    with torch.no_grad():
        model[0].weight.view(-1)[:6] = 0
    keeper.check()
    with torch.no_grad():
        model[0].weight.view(-1)[6] = 0
    with pytest.raises(UserError, match="7 of them in 0.weight"):
        keeper.check()


def test_a_frozen_weight_keeps_its_mask():
    model = network()
    masks = masks_of_zeros(model)
    model[0].weight.requires_grad_(False)
    optimizer = OPTIMIZERS["AdamW"](p for p in model.parameters() if p.requires_grad)
    keeper = keep_zeros(model, masks, optimizer)
    train(model, optimizer)
    keeper.check()
    with torch.no_grad():
        model[0].weight.add_(1)
    assert keeper.regrown() == {"0.weight": int((~masks["0.weight"]).sum())}


@pytest.mark.parametrize("kind", [torch.uint8, torch.float32, torch.int64])
@pytest.mark.parametrize("true", [1, 255])
def test_a_mask_of_another_type_is_its_truth(kind, true):
    model, mask = network(), torch.rand(5, 9) < 0.5
    optimizer = OPTIMIZERS["SGD"](model.parameters())
    keeper = keep_zeros(model, {"2.weight": mask.to(kind) * true}, optimizer)
    assert torch.equal(model[2].weight != 0, mask) and keeper.n_masked == (~mask).sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_checksum_is_the_sum_of_its_pieces_and_sees_places_and_bits(dtype):
    weights = torch.randn(1000).to(dtype)
    whole = checksum(weights, 0)
    at = [0, 1, 400, 999, 1000]
    pieces = (checksum(weights[a:b], a) for a, b in itertools.pairwise(at))
    assert (sum(pieces) - whole) % 2**64 == 0
    swapped = weights.clone()
    swapped[[3, 700]] = weights[[700, 3]]
    assert checksum(swapped, 0) != whole
    assert checksum(weights, 1) != whole


def test_links_to_weights_of_another_parameter_are_refused():
    model = network().to(torch.bfloat16)
    group = [p for p in model.parameters() if p.dim() > 1]

    class Wrapper:
        fp16_groups = [group]
        fp32_groups = [[p.detach().float() for p in (group[0], group[2], group[1])]]
        optimizer = torch.optim.AdamW(fp32_groups[0])

    Wrapper.fp32_groups[0][1] = torch.randn_like(group[1].float())
    with pytest.raises(UserError, match="2.weight .2 parameters.*not its own"):
        keep_zeros(model, {}, Wrapper())


def test_the_weights_themselves_are_masked_after_every_step():
    model = network()
    masks = masks_of_zeros(model)
    optimizer = OPTIMIZERS["AdamW"](model.parameters())
    keeper = keep_zeros(model, masks, optimizer)
    with torch.no_grad():
        model[0].weight += 1
    train(model, optimizer, 1)
    keeper.check()


def test_a_step_of_some_weights_masks_these_alone():
    """As ZeRO-3 steps: the optimizer holds a sub-group at a time."""
    model = network()
    masks = masks_of_zeros(model)
    optimizer = OPTIMIZERS["SGD"](model.parameters())
    keeper = keep_zeros(model, masks, optimizer)
    with torch.no_grad():
        for name in masks:
            model.get_parameter(name).add_(1)
    optimizer.param_groups[0]["params"] = [model[0].weight]
    optimizer.step()
    assert keeper.regrown() == {"4.weight": int((~masks["4.weight"]).sum())}


def test_the_flat_fp32_weights_of_deepspeeds_fused_adam_are_masked():
    """Stage 0 in 16 bits: the 16-bit weights are copies of a flat fp32 one that is stepped."""
    model = network()
    masks = {name: torch.rand(p.shape) < 0.5 for name, p in model.named_parameters() if p.dim() > 1}
    group = list(model.parameters())

    class Wrapper:
        fp16_groups = [group]
        fp32_groups_flat = [torch.cat([p.detach().flatten() for p in group]).requires_grad_()]
        optimizer = torch.optim.AdamW(fp32_groups_flat, lr=0.1)

        def step(self):
            self.fp32_groups_flat[0].grad = torch.cat([p.grad.flatten() for p in group])
            self.optimizer.step()
            parts = self.fp32_groups_flat[0].detach().split([p.numel() for p in group])
            for p, part in zip(group, parts, strict=True):
                p.data.copy_(part.view(p.shape))

    keeper = keep_zeros(model, masks, wrapper := Wrapper())
    backward(model, 0)
    wrapper.step()
    keeper.check()
    assert all(
        p.count_nonzero() == masks[n].sum() for n, p in model.named_parameters() if n in masks
    )


def test_regrown_weights_are_counted():
    model = network()
    masks = masks_of_zeros(model)
    keeper = keep_zeros(model, masks, OPTIMIZERS["AdamW"](model.parameters()))
    with torch.no_grad():
        for name, n in (("0.weight", 1), ("4.weight", 3)):
            for r, c in (~masks[name]).nonzero()[:n]:
                model.get_parameter(name)[r, c] = 1
    assert keeper.regrown() == {"0.weight": 1, "4.weight": 3}


def test_a_keeper_that_was_removed_keeps_nothing():
    model = network()
    masks = masks_of_zeros(model)
    optimizer = OPTIMIZERS["AdamW"](model.parameters())
    keep_zeros(model, masks, optimizer).remove()
    train(model, optimizer)
    assert all((w != 0).all() for w in masked(model, masks))


@given(rows=st.integers(1, 7), columns=st.integers(1, 7), seed=st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_a_mask_of_any_shape_is_kept_bit_by_bit(rows, columns, seed):
    mask = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < 0.5
    model = nn.Linear(columns, rows, bias=False)
    nn.init.ones_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=1)
    keep_zeros(model, {"weight": mask}, optimizer)
    model(torch.ones(1, columns)).sum().backward()
    assert torch.equal(model.weight.grad, mask.float())
    optimizer.step()
    optimizer.step()
    assert torch.equal(model.weight.detach(), -1.0 * mask)


class Muon(torch.optim.SGD):
    """Stands for an optimizer whose update of a weight depends on the whole matrix."""


REFUSED = {
    "an unknown name": ({"0.weights": torch.ones(9, 7)}, torch.optim.SGD, "no parameter 0.weights"),
    "a wrong shape": ({"0.weight": torch.ones(7, 9)}, torch.optim.SGD, r"0.weight .*\[7, 9\]"),
    "a mixing optimizer": ({"0.weight": torch.ones(9, 7)}, Muon, "Muon"),
    "no optimizer": ({"0.weight": torch.ones(9, 7)}, None, "optimizer"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_kept_is_refused_and_leaves_the_model_alone(case):
    masks, optimizer, message = REFUSED[case]
    model = network()
    before = copy.deepcopy(model.state_dict())
    optimizer = optimizer and optimizer(model.parameters(), lr=0.1)
    with pytest.raises(UserError, match=message):
        keep_zeros(model, {n: m.bool() for n, m in masks.items()}, optimizer)
    backward(model, 0)
    assert model[0].weight.grad.all()  # no hook was left behind
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_an_optimizer_that_has_stepped_before_is_refused(kind):
    model = network()
    masks = masks_of_zeros(model)
    optimizer = OPTIMIZERS[kind](model.parameters())
    train(model, optimizer, 1)
    with pytest.raises(UserError, match="moments"):
        keep_zeros(model, masks, optimizer)


def test_masks_of_zeros_are_the_matrices_with_a_zero_or_the_named_ones():
    model = network()
    with torch.no_grad():
        model[4].bias.zero_()
    masks = masks_of_zeros(model)
    assert set(masks) == {"0.weight", "4.weight"}
    named = masks_of_zeros(model, ["2.weight", "4.bias"])
    assert named["2.weight"].all() and not named["4.bias"].any() and len(named) == 2
    for name, mask in (masks | named).items():
        p = model.get_parameter(name)
        assert mask.shape == p.shape and mask.dtype == torch.bool
        for value, on in zip(p.flatten().tolist(), mask.flatten().tolist(), strict=True):
            assert on == (value != 0)
