"""Perplexity on windows of tokens, as in SparseGPT and Wanda.

ppl = exp(mean negative log-likelihood) over the window - 1 predicted tokens of each window. The
model is streamed: all windows pass one block before the next block is read, so a model larger than
memory can be scored.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from cap_llm.blockwise.walk import Walk
from cap_llm.models.blocks import BlockModel
from cap_llm.runtime.errors import UserError
from cap_llm.runtime.memory import Memory
from cap_llm.runtime.world import World

LOGIT_TOKENS = 2048  # per chunk of logits


def next_token_nll(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Sums the negative log-likelihood of ids [B, T] under logits [B, T, V]; T - 1 per row."""
    targets = ids[:, 1:].to(logits.device)
    total = torch.zeros((), dtype=torch.float64, device=logits.device)
    for row, target in zip(logits, targets, strict=True):
        total += F.cross_entropy(row[:-1].float(), target, reduction="sum")
    return total


@torch.no_grad()
def perplexity(model: torch.nn.Module, windows: torch.Tensor) -> float:
    """Computes the perplexity of a causal language model in memory on token ids [N, T]."""
    device = next(model.parameters()).device
    nll = sum(
        next_token_nll(model(input_ids=w.to(device)).logits, w).item() for w in windows.split(1)
    )
    return math.exp(nll / (windows.shape[0] * (windows.shape[1] - 1)))


@torch.no_grad()
def streamed_nll(
    model: BlockModel,
    windows: torch.Tensor,
    world: World,
    memory: Memory,
    scratch: Path,
    advance: Callable[[], None] = lambda: None,
) -> float:
    """Sums the negative log-likelihood of ids [N, T] under a model, over all ranks.

    Args:
        model: streamed block by block.
        windows: all windows; each rank takes its share.
        world: the ranks.
        memory: budget for activations.
        scratch: folder to spill to.
        advance: called after each block.

    Raises:
        UserError: the model is not a causal language model, or an output is not finite.
    """
    if not model.is_causal:
        raise UserError(
            f"{type(model.model).__name__} has no next-token logits, so it has no perplexity. "
            "Remove evaluate from --stages."
        )
    own = windows[list(world.shard(len(windows)))]
    walk = Walk(model, own, memory, scratch) if len(own) else None
    if walk:
        for i in range(len(model)):
            with model.block(i) as block:
                walk.forward(i, block)
            advance()
    return head_nll(model, walk, world)


@torch.no_grad()
def head_nll(model: BlockModel, walk: Walk | None, world: World) -> float:
    """Sums the negative log-likelihood of a walk's ids after all blocks, over all ranks."""
    total = torch.zeros((), dtype=torch.float64, device=world.device)
    for k, ids in enumerate(walk.ids if walk else ()):
        rows = max(1, LOGIT_TOKENS // ids.shape[1])
        for part, states in zip(ids.split(rows), walk.hidden[k].split(rows), strict=True):
            total += next_token_nll(model.head(part, states), part)
    return world.sum(total).item()
