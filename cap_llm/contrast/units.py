"""Units of a contrast: short vectors of states, extracted in the same way for every model.

States after the final norm are strongly anisotropic: a few channels dominate all cosines. Units are
therefore projected to fewer dimensions by a fixed orthonormal matrix, centered by the mean over a
sample of the data, and normalized.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from cap_llm.contrast.loss import Units


@dataclass(frozen=True)
class UnitKind:
    """A kind of unit; only units of one kind are contrasted with each other.

    Attributes:
        units: slice of an example's units.
        weight: of its loss.
        temperature: of its softmax.
        supervised: weight of the positives with the anchor's label.
    """

    units: slice
    weight: float
    temperature: float
    supervised: float = 0.0


class UnitExtractor(ABC):
    """Extracts the units of a data set; a task defines them.

    A unit depends only on its example's id and the seed, so a bank can be filled before or during
    the training.

    Args:
        n_examples: size of the data set.
        n_units: U, units per example.
        width: H, of the states.
        dim: d, of the units; at most the width.
        seed: of the projection.
        device: of the states.

    Attributes:
        kinds: the kinds of units.
        facts: that identify the units, for the bank.
    """

    kinds: list[UnitKind]
    facts: dict

    def __init__(
        self, n_examples: int, n_units: int, width: int, dim: int, seed: int, device: torch.device
    ):
        self.n_examples, self.n_units, self.dim = n_examples, n_units, min(dim, width)
        self.seed, self.device = seed, device
        generator = torch.Generator().manual_seed(seed)
        random = torch.randn(width, self.dim, generator=generator, dtype=torch.float64)
        self.projection = torch.linalg.qr(random).Q.float().to(device)  # [H, d]

    @abstractmethod
    def pooled(self, states: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Pools states [B, T, H] of examples [B] to one vector per unit, [B, U, H]."""

    @abstractmethod
    def units(self, ids: torch.Tensor) -> Units:
        """Returns the identities [B, U] of the units of examples [B]."""

    @abstractmethod
    def draws(self, start: int, end: int) -> torch.Tensor:
        """Returns the ids of the examples `start` to `end` in training order."""

    def raw(self, states: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Returns projected, uncentered units [B, U, d], fp32, from states [B, T, H] of examples
        [B]."""
        return self.pooled(states.float(), ids) @ self.projection


def normalize(raw: torch.Tensor, center: torch.Tensor) -> torch.Tensor:
    """Centers units [..., d] by a bank's center [d] and scales them to length 1."""
    return F.normalize(raw - center, dim=-1)


def anisotropy(vectors: torch.Tensor) -> tuple[float, float]:
    """Measures how evenly unit vectors [n, d] cover their space.

    Returns:
        The mean pairwise cosine, and the effective rank: the exponential of the entropy of the
        normalized eigenvalues of their second moment (Roy and Vetterli 2007).
    """
    vectors = vectors.double()
    n = len(vectors)
    total = vectors.sum(0).square().sum()
    mean_cosine = (total - n) / (n * (n - 1)) if n > 1 else torch.ones(())
    p = torch.linalg.eigvalsh(vectors.T @ vectors / n).clamp(min=1e-12)
    p = p / p.sum()
    return mean_cosine.item(), (-(p * p.log()).sum()).exp().item()
