"""Units of contrast: short vectors of a model's states, the same way for every model.

States after the final norm are far from isotropic: a few channels dominate all cosines. So vectors
are projected to fewer dimensions by one fixed orthonormal matrix, centered by the mean over a
sample of the data, and only then normalized.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from cap_llm.contrast.loss import Units


@dataclass(frozen=True)
class Kind:
    """Units that are contrasted with each other: which of an example's, and how.

    Attributes:
        place: of the units among an example's.
        weight: of their loss.
        temperature: of their softmax.
        supervised: weight of positives that share the anchor's label.
    """

    place: slice
    weight: float
    temperature: float
    supervised: float = 0.0


class UnitExtractor(ABC):
    """The units of a data set; a task says what they are.

    What a unit is depends on its example's id and the seed alone, so that frozen models can be
    banked before or during the training.

    Args:
        n_examples: in the data set.
        n_units: U, per example.
        width: H, of the states.
        dim: d, of the units; at most the width.
        seed: of the projection.
        device: where states are.

    Attributes:
        kinds: of the units.
        facts: what the units are made of, for the identity of a bank.
    """

    kinds: list[Kind]
    facts: dict

    def __init__(
        self, n_examples: int, n_units: int, width: int, dim: int, seed: int, device: torch.device
    ):
        self.n_examples, self.n_units, self.dim = n_examples, n_units, min(dim, width)
        self.seed, self.device = seed, device
        generator = torch.Generator().manual_seed(seed)
        square = torch.randn(width, self.dim, generator=generator, dtype=torch.float64)
        self.projection = torch.linalg.qr(square).Q.float().to(device)  # [H, d]

    @abstractmethod
    def pooled(self, states: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """The states that units are made of, [B, U, H], from states [B, T, H] of examples [B]."""

    @abstractmethod
    def units(self, ids: torch.Tensor) -> Units:
        """What the units of examples [B] are, [B, U]."""

    @abstractmethod
    def draws(self, start: int, end: int) -> torch.Tensor:
        """Ids of the examples at places `start` to `end` of the training."""

    def raw(self, states: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Projected units [B, U, d] in fp32, not centered yet, from states [B, T, H].

        Args:
            states: with gradient or without.
            ids: of the examples, [B].
        """
        return self.pooled(states.float(), ids) @ self.projection


def normalize(raw: torch.Tensor, center: torch.Tensor) -> torch.Tensor:
    """Units [..., d] minus the bank's center [d], scaled to length 1."""
    return F.normalize(raw - center, dim=-1)


def anisotropy(vectors: torch.Tensor) -> tuple[float, float]:
    """How well vectors [n, d] of length 1 fill their space.

    Returns:
        The mean cosine of two of them, and the effective rank: exp of the entropy of the
        eigenvalues of their second moment (Roy and Vetterli 2007).
    """
    vectors = vectors.double()
    n = len(vectors)
    total = vectors.sum(0).square().sum()
    mean_cosine = (total - n) / (n * (n - 1)) if n > 1 else torch.ones(())
    p = torch.linalg.eigvalsh(vectors.T @ vectors / n).clamp(min=1e-12)
    p = p / p.sum()
    return mean_cosine.item(), (-(p * p.log()).sum()).exp().item()
