"""OWL: sparsity per block from the share of outliers in its activations.

Yin et al. 2024, equation 3 and the released code; all matrices of a block have the same sparsity.
The mean over all prunable weights is exact even if blocks differ in size, unlike in the released
code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from cap_llm.blockwise.walk import Walk
from cap_llm.config import OwlConfig
from cap_llm.models.blocks import BlockModel, Group
from cap_llm.models.skeleton import matrix
from cap_llm.runtime.world import World
from cap_llm.solvers.hessian import Moments
from cap_llm.solvers.scores import wanda


def outlier_shares(
    model: BlockModel, walk: Walk, threshold: float, world: World, advance: Callable[[], None]
) -> list[float]:
    """Returns the percentage of each block's Wanda scores above `threshold` times their mean.

    Passes the walk through the whole dense model.
    """
    shares = []
    for i in range(len(model)):
        with model.block(i) as block:
            scores: list[torch.Tensor] = []
            linears = model.linears(i)

            def collect(group: Group, inputs: Iterator, scores=scores, linears=linears) -> None:
                moments = Moments(group.columns, model.device, full=False)
                for x in inputs:
                    moments.add(x)
                moments.merge(world)
                mean_square = moments.finish(group.names[0]).diagonal
                scores += [wanda(matrix(linears[n]).float(), mean_square) for n in group.names]

            walk.visit(i, block, collect)
        n_scores = sum(s.numel() for s in scores)
        mean = sum(s.sum().item() for s in scores) / n_scores
        above = sum(int((s > threshold * mean).sum()) for s in scores)
        shares.append(100 * above / n_scores)
        advance()
    return shares


def allocate(
    shares: list[float],
    sizes: list[int],
    sparsity: float,
    config: OwlConfig,
    minimum: list[float] | None = None,
) -> list[float]:
    """Allocates a sparsity per block: the more outliers, the fewer zeros.

    Args:
        shares: outlier percentage per block.
        sizes: prunable weights per block.
        sparsity: mean over all weights.
        config: `strength` is half the range of sparsities.
        minimum: sparsity per block that an existing mask already has.

    Returns:
        A sparsity per block, in [0.01, 0.99] and at least `minimum`.
    """
    low, high = min(shares), max(shares)
    width = high - low
    offsets = [2 * config.strength * (d - low) / width if width else 0.0 for d in shares]
    total = sum(sizes)
    mean = sum(k * n for k, n in zip(offsets, sizes, strict=True)) / total
    result = [sparsity - (k - mean) for k in offsets]
    lower = [max(0.01, s) for s in minimum or [0.0] * len(result)]
    # redistribute what the bounds cut off over the blocks within them
    for _ in range(len(result)):
        result = [min(0.99, max(low, s)) for low, s in zip(lower, result, strict=True)]
        error = sparsity - sum(s * n for s, n in zip(result, sizes, strict=True)) / total
        free = [i for i, s in enumerate(result) if (s < 0.99 if error > 0 else s > lower[i])]
        if abs(error) < 1e-12 or not free:
            break
        change = error * total / sum(sizes[i] for i in free)
        for i in free:
            result[i] += change
    return result
