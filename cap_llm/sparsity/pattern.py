"""Where zeros may be, by name and numbers. Without torch, so that reading settings is quick."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from cap_llm.runtime.errors import UserError


@dataclass(frozen=True)
class Pattern:
    """Where zeros may be.

    Attributes:
        kind: `unstructured` (anywhere in the matrix), `row` (the same number in each output row)
            or `n:m` (at most `n` weights stay in each group of `m` consecutive inputs of a row).

    Raises:
        UserError: it is none of these; `parse` reads them from text.
    """

    kind: Literal["unstructured", "row", "n:m"]
    n: int = 0
    m: int = 0

    def __post_init__(self):
        plain = self.kind in ("unstructured", "row") and self.n == self.m == 0
        if not plain and not (self.kind == "n:m" and 0 < self.n <= self.m):
            raise UserError(
                f"pattern {self.kind!r} with N {self.n} and M {self.m} is unknown; use "
                "Pattern.parse with unstructured, row or N:M (2:4)"
            )

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Reads `unstructured`, `row` or `N:M` ("keep N of M").

        Raises:
            UserError: it is none of these, or keeps none or all.
        """
        if text in ("unstructured", "row"):
            return cls(text)
        match = re.fullmatch(r"([0-9]{1,9}):([0-9]{1,9})", str(text))
        if not match:
            raise UserError(f"pattern {text!r} is unknown; use unstructured, row or N:M (2:4)")
        n, m = map(int, match.groups())
        if not 0 < n < m:
            raise UserError(f"pattern {text} would keep {n} of {m}; N must lie in 1..M-1")
        return cls("n:m", n, m)

    def __str__(self) -> str:
        return f"{self.n}:{self.m}" if self.m else self.kind

    @property
    def fixed_sparsity(self) -> float | None:
        """The share of zeros that the pattern itself fixes."""
        return 1 - self.n / self.m if self.m else None

    def check(self, name: str, shape: Sequence[int]) -> None:
        """Refuses a matrix [R, C] that the pattern does not divide.

        Raises:
            UserError: C is not a multiple of M.
        """
        if self.m and shape[1] % self.m:
            raise UserError(
                f"pattern {self} does not divide {name} {list(shape)}: {shape[1]} inputs are no "
                f"multiple of {self.m}; leave it out by --oneshot.layers or choose another pattern"
            )


def zeros_of(sparsity: float, weights: int) -> int:
    """How many of `weights` go.

    Raises:
        UserError: `sparsity` is not a share of zeros.
    """
    if not 0 <= sparsity <= 1:
        raise UserError(f"a sparsity of {sparsity:g} is not a share of zeros; give one in [0, 1]")
    return round(sparsity * weights)
