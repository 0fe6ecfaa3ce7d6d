"""The cost of a stage that processes a model block by block; it errs on the safe side."""

from __future__ import annotations

import torch

from cap_llm.models.skeleton import matrix
from cap_llm.stages import Cost, Preview


def streaming_cost(
    preview: Preview,
    tokens: int,
    length: int,
    *,
    passes: float = 1,
    streams: float = 1,
    width: int | None = None,
    models: int = 1,
    per_weight: float = 0,
    solver: tuple[int, int] = (0, 0),
    solving: float = 0,
    walks: int = 0,
    writes: bool = True,
) -> Cost:
    """The cost of passing a text through the blocks of a model.

    Args:
        preview: the model and the ranks.
        tokens: of the text, over all ranks.
        length: tokens per sequence.
        passes: forward passes of the text.
        streams: hidden states that a rank stores, as a multiple of its share of the text.
        width: bytes per value; by default those of the stored type, and 4 on CPUs.
        models: models whose parameters outside the blocks are loaded.
        per_weight: bytes per weight of a block, besides the weights of two blocks.
        solver: numbers of fp32 matrices [C, C] and [R, C] of the largest linear.
        solving: operations of the solver for a matrix, as a multiple of R C^2.
        walks: passes that also accumulate second moments.
        writes: whether the model is written, with its masks (twice, once in parts).
    """
    model, device = preview.model, preview.world.device
    shapes = [[matrix(m).shape for m in model.linears(i).values()] for i in range(len(model))]
    linears = [shape for block in shapes for shape in block]
    weights = [sum(r * c for r, c in block) for block in shapes]
    n_parameters = sum(p.numel() for p in model.model.parameters())
    width = width or (4 if device.type == "cpu" else min(4, model.model.dtype.itemsize))
    hidden = linears[0][1]
    share = tokens / preview.world.size
    memory = width * (models * (n_parameters - sum(weights)) + 2 * max(weights))
    squares, copies = solver
    largest = max(r * c for r, c in linears)
    memory += 4 * (squares * max(c for _, c in linears) ** 2 + max(4, copies) * largest)
    return Cost(
        torch.bfloat16 if width == 2 else torch.float32,
        memory=memory + per_weight * max(weights),
        cached=streams * share * hidden * width,
        waiting=bool(walks) * share * width * max(sum(map(sum, block)) for block in shapes),
        disk=writes * (preview.n_bytes + sum(weights) // 4),
        forwards=passes * tokens * 2 * (sum(weights) + 2 * length * hidden * len(model)),
        # linears that share their input share its second moments; here each counts
        solving=sum(c * c * (2 * walks * tokens + solving * r) for r, c in linears),
    )
