"""Importance scores of weights: the lowest are pruned first."""

from __future__ import annotations

import torch


def magnitude(weight: torch.Tensor) -> torch.Tensor:
    """Returns |W| [R, C]."""
    return weight.abs()


def wanda(weight: torch.Tensor, mean_square: torch.Tensor) -> torch.Tensor:
    """Returns |W_ij| * ||x_j|| [R, C] (Sun et al. 2024, eq. 1), from input mean squares [C].

    The mean over tokens, instead of the sum, scales all scores equally.
    """
    return weight.abs() * mean_square.sqrt()
