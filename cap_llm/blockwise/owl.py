"""OWL: uneven sparsity, from how many outliers the activations of each block have.

Yin et al. 2024, equation 3 and the released code: one sparsity for all matrices of a block. The
mean over all prunable weights is kept exactly, also where blocks differ in size (the released code
takes blocks as equals).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from cap_llm.blockwise.walk import Walk
from cap_llm.config import OwlConfig
from cap_llm.models.blocks import BlockModel, Group, matrix
from cap_llm.runtime.world import World
from cap_llm.solvers.hessian import Moments
from cap_llm.solvers.scores import wanda


def outlier_shares(
    model: BlockModel, walk: Walk, threshold: float, world: World, advance: Callable[[], None]
) -> list[float]:
    """Percentage of each block's Wanda scores that exceed `threshold` times their mean.

    Takes the walk through the whole dense model.
    """
    shares = []
    for i in range(len(model)):
        with model.block(i) as block:
            score: list[torch.Tensor] = []
            linears = model.linears(i)

            def collect(group: Group, inputs: Iterator, score=score, linears=linears) -> None:
                moments = Moments(group.columns, model.device, full=False)
                for x in inputs:
                    moments.add(x)
                moments.merge(world)
                mean_square = moments.finish(group.names[0]).diagonal
                score += [wanda(matrix(linears[n]).float(), mean_square) for n in group.names]

            walk.visit(i, block, collect)
        mean = sum(s.sum().item() for s in score) / sum(s.numel() for s in score)
        above = sum(int((s > threshold * mean).sum()) for s in score)
        shares.append(100 * above / sum(s.numel() for s in score))
        advance()
    return shares


def allocate(
    shares: list[float],
    sizes: list[int],
    sparsity: float,
    config: OwlConfig,
    gone: list[float] | None = None,
) -> list[float]:
    """Sparsity of each block: more outliers, fewer zeros.

    Args:
        shares: outlier percentage of each block.
        sizes: prunable weights of each block.
        sparsity: the mean to keep, over all weights.
        config: `strength` is half of the range that they span.
        gone: the share of each block that an earlier mask removes already; it cannot come back.

    Returns:
        A sparsity for each block, in [0.01, 0.99], and at least what is gone.
    """
    low, high = min(shares), max(shares)
    width = high - low
    kept = [2 * config.strength * (d - low) / width if width else 0.0 for d in shares]
    total = sum(sizes)
    mean = sum(k * n for k, n in zip(kept, sizes, strict=True)) / total
    wanted = [sparsity - (k - mean) for k in kept]
    least = [max(0.01, g) for g in gone or [0.0] * len(wanted)]
    # where a bound cuts, the others take over what it leaves
    for _ in range(len(wanted)):
        wanted = [min(0.99, max(low, s)) for low, s in zip(least, wanted, strict=True)]
        off = sparsity - sum(s * n for s, n in zip(wanted, sizes, strict=True)) / total
        free = [i for i, s in enumerate(wanted) if (s < 0.99 if off > 0 else s > least[i])]
        if abs(off) < 1e-12 or not free:
            break
        share = off * total / sum(sizes[i] for i in free)
        for i in free:
            wanted[i] += share
    return wanted
