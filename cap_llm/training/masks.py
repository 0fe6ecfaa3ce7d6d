"""What masks do during a training."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch

from cap_llm.sparsity.keeper import ZeroKeeper, keep_zeros


class MaskPolicy(Protocol):
    """What masks do during a training."""

    def attach(self, engine) -> ZeroKeeper:
        """Takes hold of a fresh engine, before a checkpoint is loaded.

        Returns:
            What counts and checks its zeros.
        """
        ...


class Fixed:
    """Masks that do not change: what is zero stays zero, exactly.

    Args:
        masks: names in the model and masks in their parameters' shape, false where a weight stays
            zero; taken one at a time.
    """

    def __init__(self, masks: Iterable[tuple[str, torch.Tensor]]):
        self._masks = masks

    def attach(self, engine) -> ZeroKeeper:
        """Masks gradients and fp32 weights from now on."""
        return keep_zeros(engine.module.model, self._masks, engine.optimizer)
