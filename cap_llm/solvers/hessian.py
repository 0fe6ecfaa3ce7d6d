"""The layer-wise Hessian: accumulated over tokens, merged over ranks, damped and factorised.

The squared error of a linear's outputs is quadratic in its weights, with the same Hessian
H = E[x x^T] for every row. Linears that read the same input share it, so it is accumulated and
factorised once for all of them.
"""

from __future__ import annotations

import functools
import math

import torch

from cap_llm.runtime.errors import UserError

TILE = 256  # columns at most; what is computed twice of the symmetric product shrinks with it
RETRIES = 3


class Moments:
    """Second moments of one input, over all tokens seen so far.

    Args:
        columns: C, the input's features.
        full: accumulate the whole matrix; otherwise only its diagonal.
        most: tokens after which no more are looked at; None for all.
    """

    def __init__(
        self, columns: int, device: torch.device, full: bool = True, most: int | None = None
    ):
        self.tokens, self.full, self.most = 0, full, most
        shape = (columns, columns) if full else (columns,)
        self._sum = torch.zeros(shape, dtype=torch.float32, device=device)
        self._tile = math.ceil(columns / math.ceil(columns / TILE))  # all tiles equal

    def add(self, x: torch.Tensor) -> None:
        """Adds the tokens of x [..., C]. Only the upper triangle of tiles is computed."""
        x = x.reshape(-1, x.shape[-1])
        x = x[: None if self.most is None else self.most - self.tokens].float()
        self.tokens += x.shape[0]
        if self._sum.dim() == 1:
            self._sum += x.square().sum(0)
            return
        for i in range(0, x.shape[1], self._tile):
            self._sum[i : i + self._tile, i:].addmm_(x[:, i : i + self._tile].T, x[:, i:])

    def merge(self, world) -> None:
        """Adds what all ranks have seen; exact, whatever their shares."""
        counts = world.gather(self.tokens)
        self.tokens = sum(counts)
        world.sum(self._sum)

    @classmethod
    def total(cls, parts: list[Moments]) -> Moments:
        """The moments over the tokens of several finished parts; of one part, itself."""
        if len(parts) == 1:
            return parts[0]
        whole = cls(len(parts[0].diagonal), parts[0]._sum.device, parts[0].full)
        whole.tokens = sum(part.tokens for part in parts)
        for part in parts:
            whole._sum.add_(part._sum, alpha=part.tokens / whole.tokens)
        return whole

    def error(self, difference: torch.Tensor) -> float:
        """Mean squared error of the outputs that a difference of weights [R, C] makes."""
        return (difference @ self.hessian * difference).sum().item()

    def finish(self, name: str) -> Moments:
        """Turns sums into means and fills the lower triangle. Call once, after the last `add`.

        Raises:
            UserError: an activation was NaN or infinite.
        """
        self._sum /= self.tokens
        if not bool(self.diagonal.isfinite().all()):
            raise UserError(
                f"the input of {name} is not finite: the model overflows on the calibration text; "
                "check the model, or use one stored in bfloat16 or float32"
            )
        if self._sum.dim() == 2:
            # tile by tile: a transposed copy of the whole would double the memory
            for i in range(0, self._sum.shape[0], self._tile):
                rows = self._sum[i : i + self._tile, i:]
                self._sum[i:, i : i + self._tile] = rows.T.clone()
        return self

    @property
    def diagonal(self) -> torch.Tensor:
        """Mean square of each input feature [C]."""
        return self._sum if self._sum.dim() == 1 else self._sum.diagonal()

    @property
    def hessian(self) -> torch.Tensor:
        """H [C, C]."""
        if self._sum.dim() != 2:
            raise ValueError("only the diagonal was accumulated")
        return self._sum


class Factor:
    """A damped Hessian, and on demand what solvers make of its Cholesky factor.

    Args:
        hessian: [C, C], with the ridge on its diagonal, next to nothing where an input is dead.
        lower: the Cholesky factor L [C, C] of H with rows and columns reversed.
        dead: [C], inputs that never fire (always zero); their weights are free to go.
        damping: the ridge used, as a share of the mean diagonal.
    """

    def __init__(
        self, hessian: torch.Tensor, lower: torch.Tensor, dead: torch.Tensor, damping: float
    ):
        self.hessian, self.dead, self.damping = hessian, dead, damping
        self._lower = lower

    @functools.cached_property
    def upper(self) -> torch.Tensor:
        """The upper triangular U [C, C] with H^-1 = U^T U, along which SparseGPT walks.

        It is the inverse of the upper V in H = V V^T, which is L with rows and columns reversed.
        With L that takes a Cholesky and a triangular inverse; the published code's three steps
        (Cholesky, inverse, Cholesky of the inverse) take twice as many operations.
        """
        v, self._lower = self._lower.flip(0, 1), None
        # in place: the identity becomes the inverse
        inverse = torch.eye(len(v), dtype=v.dtype, device=v.device)
        return torch.linalg.solve_triangular(v, inverse, upper=True, out=inverse)

    @functools.cached_property
    def inverse(self) -> torch.Tensor:
        """H^-1 [C, C]."""
        if self._lower is None:
            return _gram(self.upper)
        return torch.cholesky_inverse(self._lower).flip(0, 1)


def _gram(upper: torch.Tensor) -> torch.Tensor:
    """U^T U of an upper triangular U [C, C]: tile by tile, without the zeros below the diagonal."""
    gram = torch.empty_like(upper)
    for i in range(0, len(upper), TILE):
        j = i + TILE
        rows = upper[:j, i:j].T @ upper[:j, i:]
        gram[i:j, i:], gram[i:, i:j] = rows, rows.T
    return gram


def factorise(hessian: torch.Tensor, damping: float, name: str) -> Factor:
    """Damps H [C, C] and factorises it. Overwrites `hessian`.

    Raises:
        UserError: H is not positive definite even with `damping` raised tenfold three times.
    """
    dead = hessian.diagonal() == 0
    diagonal = hessian.diagonal().clone()
    mean = diagonal.mean().item()
    quiet = 1e-6 * mean or 1.0  # a dead input's energy: with more, solvers keep its weights
    tried = damping
    for _ in range(RETRIES + 1):
        hessian.diagonal().copy_(torch.where(dead, quiet, diagonal + tried * mean))
        lower, failed = torch.linalg.cholesky_ex(hessian.flip(0, 1))
        if not failed:
            return Factor(hessian, lower, dead, tried)
        tried *= 10
    raise UserError(
        f"the Hessian of {name} is not positive definite even with damping {tried / 10:g}: "
        "too few calibration tokens or duplicated features; give more --calibration.sequences"
    )
