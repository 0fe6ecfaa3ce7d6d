"""The walk: calibration text passes through a model block by block, and each block is changed.

Within a block, the linears that share an input change together, once all micro-batches have reached
that input. So each linear sees the outputs of the changed ones before it. To run each block only
once, the forward pass of a micro-batch is a coroutine: it pauses at the next input, waits until its
linears have changed, and resumes. It is a greenlet, since it pauses deep inside the model's code. A
paused micro-batch holds its intermediate values. Those that exceed the memory are recomputed from
the start of the block, with the same result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from greenlet import getcurrent, greenlet
from torch import nn

from cap_llm.blockwise.cache import ActivationCache
from cap_llm.models.blocks import BlockModel, Call, Group
from cap_llm.runtime.errors import UserError
from cap_llm.runtime.memory import Memory

MICRO_TOKENS = 2048  # per forward pass: large enough for matrix throughput, small enough for caches


class Walk:
    """The hidden states of the calibration text, between two blocks of a model.

    Args:
        model: the model.
        windows: token ids [N, T] of this rank.
        memory: budget for the hidden states.
        scratch: folder to spill to.
        micro_tokens: tokens per forward pass.
    """

    def __init__(
        self,
        model: BlockModel,
        windows: torch.Tensor,
        memory: Memory,
        scratch: Path,
        micro_tokens: int = MICRO_TOKENS,
    ):
        self.model = model
        self.ids = windows.split(max(1, micro_tokens // windows.shape[1]))
        self.hidden = ActivationCache(model.device, memory, scratch)
        self.calls: list[list[Call]] = []
        for i, ids in enumerate(self.ids):
            hidden, calls = model.embed(ids)
            self.hidden[i] = hidden
            self.calls.append(calls)

    @torch.no_grad()
    def forward(self, i: int, block: nn.Module) -> None:
        """Passes all micro-batches through block i without changing it.

        Raises:
            UserError: an output is not finite.
        """
        for k in range(len(self.ids)):
            self.hidden[k] = self.output(i, k, block)

    def output(self, i: int, k: int, block: nn.Module) -> torch.Tensor:
        """Returns the output of block i for micro-batch k.

        Raises:
            UserError: the output is not finite.
        """
        return self._finite(i, self.calls[k][i].run(block, self.hidden[k]))

    @torch.no_grad()
    def visit(
        self,
        i: int,
        block: nn.Module,
        change: Callable[[Group, Iterator[torch.Tensor]], None],
    ) -> None:
        """Passes all micro-batches through block i and calls `change` on each group of linears.

        Args:
            i: index of the block.
            block: the block, with its weights.
            change: called with a group and its inputs [..., C] per micro-batch; must read all of
                them before it changes the group's weights.

        Raises:
            UserError: an output is not finite.
        """
        groups = self.model.groups(i, self.calls[0][i], self.hidden[0])
        held = self.hidden.left // max(1, self._held_bytes(block, groups))
        lanes = [_Lane(self, i, k, block, hold=k < held) for k in range(len(self.ids))]
        handles = [
            block.get_submodule(group.names[0]).register_forward_pre_hook(_pause)
            for group in groups
        ]
        try:
            for g, group in enumerate(groups):
                change(group, (lane.input(g) for lane in lanes))
            for k, lane in enumerate(lanes):
                self.hidden[k] = self._finite(i, lane.finish(len(groups)))
        finally:
            for handle in handles:
                handle.remove()

    def _finite(self, i: int, output: torch.Tensor) -> torch.Tensor:
        # checked here, since later norms may turn infinity into finite values
        if not bool(output.sum().isfinite()) and not bool(output.isfinite().all()):
            raise UserError(
                f"The output of {self.model.block_name(i)} is not finite. Check the model's "
                "weights, or use a checkpoint in bfloat16 or float32."
            )
        return output

    def _held_bytes(self, block: nn.Module, groups: list[Group]) -> int:
        """Upper bound of the bytes of one paused micro-batch: all inputs and outputs of linears.

        Eager attention (the only one of BLOOM) also holds the scores of all pairs of tokens and two
        tensors derived from them.
        """
        example, config = self.hidden[0], self.model.model.config.get_text_config()
        outputs = sum(
            _out_features(block.get_submodule(name)) for group in groups for name in group.names
        )
        per_token = 2 * example.shape[-1] + sum(g.columns for g in groups) + outputs
        n_bytes = per_token * self.ids[0].numel() * example.element_size()
        if config._attn_implementation == "eager":
            pairs = self.ids[0].numel() * self.ids[0].shape[1]
            n_bytes += 3 * config.num_attention_heads * pairs * 4  # fp32 softmax
        return n_bytes


class _Lane:
    """One micro-batch in a block."""

    def __init__(self, walk: Walk, i: int, k: int, block: nn.Module, hold: bool):
        self._run = lambda: walk.calls[k][i].run(block, walk.hidden[k])
        self._hold = hold
        self._held: greenlet | None = None

    def input(self, g: int) -> torch.Tensor:
        """Returns the input [..., C] of group g, after the previous groups have changed."""
        if self._hold and self._held:
            return self._held.switch()
        self._held = greenlet(self._run)
        x = self._held.switch()
        for _ in range(g):
            x = self._held.switch()
        if not self._hold:
            self._held.throw()  # ends the paused forward pass
            self._held = None
        return x

    def finish(self, n_groups: int) -> torch.Tensor:
        """Returns the block's output, after all groups have changed."""
        if not self._hold:
            self._hold = True
            self.input(n_groups - 1)
        output = self._held.switch()
        self._held = None
        return output


def _pause(module: nn.Module, args: tuple) -> None:
    """Passes the input to the lane's parent greenlet and pauses."""
    getcurrent().parent.switch(args[0])


def _out_features(linear: nn.Module) -> int:
    return linear.nf if hasattr(linear, "nf") else linear.out_features
