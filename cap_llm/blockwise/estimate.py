"""Estimates shared by the stages that process a model block by block; they err on the safe side."""

from __future__ import annotations

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from cap_llm.config import CalibrationConfig
from cap_llm.models.blocks import matrix
from cap_llm.stages import Cost, Preview


class Sizes:
    """The sizes of a model's matrices, and costs derived from them.

    Args:
        preview: the model and the ranks.

    Attributes:
        linears: the shapes [R, C] of the linears of all blocks.
        weights: the number of weights in the linears of each block.
        outside: the number of parameters that are not in these linears.
        hidden: the width of the hidden states.
        width: bytes of a value in forward passes.
    """

    def __init__(self, preview: Preview):
        model, self.world, self.n_bytes = preview.model, preview.world, preview.n_bytes
        blocks = [[matrix(m).shape for m in model.linears(i).values()] for i in range(len(model))]
        self.linears = [shape for shapes in blocks for shape in shapes]
        self.weights = [sum(r * c for r, c in shapes) for shapes in blocks]
        self.outside = sum(p.numel() for p in model.model.parameters()) - sum(self.weights)
        self.hidden = max((c for shapes in blocks for _, c in shapes[:1]), default=0)
        stored = round(self.n_bytes / self.n_parameters)
        self.width = 2 if self.world.device.type == "cuda" and stored < 4 else 4
        self._largest_inputs = max((sum(map(sum, shapes)) for shapes in blocks), default=0)
        self._moments = sum(map(_second_moments, model.blocks))
        self._n_blocks = len(model)

    @property
    def n_parameters(self) -> int:
        """The number of all parameters."""
        return self.outside + sum(self.weights)

    def shard(self, n: int) -> int:
        """A rank's share of n tokens."""
        return n // self.world.size

    def states(self, tokens: int) -> int:
        """Bytes of the hidden states of this many tokens."""
        return tokens * self.hidden * self.width

    def streaming(self, models: int = 1) -> Cost:
        """The cost of holding two blocks of a model, and what is outside the blocks of `models`."""
        memory = self.width * (models * self.outside + 2 * max(self.weights))
        return Cost(torch.bfloat16 if self.width == 2 else torch.float32, memory)

    def rewriting(self, models: int = 1) -> Cost:
        """The cost of streaming a model and writing it with its masks (twice, once in parts)."""
        cost = self.streaming(models)
        cost.disk = self.n_bytes + sum(self.weights) // 4
        cost.memory += 16 * max(r * c for r, c in self.linears)
        return cost

    def add_solver(self, cost: Cost, squares: int, copies: int) -> None:
        """Adds fp32 matrices [C, C] and further copies of [R, C] that a solver holds."""
        columns = max(c for _, c in self.linears)
        largest = max(r * c for r, c in self.linears)
        cost.memory += 4 * (squares * columns**2 + (copies - 4) * largest)

    def add_walks(
        self, cost: Cost, calibration: CalibrationConfig, walks: int, solving: float
    ) -> None:
        """Adds walks of the calibration text with second moments, and solvers.

        Args:
            cost: to add to.
            calibration: the text.
            walks: the number of walks.
            solving: operations of the solvers per matrix [R, C], as multiples of R C^2.
        """
        n = calibration.sequences * calibration.length
        cost.forwards += walks * n * self.flops(calibration.length)
        cost.solving += walks * n * 2 * self._moments
        cost.solving += solving * sum(r * c * c for r, c in self.linears)
        cost.waiting = self.shard(n) * self.width * self._largest_inputs

    def flops(self, length: int) -> float:
        """Operations per token of the forward passes of all blocks."""
        return 2 * (sum(self.weights) + 2 * length * self.hidden * self._n_blocks)


def _second_moments(block: nn.Module) -> int:
    """Counts the multiplications per token of the second moments of a block's linears.

    The last linear of a module reads what the others computed, and the others share their input:
    q, k and v one, o its own; gate and up one, down its own.
    """
    columns: dict[tuple, int] = {}
    for parent in block.modules():
        linears = [m for m in parent.children() if isinstance(m, nn.Linear | Conv1D)]
        for m in linears:
            columns[parent, m is linears[-1]] = matrix(m).shape[1]
    return sum(c * c for c in columns.values())
