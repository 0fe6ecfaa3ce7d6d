"""Prune with your own solver, block by block.

    python examples/custom_solver.py

Weights are scored by relative importance (RIA, Zhang et al. 2024). Each block is calibrated on the
output of the pruned blocks before it.
"""

import tempfile
from pathlib import Path

import torch
from prune_in_memory import tiny_model

from cap_llm import perplexity
from cap_llm.blockwise.walk import Walk
from cap_llm.models.blocks import BlockModel, Group
from cap_llm.models.skeleton import matrix
from cap_llm.runtime.memory import Memory
from cap_llm.solvers.hessian import Moments
from cap_llm.sparsity.choose import choose
from cap_llm.sparsity.pattern import Pattern


def ria(weight: torch.Tensor, mean_square: torch.Tensor) -> torch.Tensor:
    """Scores [R, C] of a weight [R, C], given the mean squares [C] of its inputs."""
    magnitude = weight.abs()
    relative = magnitude / magnitude.sum(0) + magnitude / magnitude.sum(1, keepdim=True)
    return relative * mean_square.sqrt().sqrt()


@torch.no_grad()
def prune_by_ria(model, ids: torch.Tensor, pattern: Pattern) -> None:
    """Prunes all linears in the blocks of a model in memory, calibrated on ids [N, T]."""
    blocks = BlockModel(model, model.device)
    with tempfile.TemporaryDirectory() as scratch:
        walk = Walk(blocks, ids, Memory.plan(model.device), Path(scratch))
        for i in range(len(blocks)):
            linears = blocks.linears(i)

            def change(group: Group, inputs, linears=linears) -> None:
                moments = Moments(group.columns, model.device, full=False)
                for x in inputs:  # [..., C] of each micro-batch
                    moments.add(x)
                mean_square = moments.finish(group.names[0]).diagonal
                for name in group.names:
                    weight = matrix(linears[name])  # [R, C], also for Conv1D
                    weight.mul_(choose(ria(weight, mean_square), pattern, 0.5))

            with blocks.block(i) as block:
                walk.visit(i, block, change)


def main() -> None:
    """Prunes a tiny random model to 2:4."""
    model = tiny_model()
    ids = torch.randint(0, 256, (8, 64), generator=torch.Generator().manual_seed(1))
    prune_by_ria(model, ids, Pattern.parse("2:4"))
    weight = model.get_parameter("model.layers.0.mlp.up_proj.weight")
    print(f"{(weight == 0).float().mean():.0%} zeros, ppl {perplexity(model, ids):.2f}")


if __name__ == "__main__":
    main()
