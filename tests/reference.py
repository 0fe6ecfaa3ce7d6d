"""Slow reference solvers in float64, written from the papers: loops and sorts, no tricks.

Also the inputs that the tests of the solvers share: correlated activations, and real layers.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from cap_llm.sparsity.pattern import Pattern


def keep_highest(score: list[float], n_drop: int, allowed: list[bool]) -> list[bool]:
    """Sorts the allowed scores and drops the lowest; of equals the first in memory goes first."""
    order = sorted((s, i) for i, s in enumerate(score) if allowed[i])
    keep = list(allowed)
    for _, i in order[:n_drop]:
        keep[i] = False
    return keep


def choose(score, pattern: Pattern, sparsity: float, allowed=None) -> torch.Tensor:
    """The mask [R, C] that keeps the highest scores, unit by unit (matrix, row or group)."""
    if allowed is None:
        allowed = torch.ones_like(score, dtype=torch.bool)
    width = {"unstructured": score.numel(), "row": score.shape[1], "n:m": pattern.m}[pattern.kind]
    zeros = pattern.m - pattern.n if pattern.m else round(sparsity * width)
    mask = []
    for s, a in zip(
        score.reshape(-1, width).tolist(), allowed.reshape(-1, width).tolist(), strict=True
    ):
        mask.append(keep_highest(s, max(0, zeros - a.count(False)), a))
    return torch.tensor(mask).reshape(score.shape)


def second_moment(x: torch.Tensor) -> torch.Tensor:
    """E[x x^T] of inputs [tokens, C]."""
    x = x.double()
    return x.T @ x / len(x)


def damped(hessian: torch.Tensor, damping: float = 0.01) -> torch.Tensor:
    """H plus a ridge, relative to the mean diagonal; dead inputs get a 1."""
    h = hessian.double().clone()
    ridge = damping * h.diagonal().mean()
    for j in range(len(h)):
        h[j, j] = (h[j, j] if h[j, j] != 0 else 1.0) + ridge
    return h


def error(weight: torch.Tensor, dense: torch.Tensor, hessian: torch.Tensor) -> float:
    """tr((W - W_d) H (W - W_d)^T)."""
    d = weight.double() - dense.double()
    return (d @ hessian.double() * d).sum().item()


def sparsegpt(
    weight, hessian, pattern: Pattern, sparsity: float, allowed=None, block_size: int = 128
) -> tuple[torch.Tensor, torch.Tensor]:
    """SparseGPT column by column, every update over all columns to the right. `hessian` damped.

    The share of a block is what the total asks for up to its end, so that the whole is exact.
    """
    w = weight.double().clone()
    n_rows, n_columns = w.shape
    if allowed is None:
        allowed = torch.ones_like(w, dtype=torch.bool)
    inverse = torch.linalg.inv(hessian.double())
    upper = torch.linalg.cholesky((inverse + inverse.T) / 2, upper=True)
    mask = allowed.clone()
    size = n_columns if pattern.kind == "row" else w.numel()
    units = [slice(r, r + 1) for r in range(n_rows)] if pattern.kind == "row" else [slice(None)]
    for start in range(0, n_columns, block_size):
        block = slice(start, min(start + block_size, n_columns))
        if not pattern.m:
            score = (w[:, block] / upper.diagonal()[block]).square()
            for unit in units:
                total = int(allowed[unit].sum())
                goal = max(0, round(sparsity * size) - (size - total))
                seen = int(allowed[unit, : block.stop].sum())
                removed = int((allowed & ~mask)[unit].sum())
                drop = round(goal * seen / max(1, total)) - removed
                inside = allowed[unit, block].flatten()
                ranked = score[unit].flatten().masked_fill(~inside, torch.inf)
                keep = inside.clone()
                keep[ranked.argsort(stable=True)[:drop]] = False
                mask[unit, block] = keep.reshape(score[unit].shape)
        for j in range(block.start, block.stop):
            if pattern.m and j % pattern.m == 0:
                group = slice(j, j + pattern.m)
                score = (w[:, group] / upper.diagonal()[group]).square()
                mask[:, group] = choose(score, pattern, 0, allowed[:, group])
            pruned = w[:, j] * ~mask[:, j]
            w[:, j:] -= (pruned / upper[j, j])[:, None] * upper[j, j:]
    return w * mask, mask


def refit(mask: torch.Tensor, target: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """Solves the normal equations of each row on its mask."""
    h, result = hessian.double(), torch.zeros(target.shape, dtype=torch.float64)
    for r in range(len(target)):
        on = mask[r].nonzero().flatten()
        right = h[on] @ target[r].double()
        result[r, on] = torch.linalg.solve(h[on][:, on], right)
    return result


def wanda_score(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """|W| times the norm of each input over the tokens."""
    score = weight.double().abs()
    for j in range(score.shape[1]):
        score[:, j] *= x[:, j].double().norm()
    return score


def owl(shares: list[float], sizes: list[int], sparsity: float, strength: float) -> list[float]:
    """OWL before clamping: sparsity of each block from its outlier share."""
    low, high = min(shares), max(shares)
    keep = [2 * strength * (d - low) / (high - low) for d in shares]
    mean = sum(k * n for k, n in zip(keep, sizes, strict=True)) / sum(sizes)
    return [1 - (k + (1 - sparsity) - mean) for k in keep]


def assert_same_pruning(new, mask, expected, expected_mask) -> None:
    """The same mask and weights, but for what follows once rounding swaps two near-equal scores.

    Mostly the masks are equal to the last bit. Where one swap happens, its row's errors differ from
    there on, and so does the choice in later columns (of all rows, where they share a quota): how
    far that spreads depends on the order of summation, so on the number of threads. Up to the first
    swap all must agree. `new` and `mask` are [R, C] in fp32, what is expected in float64.
    """
    differs = mask != expected_mask
    assert differs.float().mean().item() <= 2e-2
    same = differs.long().cumsum(1) == 0  # left of a row's first swap
    assert same.float().mean().item() > 0.75
    distance = ((new.double() - expected) * same).norm()
    assert distance.item() <= 1e-3 * (expected * same).norm().item()


def assert_exact(mask: torch.Tensor, pattern: Pattern, sparsity: float) -> None:
    """The mask [R, C] removes what its pattern says, to the last weight."""
    if pattern.m:
        assert set(mask.reshape(-1, pattern.m).sum(1).tolist()) == {pattern.n}
    elif pattern.kind == "row":
        assert set((~mask).sum(1).tolist()) == {round(sparsity * mask.shape[1])}
    else:
        assert int((~mask).sum()) == round(sparsity * mask.numel())


def correlated(tokens: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Inputs [tokens, C] of a decaying spectrum with a few loud features, as in models."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=g)
    mix *= torch.linspace(1, 0.05, columns)[:, None]
    x = torch.randn(tokens, columns, generator=g) @ mix
    x[:, :: max(1, columns // 3)] *= 6
    return x


def gaussian(rows: int, columns: int, seed: int = 1) -> torch.Tensor:
    """A weight [R, C]."""
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def problem(rows: int = 24, columns: int = 96, seed: int = 0):
    """A target W_d [R, C] and a damped H [C, C]."""
    h = damped(second_moment(correlated(4 * columns, columns, seed))).float()
    return gaussian(rows, columns, seed + 1), h


@dataclass
class Layer:
    """A real matrix [R, C], its inputs [tokens, C] and their second moment in float64."""

    weight: torch.Tensor
    x: torch.Tensor
    hessian: torch.Tensor


REAL_LAYERS = [
    f"model.layers.{i}.{name}"
    for i in (0, 10, 29)
    for name in ("self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
]


@functools.cache
def real_layers(folder: Path, ids: torch.Tensor) -> dict[str, Layer]:
    """REAL_LAYERS of a model directory with what they read for ids [B, T], by plain hooks."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    inputs: dict[str, list[torch.Tensor]] = {name: [] for name in REAL_LAYERS}
    for name, seen in inputs.items():
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, seen=seen: seen.append(args[0].flatten(0, -2).clone())
        )
    with torch.no_grad():
        for two in ids.split(2):
            model.base_model(two, use_cache=False)
    layers = {}
    for name, seen in inputs.items():
        x = torch.cat(seen)
        weight = model.get_submodule(name).weight.detach().clone()
        layers[name] = Layer(weight, x, second_moment(x))
    return layers
