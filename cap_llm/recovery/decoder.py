"""A causal language model as recovery sees it: final states, block outputs, and the head.

One forward gives everything the losses need. The head is kept out of it and applied to chunks of
tokens by `head_loss`, so that no logits [B, T, V] stand in memory.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from cap_llm.models.blocks import find_blocks, states_of
from cap_llm.recovery.objectives import head_loss, square_head


class Decoder(nn.Module):
    """A frozen or trained model seen as states and head.

    Args:
        model: a causal language model of transformers; `check.refuse_changed_logits` passes it.
    """

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    @property
    def head(self) -> nn.Linear:
        """The layer from final states to logits."""
        return self.model.get_output_embeddings()

    def forward(self, ids: torch.Tensor, features: bool) -> tuple[torch.Tensor, ...]:
        """Final states [B, T, H] (after the last norm) for ids [B, T], then, with `features`, the
        output of each block."""
        outputs: list[torch.Tensor] = []
        handles = []
        if features:
            for block in find_blocks(self.model)[1]:
                handles.append(
                    block.register_forward_hook(lambda _, __, out: outputs.append(states_of(out)))
                )
        try:
            states = self.model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
        finally:
            for handle in handles:
                handle.remove()
        return states, *outputs


class Student(Decoder):
    """The trained model with the losses that need its head: all parameters are used inside one
    forward, as ZeRO-3 wants it.

    Args:
        model: the model.
        ce, kl, temperature: weights and temperature of the head's losses.
        feature: whether block outputs are compared.
        skip: first positions that the block outputs are not compared at.
    """

    def __init__(self, model, ce: float, kl: float, temperature: float, feature: bool, skip: int):
        super().__init__(model)
        self.factors, self.feature, self.skip = (ce, kl, temperature), feature, skip
        # The head runs as a module, so that ZeRO-3 brings its weight, but gives losses.
        self.head.forward = self._head_losses

    def forward(self, ids: torch.Tensor, teacher=None, head=None):
        """Losses of ids [B, T].

        Args:
            ids: the batch.
            teacher: the teacher's `Decoder.forward`, or None without distillation.
            head: the teacher's head (weight, bias).

        Returns:
            The weighted head loss with gradient, CE, KL, the feature loss, and the final states.
        """
        states, *outputs = super().forward(ids, self.feature and teacher is not None)
        flat = states[:, :-1].flatten(0, 1)
        target = ids[:, 1:].flatten()
        t = None
        if teacher is not None and self.factors[1]:
            t = (teacher[0][:, :-1].flatten(0, 1), *head)
        total, ce, kl = self.head(flat, targets=target, teacher=t)
        feature = torch.zeros((), device=ids.device)
        if outputs:
            feature = square_head(outputs, list(teacher[1:]), self.skip)
        return total, ce, kl, feature, states

    def _head_losses(self, states: torch.Tensor, targets: torch.Tensor, teacher: tuple | None):
        head = self.head
        return head_loss(states, head.weight, head.bias, targets, teacher, *self.factors)
