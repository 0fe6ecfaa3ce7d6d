"""The pruning methods by name, on the matrices that read one input."""

from __future__ import annotations

from collections.abc import Callable

import torch

from cap_llm.config import OneshotConfig
from cap_llm.solvers import scores
from cap_llm.solvers.admm import admm_grad, alps
from cap_llm.solvers.hessian import Moments, factorise
from cap_llm.solvers.refit import refit
from cap_llm.solvers.sparsegpt import sparsegpt
from cap_llm.sparsity.choose import choose
from cap_llm.sparsity.pattern import Pattern


class Solver:
    """The configured method on the matrices that read one input; factorises their Hessian once.

    Where `moments` hold the diagonal alone, the errors are measured by those of a `sample`.
    """

    def __init__(
        self,
        config: OneshotConfig,
        moments: Moments | None,
        name: str,
        needs_factor: bool = False,
        sample: Moments | None = None,
    ):
        self.config, self.measure = config, moments if moments and moments.full else sample
        self.pattern = pattern_of(config)
        self.factor = self.added = None
        if moments and (needs_factor or config.second_order):
            self.mean_square = moments.diagonal.clone()
            self.factor = factorise(moments.hessian, config.damping, name)
            self.added = self.factor.hessian.diagonal() - self.mean_square
        elif moments:
            self.mean_square = moments.diagonal

    @property
    def damping(self) -> float | None:
        return self.factor.damping if self.factor else None

    def __call__(
        self,
        weight: torch.Tensor,
        sparsity: float,
        allowed: torch.Tensor | None = None,
        target: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The pruned weight and its mask, both [R, C]; refit matches the outputs of `target`."""
        new, mask = METHODS[self.config.method](self, weight, sparsity, allowed)
        if self.config.refits:
            new = self.refit(new, mask, weight if target is None else target)
        return new, mask

    def keep_highest(
        self,
        score: torch.Tensor,
        weight: torch.Tensor,
        sparsity: float,
        allowed: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The weight with the lowest scores removed, and its mask, all [R, C]."""
        mask = choose(score, self.pattern, sparsity, allowed)
        return weight * mask, mask

    def refit(self, weight: torch.Tensor, mask: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The least-squares weights [R, C] on `mask` for the outputs of `target`."""
        return refit(weight, mask, target, self.factor.hessian, self.factor.inverse)

    def error(self, dense: torch.Tensor, new: torch.Tensor) -> float | None:
        """Relative squared error of the outputs, without the ridge that damping added."""
        if self.measure is None:
            return None

        def energy(w: torch.Tensor) -> torch.Tensor:
            total = (w @ self.measure.hessian * w).sum()
            return total if self.added is None else total - (w.square() @ self.added).sum()

        return (energy(dense - new) / energy(dense).clamp(min=1e-30)).item()


# by `oneshot.method`: the solver, the weight [R, C], the sparsity and the mask to stay inside
METHODS: dict[str, Callable[..., tuple[torch.Tensor, torch.Tensor]]] = {
    "magnitude": lambda s, w, *how: s.keep_highest(scores.magnitude(w), w, *how),
    "wanda": lambda s, w, *how: s.keep_highest(scores.wanda(w, s.mean_square), w, *how),
    "sparsegpt": lambda s, w, *how: sparsegpt(w, s.factor, s.pattern, *how, s.config.block_size),
    "admm_grad": lambda s, w, *how: admm_grad(w, s.factor.hessian, s.pattern, *how),
    "alps": lambda s, w, *how: alps(w, s.factor.hessian, s.pattern, *how),
}


def pattern_of(config: OneshotConfig) -> Pattern:
    """Where zeros may be: Wanda compares the weights of an output row, never those of two rows."""
    pattern = Pattern.parse(config.pattern)
    by_row = config.method == "wanda" and pattern.kind == "unstructured"
    return Pattern("row") if by_row else pattern
