"""The walk: calibration text goes through a model block by block, each block changed on the way.

Within a block, the linears that read one input are changed together, as soon as all micro-batches
have reached that input; so every linear sees what the changed ones before it give. To walk a block
only once, the forward of each micro-batch is a coroutine (a greenlet, because the pause lies deep
inside the model's own code): it stops where it is about to read the next input, waits until that
input's linears are changed, and goes on. A waiting micro-batch holds its intermediate values; those
for which memory does not last are run again from the block's start, with the same result.
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

MICRO_TOKENS = 2048  # tokens a forward; enough for full matrix rates, few enough for the caches


class Walk:
    """A model's hidden states on their way from the embedding to the head.

    Args:
        model: the model.
        windows: token ids [N, T] of this rank.
        memory: for the hidden states.
        scratch: a folder to spill to.
        micro_tokens: tokens a forward.
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
        """Takes all micro-batches through block i as it stands.

        Raises:
            UserError: its output is not finite.
        """
        for k in range(len(self.ids)):
            self.hidden[k] = self.output(i, k, block)

    def output(self, i: int, k: int, block: nn.Module) -> torch.Tensor:
        """What block i as it stands gives for micro-batch k.

        Raises:
            UserError: it is not finite.
        """
        return self._finite(i, self.calls[k][i].run(block, self.hidden[k]))

    @torch.no_grad()
    def visit(
        self,
        i: int,
        block: nn.Module,
        change: Callable[[Group, Iterator[torch.Tensor]], None],
    ) -> None:
        """Takes all micro-batches through block i and lets `change` loose on it on the way.

        Args:
            i: the block's number.
            block: the block, with its weights.
            change: called for each group of linears with the micro-batches' inputs [..., C] to it,
                which it must read to their end before it changes the group's weights.
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
        # Later norms may turn infinity into something finite, so it is caught here.
        if not bool(output.sum().isfinite()) and not bool(output.isfinite().all()):
            raise UserError(
                f"the output of {self.model.block_name(i)} is not finite: the model overflows; "
                "check its weights, or use one stored in bfloat16 or float32"
            )
        return output

    def _held_bytes(self, block: nn.Module, groups: list[Group]) -> int:
        """Upper bound of what one waiting micro-batch holds: all inputs and outputs of linears.

        Attention in plain PyTorch ("eager": BLOOM has no other) also keeps the scores of all
        pairs of tokens in its frame, and two tensors that it makes of them.
        """
        example, config = self.hidden[0], self.model.model.config.get_text_config()
        outputs = sum(
            _out_features(block.get_submodule(name)) for group in groups for name in group.names
        )
        a_token = 2 * example.shape[-1] + sum(g.columns for g in groups) + outputs
        n_bytes = a_token * self.ids[0].numel() * example.element_size()
        if config._attn_implementation == "eager":
            pairs = self.ids[0].numel() * self.ids[0].shape[1]
            n_bytes += 3 * config.num_attention_heads * pairs * 4  # the softmax is float32
        return n_bytes


class _Lane:
    """One micro-batch on its way through a block."""

    def __init__(self, walk: Walk, i: int, k: int, block: nn.Module, hold: bool):
        self._run = lambda: walk.calls[k][i].run(block, walk.hidden[k])
        self._hold = hold
        self._held: greenlet | None = None

    def input(self, g: int) -> torch.Tensor:
        """The input [..., C] of group g, once the groups before it are changed."""
        if self._hold and self._held:
            return self._held.switch()
        self._held = greenlet(self._run)
        x = self._held.switch()
        for _ in range(g):
            x = self._held.switch()
        if not self._hold:
            self._held.throw()  # ends it where it waits
            self._held = None
        return x

    def finish(self, n_groups: int) -> torch.Tensor:
        """The block's output, once all groups are changed."""
        if not self._hold:
            self._hold = True
            self.input(n_groups - 1)
        output = self._held.switch()
        self._held = None
        return output


def _pause(module: nn.Module, args: tuple) -> None:
    """Hands the input to whoever started this lane, and waits there to be resumed."""
    getcurrent().parent.switch(args[0])


def _out_features(linear: nn.Module) -> int:
    return linear.nf if hasattr(linear, "nf") else linear.out_features
