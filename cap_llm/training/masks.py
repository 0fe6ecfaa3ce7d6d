"""What masks do during a training."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch

from cap_llm.recovery.zeros import keep_zeros


class MaskPolicy(Protocol):
    """The masks of a training, from the fresh engine to the export.

    Attributes:
        n_masked: weights at zero.
    """

    n_masked: int

    def attach(self, engine) -> None:
        """Takes hold of a fresh engine, before its checkpoint is loaded."""

    def check(self) -> None:
        """Verifies that every masked weight is zero.

        Raises:
            UserError: one is not.
        """

    def detach(self) -> None:
        """Lets go of the engine."""
        ...


class Fixed:
    """Masks that do not change: what is zero stays zero, exactly.

    Args:
        masks: names in the model and masks in their parameters' shape, false where a weight stays
            zero; taken one at a time.
    """

    def __init__(self, masks: Iterable[tuple[str, torch.Tensor]]):
        self._masks = masks

    def attach(self, engine) -> None:
        """Masks gradients and fp32 weights from now on."""
        self._keeper = keep_zeros(engine, ((f"model.{name}", mask) for name, mask in self._masks))

    @property
    def n_masked(self) -> int:
        """Weights at zero."""
        return self._keeper.n_masked

    def check(self) -> None:
        """Verifies that every masked weight is zero.

        Raises:
            UserError: one is not.
        """
        self._keeper.check()

    def detach(self) -> None:
        """Removes the hooks."""
        self._keeper.remove()
