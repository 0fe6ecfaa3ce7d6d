"""Sparsity patterns. Imports no torch, so that reading settings is fast."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from cap_llm.runtime.errors import UserError


@dataclass(frozen=True)
class Pattern:
    """A sparsity pattern.

    Attributes:
        kind: `unstructured` (zeros anywhere in the matrix), `row` (the same number of zeros in each
            output row) or `n:m` (at most `n` nonzeros in each group of `m` consecutive inputs).

    Raises:
        UserError: the combination is invalid; `parse` reads a pattern from text.
    """

    kind: Literal["unstructured", "row", "n:m"]
    n: int = 0
    m: int = 0

    def __post_init__(self):
        plain = self.kind in ("unstructured", "row") and self.n == self.m == 0
        if not plain and not (self.kind == "n:m" and 0 < self.n <= self.m):
            raise UserError(
                f"pattern {self.kind!r} with n={self.n} and m={self.m} is invalid. Use "
                "Pattern.parse with unstructured, row or N:M (such as 2:4)."
            )

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Parses `unstructured`, `row` or `N:M` (keep N of M).

        Raises:
            UserError: the text is none of these, or N is not in 1..M-1.
        """
        if text in ("unstructured", "row"):
            return cls(text)
        match = re.fullmatch(r"([0-9]{1,9}):([0-9]{1,9})", str(text))
        if not match:
            raise UserError(f"pattern {text!r} is unknown. Use unstructured, row or N:M.")
        n, m = map(int, match.groups())
        if not 0 < n < m:
            raise UserError(f"pattern {text} would keep {n} of {m}. N must be in 1..M-1.")
        return cls("n:m", n, m)

    def __str__(self) -> str:
        return f"{self.n}:{self.m}" if self.m else self.kind

    @property
    def fixed_sparsity(self) -> float | None:
        """The fraction of zeros that N:M implies; None for other patterns."""
        return 1 - self.n / self.m if self.m else None

    def check(self, name: str, shape: Sequence[int]) -> None:
        """Verifies that M divides C of a matrix [R, C].

        Raises:
            UserError: it does not.
        """
        if self.m and shape[1] % self.m:
            raise UserError(
                f"pattern {self} does not divide {name} {list(shape)}: {shape[1]} inputs are not a "
                f"multiple of {self.m}. Exclude it by --oneshot.layers, or use another pattern."
            )


def zeros_of(sparsity: float, weights: int) -> int:
    """Returns how many of `weights` are zero at `sparsity`.

    Raises:
        UserError: `sparsity` is not in [0, 1].
    """
    if not 0 <= sparsity <= 1:
        raise UserError(f"sparsity {sparsity:g} is not a fraction of zeros. Use a value in [0, 1].")
    return round(sparsity * weights)
