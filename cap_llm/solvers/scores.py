"""Scores of weights: the higher, the longer a weight stays. Magnitude and Wanda need no more."""

from __future__ import annotations

import torch


def magnitude(weight: torch.Tensor) -> torch.Tensor:
    """|W| [R, C]."""
    return weight.abs()


def wanda(weight: torch.Tensor, mean_square: torch.Tensor) -> torch.Tensor:
    """|W_ij| * ||x_j|| [R, C] (Sun et al. 2024, eq. 1), from mean squares of the inputs [C].

    The mean instead of the sum over tokens scales all scores alike, which changes no choice.
    """
    return weight.abs() * mean_square.sqrt()
