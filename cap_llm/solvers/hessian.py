"""The layer-wise Hessian: accumulated over tokens, reduced over ranks, damped and factorized.

The squared output error of a linear layer is quadratic in its weights, with the same Hessian
H = E[x x^T] for every row. Layers that read the same input share one accumulation and factor.
"""

from __future__ import annotations

import functools
import math

import torch

from cap_llm.runtime.errors import UserError

TILE = 256  # maximum columns per tile; smaller tiles duplicate less of the symmetric product
RETRIES = 3  # of the factorization, each with ten times the damping


class Moments:
    """Second moments of one input, accumulated over tokens.

    Args:
        columns: C, the number of input features.
        full: accumulate the whole matrix; otherwise only its diagonal.
        max_tokens: ignore the tokens after this many; None: no limit.
    """

    def __init__(
        self, columns: int, device: torch.device, full: bool = True, max_tokens: int | None = None
    ):
        self.tokens, self.full, self.max_tokens = 0, full, max_tokens
        shape = (columns, columns) if full else (columns,)
        self._sum = torch.zeros(shape, dtype=torch.float32, device=device)
        self._tile = math.ceil(columns / math.ceil(columns / TILE))  # tiles of equal size

    def add(self, x: torch.Tensor) -> None:
        """Accumulates the tokens of x [..., C], in the upper triangle of tiles only."""
        x = x.reshape(-1, x.shape[-1])
        x = x[: None if self.max_tokens is None else self.max_tokens - self.tokens].float()
        self.tokens += x.shape[0]
        if self._sum.dim() == 1:
            self._sum += x.square().sum(0)
            return
        for i in range(0, x.shape[1], self._tile):
            self._sum[i : i + self._tile, i:].addmm_(x[:, i : i + self._tile].T, x[:, i:])

    def merge(self, world) -> None:
        """Sums over all ranks, which may hold different numbers of tokens."""
        counts = world.gather(self.tokens)
        self.tokens = sum(counts)
        world.sum(self._sum)

    @classmethod
    def total(cls, parts: list[Moments]) -> Moments:
        """Combines finished parts, weighted by their tokens. Returns a single part itself."""
        if len(parts) == 1:
            return parts[0]
        whole = cls(len(parts[0].diagonal), parts[0]._sum.device, parts[0].full)
        whole.tokens = sum(part.tokens for part in parts)
        for part in parts:
            whole._sum.add_(part._sum, alpha=part.tokens / whole.tokens)
        return whole

    def error(self, difference: torch.Tensor) -> float:
        """Mean squared output error that a weight difference [R, C] causes."""
        return (difference @ self.hessian * difference).sum().item()

    def finish(self, name: str) -> Moments:
        """Divides by the tokens and fills the lower triangle. Call once, after the last `add`.

        Args:
            name: of the layer, for the error.

        Raises:
            UserError: an activation is NaN or infinite.
        """
        self._sum /= self.tokens
        if not bool(self.diagonal.isfinite().all()):
            raise UserError(
                f"The input of {name} is not finite on the calibration text. Check the model, or "
                "use a checkpoint in bfloat16 or float32."
            )
        if self._sum.dim() == 2:
            # per tile: transposing the whole matrix would double the memory
            for i in range(0, self._sum.shape[0], self._tile):
                rows = self._sum[i : i + self._tile, i:]
                self._sum[i:, i : i + self._tile] = rows.T.clone()
        return self

    @property
    def diagonal(self) -> torch.Tensor:
        """Mean square per input feature [C]."""
        return self._sum if self._sum.dim() == 1 else self._sum.diagonal()

    @property
    def hessian(self) -> torch.Tensor:
        """H [C, C]."""
        if self._sum.dim() != 2:
            raise ValueError("Moments(full=False) has only the diagonal of the Hessian.")
        return self._sum


class Factor:
    """A damped Hessian with its Cholesky factor; inverses are computed on demand.

    Args:
        hessian: H [C, C], damped; its diagonal is near zero at dead inputs.
        lower: Cholesky factor L [C, C] of H with rows and columns reversed.
        dead: [C], true for inputs that are always zero; removing their weights costs nothing.
        damping: the ridge, as a fraction of the mean diagonal.
    """

    def __init__(
        self, hessian: torch.Tensor, lower: torch.Tensor, dead: torch.Tensor, damping: float
    ):
        self.hessian, self.dead, self.damping = hessian, dead, damping
        self._lower = lower

    @functools.cached_property
    def upper(self) -> torch.Tensor:
        """The upper triangular U [C, C] with H^-1 = U^T U, which SparseGPT uses.

        U = V^-1 for H = V V^T, where V is L with rows and columns reversed. This takes half the
        operations of the published code (Cholesky, inverse, Cholesky of the inverse).
        """
        v, self._lower = self._lower.flip(0, 1), None
        # in place: overwrites the identity
        inverse = torch.eye(len(v), dtype=v.dtype, device=v.device)
        return torch.linalg.solve_triangular(v, inverse, upper=True, out=inverse)

    @functools.cached_property
    def inverse(self) -> torch.Tensor:
        """H^-1 [C, C]."""
        if self._lower is None:
            return _gram(self.upper)
        return torch.cholesky_inverse(self._lower).flip(0, 1)


def _gram(upper: torch.Tensor) -> torch.Tensor:
    """Returns U^T U for an upper triangular U [C, C]; skips the tiles below the diagonal."""
    gram = torch.empty_like(upper)
    for i in range(0, len(upper), TILE):
        j = i + TILE
        rows = upper[:j, i:j].T @ upper[:j, i:]
        gram[i:j, i:], gram[i:, i:j] = rows, rows.T
    return gram


def factorize(hessian: torch.Tensor, damping: float, name: str) -> Factor:
    """Damps H [C, C] and factorizes it. Overwrites `hessian`.

    Args:
        hessian: H [C, C].
        damping: ridge, as a fraction of the mean diagonal.
        name: of the layer, for the error.

    Raises:
        UserError: H is not positive definite, even with 1000 times the damping.
    """
    dead = hessian.diagonal() == 0
    diagonal = hessian.diagonal().clone()
    mean = diagonal.mean().item()
    floor = 1e-6 * mean or 1.0  # for dead inputs; with more, solvers would keep their weights
    for _ in range(RETRIES + 1):
        hessian.diagonal().copy_(torch.where(dead, floor, diagonal + damping * mean))
        lower, failed = torch.linalg.cholesky_ex(hessian.flip(0, 1))
        if not failed:
            return Factor(hessian, lower, dead, damping)
        damping *= 10
    raise UserError(
        f"The Hessian of {name} is not positive definite, even with damping {damping / 10:g}. "
        "Increase --calibration.sequences, or check the model for duplicated features."
    )
