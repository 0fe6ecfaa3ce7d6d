"""Estimates shared by the stages that process a model block by block; they err on the safe side."""

from __future__ import annotations

import torch
from torch import nn

from cap_llm.config import CalibrationConfig
from cap_llm.models.skeleton import LINEARS, matrix
from cap_llm.stages import Cost, Preview


class Sizes:
    """The sizes of a model's matrices.

    Attributes:
        weights: the number of weights in the linears of each block.
        outside: the number of all other parameters.
        width: bytes of a value in forward passes.
    """

    def __init__(self, preview: Preview):
        model, self.n_bytes, world = preview.model, preview.n_bytes, preview.world
        self.n_ranks, self._blocks = world.size, model.blocks
        shapes = [[matrix(m).shape for m in model.linears(i).values()] for i in range(len(model))]
        self.linears = [shape for block in shapes for shape in block]
        self.weights = [sum(r * c for r, c in block) for block in shapes]
        self.outside = sum(p.numel() for p in model.model.parameters()) - sum(self.weights)
        stored = round(self.n_bytes / (self.outside + sum(self.weights)))
        self.width = 2 if world.device.type == "cuda" and stored < 4 else 4
        self._hidden = max((c for block in shapes for _, c in block[:1]), default=0)
        self._inputs = max((sum(map(sum, block)) for block in shapes), default=0)

    def states(self, tokens: float) -> float:
        """Bytes of the hidden states of this many tokens."""
        return tokens * self._hidden * self.width

    def flops(self, length: int) -> float:
        """Operations per token of the forward passes of all blocks."""
        return 2 * (sum(self.weights) + 2 * length * self._hidden * len(self._blocks))

    def streaming(self, n_models: int = 1) -> Cost:
        """The cost of two blocks, and of what is outside the blocks of `n_models` models."""
        memory = self.width * (n_models * self.outside + 2 * max(self.weights))
        return Cost(torch.bfloat16 if self.width == 2 else torch.float32, memory)

    def rewriting(self, n_models: int = 1) -> Cost:
        """The cost of streaming a model and writing it with its masks (twice, once in parts)."""
        cost = self.streaming(n_models)
        cost.memory += 16 * max(r * c for r, c in self.linears)
        cost.disk = self.n_bytes + sum(self.weights) // 4
        return cost

    def add_solver(
        self,
        cost: Cost,
        calibration: CalibrationConfig,
        squares: int,
        copies: int,
        walks: int,
        each: float,
    ) -> None:
        """Adds walks of the calibration text with second moments, and a solver.

        Args:
            cost: to add to.
            calibration: the text.
            squares, copies: fp32 matrices [C, C] and [R, C] that the solver holds.
            walks: the number of walks.
            each: operations of the solver for a matrix, as a multiple of R C^2.
        """
        largest, columns = max(r * c for r, c in self.linears), max(c for _, c in self.linears)
        n = calibration.sequences * calibration.length
        cost.memory += 4 * (squares * columns**2 + (copies - 4) * largest)
        cost.waiting = n / self.n_ranks * self.width * self._inputs
        cost.forwards = walks * n * self.flops(calibration.length)
        cost.solving = walks * n * 2 * sum(map(_second_moments, self._blocks))
        cost.solving += each * sum(r * c * c for r, c in self.linears)


def _second_moments(block: nn.Module) -> int:
    """Counts the multiplications per token of the second moments of a block's linears.

    The last linear of a module reads what the others computed, and the others share their input:
    q, k and v one, o its own; gate and up one, down its own.
    """
    columns: dict[tuple, int] = {}
    for parent in block.modules():
        linears = [m for m in parent.children() if isinstance(m, LINEARS)]
        for m in linears:
            columns[parent, m is linears[-1]] = matrix(m).shape[1]
    return sum(c * c for c in columns.values())
